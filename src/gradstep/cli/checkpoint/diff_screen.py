"""What a person sees of two checkpoints: what changed in words, then in numbers, the largest change first."""

import math
from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from gradstep.cli.checkpoint.changes import Change, Difference, Pair, has_codes
from gradstep.cli.checkpoint.measuring import Measure
from gradstep.cli.checkpoint.screen import ROWS, table
from gradstep.cli.checkpoint.spelling import printable

Row = TypeVar("Row")


def show(difference: Difference, screen: Console, everything: bool) -> None:
    """All of it; long tables in short unless `everything` is asked for."""
    for side, contents in (("A", difference.a), ("B", difference.b)):
        name = printable(str(contents.path))
        screen.print(Text.assemble((f"{side}  ", "bold"), name), soft_wrap=True)
    screen.print()
    if difference.changes:
        _show_changes(difference.changes, screen, everything)
    if difference.changed:
        _show_measures(difference.changed, screen, everything)
    screen.print(Text(_summary(difference)))


def _summary(difference: Difference) -> str:
    changed, same = len(difference.changed), difference.same
    if difference.is_empty:
        tensors = f"{same:,} tensor{'s' * (same != 1)}"
        text = f"Nothing differs: {tensors}, by their recorded hashes, and all that is said of them are equal."
    elif not changed and not same:
        text = "They have no tensors in common."
    else:
        text = f"{changed:,} of the {changed + same:,} tensors of both differ."
    if difference.other_bits:
        text += f" {difference.other_bits:,} of the equal ones have other bits: signs of zero, or kinds of NaN."
    return text


def _show_changes(changes: Sequence[Change], screen: Console, everything: bool) -> None:
    made = table("", "A", "B")
    for change in _first(changes, everything):
        cells = [Text("-", "dim") if text is None else Text(printable(text)) for text in (change.a, change.b)]
        made.add_row(Text(printable(change.where)), *cells)
    screen.print(made)
    _show_rest(changes, "differences", screen, everything)


def _show_measures(changed: Sequence[tuple[Pair, Measure]], screen: Console, everything: bool) -> None:
    numbers = ("relative", "largest", "elements that differ")
    made = table("parameter", "array", *numbers, numbers=numbers)
    for pair, measure in _first(changed, everything):
        largest = f"{measure.largest:.0f} of 255" if has_codes(pair) else _number(measure.largest)
        made.add_row(
            Text(printable(pair.parameter)), Text(printable(pair.a.label)), _number(measure.relative), largest,
            f"{measure.differing:,} of {measure.elements:,}",
        )  # fmt: skip
    screen.print(made)
    _show_rest(changed, "smaller changes", screen, everything)
    screen.print(Text("relative: root mean square of B - A, over that of A; largest: of |B - A|", "dim"))
    if any(has_codes(pair) for pair, _ in changed):
        screen.print(Text("codes are compared as they are, not the numbers that they stand for", "dim"))


def _first(rows: Sequence[Row], everything: bool) -> Sequence[Row]:
    return rows if everything else rows[:ROWS]


def _show_rest(rows: Sequence[object], what: str, screen: Console, everything: bool) -> None:
    if len(rows) > ROWS and not everything:
        screen.print(Text(f"and {len(rows) - ROWS:,} {what}; --all shows each", "yellow"))
    screen.print()


def _number(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.3g}"
