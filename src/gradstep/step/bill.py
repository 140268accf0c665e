"""What a step will need of memory, counted before anything is allocated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from operator import add
from typing import Any

from gradstep.arrays.library import MemoryLibrary, recognise
from gradstep.arrays.memory import axis_order, element_strides, strides_in_order
from gradstep.program.blocks import BLOCK
from gradstep.program.formats import BYTES, Format, compute_dtype, master_of
from gradstep.program.newton_schulz import workspace_shapes
from gradstep.program.program import Program, small_inputs
from gradstep.step.forms import describe_floats
from gradstep.step.leaf import Leaf
from gradstep.step.match import check_parameter, check_products, walking_order
from gradstep.step.sizes import count_blocks, small_shape, stack_shapes, sums_count
from gradstep.step.storage import parts_of


@dataclass(frozen=True, slots=True)
class MemoryBill:
    """Bytes that an optimizer needs beside parameters and gradients.

    Attributes:
        slots: its state, codes and scales included.
        masters: the float32 copies of parameters.
        scratch: dense copies of arrays that kernels cannot walk, matrices that are orthogonalized, and sums, for
            gradients laid out like their parameters. 0 for JAX and MLX, which have temporaries of their own;
            what donated arrays take on the CPU is not counted.
        sums: the sums of micro-batches; 0 without `Accumulate`.
        anchors: copies of parameters at the last outer step, and what the wire owes; 0 without `DiLoCo`.
    """

    slots: int = 0
    masters: int = 0
    scratch: int = 0
    sums: int = 0
    anchors: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))

    def __add__(self, other: "MemoryBill") -> "MemoryBill":
        return MemoryBill(*map(add, astuple(self), astuple(other)))

    def __str__(self) -> str:
        parts = {**asdict(self), "total": self.total}
        return ", ".join(f"{name} {size:,} bytes" for name, size in parts.items() if size or name == "total")


def bill(named: Mapping[str, Any], routes: Sequence[tuple[Leaf, list[str]]], *, inspected: bool) -> MemoryBill:
    """What these parameters cost, each with the optimizer that takes it."""
    library = recognise(params=named)
    total = MemoryBill()
    for leaf, names in routes:
        batches: dict[Any, tuple[Program, list[Sequence[int]]]] = {}
        for name in names:
            if library.in_place is True:
                total += _in_memory(library, leaf, name, named[name], batches, inspected=inspected)
            else:
                form = describe_floats(library, named[name], f"params[{name!r}]")
                program = leaf.program(name, len(form.shape))
                total += _state(program, leaf.storage.formats(program.slots, form.dtype, form.dtype), form.shape)
        for (_, dtype), (program, shapes) in batches.items():
            total += MemoryBill(scratch=_workspace(program, compute_dtype(dtype), shapes))
    return total


def _state(program: Program, formats: Mapping[str, Format], shape: Sequence[int]) -> MemoryBill:
    sizes = {part.name: math.prod(part.shape) * BYTES[part.dtype] for part in parts_of(program, formats, shape)}
    masters = sizes.pop(master_of("w"), 0)
    return MemoryBill(sum(sizes.values()), masters)


def _in_memory(
    library: MemoryLibrary, leaf: Leaf, name: str, parameter: Any, batches: dict[Any, Any], *, inspected: bool
) -> MemoryBill:
    memory = check_parameter(library, name, parameter)
    program = leaf.program(name, len(memory.shape))
    formats = leaf.storage.formats(program.slots, memory.dtype, memory.dtype)
    state, dtype = _state(program, formats, memory.shape), compute_dtype(memory.dtype)
    scratch = _statistics(program, memory.shape, BYTES[dtype])
    if element_strides(memory) != strides_in_order(memory.shape, walking_order(memory, program, formats)):
        scratch += 2 * memory.size * memory.itemsize  # parameter and gradient
    if inspected:
        scratch += 8 * count_blocks(memory.size, BLOCK)
    scratch += sum(map(len, program.matrices)) * memory.size * BYTES[dtype]
    check_products(library, name, program)
    batches.setdefault((id(program), memory.dtype), (program, []))[1].append(memory.shape)
    return state + MemoryBill(scratch=scratch)


def _workspace(program: Program, dtype: str, shapes: Sequence[Sequence[int]]) -> int:
    """What the matrices of a batch take turns in: for each dtype as much as the largest needs."""
    most: dict[str, int] = {}
    for product_dtype in program.product_dtypes:
        sizes = [
            sum(map(math.prod, workspace_shapes(stack, exact=product_dtype is None))) for stack in stack_shapes(shapes)
        ]
        most[product_dtype or dtype] = max(sizes)
    return sum(size * BYTES[kept] for kept, size in most.items())


def _statistics(program: Program, shape: Sequence[int], itemsize: int) -> int:
    """The sums of all sweeps, and the small values that they read."""
    reductions = [reduction for sweep in program.sweeps for reduction in sweep.reductions]
    sums = sum(sums_count(program, reduction, shape) for reduction in reductions)
    small = {source.index: source.kind for sweep in program.sweeps for source in small_inputs(sweep)}
    values = sum(math.prod(small_shape(kind, shape)) for kind in small.values())
    return 8 * sums + itemsize * values


def sums_bill(named: Mapping[str, Any], routes: Sequence[tuple[Leaf, list[str]]], every: int) -> MemoryBill:
    """What the micro-batches of a round cost: their sums, and copies of what kernels cannot walk."""
    library = recognise(params=named)
    total = MemoryBill()
    for leaf, names in routes:
        for name in names:
            if library.in_place is True:
                total += _sum_in_memory(library, leaf, name, named[name], every)
            else:
                form = describe_floats(library, named[name], f"params[{name!r}]")
                total += MemoryBill(sums=math.prod(form.shape) * BYTES[compute_dtype(form.dtype)])
    return total


def _sum_in_memory(library: MemoryLibrary, leaf: Leaf, name: str, parameter: Any, every: int) -> MemoryBill:
    """A sum is dense in the order of its parameter; the step may walk otherwise, and a gradient may not be dense."""
    memory = check_parameter(library, name, parameter)
    program = leaf.program(name, len(memory.shape))
    formats = leaf.storage.formats(program.slots, memory.dtype, memory.dtype)
    size = memory.size * BYTES[compute_dtype(memory.dtype)]
    own = strides_in_order(memory.shape, axis_order(memory))
    copied = own != strides_in_order(memory.shape, walking_order(memory, program, formats))
    scratch = size if copied else 0
    if element_strides(memory) != own:
        scratch += memory.size * memory.itemsize * min(every - 1, 2)  # the first call's, and that of the others
    return MemoryBill(scratch=scratch, sums=size)
