"""What the numbers were measured on, and how: alternating, in one process, medians."""

import statistics
from collections.abc import Callable, Sequence

from gradstep.cli.bench.machine import describe
from gradstep.cli.bench.timing import turn

__all__ = ["describe", "medians"]


def medians(
    sides: Sequence[Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None, warm: int = 0
) -> list[float]:
    """The median time of each side in milliseconds; they take turns, and the first rounds are not counted."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 3):
        before()
        for side, kept in zip(sides, times, strict=True):
            kept.append(turn(side, warm))
    return [1e3 * statistics.median(kept[3:]) for kept in times]
