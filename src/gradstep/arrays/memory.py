"""Where an array lies in memory, whoever owns it, and what can be said about such places."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gradstep.program.formats import BYTES, NARROW

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def bits_dtype(dtype: str) -> str:
    """The dtype of NumPy that holds such elements as they are: 16-bit floats as their bits."""
    return "uint16" if dtype in NARROW else dtype


_borrow: Any = ctypes.c_char.from_buffer


def start_of(table: Integers) -> int:
    """Where a table of ours begins; many times faster than `.ctypes.data` in a cold cache."""
    return ctypes.addressof(_borrow(table)) if len(table) else 0


class Bits(NamedTuple):
    """The elements of an array of another library, in its memory; floats of 16 bits as their bits."""

    values: np.ndarray[Any, Any]
    dtype: str

    @property
    def ndim(self) -> int:
        """How many axes the array has."""
        return self.values.ndim


def bits_at(address: int, shape: tuple[int, ...], dtype: str) -> Bits:
    """The array in C order that begins there; its owner must outlive it."""
    kind = np.dtype(bits_dtype(dtype))
    size = math.prod(shape)
    if not size:
        return Bits(np.empty(shape, kind), dtype)
    memory: Any = (ctypes.c_char * (size * kind.itemsize)).from_address(address)
    return Bits(np.frombuffer(memory, kind).reshape(shape), dtype)


class Memory(NamedTuple):
    """An array's place: `strides` in bytes, `dtype` by NumPy's name."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    writable: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return BYTES[self.dtype]

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bounds(self) -> tuple[int, int]:
        """The first byte and the one after the last."""
        if 0 in self.shape:
            return self.address, self.address
        reach = [(length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(part for part in reach if part < 0)
        return low, self.address + sum(part for part in reach if part > 0) + self.itemsize


def element_strides(memory: Memory) -> tuple[int, ...] | None:
    """Strides in elements, with 0 for axes that never move; None when they are no whole elements."""
    if 0 in memory.shape:
        return (0,) * len(memory.shape)
    if any(stride % memory.itemsize for length, stride in zip(memory.shape, memory.strides, strict=True) if length > 1):
        return None
    return tuple(
        stride // memory.itemsize if length > 1 else 0
        for length, stride in zip(memory.shape, memory.strides, strict=True)
    )


def strides_in_order(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The element strides of a dense array whose axes, from slow to fast, are `order`."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        if shape[axis] != 1:
            strides[axis] = step
            step *= shape[axis]
    return (0,) * len(shape) if 0 in shape else tuple(strides)


def axis_order(memory: Memory) -> list[int]:
    """The axes from slow to fast, by their strides; C order where they are equal."""
    return sorted(range(len(memory.shape)), key=lambda axis: (-abs(memory.strides[axis]), axis))


def overlaps_itself(memory: Memory) -> bool:
    """Whether two elements may share memory: strides that do not nest are taken as overlapping."""
    axes = sorted(
        (abs(stride), length) for length, stride in zip(memory.shape, memory.strides, strict=True) if length > 1
    )
    reach = memory.itemsize
    for stride, length in axes if 0 not in memory.shape else ():
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False


def as_array(memory: Memory) -> np.ndarray[Any, Any]:
    """A NumPy array that borrows the memory, for questions about overlap; the owner must outlive it."""

    class Borrowed:
        __array_interface__ = {  # noqa: RUF012
            "data": (memory.address, True),
            "shape": memory.shape,
            "strides": memory.strides,
            "typestr": f"<u{memory.itemsize}",
            "version": 3,
        }

    return np.asarray(Borrowed())
