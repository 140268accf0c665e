"""A checkpoint brought into an optimizer: compared with it, read, and adopted, or nothing at all."""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping
from typing import Any

from gradstep.accumulate import Accumulate
from gradstep.arrays.library import Form, recognise
from gradstep.arrays.stored import check_array
from gradstep.checkpoint.comparison import Comparison
from gradstep.checkpoint.differences import Difference, mismatch
from gradstep.checkpoint.matching import RuleMatch, Whose, match_trees
from gradstep.checkpoint.nodes import Document, Held, Node
from gradstep.checkpoint.tensors import Tensors
from gradstep.checkpoint.values import Functions
from gradstep.checkpoint.wants import Wants, wants_of
from gradstep.errors import ReadOnlyError
from gradstep.interrupts import InterruptsHeld
from gradstep.optimizer import Optimizer
from gradstep.tree import entries_of, named_arrays


def restore(
    optimizer: Optimizer, mine: Node, document: Document, tensors: Tensors, *,
    params: object, like: object, strict: bool, whose: Whose, functions: Functions,
) -> list[Difference]:  # fmt: skip
    """Load a checkpoint; see `Optimizer.load`. To be called while no other thread can step.

    `mine` is what a checkpoint of the optimizer would say.
    """
    named = _named(params, "params")
    models = named if like is None else _named(like, "like")
    matching = match_trees(optimizer, mine, document.optimizer, whose, functions, tensors.name)
    rules = matching.rules
    wants: list[Wants] | list[None] = [None] * len(rules)
    if models is not None:
        wants = wants_of(optimizer, rules, matching.frozen, models)
    every = None if models is None else {name: want for some in wants if some for name, want in some.items()}

    comparison = Comparison(document, tensors)
    states = [comparison.state(rule, some) for rule, some in zip(rules, wants, strict=True)]
    sums = comparison.sums(matching.round.sums, every, models or ()) if matching.round else {}
    shared = {} if named is None else comparison.parameters(named)
    differences = [*matching.differences, *comparison.differences]
    if strict and differences:
        raise mismatch(tensors.name, differences)

    everything = zip(rules, states, wants, strict=True)
    successors = [_Successor(rule, state, tensors, some, strict=strict) for rule, state, some in everything]
    # A round of which a sum is left out could not go on: it begins anew.
    whole_round = matching.round if matching.round and len(sums) == len(matching.round.sums) else None
    totals = {name: tensors.read(key) for name, key in sums.items()} if whole_round else {}
    landed = {n: every[n].land_sum(total) if every and n in every else total for n, total in totals.items()}
    write = _replacement(tensors, params, {n: named[n] for n in shared}, shared) if named and shared else None
    _ = optimizer.step  # no count waits for a device any more: reading was the last that could fail
    with InterruptsHeld():
        if write is not None:
            write()
        for change in matching.changes:
            change()
        for successor in successors:
            successor.adopt(frozenset(document.stateless) if strict and comparison.names is not None else None)
        for member in optimizer._family():
            member._begin_again(comparison.names or frozenset())
        if isinstance(optimizer, Accumulate):
            optimizer._resume(whole_round.micro_step if whole_round else 0, landed)
    return differences


def _named(tree: object, what: str) -> Mapping[str, Any] | None:
    """The arrays of a tree by name; None for none."""
    if tree is None:
        return None
    named = named_arrays(tree, what)
    for name, array in named.items():
        check_array(array, f"{what}[{name!r}]")
    return named


class _Successor:
    """What an optimizer with a rule will have: what was read and, unless `strict`, what it has beside that."""

    def __init__(
        self, rule: RuleMatch, state: Mapping[str, Held], tensors: Tensors, wants: Wants | None, *, strict: bool
    ) -> None:
        self._rule = rule
        self._steps = rule.leaf.steps | {name: held.steps for name, held in state.items()}
        self._entries = {} if strict else {n: slots for n, slots in rule.leaf.entries.items() if n not in state}
        for name, held in state.items():
            self._entries[name] = {
                slot: self._read(tensors, key, name, slot, wants) for slot, key in held.arrays.items()
            }

    @staticmethod
    def _read(tensors: Tensors, key: str, name: str, slot: str, wants: Wants | None) -> Any:
        """An array of the library of the parameter that wants it, or of none yet."""
        stored = tensors.read(key)
        return stored if wants is None else wants[name].land(slot, stored)

    def adopt(self, known: frozenset[str] | None) -> None:
        """Let the optimizer have it."""
        rule = self._rule
        rule.leaf.restore(rule.settings, self._entries, self._steps, rule.node.step, known)


def _replacement(
    tensors: Tensors, params: object, named: Mapping[str, Any], keys: Mapping[str, str]
) -> Callable[[], None]:  # fmt: skip
    """Verify the checkpoint's parameters, and that those here can be replaced; what replaces them.

    In memory they are read twice, first to be verified, so that no more than one of them is there besides those that
    there are. New arrays are all made before the first takes its place.
    """
    library = recognise(params=named)
    if library.in_place is True:
        views = {name: _writable(library.as_numpy(array), name) for name, array in named.items()}
        for key in keys.values():
            tensors.verify(key)

        def overwrite() -> None:
            for name, view in views.items():
                view[...] = tensors.read(keys[name]).bits
            library.wrote(list(named.values()))

        return overwrite
    entries = entries_of(params, list(named))
    new: list[Any] = []
    for array, key in zip(named.values(), keys.values(), strict=True):
        dtype, shape = tensors.shape(key)
        new.append(tensors.read(key).in_place_of(library, Form(shape, dtype, library.place_of(array))))

    def replace() -> None:
        for (container, name), array in zip(entries, new, strict=True):
            container[name] = array

    return replace


def _writable(view: Any, name: str) -> Any:
    if not view.flags.writeable:
        raise ReadOnlyError(f"params[{name!r}] is read-only; pass a writable array: a copy, for example")
    return view
