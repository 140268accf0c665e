"""A group of threads of one process: the interface in its plainest form, for tests."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from gradstep.errors import CommunicationError

Result = TypeVar("Result")

TIMEOUT = 30.0  # seconds until a thread that does not come is given up


class ThreadGroup:
    """One of the threads that `run_in_threads` starts; `places` and `barrier` are common to all."""

    name = "threads"

    def __init__(self, rank: int, places: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(places)
        self._places, self._barrier = places, barrier

    def gather(self, values: np.ndarray) -> np.ndarray:
        return np.stack(self._pass_round(values.copy()))

    def gather_messages(self, message: bytes) -> list[bytes]:
        return self._pass_round(message)

    def exchange(self, parts: np.ndarray) -> np.ndarray:
        return np.stack([every[self.rank] for every in self._pass_round(parts.copy())])

    def _pass_round(self, mine: Any) -> list[Any]:
        self._places[self.rank] = mine
        try:
            self._barrier.wait()
            theirs = list(self._places)
            self._barrier.wait()  # nobody puts the next before all have read these
        except threading.BrokenBarrierError as error:
            raise CommunicationError(
                f"rank {self.rank} of {self.size} threads: another one failed or is late"
            ) from error
        return theirs


def group_of_one() -> ThreadGroup:
    """Nobody else."""
    return ThreadGroup(0, [None], threading.Barrier(1))


def run_in_threads(n: int, function: Callable[[ThreadGroup], Result], timeout: float = TIMEOUT) -> list[Result]:
    """What `function` returns in each of `n` threads, by rank. The first error of a thread is raised again."""
    places: list[Any] = [None] * n
    barrier = threading.Barrier(n, timeout=timeout)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, places, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    if errors:
        raise next((each for each in errors if not _is_consequence(each)), errors[0])
    if len(results) < n:
        late = sorted(set(range(n)) - set(results))
        raise CommunicationError(f"ranks {late} of {n} threads have not ended after {timeout:g} s")
    return [results[rank] for rank in range(n)]


def _is_consequence(error: BaseException) -> bool:
    return isinstance(error.__cause__, threading.BrokenBarrierError)
