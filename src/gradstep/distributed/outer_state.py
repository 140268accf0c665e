"""The state of an outer optimizer: what all ranks must have in common, and what those who lack it are given."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import numpy_library
from gradstep.distributed.group import Array
from gradstep.program.blocks import sum_of_squares
from gradstep.settings import Settings
from gradstep.step.leaf import Leaf

Kept = tuple[Leaf, Settings, dict[str, dict[str, Any]], dict[str, int], int]


class OuterState:
    """Slots and counts of an optimizer whose parameters are arrays of NumPy.

    Args:
        leaves: those of the optimizer.
        go_on_from: lets the optimizer have taken so many steps.
    """

    def __init__(self, leaves: Sequence[Leaf], go_on_from: Callable[[int], None]) -> None:
        self._leaves, self._go_on_from = leaves, go_on_from

    def counts(self, names: Iterable[str]) -> str:
        """The steps that were taken, in all and of each of these parameters, as a text; the same on all ranks."""
        wanted = sorted(names)
        return json.dumps([[leaf.step, [leaf.steps.get(name) for name in wanted]] for leaf in self._leaves])

    def arrays(self, names: Iterable[str]) -> list[Array]:
        """The slots of these parameters, in one order on all ranks."""
        library, wanted = numpy_library(), sorted(names)
        slots = (leaf.slots_of(name) for leaf in self._leaves for name in wanted)
        return [library.as_numpy(each[slot]) for each in slots for slot in sorted(each)]

    def describe(self, names: Iterable[str]) -> list[Any]:
        """What `adopt` takes, plain data."""
        wanted = sorted(names)
        return [
            {
                "step": leaf.step,
                "steps": {name: leaf.steps[name] for name in wanted if name in leaf.names()},
                "slots": {
                    name: {slot: [array.dtype.name, array.shape] for slot, array in leaf.slots_of(name).items()}
                    for name in wanted
                    if name in leaf.names()
                },
            }
            for leaf in self._leaves
        ]

    def adopt(self, described: Sequence[Mapping[str, Any]]) -> None:
        """Have the slots and counts that another rank has described, for those parameters; slots are 0 yet."""
        library = numpy_library()
        states = [
            {
                name: {slot: library.zeros(shape, range(len(shape)), dtype) for slot, (dtype, shape) in slots.items()}
                for name, slots in each["slots"].items()
            }
            for each in described
        ]
        self._go_on_from(described[0]["step"])
        for leaf, each, entries in zip(self._leaves, described, states, strict=True):
            others = {name: slots for name, slots in leaf.entries.items() if name not in entries}
            steps = leaf.steps | each["steps"]
            leaf.restore(leaf.settings, {**others, **entries}, steps, each["step"], None)

    def kept(self) -> list[Kept]:
        """All of it, to go back to."""
        return [(leaf, leaf.settings, leaf.entries, leaf.steps, leaf.step) for leaf in self._leaves]

    def go_back(self, kept: Sequence[Kept]) -> None:
        """Have the state that was kept, if another has been adopted since."""
        if all(leaf.entries is entries for leaf, _, entries, _, _ in kept):
            return
        self._go_on_from(kept[0][-1])
        for leaf, settings, entries, steps, step in kept:
            leaf.restore(settings, entries, steps, step, None)


def norm(arrays: Iterable[Array]) -> float:
    """The Euclidean norm of arrays together, the same bits on all ranks."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(sum(sum_of_squares(array) for array in arrays)))
