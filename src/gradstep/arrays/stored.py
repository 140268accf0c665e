"""Arrays as a checkpoint holds them, which belong to no array library yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import (
    Form,
    FunctionalLibrary,
    Library,
    MemoryLibrary,
    is_masked,
    numpy_library,
    owner,
)
from gradstep.arrays.memory import bits_dtype
from gradstep.errors import ArgumentTypeError, DtypeError

Bits = np.ndarray[Any, Any]


class Stored:
    """The elements of an array in C order; an array library gets them when it is known.

    Attributes:
        bits: a NumPy array, in which 16-bit floats are their bits.
        dtype: the name of the elements' dtype.
    """

    __slots__ = ("bits", "dtype")

    def __init__(self, bits: Bits, dtype: str) -> None:
        self.bits, self.dtype = bits, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.bits.shape

    def in_memory(self, library: MemoryLibrary, order: Sequence[int]) -> Any:
        """The array in a library: the same memory, unless axes are wanted in another order, from slow to fast."""
        if list(order) == sorted(order):
            return library.from_bits(self.bits, self.dtype)
        array = library.zeros(self.shape, order, self.dtype)
        library.as_numpy(array)[...] = self.bits
        return array

    def in_place_of(self, library: FunctionalLibrary, form: Form) -> Any:
        """The array in a library, where an array of this form lies."""
        return library.from_bits(self.bits, form)

    def shown(self) -> Any:
        """The same memory as an array of NumPy."""
        try:
            return numpy_library().from_bits(self.bits, self.dtype)
        except DtypeError as error:
            raise DtypeError(
                f"a loaded array belongs to NumPy before the next step. {error}; or load with like=params"
            ) from None


def dtype_of(array: Any) -> str:
    """The name of an array's dtype, whoever owns it."""
    if isinstance(array, Stored):
        return array.dtype
    return getattr(array.dtype, "name", None) or str(array.dtype).rpartition(".")[-1].rstrip("_")


def check_array(array: Any, what: str) -> Library:
    """The library of an array whose elements can be read.

    Raises:
        ArgumentTypeError: it is none, or masked.
    """
    library = owner(array)
    if library is None:
        raise ArgumentTypeError(f"{what} is a {type(array).__name__}; expected an array of NumPy, PyTorch, JAX or MLX")
    if is_masked(array):
        raise ArgumentTypeError(f"{what} is a masked array, and its mask would be lost; pass .filled()")
    return library


def bits_of(array: Any, what: str) -> Bits:
    """The elements of an array of any library, in C order; its own memory where it lies so.

    Raises:
        ArgumentTypeError: it is no array, or one whose elements do not lie in memory.
    """
    if isinstance(array, Stored):
        return array.bits
    library = check_array(array, what)
    if library is numpy_library():
        array = np.asarray(array)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        bits = library.as_numpy(array)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ArgumentTypeError(f"{what} is no array whose elements can be read where they lie: {error}") from None
    return np.ascontiguousarray(bits).reshape(bits.shape)  # the former makes a vector of what has no dimensions


def copy_of(array: Any, what: str) -> Stored:
    """The elements of an array of any library, copied."""
    return Stored(np.array(bits_of(array, what)), dtype_of(array))


def empty_bits(shape: Sequence[int], dtype: str) -> Bits:
    """Memory for the elements of an array."""
    return np.empty(shape, bits_dtype(dtype))
