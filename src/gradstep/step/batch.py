"""Tensors of one optimizer that run the same program: their tables, their scratch, and the run through all sweeps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import MemoryLibrary
from gradstep.arrays.memory import Integers
from gradstep.program.between import emit_after
from gradstep.program.blocks import exact_sum
from gradstep.program.compiler import compile_kernel
from gradstep.program.formats import compute_dtype, scales_of
from gradstep.program.frame import KernelSource
from gradstep.program.graph import Kind, Reading
from gradstep.program.kernel import ROWS, emit
from gradstep.program.newton_schulz import Workspace, newton_schulz
from gradstep.program.noise import signed, step_shift, tensor_key
from gradstep.program.program import Program, place_of, small_inputs
from gradstep.step.launch import Launch, flat_chunks, matrix_chunks, stack_chunks
from gradstep.step.leaf import Leaf
from gradstep.step.match import Match
from gradstep.step.scalars import ScalarTable, Scales
from gradstep.step.sizes import blocks_summed, count_blocks, count_matrices, matrix_shape, small_shape, stack_shapes

Array = np.ndarray[Any, Any]


class Scratch:
    """An array that a kernel cannot walk, and the dense copy that it walks instead."""

    def __init__(self, place: str, tensor: int, copy: Array, *, written: bool, array: Any) -> None:
        self.place, self.tensor, self.copy, self.written = place, tensor, copy, written
        self.array = array  # None for w and g, which are handed in anew with each step


class Sums:
    """What a reduction leaves behind in the kernels of a batch.

    Attributes:
        addresses: where each tensor's sums lie.
        totals: where its total lies, if it is a statistic of the tensor; else the same.
    """

    def __init__(self, sizes: Sequence[int], kind: Kind) -> None:
        whole = kind is Kind.WHOLE
        self._totals = np.zeros(len(sizes) if whole else 0)
        # The sum of a single block is the total.
        self._several = {i: np.zeros(size) for i, size in enumerate(sizes) if size > 1 or not whole}
        self.totals = self._totals.ctypes.data + self._totals.itemsize * np.arange(len(sizes))
        self.addresses = self.totals.copy()
        for i, sums in self._several.items():
            self.addresses[i] = sums.ctypes.data
        if not whole:
            self.totals = self.addresses

    def add_up(self) -> None:
        """Add the sums of several blocks up, where a statistic of the tensor is wanted."""
        if len(self._totals):
            for i, sums in self._several.items():
                self._totals[i] = exact_sum(sums.tolist())


class Batch:
    """All tensors that share an optimizer, a program and dtypes."""

    def __init__(self, leaf: Leaf, library: MemoryLibrary, matches: Sequence[Match]) -> None:
        self.leaf, self._library, self.matches = leaf, library, list(matches)
        self.program: Program = matches[0].program
        self.reading = matches[0].reading
        self.formats = matches[0].formats
        self.dtype = compute_dtype(self.formats["w"].dtype)
        self.gradient_dtype = self.formats["g"].dtype
        self._stochastic = any(kept.stochastic for kept in self.formats.values())
        self.sizes: Integers = np.array([match.memory["w"].size for match in matches], np.int64)
        self.scratch: list[Scratch] = []
        self.addresses: dict[str, Integers] = {}
        self._small: dict[str, list[Array]] = {}
        self._sums: dict[str, Sums] = {}
        self._matrices: dict[str, list[Array]] = {}
        self._workspace = Workspace()
        self._stacks = [count_matrices(match.shape) for match in matches]
        self._starts: Integers = np.array([match.start for match in matches], np.int64)
        self._are_pieces = bool(self._starts.any())
        self._dimensions = self._measure()
        names, shapes = [match.name for match in matches], [match.shape for match in matches]
        self._scalars = ScalarTable(leaf, self.program, self.dtype, names, shapes)
        self._keys = self._make_keys(names)
        self._launches = [self._launch(level) for level in range(len(self.program.sweeps))]
        self._after = [self._launch_after(level) for level in range(len(self.program.sweeps))]
        for place in ("w", "g", *self.program.slots, *(["g.sum"] if self.reading is Reading.SUMMED else [])):
            self._lay_out(place)
        self._lay_out_matrices()

    @property
    def _all_launches(self) -> list[Launch]:
        return [launch for launch in (*self._launches, *self._after) if launch]

    # What is made once

    def _measure(self) -> Integers | None:
        if not self.program.factored:
            return None
        shapes = [match.shape for match in self.matches]
        return np.array([(*shape[-2:], count_blocks(shape[-2], ROWS)) for shape in shapes], np.int64)

    def _make_keys(self, names: Sequence[str]) -> Integers:
        """What each tensor's noise begins with, where something is rounded at random."""
        seed = self.leaf.storage.options.seed
        return np.array([signed(tensor_key(seed, name)) for name in names] if self._stochastic else (), np.int64)

    def _launch(self, level: int) -> Launch:
        sweep = self.program.sweeps[level]
        source = emit(self.program, sweep, self.dtype, self.formats)
        if self._dimensions is not None:
            chunks = matrix_chunks(self._dimensions, np.array(self._stacks, np.int64))
        else:
            chunks = flat_chunks(self.sizes, self._starts)
        launch = self._make_launch(source, chunks, int(self.sizes.sum()), self._dimensions)
        for reduction in sweep.reductions:
            sums = Sums([blocks_summed(self.program, reduction, m.shape) for m in self.matches], reduction.kind)
            self._sums[place_of(reduction)] = sums
            launch.place(place_of(reduction), sums.addresses, sums=True)
        for source in small_inputs(sweep):
            if place_of(source) not in self._small:
                self._small[place_of(source)] = [
                    np.zeros(small_shape(source.kind, match.shape), self.dtype) for match in self.matches
                ]
            launch.place(place_of(source), _addresses(self._small[place_of(source)]))
        return launch

    def _launch_after(self, level: int) -> Launch | None:
        """What follows a sweep goes through rows and columns, or through tensors, instead of elements."""
        source = emit_after(self.program, level, self.dtype, self.formats)
        if source is None:
            return None
        dimensions = self._dimensions
        if dimensions is None:
            dimensions = np.stack([np.ones_like(self.sizes), self.sizes, np.ones_like(self.sizes)], axis=1)
        stacks = np.array(self._stacks if self.program.factored else [1] * len(self.matches), np.int64)
        height, width, blocks = dimensions.T
        elements = int((stacks * (height + width * blocks)).sum() if self.program.factored else len(self.matches))
        launch = self._make_launch(source, stack_chunks(stacks * (self.sizes > 0)), elements, dimensions)
        for place, sums in self._sums.items():
            launch.place(place, sums.totals, sums=True)
        for place, values in self._small.items():
            launch.place(place, _addresses(values))
        return launch

    def _make_launch(
        self, source: KernelSource, chunks: Integers, elements: int, dimensions: Integers | None
    ) -> Launch:
        return Launch(
            compile_kernel(source), chunks, len(self.matches), elements,
            rows=self._scalars.rows, scalars=self._scalars.values, dimensions=dimensions, keys=self._keys,
            team=self._library.team,
        )  # fmt: skip

    def _lay_out(self, place: str) -> None:
        """Find each tensor's address of one array; arrays that no kernel can walk get scratch."""
        for part in self.formats[place].parts(place):
            self._place(part, self._find(part, may_copy=part != scales_of(place)))

    def _find(self, part: str, *, may_copy: bool) -> Integers:
        addresses = np.zeros(len(self.matches), np.int64)
        for i, match in enumerate(self.matches):
            if not may_copy or match.is_direct(part):
                addresses[i] = match.memory[part].address - match.lead(part)
                continue
            copy = match.scratch(part)
            array = match.total if part == "g.sum" else match.slots.get(part)
            self.scratch.append(Scratch(part, i, copy, written=part not in ("g", "g.sum"), array=array))
            addresses[i] = copy.ctypes.data - match.lead(part)
        return addresses

    def _lay_out_matrices(self) -> None:
        for symbol in [symbol for following in self.program.matrices for symbol in following]:
            place = place_of(symbol)
            stacks = [np.empty(shape, self.dtype) for shape in stack_shapes(match.shape for match in self.matches)]
            self._place(place, self._spread(stacks))
            self._matrices[place] = [self._library.from_bits(stack, stack.dtype.name) for stack in stacks]

    def _spread(self, stacks: Sequence[Array]) -> Integers:
        """The address of each tensor's matrix, from the next place in a stack of its shape."""
        places: dict[tuple[int, int], list[int]] = {}
        for stack in stacks:
            places.setdefault(stack.shape[-2:], []).extend(matrix.ctypes.data for matrix in stack)
        turns = {shape: iter(addresses) for shape, addresses in places.items()}
        return np.array([next(turns[matrix_shape(match.shape)]) for match in self.matches], np.int64)

    def _place(self, place: str, addresses: Integers) -> None:
        self.addresses[place] = addresses
        for launch in self._all_launches:
            launch.place(place, addresses)

    # What is done for each step

    def move(self, place: str, addresses: Integers) -> None:
        """The parameters or gradients lie at other addresses than before; scratch stays where it is."""
        if self._are_pieces:
            addresses = addresses - np.array([match.lead(place) for match in self.matches], np.int64)
        elif self.scratch:
            addresses = addresses.copy()
        for scratch in self.scratch:
            if scratch.place == place:
                addresses[scratch.tensor] = scratch.copy.ctypes.data - self.matches[scratch.tensor].lead(place)
        self._place(place, addresses)

    def gather(self, parameters: Sequence[Any], gradients: Sequence[Any]) -> None:
        """Copy into scratch what no kernel can walk."""
        handed = {"w": parameters, "g": gradients}
        for scratch in self.scratch:
            array = handed[scratch.place][scratch.tensor] if scratch.array is None else scratch.array
            np.copyto(scratch.copy, self._library.as_numpy(array))

    def prepare(self, scales: Scales) -> None:
        """Fill the scalars and run every sweep but the last: all that is written is scratch."""
        self._scalars.fill(scales)
        if self._stochastic:
            for launch in self._all_launches:
                launch.shift(step_shift(self.leaf.step))
        for level, launch in enumerate(self._launches[:-1]):
            launch.run()
            self._finish(level)

    def commit(self, parameters: Sequence[Any]) -> None:
        """Write parameters and slots. Nothing in here can fail."""
        self._scalars.advance()
        self._launches[-1].run()
        self._run_after(-1)
        for scratch in self.scratch:
            if scratch.written:
                array = parameters[scratch.tensor] if scratch.array is None else scratch.array
                np.copyto(self._library.as_numpy(array), scratch.copy)

    def _run_after(self, level: int) -> None:
        launch = self._after[level]
        if launch:
            launch.run()

    def _finish(self, level: int) -> None:
        """Compute what the next sweep reads, and run the matrix operations between the two."""
        for reduction in self.program.sweeps[level].reductions:
            self._sums[place_of(reduction)].add_up()
        self._run_after(level)
        for symbol in self.program.matrices[level]:
            for matrix in self._matrices[place_of(symbol)]:
                newton_schulz(matrix, symbol.attribute, self._workspace)


def _addresses(arrays: Sequence[Array]) -> Integers:
    return np.array([array.ctypes.data for array in arrays], np.int64)


def batches(leaf: Leaf, library: MemoryLibrary, matches: Sequence[Match]) -> list[Batch]:
    """Sort matches by program and dtypes, and make a batch of each sort."""
    sorts: dict[Any, list[Match]] = {}
    for match in matches:
        key = (id(match.program), match.reading, match.memory["w"].dtype, match.memory["g"].dtype)
        sorts.setdefault(key, []).append(match)
    return [Batch(leaf, library, group) for group in sorts.values()]
