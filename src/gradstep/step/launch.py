"""A kernel together with its job: the tables that tell it where the tensors lie."""

import ctypes
from typing import Any

import numpy as np

from gradstep.arrays.memory import Integers, start_of
from gradstep.program.blocks import BLOCK
from gradstep.program.compiler import Kernel
from gradstep.program.frame import FIELDS
from gradstep.program.kernel import ROWS
from gradstep.program.threads import Team, pool

RUN = 16  # chunks that a thread grabs at once, at most
GRAIN, SHIFT = FIELDS.index("grain"), FIELDS.index("shift")
GRABS = 16  # times that each thread should grab, at least, so that all end together

Doubles = np.ndarray[Any, np.dtype[np.float64]]


class Launch:
    """One sweep over one batch of tensors.

    Args:
        kernel: the compiled sweep.
        chunks: one row per chunk: tensor, first, length.
        tensors: how many tensors the batch has.
        elements: how many elements all of them have.
        rows: the row of `scalars` that each tensor uses.
        scalars: the scalar expressions, one row per combination of step count and shape.
        dimensions: for factored programs, height, width and blocks per matrix of each tensor.
        keys: each tensor's key, where something is rounded at random.
        team: the threads of the library that the tensors are of.
    """

    def __init__(
        self,
        kernel: Kernel,
        chunks: Integers,
        tensors: int,
        elements: int,
        *,
        rows: Integers | None = None,
        scalars: Doubles | None = None,
        dimensions: Integers | None = None,
        keys: Integers | None = None,
        team: Team | None = None,
    ) -> None:
        self._team = team
        self.kernel, self._chunks, self._elements = kernel, len(chunks), elements
        self._operands = {(operand.place, operand.sums): row for row, operand in enumerate(kernel.source.operands)}
        self.addresses = np.zeros((len(kernel.source.operands), tensors), np.int64)
        self._addresses = self.addresses.ctypes.data
        self._next = (ctypes.c_int64 * 16)()  # a cache line of its own
        empty = np.zeros(1, np.int64)
        fields: dict[str, Any] = {
            "chunks": chunks, "count": len(chunks), "grain": 1, "next": ctypes.addressof(self._next),
            "addresses": self.addresses,
            "tensors": tensors, "rows": empty if rows is None else rows,
            "scalars": empty if scalars is None else scalars, "dimensions": empty if dimensions is None else dimensions,
            "keys": empty if keys is None else keys, "shift": 0,
        }  # fmt: skip
        self._alive = list(fields.values())
        values = [fields[name] for name in FIELDS]
        words = [value if isinstance(value, int) else value.ctypes.data for value in values]
        self._job = (ctypes.c_int64 * len(words))(*words)
        self._job_address = ctypes.addressof(self._job)

    def place(self, place: str, addresses: Integers, *, sums: bool = False) -> None:
        """Tell where an operand lies in each tensor, when the kernel has such an operand."""
        row = self._operands.get((place, sums))
        if row is not None:  # a copy without NumPy, whose own is slow while it is not in the cache
            ctypes.memmove(self._addresses + row * addresses.nbytes, start_of(addresses), addresses.nbytes)

    def shift(self, word: int) -> None:
        """Move the noise on to this step's, for rounding at random."""
        self._job[SHIFT] = word

    def run(self) -> None:
        """Run the kernel over all chunks, on as many threads as are worth it."""
        self._next[0] = 0
        threads = pool.threads_for(self._elements, self._team)
        # A thread that goes on where it was is faster than one that leaps over the others' chunks.
        self._job[GRAIN] = min(max(self._chunks // (GRABS * threads), 1), RUN)
        pool.run(self.kernel, self._job_address, threads, self._team)


def flat_chunks(sizes: Integers, starts: Integers | None = None) -> Integers:
    """Cut tensors into blocks of `BLOCK` elements; `starts` are the numbers of their first elements, if not 0."""
    chunks = _chunks(sizes, np.full_like(sizes, BLOCK))
    if starts is not None:
        chunks[:, 1] += starts[chunks[:, 0]]
    return chunks


def matrix_chunks(dimensions: Integers, stacks: Integers) -> Integers:
    """Cut stacks of matrices into chunks of whole blocks of rows, of about `BLOCK` elements."""
    height, width, blocks = dimensions.T
    block_size = np.maximum(np.minimum(height, ROWS) * width, 1)
    return _chunks(stacks * blocks * (width > 0), np.maximum(BLOCK // block_size, 1))


def stack_chunks(stacks: Integers) -> Integers:
    """One chunk for each stack of matrices that is not empty."""
    tensors = np.flatnonzero(stacks)
    return np.ascontiguousarray(np.stack([tensors, np.zeros_like(tensors), stacks[tensors]], axis=1), dtype=np.int64)


def _chunks(lengths: Integers, grains: Integers) -> Integers:
    counts = -(-lengths // grains)
    tensor = np.repeat(np.arange(len(lengths)), counts)
    first = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
    first *= grains[tensor]
    length = np.minimum(grains[tensor], lengths[tensor] - first)
    return np.ascontiguousarray(np.stack([tensor, first, length], axis=1), dtype=np.int64)
