"""Gradients averaged and parameters spread among ranks, in buckets of bounded size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gradstep.distributed.collective import sum_parts
from gradstep.distributed.group import Array, Group
from gradstep.distributed.partition import Portion

BUCKET = 1 << 25  # bytes that are under way at once, at most


class Stretch(NamedTuple):
    """Elements `start` to `stop` of a parameter, from place `at` on in what their rank has."""

    name: str
    start: int
    stop: int
    at: int


class Shelf:
    """What each rank has, one portion after the other, in the order of names.

    Args:
        ranks: how many there are.
        portions: of each parameter.
        width: how many places an element takes.
    """

    def __init__(self, ranks: int, portions: Mapping[str, Sequence[Portion]], width: Callable[[str], int]) -> None:
        self.rows: list[list[Stretch]] = [[] for _ in range(ranks)]
        self.lengths = [0] * ranks
        for name, parts in portions.items():
            for rank, start, stop in parts:
                first, last = start * width(name), stop * width(name)
                self.rows[rank].append(Stretch(name, first, last, self.lengths[rank]))
                self.lengths[rank] += last - first

    def slices(self, places: int) -> Iterator[tuple[int, int, list[tuple[int, Stretch]]]]:
        """Cut all rows into slices of so many places: first and last place, and what lies there with its rank."""
        for low in range(0, max(self.lengths), places):
            high = min(low + places, max(self.lengths))
            yield low, high, [(rank, cut) for rank, row in enumerate(self.rows) for cut in _cut(row, low, high)]


def _cut(row: Sequence[Stretch], low: int, high: int) -> Iterator[Stretch]:
    for name, start, stop, at in row:
        first, last = max(low - at, 0), min(high - at, stop - start)
        if first < last:
            yield Stretch(name, start + first, start + last, at + first - low)


def _widest(slices: Sequence[tuple[int, int, object]]) -> int:
    return max((high - low for low, high, _ in slices), default=0)


class Averaging:
    """Averages the gradients of one compute dtype: each rank gets those of its own portions.

    ```
    averaged = (g on rank 0 + g on rank 1 + …) / ranks
    ```

    Attributes:
        averaged: this rank's portions, one after the other.
        rows: what each rank gets, and where it lies there.
        own: this rank's row.
    """

    def __init__(self, group: Group, portions: Mapping[str, Sequence[Portion]], dtype: str) -> None:
        self._group, self._dtype = group, np.dtype(dtype)
        shelf = Shelf(group.size, portions, lambda _: 1)
        self.rows, self.own = shelf.rows, shelf.rows[group.rank]
        self._slices = list(shelf.slices(max(BUCKET // (self._dtype.itemsize * group.size), 1)))
        self._bucket: Array = np.zeros(group.size * _widest(self._slices), self._dtype)
        self.averaged: Array = np.zeros(shelf.lengths[group.rank], self._dtype)

    def average(self, flat: Callable[[str, int, int], Array]) -> Exception | None:
        """Exchange all gradients; `flat` gives elements of one, in C order and the compute dtype.

        Returns what `flat` has raised, after all the others have had what they wait for.
        """
        problem = None
        for low, high, stretches in self._slices:
            parts = self._bucket[: self._group.size * (high - low)].reshape(self._group.size, -1)
            try:  # what lies behind the end of a row is nobody's
                for rank, (name, start, stop, at) in stretches:
                    parts[rank, at : at + stop - start] = flat(name, start, stop)
            except Exception as error:
                problem = error
            total = sum_parts(self._group, parts) if self._group.size > 1 else parts[0]
            mine = self.averaged[low:high]
            with np.errstate(all="ignore"):
                np.divide(total[: len(mine)], self._group.size, out=mine)
        return problem


class Spreading:
    """Brings every rank's portions of parameters to all others."""

    def __init__(self, group: Group, portions: Mapping[str, Sequence[Portion]], itemsize: Callable[[str], int]) -> None:
        self._group = group
        shelf = Shelf(group.size, portions, itemsize)
        self._slices = list(shelf.slices(max(BUCKET // group.size, 1)))
        self._own: Array = np.zeros(_widest(self._slices), np.uint8)

    def spread(self, flat: Mapping[str, Array]) -> None:
        """Exchange the bytes of all parameters, `flat` in C order, and write those of the others."""
        group = self._group
        if group.size == 1:
            return
        for low, high, stretches in self._slices:
            own = self._own[: high - low]
            for rank, (name, start, stop, at) in stretches:
                if rank == group.rank:
                    own[at : at + stop - start] = flat[name][start:stop]
            everybody = group.gather(own)
            for rank, (name, start, stop, at) in stretches:
                if rank != group.rank:
                    flat[name][start:stop] = everybody[rank, at : at + stop - start]
