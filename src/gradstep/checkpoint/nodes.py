"""What a checkpoint says in plain data: a tree of optimizers, with the keys of their tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

from gradstep.errors import CheckpointError
from gradstep.hyperparameters import Resolved

FORMAT = 1
DEEPEST = 100  # levels of plain data

Value = TypeVar("Value")


@dataclass(frozen=True)
class Held:
    """The state of one parameter: its step count, and the keys of its arrays by their names."""

    steps: int
    arrays: Mapping[str, str]


@dataclass(frozen=True)
class RuleNode:
    """An optimizer with a rule.

    `family` is None where the state comes from elsewhere and fits every rule with such slots; `ours` tells families
    of gradstep from users' own. Hyperparameters are encoded values by name; those that are left out are not known.
    """

    family: str | None
    ours: bool
    slots: tuple[str, ...]
    step: int
    state: Mapping[str, Held]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    resolved: Mapping[str, tuple[Resolved, ...]] = field(default_factory=dict[str, tuple[Resolved, ...]])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    storage: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class MultiNode:
    """A `MultiOptimizer`: its children by route.

    A filter is `{"kind": "glob", "name": …}` or `{"kind": "function", "name": …}`; the last one is None.
    """

    step: int
    options: Mapping[str, Any]
    routes: tuple[tuple[Any, "Node"], ...]


@dataclass(frozen=True)
class AccumulateNode:
    """An `Accumulate`: the round that is under way, with the keys of its sums by parameter name."""

    every: int
    micro_step: int
    sums: Mapping[str, str]
    optimizer: "Node"


@dataclass(frozen=True)
class DiLoCoNode:
    """A `DiLoCo`: its round, the keys of anchors and of what the wire has rounded away, and both optimizers.

    `averages` has one entry for each layout: its ranks and which of them this is, dtype, sizes by name, and the key of
    the array.
    """

    every: int
    wire: str
    round: int
    taken: int
    exact: tuple[str, ...]
    anchors: Mapping[str, str]
    sent: Mapping[str, str]
    averages: tuple["OwedNode", ...]
    outer: "Node"
    optimizer: "Node"


@dataclass(frozen=True)
class OwedNode:
    """What the wire has rounded away of the averages that a rank sends."""

    ranks: int
    rank: int
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    key: str


Node: TypeAlias = RuleNode | MultiNode | AccumulateNode | DiLoCoNode


@dataclass(frozen=True)
class Document:
    """All that a checkpoint says.

    Attributes:
        version: of the gradstep that wrote it.
        optimizer: the outermost optimizer.
        parameters: the keys of the parameters, where it holds them.
        stateless: the parameters that were known and had no state yet.
    """

    version: str
    optimizer: Node
    parameters: Mapping[str, str]
    stateless: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, of which `from_json` makes an equal document."""
        return {
            "format": FORMAT, "gradstep": self.version, "optimizer": node_to_json(self.optimizer),
            "parameters": dict(self.parameters), "stateless": list(self.stateless),
        }  # fmt: skip


def rule_nodes(node: Node) -> list[RuleNode]:
    """The optimizers with rules below a node that step parameters, in order."""
    if isinstance(node, RuleNode):
        return [node]
    if isinstance(node, (AccumulateNode, DiLoCoNode)):
        return rule_nodes(node.optimizer)
    return [leaf for _, child in node.routes for leaf in rule_nodes(child)]


def step_of(node: Node) -> int:
    """How many steps have been taken."""
    return step_of(node.optimizer) if isinstance(node, (AccumulateNode, DiLoCoNode)) else node.step


def keys_of(node: Node) -> set[str]:
    """The keys of the state and the sums of all optimizers."""
    if isinstance(node, RuleNode):
        return {key for held in node.state.values() for key in held.arrays.values()}
    if isinstance(node, AccumulateNode):
        return keys_of(node.optimizer) | set(node.sums.values())
    if isinstance(node, DiLoCoNode):
        own = {*node.anchors.values(), *node.sent.values(), *(owed.key for owed in node.averages)}
        return keys_of(node.optimizer) | keys_of(node.outer) | own
    return {key for _, child in node.routes for key in keys_of(child)}


