"""Layouts and addresses of many arrays at once, through the DLPack exchange table that their type publishes.

The table (DLPack 1.3, `DLPackExchangeAPI`) has a function that describes one array without creating objects. A
small compiled loop calls it for each array and compares what it says with what was planned.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gradstep.arrays.memory import Integers
from gradstep.program.compiler import load_function

ATTRIBUTE = "__dlpack_c_exchange_api__"
DESCRIBE = 40  # bytes into the table: dltensor_from_py_object_no_sync
MAJOR = 1

# A record is: number of dimensions, dtype word (code, bits, lanes), start of its lengths and strides, elements.
LOCATE = """
%tensor = type { ptr, i32, i32, i32, i32, ptr, ptr, i64 }
define i64 @locate(ptr %objects, i64 %count, ptr %describe, ptr %records, ptr %layouts, ptr %addresses) {
entry:
  %t = alloca %tensor
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %i.next, %same ]
  %left = icmp slt i64 %i, %count
  br i1 %left, label %ask, label %exit
ask:
  %object.at = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %object.at
  %status = call i32 %describe(ptr %object, ptr %t)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %look, label %exit
look:
  %r = mul i64 %i, 4
  %ndim.at = getelementptr i64, ptr %records, i64 %r
  %dtype.at = getelementptr i64, ptr %ndim.at, i64 1
  %layout.at = getelementptr i64, ptr %ndim.at, i64 2
  %elements.at = getelementptr i64, ptr %ndim.at, i64 3
  %ndim = load i64, ptr %ndim.at
  %dtype = load i64, ptr %dtype.at
  %layout.index = load i64, ptr %layout.at
  %elements = load i64, ptr %elements.at
  %t.device.at = getelementptr %tensor, ptr %t, i32 0, i32 1
  %t.ndim.at = getelementptr %tensor, ptr %t, i32 0, i32 3
  %t.dtype.at = getelementptr %tensor, ptr %t, i32 0, i32 4
  %t.shape.at = getelementptr %tensor, ptr %t, i32 0, i32 5
  %t.strides.at = getelementptr %tensor, ptr %t, i32 0, i32 6
  %t.offset.at = getelementptr %tensor, ptr %t, i32 0, i32 7
  %data = load ptr, ptr %t
  %device = load i32, ptr %t.device.at
  %t.ndim32 = load i32, ptr %t.ndim.at
  %t.dtype32 = load i32, ptr %t.dtype.at
  %shape = load ptr, ptr %t.shape.at
  %strides = load ptr, ptr %t.strides.at
  %offset = load i64, ptr %t.offset.at
  %t.ndim = sext i32 %t.ndim32 to i64
  %t.dtype = zext i32 %t.dtype32 to i64
  %layout = getelementptr i64, ptr %layouts, i64 %layout.index
  %on.cpu = icmp eq i32 %device, 1
  %same.ndim = icmp eq i64 %ndim, %t.ndim
  %same.dtype = icmp eq i64 %dtype, %t.dtype
  %has.data = icmp ne ptr %data, null
  %is.empty = icmp eq i64 %elements, 0
  %memory = or i1 %has.data, %is.empty
  %no.strides = icmp eq ptr %strides, null
  %is.scalar = icmp eq i64 %ndim, 0
  %has.strides = xor i1 %no.strides, true
  %strided = or i1 %has.strides, %is.scalar
  %a = and i1 %on.cpu, %same.ndim
  %b = and i1 %same.dtype, %memory
  %c = and i1 %a, %b
  %d = and i1 %c, %strided
  br i1 %d, label %axis, label %exit
axis:
  %k = phi i64 [ 0, %look ], [ %k.next, %equal ]
  %more = icmp slt i64 %k, %ndim
  br i1 %more, label %compare, label %same
compare:
  %length.at = getelementptr i64, ptr %shape, i64 %k
  %stride.at = getelementptr i64, ptr %strides, i64 %k
  %length = load i64, ptr %length.at
  %stride = load i64, ptr %stride.at
  %wanted.length.at = getelementptr i64, ptr %layout, i64 %k
  %k.stride = add i64 %k, %ndim
  %wanted.stride.at = getelementptr i64, ptr %layout, i64 %k.stride
  %wanted.length = load i64, ptr %wanted.length.at
  %wanted.stride = load i64, ptr %wanted.stride.at
  %same.length = icmp eq i64 %length, %wanted.length
  %same.stride = icmp eq i64 %stride, %wanted.stride
  %both = and i1 %same.length, %same.stride
  br i1 %both, label %equal, label %exit
equal:
  %k.next = add i64 %k, 1
  br label %axis
same:
  %base = ptrtoint ptr %data to i64
  %address = add i64 %base, %offset
  %address.at = getelementptr i64, ptr %addresses, i64 %i
  store i64 %address, ptr %address.at
  %i.next = add i64 %i, 1
  br label %next
exit:
  ret i64 %i
}
"""


class Fallback(Protocol):
    """A way to watch arrays that needs no exchange table."""

    def locate(self, arrays: list[Any]) -> Integers | None: ...


class ExchangeWatch:
    """See `Watch`. `refuse` looks for what the exchange table does not show; None for always the same arrays."""

    def __init__(self, describe: int, arrays: Sequence[Any], refuse: Callable[[list[Any]], bool] | None) -> None:
        self._describe, self._refuse = describe, refuse
        self._count = len(arrays)
        self._types = list(map(type, arrays))
        records: list[list[int]] = []
        layouts: list[int] = []
        for array in arrays:
            bits = 8 * array.element_size()
            records.append([array.ndim, 2 | bits << 8 | 1 << 16, len(layouts), array.numel()])
            layouts += [*array.shape, *array.stride()]
        self._records = np.array(records, np.int64).reshape(-1, 4)
        self._layouts = np.array(layouts, np.int64)
        self._tables = self._records.ctypes.data, self._layouts.ctypes.data

    def locate(self, arrays: list[Any]) -> Integers | None:
        """See `Watch.locate`."""
        if self._refuse is not None and (list(map(type, arrays)) != self._types or self._refuse(arrays)):
            return None
        addresses = np.empty(self._count, np.int64)
        objects = np.fromiter(arrays, object, self._count)
        try:
            done = _locate()(objects.ctypes.data, self._count, self._describe, *self._tables, addresses.ctypes.data)
        except Exception:  # the library refuses to describe one: the next plan says which, and why
            return None
        return addresses if done == self._count else None


@functools.cache
def _locate() -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    # PYFUNCTYPE keeps the GIL, and raises what the library has set as an error.
    prototype = ctypes.PYFUNCTYPE(integer, pointer, integer, pointer, pointer, pointer, pointer)
    return prototype(load_function("locate", LOCATE))


def load_exchange(array_type: type, probe: Any, fallback: Callable[[list[Any]], Fallback]) -> int | None:
    """The address of the describing function; None where there is none, or it fails a test against `fallback`."""
    capsule = getattr(array_type, ATTRIBUTE, None)
    if capsule is None:
        return None
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table: int = get_pointer(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(table).value != MAJOR:
        return None
    describe = ctypes.c_void_p.from_address(table + DESCRIBE).value
    if not describe:
        return None
    found = ExchangeWatch(describe, [probe], lambda _: False).locate([probe])
    expected = fallback([probe]).locate([probe])
    agree = found is not None and expected is not None and np.array_equal(found, expected)
    return describe if agree else None
