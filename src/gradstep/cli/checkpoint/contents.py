"""What one checkpoint holds: its tree of optimizers, and its parameters with all their arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gradstep.checkpoint.checkpoint_file import CheckpointFile
from gradstep.checkpoint.matching import by_route
from gradstep.checkpoint.nodes import AccumulateNode, DiLoCoNode, Held, MultiNode, Node, RuleNode
from gradstep.checkpoint.snapshot import SUM
from gradstep.checkpoint.tensors import Shape
from gradstep.options import DEFAULTS
from gradstep.storage_options import STORAGE_DEFAULTS

Role: TypeAlias = Literal["parameter", "slot", "sum", "outer"]


@dataclass(frozen=True)
class Part:
    """An optimizer of the tree.

    Attributes:
        where: how the errors of `load` call it.
        node: what the checkpoint says of it.
        children: those below.
        name: what it is for the one above, if that has a word for it.
        is_route: whether it is one of several, and has the parameters that `filter` takes, encoded.
    """

    where: str
    node: Node
    children: tuple["Part", ...]
    name: str | None = None
    is_route: bool = False
    filter: object = None


@dataclass(frozen=True)
class Array:
    """One tensor of a parameter; `label` is the slot's name where it is one. `outer`: of outer steps."""

    role: Role
    label: str
    key: str
    shape: Shape
    bytes: int


@dataclass(frozen=True)
class Parameter:
    """A parameter; `optimizer` and `steps` are None where no optimizer has state for it."""

    name: str
    optimizer: str | None
    steps: int | None
    arrays: tuple[Array, ...]


@dataclass(frozen=True)
class Contents:
    """All that is known without reading a tensor."""

    path: Path
    size: int
    shards: int
    version: str
    tree: Part
    parameters: tuple[Parameter, ...]

    @property
    def arrays(self) -> list[Array]:
        """All tensors."""
        return [array for parameter in self.parameters for array in parameter.arrays]


@dataclass(frozen=True)
class Total:
    """How much the arrays of one role and label take together."""

    role: Role
    label: str
    tensors: int
    bytes: int


def contents_of(file: CheckpointFile) -> Contents:
    """What an open file holds."""
    tree = part_of(file.document.optimizer)
    tensors, parameters = file.tensors, tuple(_parameters(file))
    return Contents(tensors.path, tensors.size, tensors.shards, file.document.version, tree, parameters)


def part_of(node: Node, where: str = "opt") -> Part:
    """The tree of a document."""
    if isinstance(node, AccumulateNode):
        return Part(where, node, (part_of(node.optimizer, where),))
    if isinstance(node, DiLoCoNode):
        outer = replace(part_of(node.outer, f"{where}.outer"), name="outer")
        return Part(where, node, (replace(part_of(node.optimizer, where), name="inner"), outer))
    if not isinstance(node, MultiNode):
        return Part(where, node, ())
    children: list[Part] = []
    for route, place in by_route(node).items():
        accepts, child = node.routes[place]
        children.append(replace(part_of(child, f"{where}[{route}]"), is_route=True, filter=accepts))
    return Part(where, node, tuple(children))


def all_parts(part: Part) -> Iterator[Part]:
    """An optimizer and all below, in order."""
    yield part
    for child in part.children:
        yield from all_parts(child)


def sums_of(tree: Part) -> dict[str, str]:
    """The keys of the sums of a round, by parameter."""
    nodes = (part.node for part in all_parts(tree))
    return {name: key for node in nodes if isinstance(node, AccumulateNode) for name, key in node.sums.items()}


def _outer_of(tree: Part) -> dict[str, dict[str, str]]:
    """The keys of what outer steps need, by parameter and label; that of all parameters together comes last."""
    found: dict[str, dict[str, str]] = {}
    for node in (part.node for part in all_parts(tree)):
        if isinstance(node, DiLoCoNode):
            for label, keys in (("anchor", node.anchors), ("owed", node.sent)):
                for name, key in keys.items():
                    found.setdefault(name, {})[label] = key
            for owed in node.averages:
                found[f"{owed.dtype} averages"] = {"owed": owed.key}
    return found


def changed_options(node: Node) -> dict[str, Any]:
    """The options and storage options that are not what an optimizer has by itself."""
    if isinstance(node, (AccumulateNode, DiLoCoNode)):
        return {}
    defaults: Mapping[str, Any] = {**DEFAULTS, "frozen": []}
    changed = {name: value for name, value in node.options.items() if value != defaults.get(name)}
    if isinstance(node, RuleNode):
        changed |= {name: value for name, value in node.storage.items() if value != STORAGE_DEFAULTS.get(name)}
    return changed


def totals(arrays: list[Array]) -> list[Total]:
    """The sums of bytes, in the order in which roles and labels come."""
    alike: dict[tuple[Role, str], list[int]] = {}
    for array in arrays:
        alike.setdefault((array.role, array.label), []).append(array.bytes)
    return [Total(role, label, len(sizes), sum(sizes)) for (role, label), sizes in alike.items()]


def _parameters(file: CheckpointFile) -> Iterator[Parameter]:
    tree = part_of(file.document.optimizer)
    saved, sums, outer = dict(file.document.parameters), sums_of(tree), _outer_of(tree)

    def arrays(name: str, held: Held | None) -> tuple[Array, ...]:
        slots: Mapping[str, str] = held.arrays if held else {}
        return (
            *([_array(file, "parameter", "parameter", saved.pop(name))] if name in saved else ()),
            *(_array(file, "slot", slot, key) for slot, key in slots.items()),
            *([_array(file, "sum", SUM, sums.pop(name))] if name in sums else ()),
            *(_array(file, "outer", label, key) for label, key in outer.pop(name, {}).items()),
        )

    for part in all_parts(tree):
        if isinstance(part.node, RuleNode):
            for name, held in part.node.state.items():
                yield Parameter(name, part.where, held.steps, arrays(name, held))
    for name in dict.fromkeys([*saved, *sums, *outer, *file.document.stateless]):
        yield Parameter(name, None, None, arrays(name, None))


def _array(file: CheckpointFile, role: Role, label: str, key: str) -> Array:
    shape = file.tensors.shape(key)
    return Array(role, label, key, shape, shape.bytes)
