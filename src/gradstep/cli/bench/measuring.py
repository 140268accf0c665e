"""The measurement of a case: all sides take turns in one process, and one that fails does not stop the others."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gradstep.cli.bench.case import Case
from gradstep.cli.bench.libraries import Library
from gradstep.cli.bench.sides import Action, Kind, LeftOut, Side, Stage
from gradstep.cli.bench.timing import turn

UNCOUNTED = 3  # rounds at the beginning
WARM = 2  # steps before each that is timed
SLOW = 0.05  # seconds; a step that takes longer needs none to warm up
PATIENCE = 60.0  # seconds; a case that has taken longer ends after the round, if FEWEST are counted
FEWEST = 3  # rounds


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Timed:
    """A side's times in seconds, one for each round."""

    side: str
    kind: Kind
    times: list[float]

    @property
    def spread(self) -> Spread:
        """Of its times."""
        return spread(self.times)


@dataclass(frozen=True)
class Failed:
    """A side that raised, and what."""

    side: str
    error: str


@dataclass(frozen=True)
class Result:
    """What a case showed."""

    case: Case
    timed: list[Timed]
    failed: list[Failed]

    def find(self, kind: Kind) -> Timed | None:
        """Our step or the limit; None if it failed."""
        return next((timed for timed in self.timed if timed.kind == kind), None)

    def share(self, timed: Timed) -> Spread | None:
        """The limit's time over this side's, round by round: 1 is as fast as the passes alone."""
        limit = self.find("limit")
        return limit and spread([best / own for best, own in zip(limit.times, timed.times, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """Their median and quartiles."""
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(statistics.median(values), q1, q3)


def measure(
    case: Case, library: Library, sides: Sequence[Side], rounds: int, tick: Callable[[], object] = lambda: None
) -> Result:
    """Let all sides take turns, `rounds` times and a few more that are not counted."""
    failed: dict[str, Failed] = {}
    library.forget()
    actions = _actions(case, library, sides, failed)
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    gc.collect()
    started = time.monotonic()
    with np.errstate(all="ignore"):
        for number in range(UNCOUNTED + rounds):
            if number >= UNCOUNTED + FEWEST and time.monotonic() - started > PATIENCE:
                break
            for name in [name for name in actions if name not in failed]:
                action, slow = actions[name], times[name] and times[name][-1] > SLOW
                try:
                    times[name].append(turn(action.step, 0 if slow else WARM, action.prepare))
                except Exception as error:
                    failed[name] = Failed(name, _line(error))
            tick()
    timed = [Timed(side.name, side.kind, times[side.name][UNCOUNTED:]) for side in sides if side.name not in failed]
    return Result(case, timed, list(failed.values()))


def _actions(case: Case, library: Library, sides: Sequence[Side], failed: dict[str, Failed]) -> dict[str, Action]:
    """Each side on copies of the same arrays, after one step: what is compiled, is compiled here."""
    params, rings = case.arrays()
    actions: dict[str, Action] = {}
    for side in sides:
        try:
            copies = [[library.copy(array) for array in arrays] for arrays in (params, *rings)]
            action = side.make(Stage(case, library, copies[0], copies[1:]))
            action.prepare()
            action.step()
            actions[side.name] = action
        except Exception as error:
            failed[side.name] = Failed(side.name, _line(error))
    return actions


def _line(error: BaseException) -> str:
    """An exception and its cause in one line that is not too long."""
    if isinstance(error, LeftOut):
        return str(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    cause = f" (from {_line(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {text}"[:200].rstrip(": ") + cause
