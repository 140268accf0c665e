"""Which elements of a whole array a part of it has: those of a range in C order, or of a range along every axis."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Ranges of indices along an axis, in ascending order, each from its first to behind its last."""


class Span(NamedTuple):
    """Elements `start` to `stop`, in C order."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many elements these are."""
        return self.stop - self.start


class Region(NamedTuple):
    """The elements of an array whose indices lie in the runs of every axis."""

    shape: tuple[int, ...]
    """Of the whole array."""
    axes: tuple[Runs, ...]

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> Self:
        """Every element."""
        return cls(shape, tuple(((0, length),) for length in shape))

    @classmethod
    def none_of(cls, shape: tuple[int, ...]) -> Self:
        """No element."""
        return cls(shape, tuple(((0, 0),) for _ in shape))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.axes)

    @property
    def size(self) -> int:
        """How many elements these are."""
        return math.prod(self.lengths)

    @property
    def start(self) -> int | None:
        """The number of the first element in the whole array; None where they do not follow on each other there."""
        if not self.size:
            return 0
        if any(len(runs) > 1 for runs in self.axes):
            return None
        lengths = self.lengths
        cut = next((axis for axis, length in enumerate(lengths) if length > 1), len(lengths))
        if lengths[cut + 1 :] != self.shape[cut + 1 :]:
            return None
        return sum(runs[0][0] * math.prod(self.shape[axis + 1 :]) for axis, runs in enumerate(self.axes))

    @property
    def where(self) -> "Where":
        """The same, as a span where that is possible."""
        start = self.start
        return self if start is None else Span(start, start + self.size)

    @property
    def picked(self) -> Any:
        """What picks the elements out of the whole array, as one of NumPy."""
        return _picking(self.axes)

    def common(self, other: "Region") -> "Region | None":
        """The elements that are in both, if there are any."""
        axes = tuple(_common(*pair) for pair in zip(self.axes, other.axes, strict=True))
        return Region(self.shape, axes) if all(axes) else None

    def picked_in(self, larger: "Region") -> Any:
        """What picks the elements out of those of a region that has them all."""
        return _picking([_moved(*pair) for pair in zip(self.axes, larger.axes, strict=True)])


Where: TypeAlias = Span | Region


def regions_of(where: Where, shape: tuple[int, ...]) -> list[Region]:
    """Elements as regions that follow on each other: a few, as a span has an end within each axis at most."""
    return [where] if isinstance(where, Region) else list(_boxes(shape, (), where.start, where.stop))


def make_up(shape: tuple[int, ...], parts: Sequence[Where]) -> bool:
    """Whether parts of an array, within its shape, have every element once.

    As many elements as there are, and of each cell of the grid in which all parts are cut, one: then none comes twice.
    """
    if sum(part.size for part in parts) != math.prod(shape):
        return False
    regions = [region for part in parts for region in regions_of(part, shape)]
    edges = [np.unique([0, length, *_ends(regions, axis)]) for axis, length in enumerate(shape)]
    cells = [max(len(some) - 1, 1) for some in edges]
    if math.prod(cells) > MOST_CELLS:
        return False
    had = np.zeros(cells, bool)
    for region in regions:
        axes = [
            tuple(tuple(np.searchsorted(some, run).tolist()) for run in runs)
            for some, runs in zip(edges, region.axes, strict=True)
        ]
        had[_picking(axes)] = True
    return not math.prod(shape) or bool(had.all())


MOST_CELLS = 1 << 24  # many more than any mesh makes


def copy(source: Any, there: Sequence[Region], target: Any, here: Sequence[Region]) -> None:
    """Write the elements of some regions, one after another in flat `source`, to where `target` has these elements."""
    for region, block in _blocks(source, there):
        for wanted, room in _blocks(target, here):
            common = region.common(wanted)
            if common:
                room[common.picked_in(wanted)] = block[common.picked_in(region)]


def overlap(some: Sequence[Region], others: Sequence[Region]) -> bool:
    """Whether any element is in both."""
    return any(region.common(other) for region in some for other in others)


def _blocks(flat: Any, regions: Sequence[Region]) -> Iterator[tuple[Region, Any]]:
    at = 0
    for region in regions:
        yield region, flat[at : at + region.size].reshape(region.lengths)
        at += region.size


def _ends(regions: Sequence[Region], axis: int) -> list[int]:
    return [end for region in regions for run in region.axes[axis] for end in run]


def _boxes(shape: tuple[int, ...], before: tuple[Runs, ...], start: int, stop: int) -> Iterator[Region]:
    """Elements `start` to `stop` of the part of an array that has single indices along its first axes."""
    axis = len(before)
    if start == stop:
        return
    if axis == len(shape):
        yield Region(shape, before)
        return
    inner = math.prod(shape[axis + 1 :])
    first, last = -(-start // inner), stop // inner
    if first > last:
        yield from _boxes(shape, (*before, ((last, first),)), start - last * inner, stop - last * inner)
        return
    yield from _boxes(shape, (*before, ((first - 1, first),)), start - (first - 1) * inner, inner)
    if first < last:
        yield Region(shape, (*before, ((first, last),), *(((0, length),) for length in shape[axis + 1 :])))
    yield from _boxes(shape, (*before, ((last, last + 1),)), 0, stop - last * inner)


def _picking(axes: Sequence[Runs]) -> Any:
    if all(len(runs) == 1 for runs in axes):
        return tuple(slice(*runs[0]) for runs in axes)
    return np.ix_(*(np.concatenate([np.arange(0), *(np.arange(*run) for run in runs)]) for runs in axes))


def _common(some: Runs, others: Runs) -> Runs:
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in some for b in others)
    return tuple((start, stop) for start, stop in pairs if start < stop)


def _moved(runs: Runs, among: Runs) -> Runs:
    """Where runs lie among others, which have all of their indices."""
    found: list[tuple[int, int]] = []
    at = 0
    for start, stop in among:
        inside = _common(runs, ((start, stop),))
        found += [(at + first - start, at + last - start) for first, last in inside]
        at += stop - start
    return tuple(found)
