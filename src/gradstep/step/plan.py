"""A step planned: which arrays run in which batch, checked once and reused while nothing but addresses changes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gradstep.arrays.library import MemoryLibrary, Watch
from gradstep.arrays.memory import Integers, Memory
from gradstep.program.formats import compute_dtype
from gradstep.program.graph import Reading
from gradstep.program.rounding import widened
from gradstep.program.threads import pool
from gradstep.step.batch import batches
from gradstep.step.inspection import Inspection, Inspector, global_norm
from gradstep.step.intake import Intake, joined
from gradstep.step.leaf import Leaf, State
from gradstep.step.match import Match, match
from gradstep.step.overlap import Extents
from gradstep.step.scalars import Scales


class Piece(NamedTuple):
    """Of which array one is a piece: the number of its first element there, and how many axes there are."""

    start: int
    ndim: int


class Share:
    """The gradients that one optimizer takes in this step.

    Args:
        leaf: the optimizer.
        names: the parameters.
        slots: their slots, where they are not the optimizer's own arrays.
        pieces: which of them are pieces of larger ones, with elements that follow on each other there, in C order.
    """

    def __init__(
        self,
        leaf: Leaf,
        names: list[str],
        slots: Mapping[str, Mapping[str, Any]] | None = None,
        pieces: Mapping[str, Piece] | None = None,
    ) -> None:
        self.leaf, self.names = leaf, names
        self._pieces = pieces or {}
        self._slots = slots
        self.matches: list[Match] = []
        self._rows = leaf.reserve(names)
        self.published = False  # whether the slots are the optimizer's already

    def slots_of(self, name: str) -> Mapping[str, Any]:
        """The slots that a parameter has so far."""
        return self.leaf.slots_of(name) if self._slots is None else self._slots[name]

    def piece(self, name: str, parameter: Any) -> Piece:
        """What the parameter is a piece of; mostly it is whole."""
        return self._pieces.get(name) or Piece(0, parameter.ndim)

    def stage(self) -> State:
        """The optimizer's state after the step, not yet adopted."""
        return self.leaf.stage(self._rows, () if self.published else self.matches)

    def advance(self, staged: State) -> None:
        """Let the optimizer adopt that state."""
        self.leaf.advance(staged)
        self.published = True


