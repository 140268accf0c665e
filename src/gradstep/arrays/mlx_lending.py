"""Memory of MLX on the CPU that is taken for new arrays where nobody holds the old ones."""

import ctypes
import importlib
from functools import cache
from typing import Any

import numpy as np

from gradstep.arrays.lending import lends, succeeds
from gradstep.arrays.library import Located
from gradstep.arrays.memory import Bits, bits_at, bits_dtype
from gradstep.program.formats import NARROW

mx: Any = importlib.import_module("mlx.core")

SHORT = 1 << 18  # bytes up to which a copy takes less time than MLX needs to begin

_borrow: Any = ctypes.c_char.from_buffer


class MlxLender:
    """Renews arrays by giving them an element that they have: MLX does so in place where nobody else holds them.

    Short arrays are copied.
    """

    asks_holders = True

    def can_lend(self, written: list[Any], read: list[Any]) -> bool:
        """See `Lender.can_lend`."""
        return bool(written) and mx.default_device() == mx.Device(mx.cpu) and works()

    def locate(self, arrays: list[Any]) -> Located:
        """See `Lender.locate`."""
        mx.eval(arrays)
        address_of = ctypes.addressof
        try:
            return Located(arrays, [address_of(_borrow(array)) for array in arrays])
        except (TypeError, ValueError):  # one is empty, or not in C order
            plain = [mx.contiguous(array, stream=mx.cpu) for array in arrays]
            mx.eval(plain)
            return Located(plain, [address_of(_borrow(array)) if array.size else 0 for array in plain])

    def view(self, array: Any, address: int) -> Bits:
        """See `Lender.view`."""
        return bits_at(address, tuple(array.shape), _name(array.dtype))

    def renew(self, arrays: list[Any]) -> list[Any]:
        """See `Lender.renew`."""
        return [_copy(array) if array.nbytes <= SHORT else _renewed(array) for array in arrays]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _copy(array: Any) -> Any:
    if not array.size:
        return array
    if _name(array.dtype) not in NARROW:
        return mx.array(memoryview(array), array.dtype)
    return _typed(np.frombuffer(array, np.uint16).reshape(array.shape), array.dtype)


def _renewed(array: Any) -> Any:
    first = np.frombuffer(array, bits_dtype(_name(array.dtype)), 1)
    element = _typed(first.reshape((1,) * array.ndim), array.dtype)
    return mx.slice_update(array, element, _origin(array.ndim), tuple(range(array.ndim)), stream=mx.cpu)


def _typed(bits: np.ndarray[Any, Any], dtype: Any) -> Any:
    if _name(dtype) in NARROW:
        return mx.array(bits).view(dtype, stream=mx.cpu)
    return mx.array(bits, dtype)


@cache
def _origin(ndim: int) -> Any:
    return mx.zeros(ndim, mx.int32)


def works() -> bool:
    """Whether this version of MLX writes in place what nobody holds, copies what is held, and shows what is written."""
    return succeeds(_works)


@cache
def _works() -> bool:
    return lends(MlxLender(), [mx.arange(SHORT, dtype=mx.float32) for _ in range(2)])
