"""Tensors of one optimizer that run the same program: their tables, their scratch, and the run through all sweeps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import MemoryLibrary
from gradstep.arrays.memory import Integers
from gradstep.program.compiler import compile_kernel
from gradstep.program.formats import compute_dtype, scales_of
from gradstep.program.graph import Kind, Reading
from gradstep.program.kernel import ROWS, emit
from gradstep.program.newton_schulz import Workspace, newton_schulz
from gradstep.program.noise import signed, step_shift, tensor_key
from gradstep.program.program import Program, place_of, small_inputs
from gradstep.program.rounding import key_words
from gradstep.step.launch import Launch, flat_chunks, matrix_chunks
from gradstep.step.leaf import Leaf
from gradstep.step.match import Match
from gradstep.step.scalars import ScalarTable, Scales
from gradstep.step.sizes import count_blocks, count_matrices, matrix_shape, small_shape, stack_shapes, sums_shape
from gradstep.step.small import SmallValues, matrix_statistic, narrowed, whole_statistic, widened

Array = np.ndarray[Any, Any]


class Scratch:
    """An array that a kernel cannot walk, and the dense copy that it walks instead."""

    def __init__(self, place: str, tensor: int, copy: Array, *, written: bool, array: Any) -> None:
        self.place, self.tensor, self.copy, self.written = place, tensor, copy, written
        self.array = array  # None for w and g, which are handed in anew with each step


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
        self._sums: dict[str, list[Array]] = {}
        self._matrices: dict[str, list[Array]] = {}
        self._results: list[tuple[Array, Array]] = []
        self._workspace = Workspace()
        self._views: dict[str, list[Any]] = {}
        self._stacks = [count_matrices(match.shape) for match in matches]
        self._dimensions = self._measure()
        names, shapes = [match.name for match in matches], [match.shape for match in matches]
        self._scalars = ScalarTable(leaf, self.program, self.dtype, names, shapes)
        self._keys = self._make_keys(names)
        self._launches = [self._launch(level) for level in range(len(self.program.sweeps))]
        for place in ("w", "g", *self.program.slots, *(["g.sum"] if self.reading is Reading.SUMMED else [])):
            self._lay_out(place)
        self._lay_out_matrices()

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
        kernel = compile_kernel(emit(self.program, sweep, self.dtype, self.formats))
        if self._dimensions is not None:
            chunks = matrix_chunks(self._dimensions, np.array(self._stacks, np.int64))
        else:
            chunks = flat_chunks(self.sizes)
        launch = Launch(
            kernel, chunks, len(self.matches), int(self.sizes.sum()),
            rows=self._scalars.rows, scalars=self._scalars.values, dimensions=self._dimensions, keys=self._keys,
            team=self._library.team,
        )  # fmt: skip
        for reduction in sweep.reductions:
            place = place_of(reduction)
            self._sums[place] = [np.zeros(sums_shape(self.program, reduction, match.shape)) for match in self.matches]
            launch.place(place, _addresses(self._sums[place]), sums=True)
        for source in small_inputs(sweep):
            if place_of(source) not in self._small:
                self._small[place_of(source)] = [
                    np.zeros(small_shape(source.kind, match.shape), self.dtype) for match in self.matches
                ]
            launch.place(place_of(source), _addresses(self._small[place_of(source)]))
        return launch

    def _lay_out(self, place: str) -> None:
        """Find each tensor's address of one array; arrays that no kernel can walk get scratch."""
        kind = self.program.slots.get(place, Kind.FULL)
        if kind is not Kind.FULL:
            self._views[place] = [self._library.as_numpy(match.slots[place]) for match in self.matches]
            return
        for part in self.formats[place].parts(place):
            self._place(part, self._find(part, may_copy=part != scales_of(place)))

    def _find(self, part: str, *, may_copy: bool) -> Integers:
        addresses = np.zeros(len(self.matches), np.int64)
        for i, match in enumerate(self.matches):
            if not may_copy or match.is_direct(part):
                addresses[i] = match.memory[part].address
                continue
            copy = match.scratch(match.memory[part].dtype)
            array = match.total if part == "g.sum" else match.slots.get(part)
            self.scratch.append(Scratch(part, i, copy, written=part not in ("g", "g.sum"), array=array))
            addresses[i] = copy.ctypes.data
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
        for launch in self._launches:
            launch.place(place, addresses)

    # What is done for each step

    def move(self, place: str, addresses: Integers) -> None:
        """The parameters or gradients lie at other addresses than before; scratch stays where it is."""
        if self.scratch:
            addresses = addresses.copy()
        for scratch in self.scratch:
            if scratch.place == place:
                addresses[scratch.tensor] = scratch.copy.ctypes.data
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
            for launch in self._launches:
                launch.shift(step_shift(self.leaf.step))
        if len(self._launches) == 1:
            return
        with np.errstate(all="ignore"):
            values = self._values()
            for level, launch in enumerate(self._launches[:-1]):
                launch.run()
                self._finish(level, values)
                self._hand_on(level + 1, values)
            self._results = self._small_results(values)

    def commit(self, parameters: Sequence[Any]) -> None:
        """Write parameters and slots. Nothing in here can fail."""
        self._scalars.advance()
        self._launches[-1].run()
        for target, value in self._results:
            np.copyto(target, value)
        for scratch in self.scratch:
            if scratch.written:
                array = parameters[scratch.tensor] if scratch.array is None else scratch.array
                np.copyto(self._library.as_numpy(array), scratch.copy)

    def _values(self) -> list[SmallValues]:
        """What is known before the first sweep: scalars, and the slots of rows and columns."""
        indices = self.program.scalar_places
        table = self._scalars.values[: self._scalars.used].astype(self.dtype)
        scalars: list[dict[int, Any]] = [dict(zip(indices, row, strict=False)) for row in table]
        scalars = scalars or [{}]
        slots = {s: self._views[s.attribute] for s in self.program.symbols if s.attribute in self._views}
        values: list[SmallValues] = []
        for i in range(len(self.matches)):
            known: dict[int, Any] = {
                s.index: widened(views[i], self.formats[s.attribute].dtype, self.dtype).reshape(
                    small_shape(s.kind, self.matches[i].shape)
                )
                for s, views in slots.items()
            }
            values.append(SmallValues(self.dtype, scalars[int(self._scalars.rows[i])] | known))
        return values

    def _finish(self, level: int, values: list[SmallValues]) -> None:
        """Turn the sums that the sweep left behind into statistics, and run the matrix operations after it."""
        number_type = np.dtype(self.dtype).type
        for reduction in self.program.sweeps[level].reductions:
            for i, sums in enumerate(self._sums[place_of(reduction)]):
                if reduction.kind is Kind.WHOLE:
                    value: Any = number_type(whole_statistic(reduction.op, sums, int(self.sizes[i])))
                else:
                    height, width = self.matches[i].shape[-2:]
                    value = matrix_statistic(reduction, sums, height, width, number_type)
                values[i].learn(reduction, value)
        for symbol in self.program.matrices[level]:
            for matrix in self._matrices[place_of(symbol)]:
                newton_schulz(matrix, symbol.attribute, self._workspace)

    def _hand_on(self, level: int, values: list[SmallValues]) -> None:
        """Put the small values that the next sweep reads where its kernel finds them."""
        for source in small_inputs(self.program.sweeps[level]):
            for value, buffer in zip(values, self._small[place_of(source)], strict=True):
                np.copyto(buffer, value[source])

    def _small_results(self, values: list[SmallValues]) -> list[tuple[Array, Array]]:
        """Each slot of rows or columns, and its new value. An empty parameter has no statistics to keep."""
        return [
            (target, narrowed(values[i][symbol].reshape(target.shape), self.formats[slot], self._key(slot, i)))
            for slot, symbol in self.program.small_outputs.items()
            for i, target in enumerate(self._views[slot])
            if self.sizes[i]
        ]

    def _key(self, slot: str, tensor: int) -> tuple[int, int, int] | None:
        """What the noise of a slot begins with, where it is rounded at random."""
        if not self.formats[slot].stochastic:
            return None
        seed = self.leaf.storage.options.seed
        return key_words(tensor_key(seed, self.matches[tensor].name), slot, self.leaf.step)


def _addresses(arrays: Sequence[Array]) -> Integers:
    return np.array([array.ctypes.data for array in arrays], np.int64)


def batches(leaf: Leaf, library: MemoryLibrary, matches: Sequence[Match]) -> list[Batch]:
    """Sort matches by program and dtypes, and make a batch of each sort."""
    sorts: dict[Any, list[Match]] = {}
    for match in matches:
        key = (id(match.program), match.reading, match.memory["w"].dtype, match.memory["g"].dtype)
        sorts.setdefault(key, []).append(match)
    return [Batch(leaf, library, group) for group in sorts.values()]
