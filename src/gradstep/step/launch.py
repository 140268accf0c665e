"""A kernel together with its job: the tables that tell it where the tensors lie."""

from typing import Any

import numpy as np

from gradstep.arrays.memory import Integers
from gradstep.program.blocks import BLOCK
from gradstep.program.compiler import Kernel
from gradstep.program.kernel import FIELDS, ROWS
from gradstep.program.threads import pool

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
    ) -> None:
        self.kernel, self._elements = kernel, elements
        self.addresses = np.zeros((len(kernel.source.operands), tensors), np.int64)
        self._next = np.zeros(16, np.int64)  # a cache line of its own
        empty = np.zeros(1, np.int64)
        fields: dict[str, Any] = {
            "chunks": chunks, "count": len(chunks), "next": self._next, "addresses": self.addresses,
            "tensors": tensors, "rows": empty if rows is None else rows,
            "scalars": empty if scalars is None else scalars, "dimensions": empty if dimensions is None else dimensions,
        }  # fmt: skip
        self._alive = list(fields.values())
        values = [fields[name] for name in FIELDS]
        self._job = np.array([value if isinstance(value, int) else value.ctypes.data for value in values], np.int64)
        self._job_address = self._job.ctypes.data

    def place(self, place: str, addresses: Integers, *, sums: bool = False) -> None:
        """Tell where an operand lies in each tensor, when the kernel has such an operand."""
        for number, operand in enumerate(self.kernel.source.operands):
            if operand.place == place and operand.sums == sums:
                self.addresses[number] = addresses

    def run(self) -> None:
        """Run the kernel over all chunks, on as many threads as are worth it."""
        self._next[0] = 0
        pool.run(self.kernel.call, self._job_address, self._elements)


def flat_chunks(sizes: Integers) -> Integers:
    """Cut tensors into blocks of `BLOCK` elements."""
    return _chunks(sizes, np.full_like(sizes, BLOCK))


def matrix_chunks(dimensions: Integers, stacks: Integers) -> Integers:
    """Cut stacks of matrices into chunks of whole blocks of rows, of about `BLOCK` elements."""
    height, width, blocks = dimensions.T
    block_size = np.maximum(np.minimum(height, ROWS) * width, 1)
    return _chunks(stacks * blocks * (width > 0), np.maximum(BLOCK // block_size, 1))


def _chunks(lengths: Integers, grains: Integers) -> Integers:
    counts = -(-lengths // grains)
    tensor = np.repeat(np.arange(len(lengths)), counts)
    first = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
    first *= grains[tensor]
    length = np.minimum(grains[tensor], lengths[tensor] - first)
    return np.ascontiguousarray(np.stack([tensor, first, length], axis=1), dtype=np.int64)
