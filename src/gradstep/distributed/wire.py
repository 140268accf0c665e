"""How changes travel: as they are, in bfloat16, or in 8 bits with a scale for each block."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from gradstep.distributed.group import Array
from gradstep.program.formats import QUANTUM
from gradstep.program.rounding import narrowed, widened

LARGEST = 127  # of the codes of 8 bits


class Wire(ABC):
    """Rows of numbers as bytes. A row has a multiple of 256 numbers, and all rows are equally long."""

    exact = False
    """Whether nothing is lost."""

    @abstractmethod
    def encode(self, values: Array) -> Array:
        """The bytes of float32 or float64 numbers."""

    @abstractmethod
    def decode(self, received: Array, dtype: Any) -> Array:
        """The numbers of bytes, in the dtype that they had."""


class Exact(Wire):
    """The numbers as they are, in 4 bytes, or 8 of float64."""

    exact = True

    def encode(self, values: Array) -> Array:
        """See `Wire.encode`."""
        return np.ascontiguousarray(values).view(np.uint8)

    def decode(self, received: Array, dtype: Any) -> Array:
        """See `Wire.decode`."""
        return received.view(dtype)


class Bfloat16(Wire):
    """Rounded to nearest, in 2 bytes."""

    def encode(self, values: Array) -> Array:
        """See `Wire.encode`."""
        return narrowed(values.astype(np.float32, copy=False), "bfloat16").view(np.uint8)

    def decode(self, received: Array, dtype: Any) -> Array:
        """See `Wire.decode`."""
        return widened(received.view(np.uint16), "bfloat16", np.dtype(dtype).name)


class Int8(Wire):
    """In 1 byte: whole multiples, to nearest, of a float32 for each block of 256, its largest magnitude / 127.

    A row has all codes, then all scales.
    """

    def encode(self, values: Array) -> Array:
        """See `Wire.encode`."""
        rows, length = values.shape
        blocks = values.astype(np.float32, copy=False).reshape(rows, -1, QUANTUM)
        scales = np.maximum(blocks.max(axis=2), -blocks.min(axis=2)) / np.float32(LARGEST)
        scales[scales < np.finfo(np.float32).tiny] = 0  # of less than that, quotients are too coarse
        units = blocks / np.where(scales == 0, np.float32(np.inf), scales)[:, :, None]
        codes = np.rint(units, out=units).astype(np.int8).view(np.uint8)
        return np.concatenate([codes.reshape(rows, length), scales.view(np.uint8)], axis=1)

    def decode(self, received: Array, dtype: Any) -> Array:
        """See `Wire.decode`."""
        rows, width = received.shape
        length = width * QUANTUM // (QUANTUM + 4)
        codes = received[:, :length].view(np.int8).reshape(rows, -1, QUANTUM)
        scales = np.ascontiguousarray(received[:, length:]).view(np.float32)
        return (codes * scales[:, :, None]).reshape(rows, length).astype(dtype, copy=False)


WIRES: dict[str, Wire] = {"float32": Exact(), "bfloat16": Bfloat16(), "int8": Int8()}