def node_to_json(node: Node) -> dict[str, Any]:
    """Plain data of an optimizer and all below."""
    if isinstance(node, AccumulateNode):
        return {
            "kind": "accumulate", "every": node.every, "micro_step": node.micro_step, "sums": dict(node.sums),
            "optimizer": node_to_json(node.optimizer),
        }  # fmt: skip
    if isinstance(node, DiLoCoNode):
        averages = [
            {"ranks": owed.ranks, "rank": owed.rank, "dtype": owed.dtype, "sizes": dict(owed.sizes), "key": owed.key}
            for owed in node.averages
        ]
        return {
            "kind": "diloco", "every": node.every, "wire": node.wire, "round": node.round, "taken": node.taken,
            "exact": list(node.exact), "anchors": dict(node.anchors), "sent": dict(node.sent), "averages": averages,
            "outer": node_to_json(node.outer), "optimizer": node_to_json(node.optimizer),
        }  # fmt: skip
    if isinstance(node, MultiNode):
        routes = [{"filter": accepts, "optimizer": node_to_json(child)} for accepts, child in node.routes]
        return {"kind": "multi", "step": node.step, "options": dict(node.options), "routes": routes}
    resolved = {name: list(map(_resolved_to_json, values)) for name, values in node.resolved.items()}
    state = {name: {"steps": held.steps, "arrays": dict(held.arrays)} for name, held in node.state.items()}
    return {
        "kind": "rule", "family": node.family, "ours": node.ours, "slots": list(node.slots), "step": node.step,
        "hyperparameters": dict(node.hyperparameters), "resolved": resolved, "options": dict(node.options),
        "storage": dict(node.storage), "state": state,
    }  # fmt: skip


def _resolved_to_json(resolved: Resolved) -> dict[str, Any]:
    pending = None if resolved.pending is None else list(resolved.pending)
    return {"step": resolved.stamp, "value": resolved.value, "pending": pending}


def from_json(data: Mapping[str, Any]) -> Document:
    """The document that plain data describe.

    Raises:
        CheckpointError: they describe none, or one of a format that this version does not know.
    """
    _refuse_deep(data)
    return _document(Entry("the checkpoint", data))


def _refuse_deep(data: object) -> None:
    """Raise for data that are nested so deeply that reading them would end in a `RecursionError`."""
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        level = [part for parts in level if isinstance(parts, (dict, list)) for part in _parts(parts)]
        if not level:
            return
    raise CheckpointError(f"the checkpoint is nested more than {DEEPEST} levels deep")


def _document(entry: "Entry") -> Document:
    found = entry.get("format", int)
    if found != FORMAT:
        writer = entry.raw("gradstep")
        raise CheckpointError(
            f"this checkpoint has format {found}, written by gradstep {writer}; this version reads format {FORMAT}: "
            "update gradstep"
        )
    return Document(
        entry.get("gradstep", str), _node(entry.entry("optimizer")),
        entry.mapping("parameters", read_text), tuple(entry.sequence("stateless", read_text)),
    )  # fmt: skip


def _parts(parts: Any) -> Iterable[Any]:
    return cast("Mapping[str, Any]", parts).values() if isinstance(parts, dict) else parts


class Entry:
    """A mapping of plain data, read with an error that says what was expected."""

    def __init__(self, what: str, data: object) -> None:
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{what} must be a mapping, got {_short(data)}")
        self.what, self._data = what, cast("Mapping[str, Any]", data)

    def get(self, name: str, kind: type[Value]) -> Value:
        """A value of a certain type."""
        if name not in self._data:
            raise CheckpointError(f"{self.what} lacks {name!r}")
        value = self._data[name]
        if type(value) is not kind:
            raise CheckpointError(f"{self.what}'s {name!r} must be of type {kind.__name__}, got {_short(value)}")
        return value

    def natural(self, name: str) -> int:
        """A number of steps."""
        count = self.get(name, int)
        if not 0 <= count < 1 << 63:
            raise CheckpointError(f"{self.what}'s {name!r} must be a number of steps, got {count}")
        return count

    def optional(self, name: str, kind: type[Value]) -> Value | None:
        """The same, or None."""
        return None if name in self._data and self._data[name] is None else self.get(name, kind)

    def raw(self, name: str) -> Any:
        """A value of any type."""
        return self._data.get(name)

    def entry(self, name: str) -> "Entry":
        """A mapping below."""
        return Entry(f"{self.what}'s {name}", self.raw(name))

    def mapping(self, name: str, read: Callable[[str, object], Value]) -> dict[str, Value]:
        """A mapping below, with each of its values read."""
        below = self.entry(name)
        return {key: read(f"{below.what} {key!r}", value) for key, value in below._data.items()}

    def sequence(self, name: str, read: Callable[[str, object], Value]) -> list[Value]:
        """A list below, with each of its values read."""
        return read_all(f"{self.what}'s {name}", self.raw(name), read)


