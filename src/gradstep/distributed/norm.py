"""The global norm of gradients that ranks have averaged among them, and which of these are not finite."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gradstep.distributed.exchange import Averaging, Stretch
from gradstep.distributed.group import Array, Group
from gradstep.program.blocks import BLOCK
from gradstep.program.threads import Team
from gradstep.step.inspection import Inspector, global_norm
from gradstep.step.sizes import count_blocks


class Found(NamedTuple):
    """The norm, the same bits on every rank, and the names of what is not finite.

    For any number of ranks too, but where squares of float64 over- or underflow.
    """

    norm: float
    culprits: tuple[str, ...]


class SharedNorm:
    """Sums of squares of every rank's portions, block by block, put together.

    Args:
        group: the ranks.
        averagings: the gradients, for each compute dtype.
        team: the threads of the library that the parameters are of.
    """

    def __init__(self, group: Group, averagings: Sequence[Averaging], team: Team | None) -> None:
        self._group, self._averagings = group, averagings
        self._inspectors = [
            Inspector(part.averaged.dtype.name, [size for _, size in _pieces(part.own)], team=team)
            for part in averagings
        ]
        self._places = [
            part.averaged.ctypes.data + part.averaged.itemsize * np.array([at for at, _ in _pieces(part.own)], np.int64)
            for part in averagings
        ]
        self._names = [
            [name for part in averagings for name in _of_blocks(part.rows[rank])] for rank in range(group.size)
        ]
        self._exact = all(part.averaged.dtype != np.float64 for part in averagings)

    def squares(self) -> Array:
        """This rank's sums, with room for as many as any rank has."""
        sums: list[float] = []
        for part, inspector, places in zip(self._averagings, self._inspectors, self._places, strict=True):
            found, odd = inspector.inspect(places)
            sums += self._told(part, found, odd)
        return np.array(sums + [0.0] * (max(map(len, self._names)) - len(sums)))

    def _told(self, part: Averaging, sums: list[float], odd: set[int]) -> list[float]:
        """The sums, NaN for all of a piece that is not finite; of float64 a sum may be infinite all the same."""
        pieces = _pieces(part.own)
        for place in odd:
            at, size = pieces[place]
            if part.averaged.dtype == np.float64 and np.isfinite(part.averaged[at : at + size]).all():
                continue
            first = sum(count_blocks(length, BLOCK) for _, length in pieces[:place])
            for block in range(first, first + count_blocks(size, BLOCK)):
                sums[block] = math.nan
        return sums

    def found(self, everybody: Array, whole: float) -> Found:
        """What the sums of all ranks say; may ask them once more."""
        named = [
            (name, value)
            for names, row in zip(self._names, everybody.tolist(), strict=True)
            for name, value in zip(names, row, strict=False)
        ]
        culprits = {name for name, value in named if math.isnan(value)}
        sums = [value for _, value in named]
        norm = global_norm(sums, self._arrays, exact=self._exact, put_together=self._put_together)
        return Found(norm * abs(whole), tuple(sorted(culprits)))

    def _arrays(self) -> list[Array]:
        return [part.averaged for part in self._averagings]

    def _put_together(self, together: Callable[[list[float]], float], own: float) -> float:
        return together(self._group.gather(np.array(own)).tolist())


def _pieces(row: Sequence[Stretch]) -> list[tuple[int, int]]:
    return [(stretch.at, stretch.stop - stretch.start) for stretch in row]


def _of_blocks(row: Sequence[Stretch]) -> list[str]:
    return [name for name, start, stop, _ in row for _ in range(count_blocks(stop - start, BLOCK))]
