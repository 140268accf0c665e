"""The values of a program's scalar expressions for all tensors of a batch, in as few rows as there are differences."""

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradstep.arrays.memory import Integers
from gradstep.errors import OutOfRangeError
from gradstep.program.program import Program
from gradstep.program.scalars import LARGEST
from gradstep.step.leaf import Leaf

if TYPE_CHECKING:
    from gradstep.step.launch import Doubles


class Scales(NamedTuple):
    """What gradients are multiplied by as they are read.

    `whole` scales all that the rule sees: the caller's factor or that of a mean, and the clipping. `micro` scales
    the last micro-batch of a round alone, before it joins the sum of the others.
    """

    whole: float = 1.0
    micro: float = 1.0

    def check(self, dtype: str) -> None:
        """Raise where rounding to the compute dtype gives infinity."""
        for value in self:
            if abs(value) >= LARGEST[dtype]:
                raise OutOfRangeError(
                    f"grad_scale must be finite in {dtype}, the dtype of the computation, got {value}"
                )

    def clipped(self, norm: float, max_norm: float) -> "Scales":
        """The same for gradients of this global norm, brought down to `max_norm`."""
        return self._replace(whole=self.whole * clip_scale(norm, max_norm))


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that brings the norm down to `max_norm`; NaN for a norm that is not finite."""
    return min(max_norm / (norm + 1e-6), 1.0) if math.isfinite(norm) else math.nan


class ScalarTable:
    """One row for each combination of step count, shape and group on which the scalars depend.

    Attributes:
        values: the rows, in float64.
        rows: the row of each tensor.
        used: how many rows are in use.
    """

    def __init__(
        self, leaf: Leaf, program: Program, dtype: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._leaf, self._scalars, self._dtype = leaf, program.scalars, dtype
        axes = sorted(set(self._scalars.dimensions))
        # An empty parameter has no use for its scalars, but they are computed: no length is 0.
        self._shapes = [{axis: shape[axis] or 1 for axis in axes} for shape in shapes]
        groups = [leaf.group(name) for name in names]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self._groups = list(numbers)
        self._places = [numbers[group] for group in groups]  # where each tensor's group stands
        self._needs_count = "t" in self._scalars.hyperparameters
        self._ledger_rows = leaf.reserve(names).tolist()
        height = len(names) if self._needs_count or axes else len(self._groups)
        self.values: Doubles = np.zeros((height, max(len(self._scalars), 1)))
        self.rows: Integers = np.zeros(len(names), np.int64)
        self._row = struct.Struct(f"{len(self._scalars)}d")
        self._owners: list[int] = []
        self._expected_step = -1
        self._known: bytes | None = None

    @property
    def used(self) -> int:
        """How many rows are in use."""
        return len(self._owners)

    def fill(self, scales: Scales) -> None:
        """Check the hyperparameters in the compute dtype, and compute the scalars of the coming step."""
        known: list[dict[str, float]] = []
        bits = b""
        for group in self._groups:
            self._leaf.check_rounded(self._dtype, group)
            values = {**self._leaf.scalars(group), "grad_scale": scales.whole, "g.scale": scales.micro}
            known.append(values)
            if not self._needs_count:  # else every step has scalars of its own
                bits += struct.pack(f"{len(values)}d", *values.values())  # tells 0.0 from -0.0
        if not self._scalars:
            return
        if not self._owners or (self._needs_count and self._leaf.step != self._expected_step):
            self._share_rows()  # not the step after this table's last: counts may have parted
        if not self._needs_count and bits == self._known:
            return
        self._known = None  # until the table has been filled
        for row, tensor in enumerate(self._owners):
            count = {"t": self._leaf.count(self._ledger_rows[tensor]) + 1} if self._needs_count else {}
            arguments = known[self._places[tensor]] | count
            results = self._scalars.evaluate(arguments, self._shapes[tensor], self._dtype)
            self._row.pack_into(self.values.data, row * self._row.size, *results)
        self._known = bits

    def advance(self) -> None:
        """The step for which the table was filled is being taken."""
        if self._needs_count:
            self._expected_step = self._leaf.step + 1

    def _share_rows(self) -> None:
        self._known, self._owners = None, []
        rows: dict[tuple[int, ...], int] = {}
        for tensor, shape in enumerate(self._shapes):
            count = self._leaf.count(self._ledger_rows[tensor]) if self._needs_count else 0
            row = rows.setdefault((self._places[tensor], count, *shape.values()), len(rows))
            if row == len(self._owners):
                self._owners.append(tensor)
            self.rows[tensor] = row
