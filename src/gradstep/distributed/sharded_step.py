"""A step of several ranks, planned: the part of one of them, and how it fits together with the others'."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import OTHER, STAYED, FunctionalLibrary, MemoryLibrary, owner
from gradstep.arrays.memory import Memory, element_strides, strides_in_order
from gradstep.distributed.council import Facts
from gradstep.distributed.exchange import Averaging, Spreading, bucket_bytes
from gradstep.distributed.group import Array, Group
from gradstep.distributed.norm import SharedNorm
from gradstep.distributed.partition import Extent, Partition, Portion
from gradstep.distributed.rank_plan import RankPlan, Routes
from gradstep.errors import ArgumentTypeError
from gradstep.program.formats import BYTES, compute_dtype
from gradstep.program.graph import Reading
from gradstep.program.program import Program
from gradstep.program.rounding import widened
from gradstep.step.intake import Intake, joined
from gradstep.step.leaf import Leaf
from gradstep.step.match import check_parameter, check_shape, describe_floats
from gradstep.step.plan import Piece, Plan, Share


def extents_of(library: MemoryLibrary, routes: Routes, params: Mapping[str, Any]) -> dict[str, Extent]:
    """How each parameter may be shared out: by its elements, or as a whole."""
    return {
        name: extent_of(leaf.program(name, params[name].ndim), check_parameter(library, name, params[name]))
        for leaf, names in routes
        for name in names
    }


def extent_of(program: Program, memory: Memory) -> Extent:
    """The same for one parameter with this program."""
    if is_plain(memory) and not needs_whole(program):
        return Extent(memory.shape, divisible=True, cost=0)
    return whole_extent(program, memory.shape)


def needs_whole(program: Program) -> bool:
    """Whether the rule looks at more than one element."""
    return bool(program.ordered or program.factored or program.scalars.dimensions)


def whole_extent(program: Program, shape: tuple[int, ...]) -> Extent:
    """A parameter that is stepped by one owner."""
    products = any(program.matrices) and len(shape) > 1
    return Extent(shape, divisible=False, cost=math.prod(shape) * (min(shape[-2:]) if products else 1))


def is_plain(memory: Memory) -> bool:
    """Whether an array is dense and in C order."""
    return element_strides(memory) == strides_in_order(memory.shape, range(len(memory.shape)))


def values_of(library: MemoryLibrary, params: Mapping[str, Any]) -> Facts:
    """What tells whether parameters begin with the same elements on all ranks; of arrays that the library has."""
    bits = {name: library.as_numpy(array) for name, array in sorted(params.items()) if owner(array) is library}
    hint = "(seed all ranks alike, or send those of rank 0 to the others)"
    return {
        f"the values of params[{name!r}] by their CRC-32 {hint}": f"{zlib.crc32(np.ascontiguousarray(array).data):08x}"
        for name, array in bits.items()
    }


def portion_of(library: MemoryLibrary, array: Any, portion: Portion) -> Any:
    """A rank's portion of a parameter, in its memory: flat, or as it is where that is all of it."""
    memory = library.describe(array, "a parameter")
    if portion.stop - portion.start == memory.size:
        return array
    bits = library.as_numpy(array)
    assert bits.flags.c_contiguous, "a kernel would write to a copy"
    return library.from_bits(bits.reshape(-1)[portion.start : portion.stop], memory.dtype)


def unsharded(library: FunctionalLibrary) -> ArgumentTypeError:
    """The error for arrays that cannot be spread."""
    return ArgumentTypeError(
        f"Sharded steps arrays of NumPy and PyTorch, not of {library.name}, whose arrays never change; "
        "shard these with the library's own means"
    )


