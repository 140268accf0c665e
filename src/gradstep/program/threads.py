"""Threads that run a kernel together, grabbing chunks until none is left: a small pool, or a library's own."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from gradstep.errors import ArgumentTypeError, OutOfRangeError
from gradstep.interrupts import InterruptsHeld

WORTH_THREADS = 1 << 18  # elements; below, waking a thread takes longer than it saves


class Task(Protocol):
    """A function in memory, of the address of a job: many threads may run it at once, without the GIL."""

    address: int
    call: Callable[[int], object]


class Team(Protocol):
    """The threads that an array library keeps for its own operations."""

    @property
    def threads(self) -> int:
        """How many the library uses now, the calling thread included."""
        ...

    @property
    def ready(self) -> bool:
        """Whether they can be had."""
        ...

    def run(self, task: Task, job: int, threads: int) -> None:
        """Run the task on so many of them, the caller included, and return when all are done."""
        ...


def threads_from_environment() -> int | None:
    """The number that `GRADSTEP_NUM_THREADS` sets."""
    chosen = os.environ.get("GRADSTEP_NUM_THREADS", "").strip()
    if chosen.isdecimal() and int(chosen) >= 1:
        return int(chosen)
    if chosen:
        raise OutOfRangeError(f"GRADSTEP_NUM_THREADS must be a whole number of at least 1, got {chosen!r}")
    return None


def available_threads() -> int:
    """How many threads this process may run at once: one for each CPU it is bound to."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """A thread that waits for a call, makes it, and reports back."""

    def __init__(self) -> None:
        self._go, self._done = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._function: Callable[[int], object] | None = None
        self._job = 0
        threading.Thread(target=self._run, name="gradstep", daemon=True).start()

    def start(self, function: Callable[[int], object], job: int) -> None:
        """Begin `function(job)` on the thread."""
        self._function, self._job = function, job
        self._go.release()

    def finish(self) -> None:
        """Return when the call is over; one that the thread has not woken up for is called off."""
        if not self._go.acquire(blocking=False):
            self._done.acquire()

    def stop(self) -> None:
        """End the thread."""
        self._function = None
        self._go.release()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self._function is None:
                return
            self._function(self._job)
            self._done.release()


class Pool:
    """Workers beside the calling thread. One caller at a time has them; others run alone meanwhile."""

    def __init__(self) -> None:
        self._threads: int | None = None
        self._chosen = False  # whether somebody has said how many
        self.forget()

    def forget(self) -> None:
        """Begin anew without workers: a forked child has none of its parent's threads."""
        self._busy = threading.Lock()
        self._workers: list[Worker] = []

    @property
    def threads(self) -> int:
        """How many threads take part in a large step, the caller included."""
        if self._threads is None:
            chosen = threads_from_environment()
            self._chosen = chosen is not None
            self._threads = chosen or available_threads()
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        with self._busy:
            self._threads, self._chosen = count, True
            self._resize(0)

    def threads_for(self, elements: int, team: Team | None) -> int:
        """How many threads are worth it; with a team as many as its library uses, if nobody has chosen."""
        if elements < WORTH_THREADS:
            return 1
        threads = self.threads
        return threads if team is None or self._chosen else team.threads

    def run(self, task: Task, job: int, threads: int, team: Team | None = None) -> None:
        """Run the task on so many threads, and return when all are done.

        A library's own threads are awake when its operations have just been run, and would take the CPUs from others
        while they wait for more; so they are preferred wherever they are as many as there should be.
        """
        if threads == 1:
            task.call(job)
            return
        # The workers use the caller's memory: an interrupt must not make the caller leave before them.
        with InterruptsHeld():
            if self._busy.acquire(blocking=False):
                try:
                    if team is not None and team.ready and team.threads == threads:
                        team.run(task, job, threads)
                    else:
                        self._run_together(task.call, job, threads - 1)
                finally:
                    self._busy.release()
            else:
                task.call(job)

    def _run_together(self, function: Callable[[int], object], job: int, workers: int) -> None:
        self._resize(workers)
        started: list[Worker] = []
        try:
            for worker in self._workers:
                worker.start(function, job)
                started.append(worker)
            function(job)
        finally:
            _collect(started)

    def _resize(self, count: int) -> None:
        while len(self._workers) > count:
            self._workers.pop().stop()
        with contextlib.suppress(RuntimeError, MemoryError):  # no more threads to be had: fewer do the work
            while len(self._workers) < count:
                self._workers.append(Worker())


def _collect(workers: Sequence[Worker]) -> None:
    """Finish all of them, whatever is raised meanwhile: they use the caller's memory."""
    if workers:
        try:
            workers[0].finish()
        finally:
            _collect(workers[1:])


pool = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.forget)


def set_num_threads(count: int) -> None:
    """Set how many threads a large step uses, the calling one included.

    The default is `GRADSTEP_NUM_THREADS`, or the number of CPUs that the process is bound to; for PyTorch tensors
    `torch.get_num_threads()`, and then the step runs on PyTorch's own threads. Results do not depend on it.

    Raises:
        ArgumentTypeError: `count` is not an integer.
        OutOfRangeError: `count` is below 1.

    Example:
        >>> import gradstep as gs
        >>> gs.set_num_threads(1)
    """
    if isinstance(count, bool) or not isinstance(count, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentTypeError(f"the number of threads must be an integer, got {count!r}")
    if count < 1:
        raise OutOfRangeError(f"the number of threads must be at least 1, got {count}")
    pool.threads = count
