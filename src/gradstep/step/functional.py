"""A step planned for arrays that never change: it makes new parameters and slots."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from gradstep.arrays.library import OTHER, STAYED, Found, FunctionalLibrary, Lender
from gradstep.arrays.memory import Integers
from gradstep.errors import AliasedParametersError
from gradstep.step.compiled import DONATED_TWICE, CompiledStep
from gradstep.step.forms import check_devices, check_gradient, refuse_tracing, tracing_error
from gradstep.step.intake import Intake
from gradstep.step.leaf import Leaf
from gradstep.step.lent import LentStep
from gradstep.step.look import Look, Policy
from gradstep.step.outcome import Outcome
from gradstep.step.scalars import Scales
from gradstep.step.share import FunctionalShare, Slots


class FormWatch:
    """See `Watch`: such arrays have no addresses."""

    def __init__(self, library: FunctionalLibrary, arrays: list[Any]) -> None:
        self.addresses: Integers = np.zeros(0, np.int64)
        self._library, self._forms = library, library.marks(arrays)

    def locate(self, arrays: list[Any]) -> Found:
        """See `Watch.locate`."""
        return STAYED if self._library.marks(arrays) == self._forms else OTHER


class Way(Protocol):
    """How a planned step is taken."""

    def check(self, scales: Scales) -> None:
        """See `Plan.check`."""
        ...

    def look(self, gradients: list[Any], totals: list[Any], max_norm: float | None, scales: Scales) -> Look:
        """What there is to know about the gradients before a step."""
        ...

    def run(
        self, parameters: list[Any], slots: list[Slots], gradients: list[Any], totals: list[Any], found: Look | None,
        max_norm: float | None, scales: Scales,
    ) -> tuple[list[Any], list[Slots], Look | None]:  # fmt: skip
        """The new parameters, their new slots, and what was found in the gradients."""
        ...

    def finish(self, parameters: list[Any], slots: list[Slots]) -> None:
        """What is left to do when these new arrays have taken the places of the old ones."""
        ...


class FunctionalPlan:
    """A step planned: how it is taken, and for whom. Holds no parameters or gradients."""

    in_place: Literal[False] = False

    def __init__(
        self,
        library: FunctionalLibrary,
        routes: Sequence[tuple[Leaf, list[str]]],
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        intake: Intake,
        policy: Policy,
        *,
        donating: bool,
    ) -> None:
        self.library, self._donating = library, donating
        refuse_tracing(library, [*params.values(), *grads.values()])
        self.shares = [FunctionalShare(leaf, names, library, params, intake) for leaf, names in routes]
        self.names = [name for share in self.shares for name in share.names]
        check_devices(library, {name: form for share in self.shares for name, form in share.forms.items()})
        for share in self.shares:
            for name in share.names:
                check_gradient(library, name, grads[name], share.forms[name])
        totals = intake.totals(self.names)
        self._way: Way
        lender = library.lender if donating and not totals else None
        if lender is not None and self._can_lend(lender, params, grads):
            self._way = LentStep(lender, self.shares, params, grads, intake, policy)
        else:
            self._way = CompiledStep(library, self.shares, [*grads.values(), *totals], policy, donating=donating)
        self.shown_slots: list[Any] = []
        self.shown_addresses: Integers = np.zeros(0, np.int64)

    def _can_lend(self, lender: Lender, params: Mapping[str, Any], grads: Mapping[str, Any]) -> bool:
        """Whether NumPy can take this step, in the memory of these arrays."""
        slots = [array for share in self.shares for row in share.slots() for array in row.values()]
        programs = [program for share in self.shares for program in share.programs.values()]
        coarse = any("bfloat16" in program.product_dtypes for program in programs)
        return not coarse and lender.can_lend([*params.values(), *slots], [*grads.values()])

    @property
    def lent(self) -> bool:
        """Whether the step is taken in the memory of old arrays."""
        return isinstance(self._way, LentStep)

    @property
    def published(self) -> bool:
        """See `Plan.published`."""
        return all(share.published for share in self.shares)

    def watch(self, arrays: list[Any]) -> FormWatch:
        """See `Plan.watch`."""
        return FormWatch(self.library, arrays)

    def check(self, scales: Scales) -> None:
        """See `Plan.check`."""
        self._way.check(scales)

    def look(self, gradients: list[Any], totals: list[Any], max_norm: float | None, scales: Scales) -> Look:
        """What there is to know about the gradients before a step."""
        return self._way.look(gradients, totals, max_norm, scales)

    def read(self, look: Look) -> tuple[float, tuple[str, ...]]:
        """The norm, and the names of gradients that are not finite; waits for the device."""
        norm = float(self.library.read(look.norm))
        each = np.atleast_1d(self.library.read(look.each_finite)).tolist()
        return norm, tuple(name for name, finite in zip(self.names, each, strict=False) if not finite)

    def run(
        self, parameters: list[Any], gradients: list[Any], totals: list[Any], look: Look | None, max_norm: float | None,
        scales: Scales,
    ) -> tuple[list[Any], list[Slots], Look | None]:  # fmt: skip
        """The new parameters, the new slots of each, in the plan's order, and what was found in the gradients."""
        slots = [slots for share in self.shares for slots in share.slots()]
        if self._donating:
            _refuse_donating_twice(parameters, slots, gradients)
        new, new_slots, found = self._way.run(parameters, slots, gradients, totals, look, max_norm, scales)
        if list(map(type, new)) != list(map(type, parameters)):  # these were caught from outside of a transformation
            raise tracing_error(self.library)
        return new, new_slots, found

    def finish(self, parameters: list[Any], slots: list[Slots]) -> None:
        """Let every optimizer adopt its new slots; the new parameters have taken the places of the old ones."""
        start = 0
        for share in self.shares:
            share.adopt(slots[start : start + len(share.names)])
            start += len(share.names)
        self._way.finish(parameters, slots)

    def advance(self, outcome: Outcome | None) -> None:
        """Let every optimizer count the step."""
        for share in self.shares:
            share.leaf.take(share.rows, outcome)


def _refuse_donating_twice(parameters: list[Any], slots: list[Slots], gradients: list[Any]) -> None:
    arrays = [*parameters, *gradients, *(array for row in slots for array in row.values())]
    if len(set(map(id, arrays))) < len(arrays) - len(gradients) + len(set(map(id, gradients))):
        raise AliasedParametersError(DONATED_TWICE)
