"""Arrays as a checkpoint holds them, which belong to no array library yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import Form, FunctionalLibrary, MemoryLibrary, owner
from gradstep.arrays.memory import bits_dtype
from gradstep.arrays.numpy import NUMPY
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
            return NUMPY.from_bits(self.bits, self.dtype)
        except DtypeError as error:
            raise DtypeError(
                f"a loaded array belongs to NumPy before the next step. {error}; or load with like=params"
            ) from None


def dtype_of(array: Any) -> str:
    """The name of an array's dtype, whoever owns it."""
    return array.dtype if isinstance(array, Stored) else str(array.dtype).rpartition(".")[-1].rstrip("_")


def bits_of(array: Any, what: str) -> Bits:
    """The elements of an array of any library, in C order; its own memory where it lies so."""
    if isinstance(array, Stored):
        return array.bits
    library = owner(array)
    if library is None:
        raise ArgumentTypeError(f"{what} is a {type(array).__name__}; expected an array of NumPy, PyTorch, JAX or MLX")
    if library is NUMPY:
        array = np.asarray(array)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    bits = library.as_numpy(array)
    return np.ascontiguousarray(bits).reshape(bits.shape)  # the former makes a vector of what has no dimensions


def empty_bits(shape: Sequence[int], dtype: str) -> Bits:
    """Memory for the elements of an array."""
    return np.empty(shape, bits_dtype(dtype))
