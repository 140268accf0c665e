"""How changes travel: as they are, in bfloat16, or in 8 bits with a scale for each block."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradstep.distributed.group import Array
from gradstep.errors import OutOfRangeError
from gradstep.program.formats import QUANTUM
from gradstep.program.rounding import narrowed, widened

LARGEST_SENT = float(np.finfo(np.float32).max) / 4  # and what is owed may come on top
LARGEST = 127  # of the codes of 8 bits
CHUNK = 1 << 16  # numbers that are rounded at once: temporaries stay in the cache


class Wire(ABC):
    """Rows of numbers as bytes. A row has a multiple of 256 numbers, and all rows are equally long."""

    exact = False
    """Whether nothing is lost."""

    def check(self, name: str, change: Array) -> None:
        """Raise `OutOfRangeError` for a float64 change that is finite, and would not be on the way."""
        if not self.exact and change.dtype == np.float64:
            finite = np.abs(change[np.isfinite(change)])
            if finite.size and finite.max() > LARGEST_SENT:
                raise OutOfRangeError(
                    f"the change of params[{name!r}] reaches {finite.max():.3g}, and a narrow wire carries what float32"
                    ' holds; pass wire="float32", on which float64 travels as it is'
                )

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
        sent = np.empty(values.shape, np.uint16)
        for place in _chunks(values):
            sent[place] = narrowed(values[place].astype(np.float32, copy=False), "bfloat16")
        return sent.view(np.uint8)

    def decode(self, received: Array, dtype: Any) -> Array:
        """See `Wire.decode`."""
        bits = received.view(np.uint16)
        values = np.empty(bits.shape, dtype)
        for place in _chunks(values):
            values[place] = widened(bits[place], "bfloat16", "float32")
        return values


class Int8(Wire):
    """In 1 byte: whole multiples, to nearest, of a float32 for each block of 256, its largest magnitude / 127.

    A row has all codes, then all scales.
    """

    def encode(self, values: Array) -> Array:
        """See `Wire.encode`."""
        rows, length = values.shape
        codes, scales = np.empty((rows, length), np.int8), np.empty((rows, length // QUANTUM), np.float32)
        for row, places in _chunks(values):
            blocks = values[row, places].astype(np.float32, copy=False).reshape(-1, QUANTUM)
            scale = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(LARGEST)
            scale[scale < np.finfo(np.float32).tiny] = 0  # of less than that, quotients are too coarse
            units = blocks / np.where(scale == 0, np.float32(np.inf), scale)[:, None]
            codes[row, places] = np.rint(units, out=units).reshape(-1)
            scales[row, places.start // QUANTUM : places.start // QUANTUM + len(scale)] = scale
        return np.concatenate([codes.view(np.uint8), scales.view(np.uint8)], axis=1)

    def decode(self, received: Array, dtype: Any) -> Array:
        """See `Wire.decode`."""
        rows, width = received.shape
        length = width * QUANTUM // (QUANTUM + 4)
        codes, scales = received[:, :length].view(np.int8), np.ascontiguousarray(received[:, length:]).view(np.float32)
        values = np.empty((rows, length), dtype)
        for row, places in _chunks(values):
            blocks = codes[row, places].reshape(-1, QUANTUM)
            scale = scales[row, places.start // QUANTUM : places.start // QUANTUM + len(blocks)]
            values[row, places] = (blocks * scale[:, None]).reshape(-1)
        return values


def _chunks(values: Array) -> Iterator[tuple[int, slice]]:
    """The rows and places of chunks of all rows."""
    rows, length = values.shape
    for row in range(rows):
        for low in range(0, length, CHUNK):
            yield row, slice(low, low + CHUNK)


WIRES: dict[str, Wire] = {"float32": Exact(), "bfloat16": Bfloat16(), "int8": Int8()}
