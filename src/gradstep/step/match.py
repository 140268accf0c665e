"""Gradient, parameter and slots of one name, brought together and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstep.arrays.library import MemoryLibrary
from gradstep.arrays.memory import (
    Memory,
    axis_order,
    element_strides,
    overlaps_itself,
    strides_in_order,
)
from gradstep.errors import AliasedParametersError, ArgumentTypeError, DtypeError, ReadOnlyError, ShapeError
from gradstep.program.graph import Kind, Reading
from gradstep.program.program import Program


@dataclass(frozen=True)
class Match:
    """One parameter of the step: its arrays by place (`w`, `g`, slots, `g.sum`), and where each lies."""

    name: str
    program: Program
    reading: Reading
    order: tuple[int, ...]
    strides: tuple[int, ...]
    memory: Mapping[str, Memory]
    slots: Mapping[str, Any]
    total: Any  # the sum that the gradient is added to, if there is one

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.memory["w"].shape

    def is_direct(self, place: str) -> bool:
        """Whether a kernel can walk the array as it lies; else it goes through scratch."""
        return element_strides(self.memory[place]) == self.strides

    def scratch(self, dtype: str) -> np.ndarray[Any, Any]:
        """A new dense array in the order that the kernel walks."""
        array = np.empty([self.shape[axis] for axis in self.order], dtype)
        return array.transpose(np.argsort(self.order)) if self.order else array


def check_parameter(library: MemoryLibrary, name: str, parameter: Any) -> Memory:
    """Where a parameter lies, checked that it can be written element by element."""
    memory = library.describe(parameter, f"params[{name!r}]")
    if not memory.writable:
        raise ReadOnlyError(f"params[{name!r}] is read-only; pass a writable array: a copy, or .setflags(write=True)")
    if overlaps_itself(memory):
        raise AliasedParametersError(
            f"params[{name!r}] has elements that share memory (shape {memory.shape}, strides {memory.strides}); "
            "pass a copy"
        )
    return memory


def match(
    library: MemoryLibrary, name: str, parameter: Any, gradient: Any, program: Program, slots: Mapping[str, Any],
    reading: Reading = Reading.PLAIN, total: Any = None,
) -> Match:  # fmt: skip
    """Check the arrays of one name against each other; missing slots are allocated, not yet published."""
    memory = {"w": check_parameter(library, name, parameter)}
    memory["g"] = library.describe(gradient, f"grads[{name!r}]")
    if memory["g"].shape != memory["w"].shape:
        raise ShapeError(f"grads[{name!r}] has shape {memory['g'].shape}, but params[{name!r}] has {memory['w'].shape}")
    found = make_slots(library, name, memory["w"], program, slots)
    for slot, array in found.items():
        memory[slot] = library.describe(array, f"state[{name!r}][{slot!r}]")
    if total is not None:
        memory["g.sum"] = library.describe(total, f"sums[{name!r}]")
    order = walking_order(memory["w"], program)
    return Match(name, program, reading, order, strides_in_order(memory["w"].shape, order), memory, found, total)


def walking_order(memory: Memory, program: Program) -> tuple[int, ...]:
    """The order of axes, slow to fast, in which kernels walk: the parameter's own where the program is free."""
    return tuple(range(len(memory.shape))) if program.ordered else tuple(axis_order(memory))


def make_slots(
    library: MemoryLibrary, name: str, parameter: Memory, program: Program, slots: Mapping[str, Any]
) -> dict[str, Any]:
    """The slots that the program keeps: those there are, checked, and zeros for the others."""
    order = walking_order(parameter, program)
    found: dict[str, Any] = {}
    for slot, kind in program.slots.items():
        shape = slot_shape(kind, parameter.shape)
        if slot in slots:
            _check_slot(library, name, slot, slots[slot], shape, parameter.dtype)
            found[slot] = slots[slot]
        else:
            found[slot] = library.zeros(shape, order if kind is Kind.FULL else range(len(shape)), parameter.dtype)
    return found


def slot_shape(kind: Kind, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which a slot is stored."""
    if kind is Kind.ROW:
        return tuple(shape[:-1])
    if kind is Kind.COLUMN:
        return (*shape[:-2], shape[-1])
    return tuple(shape)


def _check_slot(library: MemoryLibrary, name: str, slot: str, array: Any, shape: tuple[int, ...], dtype: str) -> None:
    what = f"state[{name!r}][{slot!r}]"
    remedy = "opt.init(params) begins anew"
    try:
        memory = library.describe(array, what)
    except (AttributeError, TypeError) as error:
        if isinstance(error, DtypeError):
            raise
        raise ArgumentTypeError(
            f"{what} is a {type(array).__module__}.{type(array).__name__}, but the parameter now belongs to "
            f"{library.name}; {remedy}"
        ) from None
    if not memory.writable:
        raise ReadOnlyError(f"{what} has been made read-only; undo it with .setflags(write=True), or {remedy}")
    if memory.shape != shape:
        raise ShapeError(f"{what} has shape {memory.shape}, but params[{name!r}] now needs {shape}; {remedy}")
    if memory.dtype != dtype:
        raise DtypeError(f"{what} has dtype {memory.dtype}, but params[{name!r}] now has {dtype}; {remedy}")
