"""Steps of which only a device knows whether they were taken, and what is counted when it tells."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from gradstep.arrays.library import FunctionalLibrary
from gradstep.interrupts import InterruptsHeld
from gradstep.lazy import computed_once

LONGEST = 64  # steps whose outcome is awaited at most; the oldest of so many have long been computed


class Outcome:
    """Whether a step was taken: a value on a device, read when somebody asks."""

    def __init__(self, library: FunctionalLibrary, taken: Any) -> None:
        self._library, self._taken = library, taken

    @computed_once
    def applied(self) -> bool:
        """Waits for the device."""
        return bool(self._library.read(self._taken))


class Awaited:
    """What is done once the outcomes of steps are known, in their order."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Outcome, Callable[[], None]]] = deque()
        self._lock = threading.Lock()

    def add(self, outcome: Outcome, action: Callable[[], None]) -> None:
        """Do this if the step was taken."""
        self._steps.append((outcome, action))
        if len(self._steps) > LONGEST:
            self._settle_down_to(LONGEST // 2)

    def settle(self) -> None:
        """Wait for all outcomes."""
        if self._steps:
            self._settle_down_to(0)

    def _settle_down_to(self, count: int) -> None:
        with self._lock:
            while len(self._steps) > count:
                applied = self._steps[0][0].applied
                with InterruptsHeld():
                    _, action = self._steps.popleft()
                    if applied:
                        action()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {}

    def __setstate__(self, _: object) -> None:
        self.__init__()
