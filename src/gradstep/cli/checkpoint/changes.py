"""In what two checkpoints differ, save for the elements of their tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gradstep.checkpoint.checkpoint_file import CheckpointFile
from gradstep.checkpoint.matching import title_of
from gradstep.checkpoint.nodes import AccumulateNode, DiLoCoNode, Node, RuleNode
from gradstep.cli.checkpoint.contents import Array, Contents, Parameter, Part
from gradstep.cli.checkpoint.measuring import Measure
from gradstep.cli.checkpoint.schedules import Scheduled, schedules_of
from gradstep.cli.checkpoint.spelling import spelled


@dataclass(frozen=True)
class Change:
    """One thing that is different: how it reads in A and in B, None where it is not there.

    `parameters` are those that it holds for, where it is about parameters.
    """

    where: str
    a: str | None
    b: str | None
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A tensor that both checkpoints have, of one shape."""

    parameter: str
    a: Array
    b: Array


@dataclass(frozen=True)
class Comparison:
    """All changes, and the tensors that can be compared."""

    changes: list[Change]
    pairs: list[Pair]


@dataclass(frozen=True)
class Difference:
    """All in which two checkpoints differ.

    Attributes:
        changed: the tensors in which elements differ, the largest change first.
        same: how many tensors have the same elements.
        other_bits: how many of these do not have the same bytes.
    """

    a: Contents
    b: Contents
    changes: Sequence[Change]
    changed: Sequence[tuple[Pair, Measure]]
    same: int
    other_bits: int

    @property
    def is_empty(self) -> bool:
        """Whether both are equal."""
        return not self.changes and not self.changed


def compare(a: Contents, b: Contents) -> Comparison:
    """What differs between two checkpoints. Their paths, sizes and versions are nobody's concern."""
    found = Comparison([], [])
    _compare_parts(found.changes, a.tree, b.tree)
    _compare_parameters(found, _by_name(a), _by_name(b))
    return found


def unequal(pairs: Iterable[Pair], a: CheckpointFile, b: CheckpointFile) -> list[Pair]:
    """The pairs whose bytes are not the same, by their hashes."""
    digests = ((pair, a.tensors.digests(pair.a.key), b.tensors.digests(pair.b.key)) for pair in pairs)
    return [pair for pair, one, other in digests if one != other or pair.a.shape.dtype != pair.b.shape.dtype]


def _compare_parts(changes: list[Change], a: Part, b: Part) -> None:
    """Compare two optimizers and all below; a round on one side only is passed over."""
    rounds = [part.node if isinstance(part.node, AccumulateNode) else None for part in (a, b)]
    if any(rounds):
        _compare_rounds(changes, a.where, *rounds)
        inner = [part.children[0] if node else part for part, node in zip((a, b), rounds, strict=True)]
        _compare_parts(changes, *inner)
        return
    facts, others = _facts(a.node), _facts(b.node)
    if title_of(a.node) != title_of(b.node):
        changes.append(Change(a.where, title_of(a.node), title_of(b.node)))
        common = facts.keys() & others.keys()  # what only one of two families has is no news
        facts, others = ({name: some[name] for name in some if name in common} for some in (facts, others))
    _compare_values(changes, a.where, facts, others)
    _compare_children(changes, a, b)


def _compare_rounds(changes: list[Change], where: str, a: AccumulateNode | None, b: AccumulateNode | None) -> None:
    if a is None or b is None:
        texts = [node and f"Accumulate(every={node.every})" for node in (a, b)]
        changes.append(Change(f"{where}'s rounds", texts[0], texts[1]))
        return
    for name in ("every", "micro_step"):
        _compare_values(changes, where, {f".{name}": str(getattr(a, name))}, {f".{name}": str(getattr(b, name))})


def _compare_children(changes: list[Change], a: Part, b: Part) -> None:
    routes, others = ({child.where: child for child in part.children} for part in (a, b))
    for where, child in routes.items():
        if where in others:
            _compare_parts(changes, child, others[where])
        else:
            changes.append(Change(where, title_of(child.node), None))
    changes += [Change(where, None, title_of(child.node)) for where, child in others.items() if where not in routes]
    common = [[where for where in some if where in rest] for some, rest in ((routes, others), (others, routes))]
    if common[0] != common[1]:
        changes.append(Change(f"{a.where}'s order of filters", ", ".join(common[0]), ", ".join(common[1])))


