"""The shape of a nested tree, by which the leaves of the next one are found in compiled code."""

import ctypes
import functools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from gradstep.program.compiler import load_function

# A branch is a record of five words: the type of the container, how it is gone through, its length, and the addresses
# of its keys and of its parts. A part is 0 for a leaf, 1 for None, and else the address of a branch.
DICT, LIST, TUPLE = 0, 1, 2
LEAF, NOTHING = 0, 1

COLLECT = """
define i64 @collect(ptr %tree, ptr %branch, ptr %leaves, ptr %python) {
entry:
  %at = alloca i64
  %key.at = alloca ptr
  %value.at = alloca ptr
  store i64 0, ptr %at
  %type.at = getelementptr i64, ptr %tree, i64 1
  %type = load i64, ptr %type.at
  %wanted.type = load i64, ptr %branch
  %same.type = icmp eq i64 %type, %wanted.type
  br i1 %same.type, label %measure, label %other
measure:
  %kind.at = getelementptr i64, ptr %branch, i64 1
  %kind = load i64, ptr %kind.at
  %length.at = getelementptr i64, ptr %branch, i64 2
  %length = load i64, ptr %length.at
  %keys.at = getelementptr i64, ptr %branch, i64 3
  %keys = load ptr, ptr %keys.at
  %parts.at = getelementptr i64, ptr %branch, i64 4
  %parts = load ptr, ptr %parts.at
  %size.at = getelementptr ptr, ptr %python, i64 %kind
  %size = load ptr, ptr %size.at
  %own.length = call i64 %size(ptr %tree)
  %same.length = icmp eq i64 %own.length, %length
  %append.at = getelementptr ptr, ptr %python, i64 3
  %append = load ptr, ptr %append.at
  %none.at = getelementptr ptr, ptr %python, i64 4
  %none = load ptr, ptr %none.at
  %next_item.at = getelementptr ptr, ptr %python, i64 5
  %next_item = load ptr, ptr %next_item.at
  %compare.at = getelementptr ptr, ptr %python, i64 6
  %compare = load ptr, ptr %compare.at
  %get.offset = add i64 %kind, 6
  %get.at = getelementptr ptr, ptr %python, i64 %get.offset
  %get = load ptr, ptr %get.at
  br i1 %same.length, label %next, label %other
next:
  %i = phi i64 [ 0, %measure ], [ %i.next, %taken ]
  %left = icmp slt i64 %i, %length
  br i1 %left, label %item, label %done
item:
  %is.dict = icmp eq i64 %kind, 0
  br i1 %is.dict, label %of.dict, label %of.sequence
of.sequence:
  %element = call ptr %get(ptr %tree, i64 %i)
  br label %value
of.dict:
  %there = call i32 %next_item(ptr %tree, ptr %at, ptr %key.at, ptr %value.at)
  %is.there = icmp ne i32 %there, 0
  br i1 %is.there, label %look.at.key, label %other
look.at.key:
  %key = load ptr, ptr %key.at
  %wanted.key.at = getelementptr ptr, ptr %keys, i64 %i
  %wanted.key = load ptr, ptr %wanted.key.at
  %entry.value = load ptr, ptr %value.at
  %same.key = icmp eq ptr %key, %wanted.key
  br i1 %same.key, label %value, label %types
types:
  %key.type.at = getelementptr i64, ptr %key, i64 1
  %key.type = load i64, ptr %key.type.at
  %wanted.key.type.at = getelementptr i64, ptr %wanted.key, i64 1
  %wanted.key.type = load i64, ptr %wanted.key.type.at
  %alike = icmp eq i64 %key.type, %wanted.key.type
  br i1 %alike, label %equality, label %other
equality:
  %equal = call i32 %compare(ptr %key, ptr %wanted.key, i32 2)
  %is.equal = icmp eq i32 %equal, 1
  br i1 %is.equal, label %value, label %other
value:
  %v = phi ptr [ %element, %of.sequence ], [ %entry.value, %look.at.key ], [ %entry.value, %equality ]
  %part.at = getelementptr i64, ptr %parts, i64 %i
  %part = load i64, ptr %part.at
  switch i64 %part, label %below [ i64 0, label %leaf
                                   i64 1, label %nothing ]
leaf:
  %failed = call i32 %append(ptr %leaves, ptr %v)
  %appended = icmp eq i32 %failed, 0
  br i1 %appended, label %taken, label %other
nothing:
  %is.none = icmp eq ptr %v, %none
  br i1 %is.none, label %taken, label %other
below:
  %child = inttoptr i64 %part to ptr
  %as.before = call i64 @collect(ptr %v, ptr %child, ptr %leaves, ptr %python)
  %alike.below = icmp ne i64 %as.before, 0
  br i1 %alike.below, label %taken, label %other
taken:
  %i.next = add i64 %i, 1
  br label %next
done:
  ret i64 1
other:
  ret i64 0
}
"""


class Outline:
    """The shape of a tree of dicts, lists and tuples: their types, keys and lengths, and the types of the leaves."""

    def __init__(self, tree: object, named: Mapping[str, Any]) -> None:
        self._names, self._kinds = list(named), set(map(type, named.values()))
        self._kept: list[object] = []  # what the records point to
        self._top = self._record(tree)

    def named(self, tree: object) -> dict[str, Any] | None:
        """The leaves of a tree by name; None if it has another shape."""
        leaves: list[Any] = []
        collect, python, _ = _collect()
        alike = collect(tree, self._top, leaves, python)
        if not alike or not self._kinds.issuperset(map(type, leaves)):
            return None
        return dict(zip(self._names, leaves, strict=True))

    def _record(self, tree: Any) -> int:
        """The address of a branch."""
        container = cast("type[Any]", type(tree))
        kind = (dict, list, tuple).index(container)
        keys, values = (list(tree), list(tree.values())) if kind == DICT else ([], list(tree))
        parts = np.array([self._part(value) for value in values], np.int64)
        addresses = np.array(list(map(id, keys)), np.int64)
        record = np.array([id(container), kind, len(values), addresses.ctypes.data, parts.ctypes.data], np.int64)
        self._kept += [keys, parts, addresses, record]
        return record.ctypes.data

    def _part(self, value: object) -> int:
        if isinstance(value, (Mapping, list, tuple)):
            return self._record(value)
        return NOTHING if value is None else LEAF


def outline_of(tree: object, named: Mapping[str, Any]) -> Outline | None:
    """The outline of a tree whose leaves are these; None if it has containers of other types."""
    return Outline(tree, named) if _is_plain(tree) else None


def _is_plain(tree: Any) -> bool:
    if type(tree) is dict:
        return all(map(_is_plain, cast("dict[str, object]", tree).values()))
    if type(tree) in (list, tuple):
        return all(map(_is_plain, tree))
    return not isinstance(tree, (Mapping, list, tuple))


@functools.cache
def _collect() -> tuple[Any, int, object]:
    """The compiled function, which keeps the GIL, and a table of the functions of Python that it calls."""
    api = ctypes.pythonapi
    functions = [
        api.PyDict_Size, api.PyList_Size, api.PyTuple_Size, api.PyList_Append, None, api.PyDict_Next,
        api.PyObject_RichCompareBool, api.PyList_GetItem, api.PyTuple_GetItem,
    ]  # fmt: skip
    addresses = [id(None) if f is None else ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions]
    table = np.array(addresses, np.int64)
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return prototype(load_function("collect", COLLECT)), table.ctypes.data, table
