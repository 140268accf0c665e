"""NumPy's array objects looked at in compiled code, if an experiment shows that their fields lie where they should.

The fields are those of `PyArrayObject_fields` in NumPy's public headers.
"""

import ctypes
import functools
import struct
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.exchange import get_item
from gradstep.arrays.library import OTHER, Found
from gradstep.program.compiler import load_function

Array = np.ndarray[Any, Any]

WRITEABLE = 0x400  # NPY_ARRAY_WRITEABLE

# A job is eleven words: the function that gets an item of a list, the offsets of seven fields, the number of arrays,
# their records, and their addresses at the last look, which are replaced. A record is five words: type, dtype object,
# number of dimensions, the writable flag, and the place of its lengths and then strides.
LOCATE = """
define i64 @locate_numpy(ptr %arrays, ptr %job) {
entry:
  %get_item = load ptr, ptr %job
  %type.at = getelementptr i64, ptr %job, i64 1
  %type.offset = load i64, ptr %type.at
  %data.at = getelementptr i64, ptr %job, i64 2
  %data.offset = load i64, ptr %data.at
  %ndim.at = getelementptr i64, ptr %job, i64 3
  %ndim.offset = load i64, ptr %ndim.at
  %shape.at = getelementptr i64, ptr %job, i64 4
  %shape.offset = load i64, ptr %shape.at
  %strides.at = getelementptr i64, ptr %job, i64 5
  %strides.offset = load i64, ptr %strides.at
  %dtype.at = getelementptr i64, ptr %job, i64 6
  %dtype.offset = load i64, ptr %dtype.at
  %flags.at = getelementptr i64, ptr %job, i64 7
  %flags.offset = load i64, ptr %flags.at
  %count.at = getelementptr i64, ptr %job, i64 8
  %count = load i64, ptr %count.at
  %records.at = getelementptr i64, ptr %job, i64 9
  %records = load ptr, ptr %records.at
  %addresses.at = getelementptr i64, ptr %job, i64 10
  %addresses = load ptr, ptr %addresses.at
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %i.next, %found ]
  %moved = phi i64 [ 0, %entry ], [ %moved.next, %found ]
  %left = icmp slt i64 %i, %count
  br i1 %left, label %look, label %done
look:
  %array = call ptr %get_item(ptr %arrays, i64 %i)
  %r = mul i64 %i, 5
  %record = getelementptr i64, ptr %records, i64 %r
  %own.type.at = getelementptr i8, ptr %array, i64 %type.offset
  %own.type = load i64, ptr %own.type.at
  %wanted.type = load i64, ptr %record
  %same.type = icmp eq i64 %own.type, %wanted.type
  br i1 %same.type, label %fields, label %other
fields:
  %own.dtype.at = getelementptr i8, ptr %array, i64 %dtype.offset
  %own.dtype = load i64, ptr %own.dtype.at
  %wanted.dtype.at = getelementptr i64, ptr %record, i64 1
  %wanted.dtype = load i64, ptr %wanted.dtype.at
  %same.dtype = icmp eq i64 %own.dtype, %wanted.dtype
  %own.ndim.at = getelementptr i8, ptr %array, i64 %ndim.offset
  %own.ndim32 = load i32, ptr %own.ndim.at
  %own.ndim = sext i32 %own.ndim32 to i64
  %wanted.ndim.at = getelementptr i64, ptr %record, i64 2
  %wanted.ndim = load i64, ptr %wanted.ndim.at
  %same.ndim = icmp eq i64 %own.ndim, %wanted.ndim
  %own.flags.at = getelementptr i8, ptr %array, i64 %flags.offset
  %own.flags32 = load i32, ptr %own.flags.at
  %own.flags = zext i32 %own.flags32 to i64
  %writable = and i64 %own.flags, 1024
  %wanted.flag.at = getelementptr i64, ptr %record, i64 3
  %wanted.flag = load i64, ptr %wanted.flag.at
  %same.flag = icmp eq i64 %writable, %wanted.flag
  %own.shape.at = getelementptr i8, ptr %array, i64 %shape.offset
  %own.shape = load ptr, ptr %own.shape.at
  %own.strides.at = getelementptr i8, ptr %array, i64 %strides.offset
  %own.strides = load ptr, ptr %own.strides.at
  %layout.at = getelementptr i64, ptr %record, i64 4
  %layout = load ptr, ptr %layout.at
  %c1 = and i1 %same.dtype, %same.ndim
  %c2 = and i1 %c1, %same.flag
  br i1 %c2, label %axis, label %other
axis:
  %k = phi i64 [ 0, %fields ], [ %k.next, %equal ]
  %more = icmp slt i64 %k, %wanted.ndim
  br i1 %more, label %compare, label %found
compare:
  %length.at = getelementptr i64, ptr %own.shape, i64 %k
  %length = load i64, ptr %length.at
  %stride.at = getelementptr i64, ptr %own.strides, i64 %k
  %stride = load i64, ptr %stride.at
  %wanted.length.at = getelementptr i64, ptr %layout, i64 %k
  %wanted.length = load i64, ptr %wanted.length.at
  %k.stride = add i64 %k, %wanted.ndim
  %wanted.stride.at = getelementptr i64, ptr %layout, i64 %k.stride
  %wanted.stride = load i64, ptr %wanted.stride.at
  %same.length = icmp eq i64 %length, %wanted.length
  %same.stride = icmp eq i64 %stride, %wanted.stride
  %both = and i1 %same.length, %same.stride
  br i1 %both, label %equal, label %other
equal:
  %k.next = add i64 %k, 1
  br label %axis
found:
  %address.at = getelementptr i8, ptr %array, i64 %data.offset
  %address = load i64, ptr %address.at
  %before.at = getelementptr i64, ptr %addresses, i64 %i
  %before = load i64, ptr %before.at
  %differs = icmp ne i64 %address, %before
  %differs.i = zext i1 %differs to i64
  %moved.next = or i64 %moved, %differs.i
  store i64 %address, ptr %before.at
  %i.next = add i64 %i, 1
  br label %next
done:
  %result = add i64 %moved, 1
  ret i64 %result
other:
  ret i64 0
}
"""


