"""Which rank steps which part of which parameter."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gradstep.errors import ConfigurationError, ShapeError
from gradstep.program.blocks import BLOCK


class Portion(NamedTuple):
    """What a rank has of a parameter: elements in C order from `start` to `stop`."""

    rank: int
    start: int
    stop: int


class Extent(NamedTuple):
    """What the partition must know of a parameter.

    Attributes:
        shape: its shape.
        divisible: whether its elements are stepped each by itself and lie in C order.
        cost: what its step takes, if it is not divisible, in whatever unit.
    """

    shape: tuple[int, ...]
    divisible: bool
    cost: int

    @property
    def size(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


class Partition:
    """Portions of parameters by name; it never changes, and what has been assigned stays so when others come.

    Divisible parameters are one flat space, in the order of their names, cut into equal ranges at whole blocks of
    elements: so sums over blocks, codes of 8 bits and random numbers are what they are in one process. Others have one
    owner each, the most expensive first, who is the one with the least to do.

    Args:
        ranks: how many there are.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._portions: dict[str, list[Portion]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._costs = [0] * ranks  # of what has one owner
        self._sizes = [0] * ranks  # of what is divisible

    def __contains__(self, name: str) -> bool:
        return name in self._portions

    @property
    def is_empty(self) -> bool:
        """Whether no parameter has come yet."""
        return not self._portions

    def __getitem__(self, name: str) -> list[Portion]:
        return self._portions[name]

    @property
    def portions(self) -> Mapping[str, list[Portion]]:
        """Who has what, by name."""
        return self._portions

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self._shapes[name]

    def extended(self, extents: Mapping[str, Extent]) -> "Partition":
        """This one, and the parameters among these that it does not have.

        Raises:
            ShapeError: one has another shape than when it came.
            ConfigurationError: one that has been cut cannot be cut any more.
        """
        for name, extent in extents.items():
            if name in self._portions:
                self._check(name, extent)
        new = {name: extent for name, extent in sorted(extents.items()) if name not in self._portions}
        if not new:
            return self
        larger = Partition(self._ranks)
        larger._portions, larger._shapes = dict(self._portions), dict(self._shapes)
        larger._costs, larger._sizes = list(self._costs), list(self._sizes)
        larger._shapes |= {name: extent.shape for name, extent in new.items()}
        larger._cut({name: extent.size for name, extent in new.items() if extent.divisible})
        larger._give({name: extent for name, extent in new.items() if not extent.divisible})
        return larger

    def of_rank(self, rank: int, names: Iterable[str]) -> dict[str, Portion]:
        """What a rank has of these parameters; whole blocks that follow on each other, so one portion of each."""
        return {name: part for name in names for part in self._portions[name] if part.rank == rank}

    def _check(self, name: str, extent: Extent) -> None:
        if extent.shape != self._shapes[name]:
            raise ShapeError(
                f"params[{name!r}] has shape {extent.shape}, but {self._shapes[name]} when the ranks shared it out; "
                "opt.init(params) begins anew"
            )
        if len(self._portions[name]) > 1 and not extent.divisible:
            raise ConfigurationError(
                f"params[{name!r}] has been cut among the ranks, but now is not laid out in C order, or its rule looks "
                "at more than one element; opt.init(params) begins anew"
            )

    def _cut(self, sizes: Mapping[str, int]) -> None:
        total, before = sum(sizes.values()), 0
        ranks = sorted(self._each, key=lambda rank: (-self._sizes[rank], rank))  # the last gets what is left
        for name, size in sizes.items():
            ends = [min(max(_rounded(total * (turn + 1) / self._ranks - before), 0), size) for turn in self._each]
            ends[-1] = size
            starts = [0, *ends[:-1]]
            portions = [Portion(*part) for part in zip(ranks, starts, ends, strict=True) if part[1] < part[2]]
            self._portions[name] = portions or [Portion(ranks[-1], 0, 0)]
            before += size
        for name in sizes:
            for rank, start, stop in self._portions[name]:
                self._sizes[rank] += stop - start

    def _give(self, extents: Mapping[str, Extent]) -> None:
        for name, extent in sorted(extents.items(), key=lambda item: (-item[1].cost, item[0])):
            owner = min(self._each, key=lambda rank: (self._costs[rank], rank))
            self._costs[owner] += extent.cost
            self._portions[name] = [Portion(owner, 0, extent.size)]

    @property
    def _each(self) -> range:
        return range(self._ranks)


def _rounded(elements: float) -> int:
    """The nearest number of elements that fills blocks."""
    return math.floor(elements / BLOCK + 0.5) * BLOCK