def exchange_bytes(library: MemoryLibrary, ranks: int, own: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    """What a rank needs for averaged gradients, and for buckets: what it sends, what it receives, and their sum."""

    def size(arrays: Mapping[str, Any]) -> int:
        memories = [library.describe(array, "a parameter") for array in arrays.values()]
        return sum(memory.size * BYTES[compute_dtype(memory.dtype)] for memory in memories)

    return size(own) + 3 * min(bucket_bytes(ranks), size(params))


class ShardedPlan(RankPlan):
    """One rank's part in a step of parameters that every rank has.

    Args:
        library: whose arrays they are.
        group: the ranks.
        routes: which optimizer takes which parameters.
        partition: who has what of them.
        params, grads: arrays by name, of the parameters that get a gradient.
        intake: how the gradients come in.
    """

    def __init__(
        self,
        library: MemoryLibrary,
        group: Group,
        routes: Routes,
        partition: Partition,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        intake: Intake,
    ) -> None:
        super().__init__(library, routes, list(params))
        self._memories = {name: check_parameter(library, name, params[name]) for name in self.names}
        self._gradients = {name: describe_floats(library, grads[name], f"grads[{name!r}]") for name in self.names}
        for name in self.names:
            check_shape(name, self._gradients[name], self._memories[name])
        self._copied = [name for name, memory in self._memories.items() if not is_plain(memory)]
        self._watch_params, self._watch_grads = library.watch(self._sorted(params)), library.watch(self._sorted(grads))
        self._watch_params.locate(self._sorted(params))
        self._watch_grads.locate(self._sorted(grads))
        portions = self._portions = {name: partition[name] for name in self.names}
        self._mine = partition.of_rank(group.rank, self.names)
        self._averagings = {
            dtype: Averaging(group, {n: parts for n, parts in portions.items() if self._computed(n) == dtype}, dtype)
            for dtype in sorted(set(map(self._computed, self.names)))
        }
        self._spreading = Spreading(group, portions, lambda name: BYTES[self._memories[name].dtype])
        self._norm = SharedNorm(group, list(self._averagings.values()), library.team)
        shares = [self._share(leaf, [name for name in names if name in self._mine]) for leaf, names in routes]
        local = [name for share in shares for name in share.names]
        parameters, gradients = (dict(zip(local, arrays, strict=True)) for arrays in self._portions_of(params, local))
        self._adopt(Plan(library, shares, parameters, gradients, intake))

    @property
    def norm(self) -> SharedNorm:
        return self._norm

    def _share(self, leaf: Leaf, names: list[str]) -> Share:
        return Share(leaf, names, pieces={name: self._piece(name) for name in names})

    def _piece(self, name: str) -> Piece:
        return Piece(self._mine[name].start, self._ndim(name))

    def _ndim(self, name: str) -> int:
        return len(self._memories[name].shape)

    def _computed(self, name: str) -> str:
        return compute_dtype(self._memories[name].dtype)

    def _finds_arrays(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> bool:
        return (
            self._watch_params.locate(self._sorted(params)) == STAYED
            and self._watch_grads.locate(self._sorted(grads)) != OTHER
        )

    def _told_of_arrays(self) -> Facts:
        facts: dict[str, str] = {}
        for what, memories in (("grads", self._gradients), ("params", self._memories)):
            for name, memory in memories.items():
                order = "" if what == "grads" or is_plain(memory) else f", strides {memory.strides}"
                dtype = f"{memory.dtype} of shape " if what == "params" else "of shape "
                facts[f"{what}[{name!r}]"] = f"{dtype}{memory.shape}{order}"
        return facts

    def _told_of_owners(self, name: str) -> str:
        return str(self._portions[name])

    def beginning(self, known: Partition, named: Mapping[str, Any]) -> Facts:
        """The values of parameters that are not known; of all others too, where none is."""
        if not known.is_empty:
            named = {name: named[name] for name in self.names if name not in known}
        return values_of(self.library, named)

    def average(self, grads: Mapping[str, Any], params: Mapping[str, Any], intake: Intake, micro: float) -> None:
        """Average the gradients of all ranks; this one keeps those of its portions."""
        bits: dict[int, Array] = {}

        def elements(array: Any, start: int, stop: int) -> Array:
            if id(array) not in bits:
                bits[id(array)] = self.library.as_numpy(array)
            there = bits[id(array)]
            return there.reshape(-1)[start:stop] if there.flags.c_contiguous else there.flat[start:stop]

        def gradient(name: str, start: int, stop: int) -> Array:
            dtype, reading = self._computed(name), intake.reading(name)
            values = widened(elements(grads[name], start, stop), self._gradients[name].dtype, dtype)
            if reading in (Reading.WEIGHED, Reading.SUMMED):
                total = intake.total(name)
                return joined(values, micro, None if total is None else elements(total, start, stop))
            return values

        problems = [averaging.average(gradient) for averaging in self._averagings.values()]
        for problem in filter(None, problems):
            raise problem

    def _written(self, params: Mapping[str, Any]) -> list[Any]:
        return self._sorted(params)

    def _spread(self, params: Mapping[str, Any]) -> None:
        arrays = {name: self.library.as_numpy(params[name]) for name in self.names}
        flat = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}
        self._spreading.spread(flat)
        for name in self._copied:
            arrays[name][...] = flat[name].view(arrays[name].dtype).reshape(arrays[name].shape)

    def _local(self, params: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        return self._portions_of(params, self.plan.names)

    def _portions_of(self, params: Mapping[str, Any], names: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """This rank's portions of parameters and averaged gradients, as arrays of the library."""
        library = self.library
        averaged = {
            stretch.name: averaging.averaged[stretch.at : stretch.at + stretch.stop - stretch.start]
            for averaging in self._averagings.values()
            for stretch in averaging.own
        }
        parameters: list[Any] = []
        gradients: list[Any] = []
        for name in names:
            parameter = portion_of(library, params[name], self._mine[name])
            parameters.append(parameter)
            gradient = averaged[name].reshape(tuple(parameter.shape))
            gradients.append(library.from_bits(gradient, self._computed(name)))
        return parameters, gradients
