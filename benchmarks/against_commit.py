"""Whether a change made steps faster or slower: the work tree against a commit, pair by pair.

    python benchmarks/against_commit.py COMMIT [--only AdamW torch …] [--pairs 40]

Each side is a process of its own on equal inputs. They take turns: one times a few steps, then the other, and the two
medians make a pair. Printed are the median of the pairs' ratios and its quartiles; below 1 the work tree is faster. A
case is marked when both quartiles are on one side of 1 and the median is 3% away from it.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trees import ROOT, checked_out, environment

FAMILIES = ("SGD", "RMSprop", "Adagrad", "AdaDelta", "Adam", "AdamW", "Adamax", "Lion", "Adafactor", "Muon")
SHAPES = {"1 of 64": (1, (8, 8)), "500 of 256": (500, (16, 16)), "4 of 250,000": (4, (500, 500)),
          "1 of 4 million": (1, (2000, 2000))}  # fmt: skip
SPAN = 0.02  # seconds that one turn takes, about
MARKED = 0.03


def cases() -> list[tuple[str, str, str]]:
    """Family, library and shapes."""
    every = [(family, library, shape) for family in FAMILIES for library in ("numpy", "torch") for shape in SHAPES]
    return [case for case in every if case[0] != "Muon" or case[2] != "1 of 4 million"]


def step_of(family: str, library: str, shape: str) -> Callable[[], object]:
    """The step that is timed; its gradients take turns, as after a backward pass."""
    import importlib
    import itertools

    import gradstep as gs

    ones: Any = importlib.import_module(library).ones
    count, size = SHAPES[shape]
    trees = [{f"layers.{i}.weight": ones(size) for i in range(count)} for _ in range(3)]
    if library == "numpy":
        trees = [{name: array.astype("float32") for name, array in tree.items()} for tree in trees]
    params, turns = trees[0], itertools.cycle(trees[1:])
    opt = getattr(gs, family)(1e-3)
    return lambda: opt.apply_gradients(next(turns), params)


def take_turns(family: str, library: str, shape: str) -> None:
    """Run in a process of its own: for each line that comes, time some steps and print their median."""
    step = step_of(family, library, shape)
    begin, steps = time.perf_counter(), 0
    while steps < 5 or time.perf_counter() - begin < SPAN:
        step()
        steps += 1
    print("ready", flush=True)
    for _ in sys.stdin:
        taken = [timed(step) for _ in range(max(steps // 2, 3))]
        print(statistics.median(taken), flush=True)


def timed(step: Callable[[], object]) -> float:
    """The seconds of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


class Worker:
    """The process of one side."""

    def __init__(self, source: Path, case: tuple[str, str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", *case],
            env=environment(source), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def turn(self) -> float:
        """The median time of a few steps, in seconds."""
        pipe: IO[str] | None = self.process.stdin
        assert pipe is not None
        pipe.write("\n")
        pipe.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended early")
        return line


@contextlib.contextmanager
def working(source: Path, case: tuple[str, str, str]) -> Iterator[Worker]:
    """A worker, and its end."""
    worker = Worker(source, case)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.communicate()


def compare(other: Path, case: tuple[str, str, str], pairs: int) -> tuple[float, list[float]]:
    """The median time in the work tree, and the ratio of every pair; who begins changes from pair to pair."""
    times: list[float] = []
    ratios: list[float] = []
    with working(ROOT, case) as ours, working(other, case) as theirs:
        for pair in range(pairs):
            order = (ours, theirs) if pair % 2 else (theirs, ours)
            taken = {worker: worker.turn() for worker in order}
            times.append(taken[ours])
            ratios.append(taken[ours] / taken[theirs])
    return statistics.median(times), ratios


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="with what to compare; without one, the work tree with itself")
    parser.add_argument("--only", nargs="*", default=[], help="words that a case must have")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        take_turns(*options.work)
        return
    import machine  # not in a worker, whose gradstep may be too old for it

    print(machine.describe())
    print(f"{'case':36}{'work tree':>13}{'ratio':>8}  quartiles")
    with checked_out(options.commit) as other:
        for case in cases():
            name = ", ".join(case)
            if any(word not in name for word in options.only):
                continue
            median, ratios = compare(other or ROOT, case, options.pairs)
            low, middle, high = statistics.quantiles(ratios, n=4)
            mark = {(True, False): "  faster", (False, True): "  SLOWER"}.get(
                (high < 1 and middle < 1 - MARKED, low > 1 and middle > 1 + MARKED), ""
            )
            print(f"{name:36}{1e6 * median:10,.1f} µs{middle:8.3f}  {low:.3f}–{high:.3f}{mark}", flush=True)


if __name__ == "__main__":
    main()
