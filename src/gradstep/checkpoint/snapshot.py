"""An optimizer as it is: a document of plain data, and the arrays that it has keys for."""
# pyright: reportPrivateUsage=false

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import gradstep
from gradstep.accumulate import Accumulate
from gradstep.arrays.library import owner
from gradstep.arrays.stored import Stored, check_array, dtype_of
from gradstep.checkpoint.container import METADATA
from gradstep.checkpoint.nodes import (
    AccumulateNode,
    DiLoCoNode,
    Document,
    Entry,
    Held,
    MultiNode,
    Node,
    OwedNode,
    RuleNode,
    from_json,
    keys_of,
)
from gradstep.checkpoint.tensors import HeldTensors
from gradstep.checkpoint.values import Encoder
from gradstep.distributed.diloco import DiLoCo
from gradstep.errors import ArgumentTypeError, CheckpointError, ConfigurationError, listing
from gradstep.multi import MultiOptimizer
from gradstep.optimizer import Optimizer
from gradstep.options import DEFAULTS
from gradstep.rules.base import RuleOptimizer
from gradstep.step.leaf import Leaf, rule_arguments
from gradstep.tree import named_arrays
from gradstep.wrapper import Wrapper

SUM = "g.sum"
DOCUMENT, TENSORS = "gradstep", "tensors"


class Snapshot(NamedTuple):
    """What a checkpoint holds. The arrays are the live ones, of any library or none; see `bits_of`."""

    document: Document
    arrays: dict[str, Any]


State = Mapping[str, tuple[int, Mapping[str, Any]]]
"""Steps and arrays of each parameter of one optimizer with a rule."""


def snapshot(optimizer: Optimizer, params: Mapping[str, Any], states: Sequence[State] | None = None) -> Snapshot:
    """The optimizer and parameters by name; to be called while no other thread can step.

    Arrays of `params` and `states` are anything with a shape and a dtype.

    Args:
        optimizer: the outermost one.
        params: parameters by name.
        states: for each optimizer with a rule, in order, where it has only a part of it. Default: its own.

    Raises:
        ArgumentTypeError: an optimizer of a class of its own.
        ConfigurationError: an optimizer has a part of the state only, and there are no `states`.
    """
    return _Recorder(states).document(optimizer, params)


def without_state(optimizer: Optimizer) -> Node:
    """All but the state, whoever has that."""
    empty: list[State] = [{} for _ in optimizer._leaves()]
    return snapshot(optimizer, {}, empty).document.optimizer


def checked_arrays(tree: object, what: str) -> Mapping[str, Any]:
    """The arrays of a tree by name.

    Raises:
        ArgumentTypeError: something is no array whose elements can be read.
    """
    named = named_arrays(tree, what)
    for name, array in named.items():
        check_array(array, f"{what}[{name!r}]")
    return named


def state_of(leaf: Leaf) -> State:
    """What one optimizer has."""
    steps = leaf.steps
    return {name: (steps[name], arrays) for name, arrays in leaf.entries.items()}


def round_of(optimizer: Optimizer) -> Accumulate | None:
    """Who sums micro-batches, the optimizer itself or what it wraps; None if nobody does."""
    while isinstance(optimizer, Wrapper) and not isinstance(optimizer, Accumulate):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, Accumulate) else None


