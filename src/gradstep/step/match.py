"""Gradient, parameter and slots of one name, brought together and checked."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.library import MemoryLibrary
from gradstep.arrays.memory import (
    Memory,
    axis_order,
    bits_dtype,
    element_strides,
    overlaps_itself,
    strides_in_order,
)
from gradstep.arrays.stored import Stored
from gradstep.errors import AliasedParametersError, ArgumentTypeError, DtypeError, ReadOnlyError, ShapeError
from gradstep.program.formats import EXPECTED, FLOATS, QUANTUM, Format, scales_of
from gradstep.program.graph import Kind, Reading
from gradstep.program.program import Program
from gradstep.step.storage import Part, Storage, are_ordered, parts_of

REMEDY = "opt.init(params) begins anew"


class Match(NamedTuple):
    """One parameter of the step: its arrays (`w`, `g`, those of its state, `g.sum`), and where each lies."""

    name: str
    program: Program
    formats: Mapping[str, Format]
    reading: Reading
    order: tuple[int, ...]
    strides: tuple[int, ...]
    memory: Mapping[str, Memory]
    slots: Mapping[str, Any]
    total: Any  # the sum that the gradient is added to, if there is one
    start: int  # the number of the first element, where the arrays are a piece of larger ones

    def lead(self, array: str) -> int:
        """How many bytes before an array its element 0 would lie, from which kernels count."""
        if not self.start:
            return 0
        blocks = any(array == scales_of(place) for place in self.formats)
        return (self.start // QUANTUM if blocks else self.start) * self.memory[array].itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.memory["w"].shape

    def is_direct(self, array: str) -> bool:
        """Whether a kernel can walk the array as it lies; else it goes through scratch."""
        memory = self.memory[array]
        strides = strides_in_order(memory.shape, range(len(memory.shape))) if self._is_small(array) else self.strides
        return element_strides(memory) == strides

    def scratch(self, array: str) -> np.ndarray[Any, Any]:
        """A new dense array in the order that the kernel walks."""
        memory = self.memory[array]
        if self._is_small(array):
            return np.empty(memory.shape, bits_dtype(memory.dtype))
        copy = np.empty([self.shape[axis] for axis in self.order], bits_dtype(memory.dtype))
        return copy.transpose(np.argsort(self.order)) if self.order else copy

    def _is_small(self, array: str) -> bool:
        """Whether the array is a slot of rows or columns."""
        return self.program.slots.get(array, Kind.FULL) is not Kind.FULL


def check_parameter(library: MemoryLibrary, name: str, parameter: Any) -> Memory:
    """Where a parameter lies, checked that it can be written element by element."""
    memory = describe_floats(library, parameter, f"params[{name!r}]")
    if not memory.writable:
        raise ReadOnlyError(f"params[{name!r}] is read-only; pass a writable array: a copy, or .setflags(write=True)")
    if overlaps_itself(memory):
        raise AliasedParametersError(
            f"params[{name!r}] has elements that share memory (shape {memory.shape}, strides {memory.strides}); "
            "pass a copy"
        )
    return memory


def describe_floats(library: MemoryLibrary, array: Any, what: str) -> Memory:
    """Where an array of real numbers lies."""
    memory = library.describe(array, what)
    if memory.dtype not in FLOATS:
        raise DtypeError(f"{what} has dtype {memory.dtype}; {EXPECTED}")
    return memory


def match(
    library: MemoryLibrary, name: str, parameter: Any, gradient: Any, program: Program, storage: Storage,
    slots: Mapping[str, Any], reading: Reading = Reading.PLAIN, total: Any = None, start: int = 0,
) -> Match:  # fmt: skip
    """Check the arrays of one name against each other; missing slots are allocated, not yet published.

    Elements are numbered from `start` on: a multiple of `BLOCK` where blocks are summed, of `QUANTUM` where slots are
    codes of 8 bits.
    """
    memory = {"w": check_parameter(library, name, parameter)}
    memory["g"] = describe_floats(library, gradient, f"grads[{name!r}]")
    check_shape(name, memory["g"], memory["w"])
    formats = storage.formats(program.slots, memory["w"].dtype, memory["g"].dtype)
    found = make_slots(library, name, memory["w"], program, formats, slots)
    for slot, array in found.items():
        memory[slot] = library.describe(array, f"state[{name!r}][{slot!r}]")
    if total is not None:
        memory["g.sum"] = library.describe(total, f"sums[{name!r}]")
        formats["g.sum"] = Format(memory["g.sum"].dtype)
    order = walking_order(memory["w"], program, formats)
    strides = strides_in_order(memory["w"].shape, order)
    return Match(name, program, formats, reading, order, strides, memory, found, total, start)


def check_shape(name: str, gradient: Memory, parameter: Memory) -> None:
    """Raise if a gradient is not as large as its parameter."""
    if gradient.shape != parameter.shape:
        raise ShapeError(f"grads[{name!r}] has shape {gradient.shape}, but params[{name!r}] has {parameter.shape}")


def check_products(library: MemoryLibrary, name: str, program: Program) -> None:
    """Raise if the library has no matrix products in the dtype that the program asks for."""
    if "bfloat16" in program.product_dtypes and not library.multiplies_bfloat16:
        raise DtypeError(
            f"{program.name} is told to multiply matrices in bfloat16, and params[{name!r}] belongs to {library.name}, "
            "which has no such products; leave ns_dtype out, or pass arrays of PyTorch, JAX or MLX"
        )


def walking_order(memory: Memory, program: Program, formats: Mapping[str, Format]) -> tuple[int, ...]:
    """The order of axes, slow to fast, in which kernels walk: the parameter's own where the program is free."""
    return tuple(range(len(memory.shape))) if are_ordered(program, formats) else tuple(axis_order(memory))


