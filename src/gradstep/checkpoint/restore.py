"""A checkpoint brought into an optimizer: compared with it, read, and adopted, or nothing at all."""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gradstep.arrays.library import Form, numpy_library, recognise
from gradstep.arrays.region import Region, Span, Where
from gradstep.arrays.stored import Stored
from gradstep.checkpoint.comparison import Comparison
from gradstep.checkpoint.differences import Difference, mismatch
from gradstep.checkpoint.matching import RuleMatch, match_trees
from gradstep.checkpoint.nodes import DiLoCoNode, Document, Held, Node
from gradstep.checkpoint.snapshot import checked_arrays, round_of, snapshot
from gradstep.checkpoint.tensors import Tensors, read, read_part, read_region
from gradstep.checkpoint.wants import Want, WantInMemory, Wants, wants_of
from gradstep.distributed.changes import NOTHING_LOST, Layout, Losses
from gradstep.distributed.diloco import DiLoCo, Kept
from gradstep.errors import ReadOnlyError
from gradstep.interrupts import InterruptsHeld
from gradstep.optimizer import Optimizer
from gradstep.persistence import Loading
from gradstep.tree import entries_of


class Share(Protocol):
    """What belongs here, where parameters or their state are spread over processes."""

    def here(self, array: Any) -> Any:
        """The memory that is here of a parameter."""
        ...

    def region(self, name: str, array: Any) -> Region:
        """Which of the parameter's elements this memory has."""
        ...

    def state(self, wants: Mapping[str, WantInMemory]) -> Mapping[str, Where]:
        """Given the parameters that will have state, those that have it here, and the elements that it is of."""
        ...


class Restoration(NamedTuple):
    """A checkpoint that has been read: what differs, and the change that is left to be made."""

    differences: list[Difference]
    adopt: Callable[[], None]


def prepare(
    optimizer: Optimizer,
    mine: Node,
    document: Document,
    tensors: Tensors,
    loading: Loading,
    share: Share | None = None,
) -> Restoration:
    """Read a checkpoint; see `Optimizer.load`. To be called while no other thread can step.

    Args:
        optimizer: the outermost one.
        mine: what a checkpoint of the optimizer would say.
        document, tensors: what the checkpoint says.
        loading: how it is loaded.
        share: what belongs here. Default: all.
    """
    params, like, strict, whose, functions = loading.checked()
    named = None if params is None else checked_arrays(params, "params")
    models = named if like is None else checked_arrays(like, "like")
    matching = match_trees(optimizer, mine, document.optimizer, whose, functions, tensors.name)
    rules = matching.rules
    wants: list[Wants] | list[None] = [None] * len(rules)
    if models is not None:
        here = () if share is None else (share.here,)
        wants = wants_of(optimizer, rules, matching.frozen, models, *here)
    every = None if models is None else {name: want for some in wants if some for name, want in some.items()}

    comparison = Comparison(document, tensors)
    states = [comparison.state(rule, some) for rule, some in zip(rules, wants, strict=True)]
    sums = comparison.sums(matching.round.sums, every, models or ()) if matching.round else {}
    shared = {} if named is None else comparison.parameters(named)
    differences = [*matching.differences, *comparison.differences]
    if strict and differences:
        raise mismatch(tensors.name, differences)

    wheres = None if share is None else share.state(_in_memory(wants, states))
    everything = zip(rules, states, wants, strict=True)
    successors = [_Successor(rule, state, tensors, some, wheres, strict=strict) for rule, state, some in everything]
    # A round of which a sum is left out could not go on: it begins anew.
    whole_round = matching.round if matching.round and len(sums) == len(matching.round.sums) else None
    totals = {n: _sum(tensors, key, n, models, share) for n, key in sums.items()} if whole_round else {}
    landed = {n: every[n].land_sum(total) if every and n in every else total for n, total in totals.items()}
    outer = None if matching.outer is None else _outer(optimizer, document, matching.outer, tensors, loading)
    if outer is not None:
        differences += outer.differences
    write = _replacement(tensors, params, {n: named[n] for n in shared}, shared, share) if named and shared else None
    _ = optimizer.step  # no count waits for a device any more: reading was the last that could fail
    names, accumulating = comparison.names, round_of(optimizer)
    known = names if share is not None else frozenset(document.stateless)  # state may be with others

    def adopt() -> None:
        with InterruptsHeld():
            if write is not None:
                write()
            for change in matching.changes:
                change()
            for successor in successors:
                successor.adopt(known if strict and names is not None else None)
            for member in optimizer._family():
                member._begin_again(names or frozenset())
            if accumulating is not None:
                accumulating._resume(whole_round.micro_step if whole_round else 0, landed)
            if outer is not None:
                outer.adopt()

    return Restoration(differences, adopt)


