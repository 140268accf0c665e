"""A checkpoint brought into an optimizer: compared with it, read, and adopted, or nothing at all."""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping
from typing import Any

from gradstep.accumulate import Accumulate
from gradstep.arrays.library import Form, recognise
from gradstep.checkpoint.comparison import Comparison
from gradstep.checkpoint.differences import Difference, mismatch
from gradstep.checkpoint.matching import Whose, match_trees
from gradstep.checkpoint.nodes import Document, Held
from gradstep.checkpoint.tensors import Tensors
from gradstep.checkpoint.values import Functions
from gradstep.checkpoint.wants import Wants, wants_of
from gradstep.errors import ReadOnlyError
from gradstep.interrupts import InterruptsHeld
from gradstep.optimizer import Optimizer
from gradstep.tree import entries_of, named_arrays


def restore(
    optimizer: Optimizer, document: Document, tensors: Tensors, *,
    params: object, like: object, strict: bool, whose: Whose, functions: Functions,
) -> list[Difference]:  # fmt: skip
    """Load a checkpoint; see `Optimizer.load`. To be called while no other thread can step."""
    named = None if params is None else named_arrays(params, "params")
    models = named if like is None else named_arrays(like, "like")
    matching = match_trees(optimizer, document.optimizer, whose, functions, tensors.name)
    rules = matching.rules
    wants: list[Wants] | list[None] = [None] * len(rules)
    if models is not None:
        wants = wants_of(optimizer, rules, matching.frozen, models)
    every = None if models is None else {name: want for some in wants if some for name, want in some.items()}

    comparison = Comparison(document, tensors)
    states = [comparison.state(rule, some) for rule, some in zip(rules, wants, strict=True)]
    sums = comparison.sums(matching.round.sums, every) if matching.round else {}
    shared = {} if named is None else comparison.parameters(named)
    differences = [*matching.differences, *comparison.differences]
    if strict and differences:
        raise mismatch(tensors.name, differences)

    entries = [_read_state(tensors, state, some) for state, some in zip(states, wants, strict=True)]
    totals = {name: tensors.read(key) for name, key in sums.items()}
    landed = {name: every[name].land_sum(total) if every else total for name, total in totals.items()}
    write = _replacement(tensors, params, shared) if shared else None
    names = frozenset({*document.stateless, *document.parameters})
    with InterruptsHeld():
        if write is not None:
            write()
        for change in matching.changes:
            change()
        for rule, state, slots in zip(rules, states, entries, strict=True):
            steps = rule.leaf.steps | {name: held.steps for name, held in state.items()}
            unmatched = {n: own for n, own in rule.leaf.entries.items() if n not in state and n not in names}
            rule.leaf.restore(rule.settings, unmatched | slots, steps, rule.node.step, names if strict else None)
        for member in optimizer._family():
            member._begin_again(names.union(*states))
        if matching.round is not None and isinstance(optimizer, Accumulate):
            optimizer._resume(matching.round.micro_step, landed)
    return differences


def _read_state(tensors: Tensors, state: Mapping[str, Held], wants: Wants | None) -> dict[str, dict[str, Any]]:
    """The arrays of a state: of the library of the parameters that want them, or of none yet."""
    entries: dict[str, dict[str, Any]] = {}
    for name, held in state.items():
        entries[name] = {}
        for slot, key in held.arrays.items():
            stored = tensors.read(key)
            entries[name][slot] = stored if wants is None else wants[name].land(slot, stored)
    return entries


def _replacement(tensors: Tensors, params: object, keys: Mapping[str, str]) -> Callable[[], None]:
    """Verify the checkpoint's parameters, and that those here can be replaced; what replaces them, one by one.

    They are read twice, so that no more than one of them is in memory besides those there are.
    """
    everything = named_arrays(params, "params")
    named = {name: everything[name] for name in keys}
    library = recognise(params=named)
    for key in keys.values():
        tensors.verify(key)
    if library.in_place is True:
        views = {name: library.as_numpy(array) for name, array in named.items()}
        for name, view in views.items():
            if not view.flags.writeable:
                raise ReadOnlyError(f"params[{name!r}] is read-only; pass a writable array: a copy, for example")

        def overwrite() -> None:
            for name, view in views.items():
                view[...] = tensors.read(keys[name]).bits
            library.wrote(list(named.values()))

        return overwrite
    entries = entries_of(params, list(named))
    places = [library.place_of(array) for array in named.values()]

    def replace() -> None:
        for (container, name), key, place in zip(entries, keys.values(), places, strict=True):
            stored = tensors.read(key)
            container[name] = stored.in_place_of(library, Form(stored.shape, stored.dtype, place))

    return replace