class _Recorder:
    def __init__(self, states: Sequence[State] | None) -> None:
        self._arrays: dict[str, Any] = {}
        self._encoder = Encoder()
        self._given, self._states = states, list[State]()
        self._of: str = ""  # what keys say of whose arrays they are

    def document(self, optimizer: Optimizer, params: Mapping[str, Any]) -> Snapshot:
        parameters = {name: self._key(name, array) for name, array in params.items()}
        node = self._node(optimizer)
        accumulating = round_of(optimizer)
        sums: Mapping[str, Any] = accumulating.sums if accumulating else {}
        having_state = {name for state in self._states for name in state}
        stateless = sorted({*optimizer._known_names, *params, *sums} - having_state)
        return Snapshot(Document(gradstep.__version__, node, parameters, tuple(stateless)), self._arrays)

    def _key(self, wanted: str, array: Any) -> str:
        """A key in UTF-8 that nothing else has."""
        stem, number = wanted.encode("utf-8", "backslashreplace").decode(), 1
        key = stem
        while key in self._arrays or key == METADATA:
            number += 1
            key = f"{stem}#{number}"
        self._arrays[key] = array
        return key

    def _node(self, optimizer: Optimizer) -> Node:
        if isinstance(optimizer, Accumulate):
            sums = {name: self._key(f"{name}.{SUM}", array) for name, array in optimizer.sums.items()}
            return AccumulateNode(optimizer.every, optimizer.micro_step, sums, self._node(optimizer.optimizer))
        if isinstance(optimizer, DiLoCo):
            return self._diloco_node(optimizer)
        if isinstance(optimizer, MultiOptimizer):
            filters = [*map(self._filter, optimizer.filters), None]
            children = map(self._node, optimizer.optimizers)
            return MultiNode(optimizer.step, self._options(optimizer), tuple(zip(filters, children, strict=True)))
        if isinstance(optimizer, RuleOptimizer):
            return self._rule_node(optimizer)
        if isinstance(optimizer, Wrapper):  # it leaves no trace: any number of processes may go on from here
            if self._given is None:
                optimizer._check_inside("a state dict")
            return self._node(optimizer.optimizer)
        raise ArgumentTypeError(
            f"a checkpoint cannot hold a {type(optimizer).__name__}, a class of your own: write it as a rule, @gs.rule"
        )

    def _diloco_node(self, optimizer: DiLoCo) -> DiLoCoNode:
        inner, kept = self._node(optimizer.optimizer), optimizer._kept()
        anchors = {name: self._key(f"{name}.anchor", array) for name, array in kept.anchors.items()}
        sent = {name: self._key(f"{name}.owed", array) for name, array in kept.losses.sent.items()}
        averages = tuple(
            OwedNode(layout.ranks, rank, layout.dtype, layout.sizes, self._key(f"{layout.dtype} averages.owed", array))
            for (layout, rank), array in kept.losses.averages.items()
        )
        return DiLoCoNode(
            optimizer.every, optimizer.wire, kept.round, kept.taken, tuple(sorted(kept.exact)), anchors, sent, averages,
            self._beside("outer.", optimizer.outer), inner,
        )  # fmt: skip

    def _beside(self, of: str, optimizer: Optimizer) -> Node:
        """An optimizer that steps something else than parameters, all of which is here."""
        given, states, whose = self._given, self._states, self._of
        self._given, self._states, self._of = None, list[State](), of
        try:
            return self._node(optimizer)
        finally:
            self._given, self._states, self._of = given, states, whose

    def _filter(self, accepts: Any) -> dict[str, str]:
        if isinstance(accepts, str):
            return {"kind": "glob", "name": accepts}
        return {"kind": "function", "name": self._encoder.name(accepts)}

    def _rule_node(self, optimizer: RuleOptimizer) -> RuleNode:
        (leaf,), family = optimizer._leaves(), type(optimizer)
        if leaf.cut and self._given is None:
            raise ConfigurationError(
                f"{optimizer!r} holds this rank's parts of the state of a Sharded optimizer; save that one"
            )
        whole = state_of(leaf) if self._given is None else self._given[len(self._states)]
        self._states.append(whole)
        state = {
            name: Held(steps, {array: self._key(f"{name}.{self._of}{array}", arrays[array]) for array in arrays})
            for name, (steps, arrays) in whole.items()
        }
        encode = self._encoder.encode
        return RuleNode(
            family.__name__, is_ours(family), rule_arguments(family.rule)[0], leaf.step, state,
            {name: encode(value) for name, value in leaf.settings.given.items()}, leaf.settings.resolved,
            self._options(optimizer),
            {name: encode_storage(value) for name, value in leaf.storage.options._asdict().items()},
        )  # fmt: skip

    def _options(self, optimizer: Optimizer) -> dict[str, Any]:
        given = {name: getattr(optimizer, name) for name in DEFAULTS}
        return {**given, "frozen": list(optimizer.frozen)}


def is_ours(family: type) -> bool:
    """Whether an optimizer class is one of gradstep's."""
    return getattr(gradstep, family.__name__, None) is family


def encode_storage(value: Any) -> Any:
    """A storage option as plain data."""
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, str]", value))
    return value if value is None or isinstance(value, (bool, str)) else int(value)


def state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """See `Optimizer.state_dict`."""
    document, arrays = snapshot(optimizer, {})
    return {DOCUMENT: document.to_json(), TENSORS: {key: _view(array) for key, array in arrays.items()}}


def _view(array: Any) -> Any:
    """Another array with the same memory, so that nobody can move the optimizer's own."""
    if isinstance(array, Stored):
        return array.shown()
    library = owner(array)
    if library is not None and library.in_place is True:
        return library.from_bits(library.as_numpy(array), dtype_of(array))
    return array


def from_state_dict(given: Mapping[str, Any]) -> tuple[Document, HeldTensors]:
    """The document and the tensors of a state dict.

    Raises:
        CheckpointError: it is none.
    """
    entry = Entry("the state dict", given)
    if entry.raw(DOCUMENT) is None:
        raise CheckpointError(
            "this is no state dict of gradstep's core, which has the keys 'gradstep' and 'tensors'; those of "
            "torch.optim and others are converted with from_torch, from_optax or from_mlx"
        )
    document = from_json(entry.raw(DOCUMENT))
    tensors = HeldTensors(entry.mapping(TENSORS, lambda _, array: array))
    lacking = sorted(key for key in keys_of(document.optimizer) if key not in tensors)
    if lacking:
        raise CheckpointError(f"the state dict lacks the tensors {listing(lacking)}")
    return document, tensors
