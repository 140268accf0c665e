"""A step for arrays that never change, taken in memory that their owner gives up for it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import numpy as np

from gradstep.arrays.library import Lender
from gradstep.arrays.numpy import NUMPY
from gradstep.errors import AliasedParametersError
from gradstep.program.arithmetic import IeeeArithmetic
from gradstep.step.intake import Intake
from gradstep.step.look import Look, Policy
from gradstep.step.plan import Plan, Share
from gradstep.step.scalars import Scales
from gradstep.step.share import FunctionalShare, Slots


class LentStep:
    """The step of NumPy, on memory that is another library's.

    All that writes nothing runs while the old arrays still have their memory. Then the library makes new arrays on
    it, which nobody has seen yet, and these are written.

    Args:
        lender: whose arrays they are.
        shares: what each optimizer takes.
        params, grads: arrays by name.
        intake: how the gradients come in.
        policy: what is done about the gradients.
    """

    def __init__(
        self,
        lender: Lender,
        shares: Sequence[FunctionalShare],
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        intake: Intake,
        policy: Policy,
    ) -> None:
        self._lender, self._shares, self._intake, self._policy = lender, shares, intake, policy
        self._names = [name for share in shares for name in share.names]
        slots = [row for share in shares for row in share.slots()]
        parameters, gradients = ([tree[name] for name in self._names] for tree in (params, grads))
        lender.wait([*parameters, *gradients])
        self._make_plan(parameters, slots, gradients)

    def _make_plan(self, parameters: list[Any], slots: list[Slots], gradients: list[Any]) -> None:
        """Plan for these arrays; what is known of the plan's addresses changes with it."""
        view, names = self._lender.view, self._names
        params, grads = (dict(zip(names, map(view, arrays), strict=True)) for arrays in (parameters, gradients))
        state = {
            name: {slot: view(array) for slot, array in row.items()} for name, row in zip(names, slots, strict=True)
        }
        shares = [Share(share.leaf, share.names, state) for share in self._shares]
        with _offering_copies():
            plan = Plan(NUMPY, shares, params, grads, self._intake)
        self._plan = plan
        self._written = self._lender.addresses([*parameters, *_arrays(slots)])
        self._read: list[int] | None = self._lender.addresses(gradients)

    def check(self, scales: Scales) -> None:
        """See `Plan.check`."""
        self._plan.check(scales)

    def look(self, gradients: list[Any], totals: list[Any], max_norm: float | None, scales: Scales) -> Look:
        """See `Way.look`."""
        self._lender.wait(gradients)
        self._plan.place("g", np.array(self._lender.addresses(gradients), np.int64))
        self._read = None  # whether they overlap what is written is seen when that is known
        return self._look(gradients, scales)

    def _look(self, gradients: list[Any], scales: Scales) -> Look:
        with IeeeArithmetic():
            found = self._plan.inspect(_Views(self._lender.view, gradients), scales)
        each_finite = np.ones(len(gradients), bool)
        each_finite[found.culprits] = False
        return Look(found.norm, np.isfinite(found.norm), None, each_finite)

    def run(
        self, parameters: list[Any], slots: list[Slots], gradients: list[Any], totals: list[Any], found: Look | None,
        max_norm: float | None, scales: Scales,
    ) -> tuple[list[Any], list[Slots], Look | None]:  # fmt: skip
        """See `Way.run`."""
        written = [*parameters, *_arrays(slots)]
        self._lender.wait([*written, *gradients])
        if self._lender.addresses(written) == self._written:
            self._find_gradients(gradients)
        else:
            self._make_plan(parameters, slots, gradients)
        if self._policy.looking:
            found = self._look(gradients, scales)
        if found and self._policy.skipping and not found.finite:
            return parameters, slots, found
        if found and self._policy.clipped and max_norm is not None:
            scales = scales.clipped(found.norm, max_norm)
        with IeeeArithmetic():
            self._plan.prepare(scales)
        new = self._lender.renew(written)  # from here on nothing can fail: the old arrays are gone
        caught = type(new[0]) is not type(written[0])  # by a transformation, in which nothing has happened yet
        rest = iter(new)
        parameters = [next(rest) for _ in parameters]
        slots = [dict(zip(row, rest, strict=False)) for row in slots]
        if caught:
            return parameters, slots, found  # the caller refuses them
        if self._lender.addresses(new) != self._written:
            self._move(parameters, slots)
        self._plan.commit(())
        return parameters, slots, found

    def _move(self, parameters: list[Any], slots: list[Slots]) -> None:
        """Where somebody else has a share in the memory, the library has copied it: write the copies."""
        find = self._lender.addresses
        self._plan.place("w", np.array(find(parameters), np.int64))
        for part in dict.fromkeys(part for row in slots for part in row):
            places = [find([row[part]])[0] if part in row else 0 for row in slots]
            self._plan.place(part, np.array(places, np.int64))
        self._written = []  # the next step is planned anew, for which gradients may not lie here

    def _find_gradients(self, gradients: list[Any]) -> None:
        addresses = self._lender.addresses(gradients)
        if addresses != self._read:
            with _offering_copies():
                self._plan.move_gradients(np.array(addresses, np.int64))
            self._read = addresses


@contextmanager
def _offering_copies() -> Generator[None]:
    try:
        yield
    except AliasedParametersError as error:
        raise AliasedParametersError(f"{error}; or pass donate=False") from None


class _Views(Sequence[Any]):
    """Views of arrays, made when they are asked for."""

    def __init__(self, view: Callable[[Any], Any], arrays: Sequence[Any]) -> None:
        self._view, self._arrays = view, arrays

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return _Views(self._view, self._arrays[place])
        return self._view(self._arrays[place])

    def __len__(self) -> int:
        return len(self._arrays)


def _arrays(slots: Sequence[Slots]) -> list[Any]:
    return [array for row in slots for array in row.values()]
