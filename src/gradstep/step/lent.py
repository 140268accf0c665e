"""A step for arrays that never change, taken in memory that their owner gives up for it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, overload

import numpy as np

from gradstep.arrays.library import Lender, Located
from gradstep.arrays.memory import Bits, Memory
from gradstep.arrays.numpy import NumPy
from gradstep.program.arithmetic import IeeeArithmetic
from gradstep.step.intake import Intake
from gradstep.step.look import Look, Policy
from gradstep.step.plan import Plan, Share
from gradstep.step.scalars import Scales
from gradstep.step.share import FunctionalShare, Slots


class LentStep:
    """The step of NumPy, on memory that is another library's.

    All that writes nothing runs while the old arrays still have their memory. Then the library makes new arrays with
    the same elements, on that memory where nobody else has a share in it, and these are written. Of their old elements
    nobody can see the change but a thread that reads them meanwhile where holders are asked.

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
        self._coming: Located | None = None  # the gradients of the step that is going to be written
        written = lender.locate([*(params[name] for name in self._names), *_arrays(slots)])
        read = lender.locate([grads[name] for name in self._names])
        parameters, rows = _parted(map(lender.view, *written), self._names, slots)
        self._plan = Plan(
            LENT,
            [Share(share.leaf, share.names, dict(zip(self._names, rows, strict=True))) for share in shares],
            dict(zip(self._names, parameters, strict=True)),
            dict(zip(self._names, map(lender.view, *read), strict=True)),
            intake,
            lent=True,
        )
        self._halves = slice(len(self._names)), slice(len(self._names), None)
        self._written, self._read = written.addresses, read.addresses

    def check(self, scales: Scales) -> None:
        """See `Plan.check`."""
        self._plan.check(scales)

    def look(self, gradients: list[Any], totals: list[Any], max_norm: float | None, scales: Scales) -> Look:
        """See `Way.look`."""
        located = self._lender.locate(gradients)
        self._find_gradients(located.addresses)
        return self._look(located, scales)

    def _look(self, gradients: Located, scales: Scales) -> Look:
        with IeeeArithmetic():
            found = self._plan.inspect(_Views(self._lender.view, gradients), scales)
        culprits = set(found.culprits)
        each_finite = [place not in culprits for place in range(len(gradients.arrays))]
        return Look(found.norm, math.isfinite(found.norm), None, each_finite)

    def run(
        self, parameters: list[Any], slots: list[Slots], gradients: list[Any], totals: list[Any], found: Look | None,
        max_norm: float | None, scales: Scales,
    ) -> tuple[list[Any], list[Slots], Look | None]:  # fmt: skip
        """See `Way.run`."""
        self._coming = None
        everything = self._lender.locate([*gradients, *parameters, *_arrays(slots)])
        read, written = (Located(*(part[where] for part in everything)) for where in self._halves)
        self._find_gradients(read.addresses)
        self._find(written.addresses, slots)
        if self._policy.looking:
            found = self._look(read, scales)
        if found and self._policy.skipping and not found.finite:
            return [*parameters], slots, found
        if found and self._policy.clipped and max_norm is not None:
            scales = scales.clipped(found.norm, max_norm)
        with IeeeArithmetic():
            self._plan.prepare(scales)
        new = self._lender.renew(written.arrays)  # the old arrays may be gone from here on
        # A transformation may have caught them: nothing happens in there, and the caller refuses them.
        self._coming = read if type(new[0]) is type(written.arrays[0]) else None
        made, kept = _parted(new, parameters, slots)
        if not self._lender.asks_holders:
            self.finish(made, kept)
        return made, kept, found

    def finish(self, parameters: list[Any], slots: list[Slots]) -> None:
        """See `Way.finish`. Where holders are asked, the new arrays have been handed out before they are written."""
        if self._coming is None:  # the step was left out, or has been finished
            return
        new = self._lender.locate([*parameters, *_arrays(slots)])
        self._find(new.addresses, slots)
        self._plan.commit(())
        self._coming = None

    def _find_gradients(self, addresses: list[int]) -> None:
        """Let the plan know where the gradients lie."""
        if addresses != self._read:
            self._plan.place("g", np.array(addresses, np.int64))
            self._read = addresses

    def _find(self, addresses: list[int], slots: list[Slots]) -> None:
        """Let the plan know where parameters and their slots lie."""
        if addresses == self._written:
            return
        parameters, rows = _parted(addresses, self._names, slots)
        self._plan.place("w", np.array(parameters, np.int64))
        for part in dict.fromkeys(part for row in rows for part in row):
            self._plan.place(part, np.array([row.get(part, 0) for row in rows], np.int64))
        self._written = addresses


class LentMemory(NumPy):
    """Memory of another library, as a plan for memory sees it."""

    def describe(self, array: Any, what: str) -> Memory:
        """See `MemoryLibrary.describe`."""
        values: np.ndarray[Any, Any] = array.values
        return Memory(values.__array_interface__["data"][0], values.shape, values.strides, array.dtype)

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """See `MemoryLibrary.as_numpy`."""
        return array.values


LENT = LentMemory()


class _Views(Sequence[Bits]):
    """Views of arrays, made when they are asked for."""

    def __init__(self, view: Callable[[Any, int], Bits], located: Located) -> None:
        self._view, self._located = view, located

    @overload
    def __getitem__(self, place: int) -> Bits: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Bits]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return _Views(self._view, Located(*(part[place] for part in self._located)))
        return self._view(self._located.arrays[place], self._located.addresses[place])

    def __len__(self) -> int:
        return len(self._located.arrays)


def _arrays(slots: Sequence[Slots]) -> list[Any]:
    return [array for row in slots for array in row.values()]


def _parted(arrays: Iterable[Any], parameters: Sized, slots: Sequence[Slots]) -> tuple[list[Any], list[Slots]]:
    """Arrays that come one after the other as parameters and their slots."""
    rest = iter(arrays)
    return [next(rest) for _ in range(len(parameters))], [dict(zip(row, rest, strict=False)) for row in slots]
