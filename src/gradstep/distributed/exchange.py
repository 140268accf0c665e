"""Gradients averaged, parameters spread and shards delivered among ranks, in buckets of bounded size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from gradstep.distributed.collective import sum_parts
from gradstep.distributed.group import Array, Group
from gradstep.distributed.partition import Portion

BUCKET = 1 << 25  # bytes that are under way at once, for up to so many ranks:
FEW = 64


def row_bytes(ranks: int) -> int:
    """The bytes under way between two ranks at once; no fewer among many of them, where messages would get small."""
    return max(BUCKET // min(ranks, FEW), 1)


def bucket_bytes(ranks: int) -> int:
    """The bytes of a row for each rank."""
    return ranks * row_bytes(ranks)


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
            yield low, high, self.between(low, high)

    def between(self, low: int, high: int) -> list[tuple[int, Stretch]]:
        """What lies between two places of all rows, with its rank."""
        return [(rank, cut) for rank, row in enumerate(self.rows) for cut in _cut(row, low, high)]


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
        self._slices = list(shelf.slices(max(row_bytes(group.size) // self._dtype.itemsize, 1)))
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
        self._slices = list(shelf.slices(row_bytes(group.size)))
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


class Letter(NamedTuple):
    """So many bytes of a parameter, which one rank has and another one gets."""

    name: str
    sender: int
    receiver: int
    size: int


Bytes: TypeAlias = Mapping[tuple[str, int], Array]
"""Flat arrays of bytes by parameter and by the other rank."""


class Delivery:
    """Brings to each rank what others have for it alone.

    Args:
        group: the ranks.
        letters: of all ranks, the same list everywhere.
    """

    def __init__(self, group: Group, letters: Sequence[Letter]) -> None:
        self._group = group
        lengths = np.zeros((group.size, group.size), np.int64)
        for letter in letters:
            lengths[letter.sender, letter.receiver] += letter.size
        self._length = int(lengths.max())
        sent: dict[str, list[Portion]] = {}
        received: dict[str, list[Portion]] = {}
        for name, sender, receiver, size in letters:
            if sender == group.rank:
                sent.setdefault(name, []).append(Portion(receiver, 0, size))
            if receiver == group.rank:
                received.setdefault(name, []).append(Portion(sender, 0, size))
        self._sent, self._received = (Shelf(group.size, some, lambda _: 1) for some in (sent, received))
        self._places = row_bytes(group.size)
        self._bucket: Array = np.zeros((group.size, min(self._places, self._length)), np.uint8)

    def deliver(self, sent: Bytes, received: Bytes) -> None:
        """Exchange all letters: read what this rank sends, and write what it receives."""
        for low in range(0, self._length, self._places):
            high = min(low + self._places, self._length)
            rows = np.ascontiguousarray(self._bucket[:, : high - low])
            for rank, (name, start, stop, at) in self._sent.between(low, high):
                rows[rank, at : at + stop - start] = sent[name, rank][start:stop]
            came = self._group.exchange(rows)
            for rank, (name, start, stop, at) in self._received.between(low, high):
                received[name, rank][start:stop] = came[rank, at : at + stop - start]
