"""A turn: the time of one step after a rest and some steps that are not counted."""

import time
from collections.abc import Callable

REST = 0.02  # seconds


def nothing() -> None:
    """No preparation."""


def turn(step: Callable[[], object], warm: int = 0, prepare: Callable[[], object] = nothing) -> float:
    """The seconds that a step takes.

    Before it there is a rest, so that no threads of another side still spin, waiting for work, in this one's time, and
    then `warm` steps that are not counted: on a virtual machine a processor that has slept takes milliseconds to wake.
    `prepare` is called before each step and is not timed.
    """
    time.sleep(REST)
    for _ in range(warm):
        prepare()
        step()
    prepare()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
