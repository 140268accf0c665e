"""A curve as one line of blocks, with a mark between the steps that were taken and those that are to come."""

import math
from typing import NamedTuple

from gradstep.cli.checkpoint.schedules import Curve

BLOCKS, MARK = "▁▂▃▄▅▆▇█", "┃"
ASCII_BLOCKS, ASCII_MARK = "_.-~=+*#", "|"
UNDRAWABLE = "?"


class Sparkline(NamedTuple):
    """The line in three parts."""

    taken: str
    mark: str
    coming: str


def sparkline(curve: Curve, step: int, ascii_only: bool = False) -> Sparkline:
    """Draw a curve between its lowest value and its highest, before step number `step` is taken."""
    blocks, mark = (ASCII_BLOCKS, ASCII_MARK) if ascii_only else (BLOCKS, MARK)
    finite = [value for value in curve.values if math.isfinite(value)]
    lowest, highest = min(finite, default=0.0), max(finite, default=0.0)

    def block(value: float) -> str:
        if not math.isfinite(value):
            return UNDRAWABLE
        if lowest == highest:
            return blocks[len(blocks) // 2]
        height = value / 2 - lowest / 2, highest / 2 - lowest / 2  # halves, whose difference is finite
        return blocks[min(int(height[0] / height[1] * len(blocks)), len(blocks) - 1)]

    line = "".join(map(block, curve.values))
    taken = sum(at < step for at in curve.steps)
    return Sparkline(line[:taken], mark, line[taken:])