class Plan:
    """The tables of a step. Holds no reference to parameters or gradients.

    `lent` memory is not looked at for overlap: nobody else has a share in it when it is written.
    """

    in_place: Literal[True] = True

    def __init__(
        self,
        library: MemoryLibrary,
        shares: Sequence[Share],
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        intake: Intake,
        *,
        lent: bool = False,
    ) -> None:
        self.library, self.shares = library, list(shares)
        _ = pool.threads  # an error in how many there should be belongs here, before anything is written
        self.names = [name for share in shares for name in share.names]
        for share in self.shares:
            pieces = {name: share.piece(name, params[name]) for name in share.names}
            share.matches = [
                match(
                    library, name, params[name], grads[name],
                    share.leaf.program(name, piece.ndim, intake.reading(name)), share.leaf.storage,
                    share.slots_of(name), intake.reading(name), intake.total(name), piece.start,
                )
                for name, piece in pieces.items()
            ]  # fmt: skip
        self.matches = [match for share in self.shares for match in share.matches]
        self._extents = None if lent else self._survey()
        if self._extents:
            self._extents.check(*(_addresses([m.memory[place] for m in self.matches]) for place in ("w", "g")))
        self.batches = [batch for share in self.shares for batch in batches(share.leaf, library, share.matches)]
        places = {name: place for place, name in enumerate(self.names)}
        self._members = [np.array([places[m.name] for m in batch.matches], np.int64) for batch in self.batches]
        self._member_lists = [members.tolist() for members in self._members]
        shown = [m for share in self.shares for m in share.matches if m.name in share.leaf.shown]
        self.shown_slots = [array for m in shown for array in m.slots.values()]
        self.shown_addresses = _addresses([m.memory[slot] for m in shown for slot in m.slots])
        self._inspectors: list[Inspector] | None = None

    @property
    def published(self) -> bool:
        """Whether a step has been taken; before, the plan's new slots are nobody's, and must not outlive a failure."""
        return all(share.published for share in self.shares)

    def watch(self, arrays: list[Any]) -> Watch:
        """What tells whether such arrays have come again."""
        return self.library.watch(arrays)

    def _survey(self) -> Extents:
        parameters, gradients = (
            {f"{tree}[{match.name!r}]": match.memory[place] for match in self.matches}
            for tree, place in (("params", "w"), ("grads", "g"))
        )
        slots = {f"state[{m.name!r}][{slot!r}]": m.memory[slot] for m in self.matches for slot in m.slots}
        # Where sums are added up they are the parameters themselves.
        sums = {
            f"sums[{m.name!r}]": memory
            for m in self.matches
            if (memory := m.memory.get("g.sum")) is not None and memory != m.memory["w"]
        }
        return Extents(parameters, gradients, slots | sums)

    def move(self, parameters: Integers, gradients: Integers) -> None:
        """The arrays may lie elsewhere now: check for overlap again and change the tables."""
        if self._extents:
            self._extents.check(parameters, gradients)
        self.place("w", parameters)
        self.place("g", gradients)

    def move_gradients(self, gradients: Integers) -> None:
        """The same when only gradients have moved."""
        if self._extents:
            self._extents.check_gradients(gradients)
        self.place("g", gradients)

    def place(self, place: str, addresses: Integers) -> None:
        """Change the tables of one array of every parameter, without a check."""
        for batch, members in zip(self.batches, self._members, strict=True):
            batch.move(place, addresses if len(self.batches) == 1 else addresses[members])

    def gather(self, parameters: Sequence[Any], gradients: Sequence[Any]) -> None:
        """Copy what no kernel can walk into scratch."""
        for batch, members in zip(self.batches, self._member_lists, strict=True):
            if batch.scratch:
                batch.gather([parameters[i] for i in members], [gradients[i] for i in members])

    def check(self, scales: Scales) -> None:
        """Raise for factors that are not finite in a dtype of the computation."""
        for batch in self.batches:
            scales.check(batch.dtype)

    def inspect(self, gradients: Sequence[Any], scales: Scales) -> Inspection:
        """The global norm of the gradients as the rules will see them, and which of them are not finite."""
        if self._inspectors is None:
            self._inspectors = [
                Inspector(batch.gradient_dtype, batch.sizes.tolist(), batch.reading, batch.dtype, self.library.team)
                for batch in self.batches
            ]
        sums: list[float] = []
        odd: set[int] = set()
        for batch, members, inspector in zip(self.batches, self._member_lists, self._inspectors, strict=True):
            parts, tensors = inspector.inspect(batch.addresses["g"], batch.addresses.get("g.sum"), scales.micro)
            sums += parts
            odd |= {members[tensor] for tensor in tensors}
        exact = all(inspector.dtype != "float64" for inspector in self._inspectors)
        culprits = [i for i in sorted(odd) if exact or not np.isfinite(self._read(i, gradients, scales)).all()]
        norm = global_norm(sums, lambda: self._read_all(gradients, scales), exact=exact)
        return Inspection(norm * abs(scales.whole), culprits)

    def _read_all(self, gradients: Sequence[Any], scales: Scales) -> Iterable[np.ndarray[Any, Any]]:
        return (self._read(i, gradients, scales) for i in range(len(gradients)))

    def _read(self, place: int, gradients: Sequence[Any], scales: Scales) -> np.ndarray[Any, Any]:
        """One gradient as a kernel reads it, before it is scaled as a whole."""
        match = self.matches[place]
        stored, dtype = self.library.as_numpy(gradients[place]), match.memory["g"].dtype
        if match.reading in (Reading.PLAIN, Reading.SCALED):
            return widened(stored, dtype, compute_dtype(dtype))
        values = widened(stored, dtype, compute_dtype(match.memory["w"].dtype))
        return joined(values, scales.micro, None if match.total is None else self.library.as_numpy(match.total))

    def prepare(self, scales: Scales) -> None:
        """Run all that writes nothing but scratch."""
        for batch in self.batches:
            batch.prepare(scales)

    def commit(self, parameters: Sequence[Any]) -> None:
        """Write parameters and slots."""
        for batch, members in zip(self.batches, self._member_lists, strict=True):
            batch.commit([parameters[i] for i in members] if batch.scratch else ())


def _addresses(memories: Sequence[Memory]) -> Integers:
    return np.array([memory.address for memory in memories], np.int64)
