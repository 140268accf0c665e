"""`gradstep diff`."""

from pathlib import Path

from gradstep.checkpoint.checkpoint_file import CheckpointFile
from gradstep.checkpoint.tensors import read
from gradstep.cli.checkpoint import plain
from gradstep.cli.checkpoint.changes import Difference, Pair, compare, unequal
from gradstep.cli.checkpoint.contents import contents_of
from gradstep.cli.checkpoint.diff_screen import show
from gradstep.cli.checkpoint.measuring import Measure, measure
from gradstep.cli.checkpoint.opening import opened
from gradstep.cli.checkpoint.screen import Reading, console, on_terminal, print_json


def run_diff(first: Path, second: Path, *, as_json: bool, everything: bool) -> int:
    """Show what changed from one checkpoint to another; returns the exit code, 1 where anything did."""
    with opened(first) as a, opened(second) as b:
        contents = contents_of(a), contents_of(b)
        found = compare(*contents)
        measured = _measured(unequal(found.pairs, a, b), a, b)
    changed = sorted(
        ((pair, size) for pair, size in measured if size.differing),
        key=lambda one: (-one[1].relative, -one[1].largest),
    )
    same = len(found.pairs) - len(changed)
    difference = Difference(*contents, found.changes, changed, same, len(measured) - len(changed))
    if as_json:
        print_json(plain.difference(difference))
    else:
        show(difference, console(), everything or not on_terminal())
    return 0 if difference.is_empty else 1


def _measured(pairs: list[Pair], a: CheckpointFile, b: CheckpointFile) -> list[tuple[Pair, Measure]]:
    """Each pair compared, with one tensor of each file in memory."""
    measured: list[tuple[Pair, Measure]] = []
    with Reading("comparing", sum(pair.a.bytes + pair.b.bytes for pair in pairs)) as reading:
        for pair in pairs:
            measured.append((pair, measure(read(a.tensors, pair.a.key), read(b.tensors, pair.b.key))))
            reading.advance(pair.a.bytes + pair.b.bytes)
    return measured