def _outer(
    optimizer: Optimizer, document: Document, node: DiLoCoNode, tensors: Tensors, loading: Loading
) -> Restoration:  # fmt: skip
    """The outer steps of a `DiLoCo`: its outer optimizer steps the anchors, arrays of NumPy."""
    assert isinstance(optimizer, DiLoCo)
    library = numpy_library()

    def landed(keys: Mapping[str, str]) -> dict[str, Any]:
        found = {name: read(tensors, key) for name, key in keys.items()}
        return {name: stored.in_memory(library, range(len(stored.shape))) for name, stored in found.items()}

    anchors = landed(node.anchors)
    losses = NOTHING_LOST
    if node.wire == optimizer.wire:
        owed = landed({str(place): one.key for place, one in enumerate(node.averages)})
        layouts = [(Layout(one.ranks, one.dtype, one.sizes), one.rank) for one in node.averages]
        losses = Losses(landed(node.sent), dict(zip(layouts, owed.values(), strict=True)))
    kept = Kept(anchors, frozenset(node.exact), losses, node.round, node.taken)
    mine = snapshot(optimizer.outer, {}).document.optimizer
    inside = Document(document.version, node.outer, {}, tuple(anchors))
    outer = prepare(optimizer.outer, mine, inside, tensors, loading._replace(params=None, like=anchors))

    def adopt() -> None:
        outer.adopt()
        optimizer._resume(kept)

    return Restoration(outer.differences, adopt)


def _in_memory(wants: Sequence[Wants | None], states: Sequence[Mapping[str, Held]]) -> dict[str, WantInMemory]:
    """The needs of the parameters that will have state."""
    return {
        name: want
        for some, state in zip(wants, states, strict=True)
        for name, want in (some or {}).items()
        if name in state and isinstance(want, WantInMemory)
    }


class _Successor:
    """What an optimizer with a rule will have: what was read and, unless `strict`, what it has beside that."""

    def __init__(
        self,
        rule: RuleMatch,
        state: Mapping[str, Held],
        tensors: Tensors,
        wants: Wants | None,
        wheres: Mapping[str, Where] | None,
        *,
        strict: bool,
    ) -> None:
        self._rule, self._cut = rule, wheres is not None
        self._steps = rule.leaf.steps | {name: held.steps for name, held in state.items()}
        self._entries = {} if strict else {n: slots for n, slots in rule.leaf.entries.items() if n not in state}
        for name, held in state.items():
            if wheres is None or name in wheres:
                want, where = wants[name] if wants is not None else None, wheres[name] if wheres is not None else None
                self._entries[name] = {
                    slot: _landed(tensors, key, slot, want, where) for slot, key in held.arrays.items()
                }

    def adopt(self, known: frozenset[str] | None) -> None:
        """Let the optimizer have it."""
        rule = self._rule
        rule.leaf.restore(rule.settings, self._entries, self._steps, rule.node.step, known)
        rule.leaf.cut = self._cut


def _landed(tensors: Tensors, key: str, slot: str, want: Want | None, where: Where | None) -> Any:
    """An array of the library of the parameter that wants it, or of none yet: whole, a region, or flat."""
    if isinstance(want, WantInMemory) and where is not None and where != Span(0, want.sum_shape.size):
        there = want.part_of(slot, where)
        if isinstance(there, Region):
            return want.land(slot, read_region(tensors, key, there))
        return want.land_part(read_part(tensors, key, *there))
    stored = read(tensors, key)
    return stored if want is None else want.land(slot, stored)


def _sum(tensors: Tensors, key: str, name: str, models: Mapping[str, Any] | None, share: Share | None) -> Stored:
    """What is here of a sum, in the shape of what is here of its parameter."""
    if share is None or models is None:
        return read(tensors, key)
    array = models[name]
    part = read_region(tensors, key, share.region(name, array))
    return Stored(part.bits.reshape(tuple(share.here(array).shape)), part.dtype)


def _replacement(
    tensors: Tensors, params: object, named: Mapping[str, Any], keys: Mapping[str, str], share: Share | None
) -> Callable[[], None]:  # fmt: skip
    """Verify the checkpoint's parameters, and that those here can be replaced; what replaces them.

    In memory they are read twice, first to be verified, so that no more than one of them is there besides those that
    there are. New arrays are all made before the first takes its place.
    """
    library = recognise(params=named)
    if library.in_place is True:
        parts = {name: array if share is None else share.here(array) for name, array in named.items()}
        views = {name: _writable(library.as_numpy(part), name) for name, part in parts.items()}
        regions = {n: share.region(n, array) for n, array in named.items() if share and parts[n] is not array}
        for name, key in keys.items():
            if name in regions:
                read_region(tensors, key, regions[name])
            else:
                tensors.verify(key)

        def overwrite() -> None:
            for name, view in views.items():
                if name in regions:
                    view[...] = read_region(tensors, keys[name], regions[name]).bits.reshape(view.shape)
                else:
                    view[...] = read(tensors, keys[name]).bits
            library.wrote([*named.values(), *(parts[name] for name in regions)])

        return overwrite
    entries = entries_of(params, list(named))
    new: list[Any] = []
    for array, key in zip(named.values(), keys.values(), strict=True):
        dtype, shape = tensors.shape(key)
        new.append(read(tensors, key).in_place_of(library, Form(shape, dtype, library.place_of(array))))

    def replace() -> None:
        for (container, name), array in zip(entries, new, strict=True):
            container[name] = array

    return replace


def _writable(view: Any, name: str) -> Any:
    if not view.flags.writeable:
        raise ReadOnlyError(f"params[{name!r}] is read-only; pass a writable array: a copy, for example")
    return view
