"""NumPy arrays."""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from gradstep.arrays.library import OTHER, Found, found, is_masked
from gradstep.arrays.memory import Memory, bits_dtype
from gradstep.arrays.numpy_objects import ObjectWatch, find_offsets
from gradstep.errors import ArgumentTypeError, DtypeError
from gradstep.program.blocks import sum_of_squares, sum_of_values
from gradstep.program.formats import BYTES, EXPECTED
from gradstep.program.newton_schulz import Iteration, newton_schulz
from gradstep.program.threads import Team

Array = np.ndarray[Any, Any]

_borrow: Any = ctypes.c_char.from_buffer


class NumPy:
    """Arrays of NumPy, written where they lie."""

    name = "NumPy"
    in_place: Literal[True] = True
    team: Team | None = None
    multiplies_bfloat16 = False

    def call(self, name: str, *args: Any) -> Any:
        """See `Operations.call`."""
        return getattr(np, name)(*args)

    def mean(self, x: Any, axis: int | None) -> Any:
        """See `Operations.mean`."""
        array = np.asarray(x)
        if axis is None:
            return array.dtype.type(sum_of_values(array) / max(array.size, 1))
        sums = array.sum(axis=axis, dtype=np.float64, keepdims=True)
        return (sums / max(array.shape[axis], 1)).astype(array.dtype)

    def rms(self, x: Any) -> Any:
        """See `Operations.rms`."""
        array = np.asarray(x)
        return array.dtype.type(math.sqrt(sum_of_squares(array) / max(array.size, 1)))

    def norm(self, x: Any) -> Any:
        """See `Operations.norm`."""
        array = np.asarray(x)
        return array.dtype.type(math.sqrt(sum_of_squares(array)))

    def orthogonalize(self, x: Any, iteration: Iteration) -> Any:
        """See `Operations.orthogonalize`."""
        if iteration.dtype:
            raise DtypeError(f"NumPy has no matrix products in {iteration.dtype}; leave the dtype out")
        return newton_schulz(x.copy(), iteration)

    def value_and_grad(self, function: Callable[..., Any]) -> NoReturn:
        """See `Operations.value_and_grad`."""
        raise ArgumentTypeError(
            "NumPy computes no gradients; write them by hand, or pass arrays of PyTorch, JAX or MLX: "
            "{name: torch.from_numpy(array) for name, array in params.items()}"
        )

    def describe(self, array: Array, what: str) -> Memory:
        """See `MemoryLibrary.describe`."""
        if is_masked(array):
            raise ArgumentTypeError(f"{what} is a masked array, and a step would ignore the mask; pass .filled()")
        if array.dtype.name not in BYTES or not array.dtype.isnative:
            raise DtypeError(
                f"{what} has dtype {array.dtype}; {EXPECTED} in native byte order: convert it with .astype(np.float32)"
            )
        return Memory(_address(array), array.shape, array.strides, array.dtype.name, array.flags.writeable)

    def watch(self, arrays: list[Array]) -> "ObjectWatch | Watched":
        """See `MemoryLibrary.watch`."""
        offsets = find_offsets()
        return ObjectWatch(offsets, arrays) if offsets else Watched(arrays)

    def zeros(self, shape: Sequence[int], order: Sequence[int], dtype: str) -> Array:
        """See `MemoryLibrary.zeros`."""
        array = np.zeros([shape[axis] for axis in order], numpy_dtype(dtype))
        return array.transpose(np.argsort(order)) if len(order) else array

    def as_numpy(self, array: Array) -> Array:
        """See `MemoryLibrary.as_numpy`."""
        return array.view(bits_dtype(array.dtype.name), np.ndarray)

    def from_bits(self, bits: Array, dtype: str) -> Array:
        """See `MemoryLibrary.from_bits`."""
        return bits.view(numpy_dtype(dtype))

    def wrote(self, arrays: list[Array]) -> None:
        """NumPy keeps no record of writes."""


def numpy_dtype(name: str) -> Any:
    """The dtype of this name; bfloat16 is the package ml_dtypes'."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise DtypeError(
            'NumPy arrays of bfloat16 need the package ml_dtypes: pip install "gradstep[bfloat16]"'
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


class Watched:
    """See `Watch`."""

    def __init__(self, arrays: list[Array]) -> None:
        self._layouts = _layouts(arrays)
        self.addresses = np.zeros(len(arrays), np.int64)

    def locate(self, arrays: list[Array]) -> Found:
        """See `Watch.locate`."""
        if _layouts(arrays) != self._layouts:
            return OTHER
        return found(self, _addresses(arrays))


def _layouts(arrays: list[Array]) -> tuple[object, ...]:
    types = list(map(type, arrays))
    if not all(issubclass(kind, np.ndarray) for kind in set(types)):
        return (types,)
    return (
        types,
        [array.shape for array in arrays],
        [array.strides for array in arrays],
        [array.dtype for array in arrays],
        [array.flags.writeable for array in arrays],
    )


def _addresses(arrays: list[Array]) -> list[int]:
    address_of = ctypes.addressof
    try:
        return [address_of(_borrow(array)) for array in arrays]
    except (TypeError, ValueError, BufferError):  # one is read-only, empty or not in C order
        return [_address(array) for array in arrays]


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]


NUMPY = NumPy()
