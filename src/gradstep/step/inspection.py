"""The reading pass before a step: the global norm of the gradients, and which of them are not finite."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.memory import Integers
from gradstep.program.blocks import exact_sum
from gradstep.program.compiler import Kernel, compile_kernel
from gradstep.program.formats import Format, compute_dtype
from gradstep.program.graph import Reading, Trace, read_gradient
from gradstep.program.kernel import emit
from gradstep.program.program import Program, place_of
from gradstep.program.threads import Team
from gradstep.step.launch import Launch, flat_chunks

SAFE_SQUARES = (1e-280, 1e280)  # between these, the sum of float64 squares has neither over- nor underflown


class Inspection(NamedTuple):
    """What the pass found: the Euclidean norm of all gradients, and the places of those with NaN or infinity."""

    norm: float
    culprits: list[int]


class Inspector:
    """Sums of squares of dense arrays of one dtype, block by block.

    Args:
        dtype: of the arrays, as they are stored.
        sizes: their numbers of elements.
        reading: what is looked at: the arrays as they are, or weighed, or added to their sums.
        sum_dtype: the dtype of those sums, in which a gradient that is weighed is computed.
        team: the threads of the library that the arrays are of.
    """

    def __init__(
        self,
        dtype: str,
        sizes: Sequence[int],
        reading: Reading = Reading.PLAIN,
        sum_dtype: str | None = None,
        team: Team | None = None,
    ) -> None:
        self._sizes = np.array(sizes, np.int64)
        bare = reading in (Reading.PLAIN, Reading.SCALED)
        self.dtype = dtype if bare or sum_dtype is None else sum_dtype
        chunks = flat_chunks(self._sizes)
        self._tensor_of_block = chunks[:, 0].copy()
        self._sums = np.zeros(len(chunks))
        kernel, place = _kernel(self.dtype, dtype, Reading.PLAIN if bare else reading)
        self._micro = np.ones((1, 1))
        rows = np.zeros(len(sizes), np.int64)
        self._launch = Launch(
            kernel, chunks, len(sizes), int(self._sizes.sum()), rows=rows, scalars=self._micro, team=team
        )
        blocks = np.bincount(self._tensor_of_block, minlength=len(sizes))
        first = np.cumsum(blocks) - blocks
        self._launch.place(place, self._sums.ctypes.data + first * self._sums.itemsize, sums=True)

    def inspect(
        self, addresses: Integers, totals: Integers | None = None, micro: float = 1.0
    ) -> tuple[list[float], set[int]]:
        """The sum of squares of each block, and the tensors in which one is not finite.

        `totals` are the addresses of the sums, `micro` is what the arrays are weighed with.
        """
        self._launch.place("g", addresses)
        if totals is not None:
            self._launch.place("g.sum", totals)
        self._micro[0, 0] = micro
        self._launch.run()
        sums: list[float] = self._sums.tolist()
        if math.isfinite(sum(sums)):  # without NumPy, which is slow while it is not in the cache
            return sums, set()
        return sums, set(self._tensor_of_block[~np.isfinite(self._sums)].tolist())


@functools.cache
def _kernel(dtype: str, stored: str, reading: Reading) -> tuple[Kernel, str]:
    trace = Trace(ndim=1)
    norm = trace.whole("norm", read_gradient(trace, reading))
    program = Program("gradient norm", {}, {"norm": norm})
    kernel = emit(program, program.sweeps[0], compute_dtype(dtype), {"g": Format(stored)})
    return compile_kernel(kernel), place_of(norm)


def own_alone(together: Callable[[list[float]], float], own: float) -> float:
    """What one process has of a number, which is all of it."""
    return together([own])


def global_norm(
    sums: Sequence[float],
    arrays: Callable[[], Iterable[np.ndarray[Any, Any]]],
    *,
    exact: bool,
    put_together: Callable[[Callable[[list[float]], float], float], float] = own_alone,
) -> float:
    """The root of the sum of all blocks.

    Squares of float32 and narrower can neither over- nor underflow in float64 (`exact`). Those of float64 can: then the
    arrays are asked for, and scaled by a power of two first. `put_together` makes one number of those that several
    processes have of their arrays.
    """
    total = exact_sum(sums)
    if exact or math.isnan(total) or SAFE_SQUARES[0] < total < SAFE_SQUARES[1]:
        return math.sqrt(total)
    own = max((float(np.max(np.abs(array), initial=0.0)) for array in arrays()), default=0.0)
    largest = put_together(max, own)
    if largest == 0 or not math.isfinite(largest):
        return largest
    exponent = math.frexp(largest)[1]
    with np.errstate(under="ignore"):
        scaled = (np.ldexp(array.astype(np.float64), -exponent) for array in arrays())
        own = math.fsum(float(np.sum(np.square(array))) for array in scaled)
    total = put_together(math.fsum, own)
    try:
        return math.ldexp(math.sqrt(total), exponent)
    except OverflowError:
        return math.inf