def make_slots(
    library: MemoryLibrary,
    name: str,
    parameter: Memory,
    program: Program,
    formats: Mapping[str, Format],
    slots: Mapping[str, Any],
) -> dict[str, Any]:
    """The arrays of the state that the program keeps: those there are, checked, and zeros for the others."""
    check_products(library, name, program)
    walked = walking_order(parameter, program, formats)
    found: dict[str, Any] = {}
    for part in parts_of(program, formats, parameter.shape):
        order = walked if part.kind is Kind.FULL else range(len(part.shape))
        there = slots.get(part.name)
        if there is None:
            found[part.name] = library.zeros(part.shape, order, part.dtype)
        elif isinstance(there, Stored):
            check_stored(name, part.name, there, part.shape, part.dtype)
            found[part.name] = there.in_memory(library, order)
        else:
            _check_slot(library, name, part, there, parameter.dtype)
            found[part.name] = there
    return found


def check_stored(name: str, slot: str, array: Stored, shape: tuple[int, ...], dtype: str) -> None:
    """Raise if a loaded array does not fit its parameter."""
    what = f"the checkpoint's state[{name!r}][{slot!r}]"
    if array.shape != shape:
        raise ShapeError(f"{what} has shape {array.shape}, but params[{name!r}] needs {shape}; {REMEDY}")
    if array.dtype != dtype:
        raise DtypeError(f"{what} has dtype {array.dtype}, but params[{name!r}] needs {dtype}; {REMEDY}")


def _check_slot(library: MemoryLibrary, name: str, part: Part, array: Any, parameter: str) -> None:
    what, remedy = f"state[{name!r}][{part.name!r}]", REMEDY
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
    if memory.shape != part.shape:
        raise ShapeError(f"{what} has shape {memory.shape}, but params[{name!r}] now needs {part.shape}; {remedy}")
    if memory.dtype != part.dtype:
        raise DtypeError(
            f"{what} has dtype {memory.dtype}, but params[{name!r}] now has {parameter}, which needs {part.dtype}; "
            f"{remedy}"
        )
    if part.kind is Kind.LEAD and element_strides(memory) != strides_in_order(part.shape, range(len(part.shape))):
        raise ArgumentTypeError(f"{what} is not contiguous any more; {remedy}")
