"""By how much the elements of two tensors differ, in float64."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstep.arrays.stored import Stored

BLOCK = 1 << 20  # elements that are widened at a time

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Measure:
    """The change from one tensor to another of its shape. NaN equals NaN, and is infinitely far from any number.

    Attributes:
        largest: the largest absolute difference.
        relative: the root mean square of the differences, relative to that of the first tensor's finite elements.
        differing: how many elements differ.
        elements: how many there are.
    """

    largest: float
    relative: float
    differing: int
    elements: int


def measure(first: Stored, second: Stored) -> Measure:
    """Compare two tensors of one shape, whatever their dtypes."""
    count, largest, change, base, finite = 0, 0.0, 0.0, 0.0, 0
    size = first.bits.size
    for start in range(0, size, BLOCK):
        a, b = _widened(first, start), _widened(second, start)
        with np.errstate(all="ignore"):
            unlike = _unlike(first, second, start) if _are_integers(first, second) else (a != b)
            unlike &= ~(np.isnan(a) & np.isnan(b))
            distance = np.abs(b[unlike] - a[unlike])
            distance[~np.isfinite(distance)] = math.inf
            known = np.abs(a[np.isfinite(a)])
        count, finite = count + len(distance), finite + len(known)
        largest = max(largest, float(distance.max(initial=0.0)))
        change, base = math.hypot(change, _norm(distance)), math.hypot(base, _norm(known))
    return Measure(largest, _relative(change, size, base, finite), count, size)


def _relative(change: float, size: int, base: float, finite: int) -> float:
    if change == 0:
        return 0.0
    return math.inf if base == 0 else (change / math.sqrt(size)) / (base / math.sqrt(finite))


def _norm(values: Numbers) -> float:
    """The root of the sum of squares, none of which may overflow."""
    top = float(values.max(initial=0.0))
    return top * math.sqrt(float(np.sum(np.square(values / top)))) if 0 < top < math.inf else top


def _piece(stored: Stored, start: int) -> Numbers:
    return stored.bits.reshape(-1)[start : start + BLOCK]


def _widened(stored: Stored, start: int) -> Numbers:
    piece = _piece(stored, start)
    if stored.dtype == "bfloat16":
        piece = (piece.astype(np.uint32) << 16).view(np.float32)
    elif stored.dtype == "float16":
        piece = piece.view(np.float16)
    with np.errstate(invalid="ignore"):
        return piece.astype(np.complex128 if piece.dtype.kind == "c" else np.float64)


def _are_integers(first: Stored, second: Stored) -> bool:
    return first.dtype == second.dtype and not first.dtype.startswith(("float", "bfloat", "complex"))


def _unlike(first: Stored, second: Stored, start: int) -> Numbers:
    """Where integers differ, also those that float64 does not tell apart."""
    return np.not_equal(_piece(first, start), _piece(second, start))
