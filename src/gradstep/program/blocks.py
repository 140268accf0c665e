"""Whole-tensor sums: float64, over fixed blocks in C order, equal bits for any number of threads.

A block is `BLOCK` consecutive elements. Element `i` of a block is added to lane `i % LANES`; the lanes are added in
order; the sums of all blocks are added exactly (`math.fsum`). Kernels follow the same definition, except in programs
that also have statistics of rows or columns. These sum in blocks of 64 rows: columns row after row, all else in
lanes that are halved at the end, lane `i % LANES` of a row's element `i`; four rows at a time have lanes of their own.
What they square is squared in float64.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

BLOCK = 1 << 15
LANES = 16


def sum_of_values(array: np.ndarray[Any, Any]) -> float:
    """The sum of all elements."""
    return _sum(array, square=False)


def sum_of_squares(array: np.ndarray[Any, Any]) -> float:
    """The sum of all squared elements, squared in float64."""
    return _sum(array, square=True)


def exact_sum(parts: Iterable[float]) -> float:
    """`math.fsum`, with IEEE results where it would raise: opposite infinities give NaN, overflow infinity."""
    parts = list(parts)
    try:
        return math.fsum(parts)
    except ValueError:
        return math.nan
    except OverflowError:
        with np.errstate(all="ignore"):
            return float(np.sum(np.array(parts)))


def _sum(array: np.ndarray[Any, Any], square: bool) -> float:
    flat = np.ravel(array, order="C").astype(np.float64)
    with np.errstate(all="ignore"):
        if square:
            flat *= flat
        sums: list[float] = []
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK]
            rows = np.zeros((-(-block.size // LANES), LANES))
            rows.reshape(-1)[: block.size] = block
            lanes = np.add.accumulate(rows, axis=0)[-1] + 0.0
            sums.append(float(np.add.accumulate(lanes)[-1]))
    return exact_sum(sums)
