"""Layouts and addresses of many arrays at once, through the DLPack exchange table that their type publishes.

The table (DLPack 1.3, `DLPackExchangeAPI`) has a function that describes one array without creating objects. A
small compiled loop calls it for each array and compares what it says with what was planned.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.library import OTHER, Found
from gradstep.program.compiler import load_function

ATTRIBUTE = "__dlpack_c_exchange_api__"
DESCRIBE = 40  # bytes into the table: dltensor_from_py_object_no_sync
MAJOR = 1

# A job is eleven words: the function that gets an item of a list, the one that describes an array, the five of
# `Offsets`, and the number of arrays with their records, layouts and addresses. A record is: number of dimensions,
# dtype word (code, bits, lanes), start of its lengths and strides, elements, type.
#
# What the library says of an array lies in three objects, each found through the one before, and after a training
# step none of them is in the cache. Blocks of arrays are therefore looked at in three rounds, each of which
# fetches what the next one reads, and what later steps will: the pointers after that to the storage lead to the
# version counter. Without `Offsets` (all 0) types and flags are not looked at.
LOCATE = """
%tensor = type { ptr, i32, i32, i32, i32, ptr, ptr, i64 }
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define i64 @locate(ptr %arrays, ptr %job) {
entry:
  %t = alloca %tensor
  %objects = alloca [32 x ptr]
  %get_item.at = getelementptr i64, ptr %job, i64 0
  %get_item = load ptr, ptr %get_item.at
  %describe.at = getelementptr i64, ptr %job, i64 1
  %describe = load ptr, ptr %describe.at
  %type.offset.at = getelementptr i64, ptr %job, i64 2
  %type.offset = load i64, ptr %type.offset.at
  %body.offset.at = getelementptr i64, ptr %job, i64 3
  %body.offset = load i64, ptr %body.offset.at
  %flags.offset.at = getelementptr i64, ptr %job, i64 4
  %flags.offset = load i64, ptr %flags.offset.at
  %refused.at = getelementptr i64, ptr %job, i64 5
  %refused = load i64, ptr %refused.at
  %storage.offset.at = getelementptr i64, ptr %job, i64 6
  %storage.offset = load i64, ptr %storage.offset.at
  %count.at = getelementptr i64, ptr %job, i64 7
  %count = load i64, ptr %count.at
  %records.at = getelementptr i64, ptr %job, i64 8
  %records = load ptr, ptr %records.at
  %layouts.at = getelementptr i64, ptr %job, i64 9
  %layouts = load ptr, ptr %layouts.at
  %addresses.at = getelementptr i64, ptr %job, i64 10
  %addresses = load ptr, ptr %addresses.at
  %known = icmp ne i64 %refused, 0
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %block, label %exit.good
block:
  %begin = phi i64 [ 0, %entry ], [ %end, %finished ]
  %moved = phi i64 [ 0, %entry ], [ %moved.i, %finished ]
  %further = add i64 %begin, 32
  %whole = icmp slt i64 %further, %count
  %end = select i1 %whole, i64 %further, i64 %count
  br label %first
first:
  %a = phi i64 [ %begin, %block ], [ %a.next, %first.next ]
  %a.left = icmp slt i64 %a, %end
  br i1 %a.left, label %get, label %first.end
first.end:
  br i1 %known, label %second, label %third
get:
  %a.object = call ptr %get_item(ptr %arrays, i64 %a)
  %a.place = sub i64 %a, %begin
  %a.object.at = getelementptr ptr, ptr %objects, i64 %a.place
  store ptr %a.object, ptr %a.object.at
  br i1 %known, label %check.type, label %first.next
check.type:
  %type.at = getelementptr i8, ptr %a.object, i64 %type.offset
  %type = load i64, ptr %type.at
  %a.r = mul i64 %a, 5
  %a.record = getelementptr i64, ptr %records, i64 %a.r
  %wanted.type.at = getelementptr i64, ptr %a.record, i64 4
  %wanted.type = load i64, ptr %wanted.type.at
  %same.type = icmp eq i64 %type, %wanted.type
  br i1 %same.type, label %fetch.body, label %exit
fetch.body:
  %a.body.at = getelementptr i8, ptr %a.object, i64 %body.offset
  %a.body = load ptr, ptr %a.body.at
  %a.line1 = getelementptr i8, ptr %a.body, i64 64
  %a.line2 = getelementptr i8, ptr %a.body, i64 128
  call void @llvm.prefetch.p0(ptr %a.body, i32 0, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %a.line1, i32 0, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %a.line2, i32 0, i32 3, i32 1)
  br label %first.next
first.next:
  %a.next = add i64 %a, 1
  br label %first
second:
  %b = phi i64 [ %begin, %first.end ], [ %b.next, %fetch.storage ]
  %b.left = icmp slt i64 %b, %end
  br i1 %b.left, label %find.body, label %third
find.body:
  %b.place = sub i64 %b, %begin
  %b.object.at = getelementptr ptr, ptr %objects, i64 %b.place
  %b.object = load ptr, ptr %b.object.at
  %b.body.at = getelementptr i8, ptr %b.object, i64 %body.offset
  %b.body = load ptr, ptr %b.body.at
  %has.body = icmp ne ptr %b.body, null
  br i1 %has.body, label %check.flags, label %exit
check.flags:
  %flags.at = getelementptr i8, ptr %b.body, i64 %flags.offset
  %flags = load i64, ptr %flags.at
  %odd = and i64 %flags, %refused
  %plain = icmp eq i64 %odd, 0
  br i1 %plain, label %fetch.storage, label %exit
fetch.storage:
  %storage.at = getelementptr i8, ptr %b.body, i64 %storage.offset
  %storage = load ptr, ptr %storage.at
  %storage.line1 = getelementptr i8, ptr %storage, i64 64
  call void @llvm.prefetch.p0(ptr %storage, i32 0, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %storage.line1, i32 0, i32 3, i32 1)
  %further8.at = getelementptr i8, ptr %storage.at, i64 8
  %further8 = load ptr, ptr %further8.at
  call void @llvm.prefetch.p0(ptr %further8, i32 0, i32 3, i32 1)
  %further16.at = getelementptr i8, ptr %storage.at, i64 16
  %further16 = load ptr, ptr %further16.at
  call void @llvm.prefetch.p0(ptr %further16, i32 0, i32 3, i32 1)
  %further24.at = getelementptr i8, ptr %storage.at, i64 24
  %further24 = load ptr, ptr %further24.at
  call void @llvm.prefetch.p0(ptr %further24, i32 0, i32 3, i32 1)
  %b.next = add i64 %b, 1
  br label %second
third:
  %i = phi i64 [ %begin, %first.end ], [ %begin, %second ], [ %i.next, %found ]
  %moved.i = phi i64 [ %moved, %first.end ], [ %moved, %second ], [ %moved.next, %found ]
  %left = icmp slt i64 %i, %end
  br i1 %left, label %ask, label %finished
finished:
  br i1 %whole, label %block, label %exit.last
ask:
  %place = sub i64 %i, %begin
  %object.at = getelementptr ptr, ptr %objects, i64 %place
  %object = load ptr, ptr %object.at
  %status = call i32 %describe(ptr %object, ptr %t)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %look, label %exit
look:
  %r = mul i64 %i, 5
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
  %c1 = and i1 %on.cpu, %same.ndim
  %c2 = and i1 %same.dtype, %memory
  %c3 = and i1 %c1, %c2
  %c4 = and i1 %c3, %strided
  br i1 %c4, label %axis, label %exit
axis:
  %k = phi i64 [ 0, %look ], [ %k.next, %equal ]
  %more = icmp slt i64 %k, %ndim
  br i1 %more, label %compare, label %found
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
found:
  %base = ptrtoint ptr %data to i64
  %address = add i64 %base, %offset
  %address.at = getelementptr i64, ptr %addresses, i64 %i
  %before = load i64, ptr %address.at
  %other = icmp ne i64 %address, %before
  %other.i = zext i1 %other to i64
  %moved.next = or i64 %moved.i, %other.i
  store i64 %address, ptr %address.at
  %i.next = add i64 %i, 1
  br label %third
exit.last:
  %result = add i64 %moved.i, 1
  ret i64 %result
exit.good:
  ret i64 1
exit:
  ret i64 0
}
"""


class Offsets(NamedTuple):
    """Where the objects of a library keep what no interface tells fast enough, in bytes; found by experiment.

    An array object holds its type and a pointer to its body; the body holds flags, of which `refused` must not be
    set, and a pointer to its storage.
    """

    type: int
    body: int
    flags: int
    refused: int
    storage: int


class Exchange(NamedTuple):
    """How a library is asked: its describing function, and what was found out about its objects."""

    describe: int
    offsets: Offsets | None


class ExchangeWatch:
    """See `Watch`.

    `codes` gives DLPack's codes of dtypes that are no plain floats. `is_odd` looks for what the exchange table does not
    show, where there are no offsets.
    """

    def __init__(
        self,
        exchange: Exchange,
        arrays: Sequence[Any],
        codes: Mapping[Any, int],
        is_odd: Callable[[list[Any]], bool],
    ) -> None:
        self._describe, self._is_odd = exchange.describe, None if exchange.offsets else is_odd
        self._count = len(arrays)
        self._types: list[type[Any]] = list(map(type, arrays))
        records: list[list[int]] = []
        layouts: list[int] = []
        for array, kind in zip(arrays, self._types, strict=True):
            dtype = codes.get(array.dtype, 2) | 8 * array.element_size() << 8 | 1 << 16
            records.append([array.ndim, dtype, len(layouts), array.numel(), id(kind)])
            layouts += [*array.shape, *array.stride()]
        self._records, self._layouts = np.array(records, np.int64), np.array(layouts, np.int64)
        self.addresses = np.zeros(self._count, np.int64)
        tables = (table.ctypes.data for table in (self._records, self._layouts, self.addresses))
        offsets = exchange.offsets or (0,) * 5
        self._job = np.array([get_item(), exchange.describe, *offsets, self._count, *tables], np.int64)
        self._job_address = self._job.ctypes.data

    def locate(self, arrays: list[Any]) -> Found:
        """See `Watch.locate`."""
        if len(arrays) != self._count:
            return OTHER
        if self._is_odd is not None and (list(map(type, arrays)) != self._types or self._is_odd(arrays)):
            return OTHER
        try:
            return _locate()(arrays, self._job_address)
        except Exception:  # the library refuses to describe one: the next plan says which, and why
            return OTHER


def get_item() -> int:
    """The address of the function that gets an item of a list."""
    return ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p).value or 0


@functools.cache
def _locate() -> Any:
    # PYFUNCTYPE keeps the GIL, and raises what the library has set as an error.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.py_object, ctypes.c_void_p)
    return prototype(load_function("locate", LOCATE))


def describing_function(array_type: type) -> int | None:
    """The address of the function that describes an array; None where the type publishes none that we know."""
    capsule = getattr(array_type, ATTRIBUTE, None)
    if capsule is None:
        return None
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table: int = get_pointer(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(table).value != MAJOR:
        return None
    return ctypes.c_void_p.from_address(table + DESCRIBE).value or None