class Offsets(NamedTuple):
    """Where an array object has its fields, in bytes."""

    type: int
    data: int
    ndim: int
    shape: int
    strides: int
    dtype: int
    flags: int


EXPECTED = Offsets(type=8, data=16, ndim=24, shape=32, strides=40, dtype=56, flags=64)


@functools.cache
def find_offsets() -> Offsets | None:
    """The offsets of the public headers; None where this NumPy does not keep to them, on any of many arrays."""
    if struct.calcsize("P") != 8 or np.ndarray.__basicsize__ < EXPECTED.flags + 8:
        return None
    arrays = _samples()
    # What lies around the two pointers is known without following one; only then are these followed.
    fits = all(map(_has_known_fields, arrays)) and all(map(_has_layout, arrays))
    return EXPECTED if fits else None


def _samples() -> list[Array]:
    """Arrays that have little in common, many so that nothing agrees by chance."""
    some: list[Array] = []
    for length in range(1, 9):
        base = np.zeros((3, length, 5))
        some += [
            base, base[1:], base.transpose(2, 0, 1), np.ones(length + 6, np.float32), np.zeros((1,) * (length + 1)),
            np.asfortranarray(np.zeros((length + 1, 4), np.uint16)), np.ones(()), np.broadcast_to(base[0, 0], (2, 5)),
        ]  # fmt: skip
    return some


def _has_known_fields(array: Array) -> bool:
    base = 0 if array.base is None else id(array.base)
    return (
        _word(array, EXPECTED.type) == id(type(array))
        and _word(array, EXPECTED.data) == array.__array_interface__["data"][0]
        and _word(array, EXPECTED.ndim) & 0xFFFFFFFF == array.ndim
        and _word(array, EXPECTED.strides + 8) == base
        and _word(array, EXPECTED.dtype) == id(array.dtype)
        and _word(array, EXPECTED.flags) & 0xFFFFFFFF == array.flags.num
    )


def _has_layout(array: Array) -> bool:
    return array.ndim == 0 or (
        _read(array, EXPECTED.shape) == array.shape and _read(array, EXPECTED.strides) == array.strides
    )


def _read(array: Array, offset: int) -> tuple[int, ...]:
    return tuple((ctypes.c_int64 * array.ndim).from_address(_word(array, offset)))


def _word(array: Array, offset: int) -> int:
    return ctypes.c_uint64.from_address(id(array) + offset).value


class ObjectWatch:
    """See `Watch`: arrays of these types, dtype objects, layouts and flags."""

    def __init__(self, offsets: Offsets, arrays: list[Array]) -> None:
        self._kept = [(type(array), array.dtype) for array in arrays]  # so that nothing else takes their addresses
        layouts = [[*array.shape, *array.strides] for array in arrays]
        self._layouts = np.array([size for layout in layouts for size in layout], np.int64)
        places = self._layouts.ctypes.data + 8 * np.cumsum([0, *map(len, layouts)], dtype=np.int64)
        flags = [array.flags.num & WRITEABLE for array in arrays]
        self._records = np.array(
            [
                [id(kind), id(dtype), array.ndim, flag, place]
                for (kind, dtype), array, flag, place in zip(self._kept, arrays, flags, places, strict=False)
            ],
            np.int64,
        )
        self.addresses = np.zeros(len(arrays), np.int64)
        tables = self._records.ctypes.data, self.addresses.ctypes.data
        self._job = np.array([get_item(), *offsets, len(arrays), *tables], np.int64)
        self._job_address, self._count = self._job.ctypes.data, len(arrays)

    def locate(self, arrays: list[Array]) -> Found:
        """See `Watch.locate`."""
        return _locate()(arrays, self._job_address) if len(arrays) == self._count else OTHER


@functools.cache
def _locate() -> Any:
    # PYFUNCTYPE keeps the GIL.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.py_object, ctypes.c_void_p)
    return prototype(load_function("locate_numpy", LOCATE))
