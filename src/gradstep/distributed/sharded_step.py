"""A step of several ranks, planned: the part of one of them, and how it fits together with the others'."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

import gradstep
from gradstep.arrays.library import OTHER, STAYED, FunctionalLibrary, MemoryLibrary, owner
from gradstep.arrays.memory import Memory, element_strides, strides_in_order
from gradstep.distributed.council import Facts, word_of
from gradstep.distributed.exchange import BUCKET, Averaging, Spreading
from gradstep.distributed.group import Array, Group
from gradstep.distributed.norm import SharedNorm
from gradstep.distributed.partition import Extent, Partition, Portion
from gradstep.errors import ArgumentTypeError, CommunicationError
from gradstep.program.arithmetic import IeeeArithmetic
from gradstep.program.formats import BYTES, compute_dtype
from gradstep.program.graph import Reading
from gradstep.program.program import Program
from gradstep.program.rounding import widened
from gradstep.step.intake import Intake
from gradstep.step.leaf import Leaf
from gradstep.step.match import check_parameter, check_shape, describe_floats
from gradstep.step.plan import Piece, Plan, Share
from gradstep.step.scalars import Scales

Routes = Sequence[tuple[Leaf, list[str]]]


def extents_of(library: MemoryLibrary, routes: Routes, params: Mapping[str, Any]) -> dict[str, Extent]:
    """How each parameter may be shared out: by its elements, or as a whole."""
    return {
        name: extent_of(leaf.program(name, params[name].ndim), check_parameter(library, name, params[name]))
        for leaf, names in routes
        for name in names
    }


def extent_of(program: Program, memory: Memory) -> Extent:
    """The same for one parameter with this program."""
    alone = not (program.ordered or program.factored or program.scalars.dimensions)
    if alone and _is_plain(memory):
        return Extent(memory.shape, divisible=True, cost=0)
    products = any(program.matrices) and len(memory.shape) > 1
    return Extent(memory.shape, divisible=False, cost=memory.size * (min(memory.shape[-2:]) if products else 1))


def _is_plain(memory: Memory) -> bool:
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


def exchange_bytes(library: MemoryLibrary, own: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    """What a rank needs for averaged gradients, and for buckets: what it sends, what it receives, and their sum."""

    def size(arrays: Mapping[str, Any]) -> int:
        memories = [library.describe(array, "a parameter") for array in arrays.values()]
        return sum(memory.size * BYTES[compute_dtype(memory.dtype)] for memory in memories)

    return size(own) + 3 * min(BUCKET, size(params))


class ShardedPlan:
    """One rank's part in a step.

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
        self.library, self.names = library, sorted(params)
        self._memories = {name: check_parameter(library, name, params[name]) for name in self.names}
        self._gradients = {name: describe_floats(library, grads[name], f"grads[{name!r}]") for name in self.names}
        for name in self.names:
            check_shape(name, self._gradients[name], self._memories[name])
        self._routes = routes
        self._copied = [name for name, memory in self._memories.items() if not _is_plain(memory)]
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
        self.norm = SharedNorm(group, list(self._averagings.values()), library.team)
        shares = [self._share(leaf, [name for name in names if name in self._mine]) for leaf, names in routes]
        local = [name for share in shares for name in share.names]
        parameters, gradients = (dict(zip(local, arrays, strict=True)) for arrays in self._local(params, local))
        self.plan = Plan(library, shares, parameters, gradients, intake)
        self._watch_slots = library.watch(self.plan.shown_slots)
        self._examples = [(leaf, {leaf.group(name): name for name in reversed(names)}) for leaf, names in routes]
        self.facts = self._describe()
        self.word = word_of(self.facts)

    def _share(self, leaf: Leaf, names: list[str]) -> Share:
        return Share(leaf, names, pieces={name: self._piece(name) for name in names})

    def _piece(self, name: str) -> Piece:
        return Piece(self._mine[name].start, len(self._memories[name].shape))

    def _computed(self, name: str) -> str:
        return compute_dtype(self._memories[name].dtype)

    def _sorted(self, tree: Mapping[str, Any]) -> list[Any]:
        return [tree[name] for name in self.names]

    def finds(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> bool:
        """Whether these are the parameters that were planned, with their slots, and gradients like those."""
        shown = self._watch_slots.locate(self.plan.shown_slots) != OTHER
        return (
            self._watch_params.locate(self._sorted(params)) == STAYED
            and self._watch_grads.locate(self._sorted(grads)) != OTHER
            and shown
            and np.array_equal(self._watch_slots.addresses, self.plan.shown_addresses)
        )

    # What all ranks must have in common

    def _describe(self) -> Facts:
        facts = {"the version of gradstep": gradstep.__version__}
        for what, memories in (("grads", self._gradients), ("params", self._memories)):
            for name, memory in memories.items():
                order = "" if what == "grads" or _is_plain(memory) else f", strides {memory.strides}"
                dtype = f"{memory.dtype} of shape " if what == "params" else "of shape "
                facts[f"{what}[{name!r}]"] = f"{dtype}{memory.shape}{order}"
        for leaf, examples in self._examples:
            for name in examples.values():
                settings = leaf.settings_of(name)
                for option, chosen in zip(settings.given, settings.static, strict=True):
                    facts[f"{option} in the rule of params[{name!r}]"] = _spelled(chosen)
        for number, (leaf, names) in enumerate(self._routes):
            for name in names:
                program = leaf.program(name, len(self._memories[name].shape))
                word = word_of(repr(program.key))
                facts[f"the rule of params[{name!r}]"] = f"{program.name} {number} ({word:x})"
                facts[f"the patterns that params[{name!r}] matches"] = repr(leaf.group(name))
                facts[f"the storage of params[{name!r}]"] = str(leaf.storage.options)
                facts[f"the shares of params[{name!r}]"] = str(self._portions[name])
        return facts

    def coming(self) -> Facts:
        """What the coming step depends on and may change from step to step."""
        return {
            f"{hyperparameter} of params[{name!r}]": repr(value)
            for leaf, examples in self._examples
            for group, name in examples.items()
            for hyperparameter, value in leaf.scalars(group).items()
        }

    # What is done for each step

    def average(self, grads: Mapping[str, Any], intake: Intake, micro: float) -> None:
        """Average the gradients of all ranks; this one keeps those of its portions.

        What ends a round of micro-batches, weighed by `micro`, joins the sum of the others first.
        """
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
                with np.errstate(all="ignore"):
                    values = values * np.dtype(dtype).type(micro)
                    if reading is Reading.SUMMED:
                        values = elements(intake.total(name), start, stop) + values
            return values

        problems = [averaging.average(gradient) for averaging in self._averagings.values()]
        for problem in filter(None, problems):
            raise problem

    def prepare(self, params: Mapping[str, Any], scales: Scales) -> None:
        """Run all that writes nothing but scratch."""
        self._parameters, gradients = self._local(params, self.plan.names) if self._has_scratch else ((), ())
        self.plan.gather(self._parameters, gradients)
        with IeeeArithmetic():
            self.plan.prepare(scales)
        self._staged = [share.stage() for share in self.plan.shares]

    def commit(self, params: Mapping[str, Any]) -> None:
        """Write this rank's portions. Nothing in here can fail."""
        self.library.wrote([*self._sorted(params), *self.plan.shown_slots])
        self.plan.commit(self._parameters)
        for share, state in zip(self.plan.shares, self._staged, strict=True):
            share.advance(state)
            share.leaf.cut = True
        self._parameters, self._staged = (), []

    def spread(self, params: Mapping[str, Any]) -> None:
        """Bring everybody's portions to everybody.

        Raises:
            CommunicationError: some have come and others not.
        """
        try:
            self._spread(params)
        except CommunicationError:
            raise
        except Exception as error:
            raise CommunicationError(
                "the step has been taken, but parameters could not be brought to all ranks, so that they differ "
                f"between ranks now ({type(error).__name__}: {error}); start again from the last checkpoint"
            ) from error

    def _spread(self, params: Mapping[str, Any]) -> None:
        arrays = {name: self.library.as_numpy(params[name]) for name in self.names}
        flat = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}
        self._spreading.spread(flat)
        for name in self._copied:
            arrays[name][...] = flat[name].view(arrays[name].dtype).reshape(arrays[name].shape)

    @property
    def _has_scratch(self) -> bool:
        return any(batch.scratch for batch in self.plan.batches)

    def _local(self, params: Mapping[str, Any], names: Sequence[str]) -> tuple[list[Any], list[Any]]:
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


def _spelled(chosen: object) -> str:
    """What `Settings.static` says of one hyperparameter, the same in every process."""
    if not isinstance(chosen, tuple):
        return "0, which leaves it out" if chosen else "kept"
    _, value = cast("tuple[type, object]", chosen)
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else repr(value)