def _facts(node: Node) -> dict[str, str]:
    """What is said of an optimizer apart from its state, each with the end of its name."""
    if isinstance(node, AccumulateNode):
        return {}
    if isinstance(node, DiLoCoNode):
        return {f".{name}": repr(getattr(node, name)) for name in ("every", "wire", "round", "taken")}
    facts = {".step": str(node.step)}
    if isinstance(node, RuleNode):
        facts |= {f".{name}": spelled(data) for name, data in node.hyperparameters.items()}
        facts |= {f".{one.label}, last value": resolved_text(one) for one in schedules_of(node)}
        facts |= {f".{name}": repr(value) for name, value in node.storage.items()}
        facts |= {"'s slots": ", ".join(node.slots) or "none"}
    return {**facts, **{f".{name}": repr(value) for name, value in node.options.items()}}


def resolved_text(scheduled: Scheduled) -> str:
    """What a schedule gave last."""
    resolved = scheduled.resolved
    if resolved is None:
        return "not known"
    waiting = "" if resolved.pending is None else f", {resolved.pending[1]!r} waits for step {resolved.pending[0]}"
    return f"{resolved.value!r} for step {resolved.stamp}{waiting}"


def _compare_values(changes: list[Change], where: str, a: Mapping[str, str], b: Mapping[str, str]) -> None:
    changes += [Change(where + name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]


Named = dict[tuple[str, int], Parameter]


def _by_name(contents: Contents) -> Named:
    """The parameters by name, and a number for the case that several optimizers hold state for one."""
    named: Named = {}
    for parameter in contents.parameters:
        number = 0
        while (parameter.name, number) in named:
            number += 1
        named[parameter.name, number] = parameter
    return named


def _compare_parameters(found: Comparison, a: Named, b: Named) -> None:
    for key in {**a, **b}:
        if key not in a or key not in b:
            texts = [_arrays_text(side[key].arrays) if key in side else None for side in (a, b)]
            found.changes.append(Change(f"all of {key[0]!r}", texts[0], texts[1], (key[0],)))
    both = [key for key in a if key in b]
    sides = [a[key] for key in both], [b[key] for key in both]
    found.changes.extend(_alike("optimizer", *sides, lambda parameter: parameter.optimizer))
    found.changes.extend(_alike("own step", *sides, lambda p: None if p.steps is None else str(p.steps)))
    kinds = [{_kind(array) for one in side for array in one.arrays} for side in sides]
    one_sided = kinds[0] ^ kinds[1]
    found.changes.extend(_one_sided(kind, *sides) for kind in sorted(one_sided))
    for one, other in zip(*sides, strict=True):
        _compare_arrays(found, one, other, one_sided)


def _alike(
    what: str, a: list[Parameter], b: list[Parameter], fact: Callable[[Parameter], str | None]
) -> Iterable[Change]:
    """One change for all parameters that go from the same to the same."""
    ways: dict[tuple[str | None, str | None], list[str]] = {}
    for one, other in zip(a, b, strict=True):
        if fact(one) != fact(other):
            ways.setdefault((fact(one), fact(other)), []).append(one.name)
    for (before, after), names in ways.items():
        whose = repr(names[0]) if len(names) == 1 else f"{len(names)} parameters"
        yield Change(f"{what} of {whose}", before, after, tuple(names))


Kind = tuple[str, str]


def _kind(array: Array) -> Kind:
    return array.role, array.label


def _one_sided(kind: Kind, *both: list[Parameter]) -> Change:
    """One change for arrays of a kind that one side has of no parameter."""
    sides = [[one for one in side if any(_kind(array) == kind for array in one.arrays)] for side in both]
    names = tuple(one.name for one in sides[0] or sides[1])
    texts = [f"{len(side)} tensor{'s' * (len(side) != 1)}" if side else None for side in sides]
    where = {"parameter": "saved parameters", "sum": "sums of a round"}.get(kind[0], f"slots {kind[1]}")
    return Change(where, texts[0], texts[1], names)


def _compare_arrays(found: Comparison, a: Parameter, b: Parameter, ignored: set[Kind]) -> None:
    sides = [{_kind(array): array for array in one.arrays if _kind(array) not in ignored} for one in (a, b)]
    for kind in {**sides[0], **sides[1]}:
        one, other = (side.get(kind) for side in sides)
        texts = [None if array is None else str(array.shape) for array in (one, other)]
        if texts[0] != texts[1]:
            found.changes.append(Change(f"{kind[1]} of {a.name!r}", texts[0], texts[1], (a.name,)))
        if one is not None and other is not None and one.shape.shape == other.shape.shape:
            found.pairs.append(Pair(a.name, one, other))


def _arrays_text(arrays: Iterable[Array]) -> str:
    return ", ".join(f"{array.label} {array.shape}" for array in arrays) or "no arrays"


def has_codes(pair: Pair) -> bool:
    """Whether a pair is compared by codes, not by the numbers that these stand for."""
    return _is_codes(pair.a) and _is_codes(pair.b)


def _is_codes(array: Array) -> bool:
    return array.role == "slot" and array.label.endswith(".codes")