def read_all(what: str, values: object, read: Callable[[str, object], Value]) -> list[Value]:
    """A list, with each of its values read."""
    if not isinstance(values, (list, tuple)):
        raise CheckpointError(f"{what} must be a list, got {_short(values)}")
    return [read(f"{what}[{place}]", value) for place, value in enumerate(cast("Sequence[object]", values))]


def _node(entry: Entry) -> Node:
    kind = entry.get("kind", str)
    if kind == "accumulate":
        every, micro_step = entry.natural("every"), entry.natural("micro_step")
        if not micro_step < max(every, 1):
            raise CheckpointError(f"{entry.what} has micro_step {micro_step} of {every}")
        return AccumulateNode(every, micro_step, entry.mapping("sums", read_text), _node(entry.entry("optimizer")))
    if kind == "diloco":
        return DiLoCoNode(
            entry.natural("every"), entry.get("wire", str), entry.natural("round"), entry.natural("taken"),
            tuple(entry.sequence("exact", read_text)), entry.mapping("anchors", read_text),
            entry.mapping("sent", read_text), tuple(entry.sequence("averages", _owed)), _node(entry.entry("outer")),
            _node(entry.entry("optimizer")),
        )  # fmt: skip
    if kind == "multi":
        routes = entry.sequence("routes", _route)
        if not routes:
            raise CheckpointError(f"{entry.what} has no routes")
        return MultiNode(entry.natural("step"), entry.mapping("options", _any), tuple(routes))
    if kind != "rule":
        raise CheckpointError(f"{entry.what} is of the unknown kind {kind!r}")
    return RuleNode(
        entry.optional("family", str), entry.get("ours", bool), tuple(entry.sequence("slots", read_text)),
        entry.natural("step"), entry.mapping("state", _held), entry.mapping("hyperparameters", _any),
        entry.mapping("resolved", _all_resolved), entry.mapping("options", _any), entry.mapping("storage", _any),
    )  # fmt: skip


def _owed(what: str, data: object) -> OwedNode:
    entry = Entry(what, data)
    sizes = entry.mapping("sizes", _natural)
    ranks, rank = entry.natural("ranks"), entry.natural("rank")
    return OwedNode(ranks, rank, entry.get("dtype", str), tuple(sizes.items()), entry.get("key", str))


def _natural(what: str, value: object) -> int:
    return Entry(what, {"": value}).natural("")


def _route(what: str, data: object) -> tuple[Any, Node]:
    entry = Entry(what, data)
    accepts = entry.raw("filter")
    if accepts is not None:
        below = entry.entry("filter")
        if below.get("kind", str) not in ("glob", "function"):
            raise CheckpointError(f"{below.what} must be a glob or a function, got {_short(accepts)}")
        below.get("name", str)
    return accepts, _node(entry.entry("optimizer"))


def _held(what: str, data: object) -> Held:
    entry = Entry(what, data)
    return Held(entry.natural("steps"), entry.mapping("arrays", read_text))


def _all_resolved(what: str, data: object) -> tuple[Resolved, ...]:
    return tuple(read_all(what, data, _resolved))


def _resolved(what: str, data: object) -> Resolved:
    entry = Entry(what, data)
    pending = entry.raw("pending")
    if pending is not None:
        pending = tuple(read_all(f"{what}'s pending", pending, _any))
        if tuple(map(type, pending)) != (int, float):
            raise CheckpointError(f"{what}'s pending must be a step and a value, got {_short(pending)}")
    return Resolved(entry.get("step", int), entry.get("value", float), pending)


def read_text(what: str, value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise CheckpointError(f"{what} must be text, got {_short(value)}")
    return value


def _any(_: str, value: object) -> Any:
    return value


def _short(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) < 80 else f'{text[:80]}…'} ({type(value).__name__})"
