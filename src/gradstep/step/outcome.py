"""Steps of which only a device knows whether they were taken, and what is counted when it tells."""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

from gradstep.arrays.library import FunctionalLibrary


class Outcome:
    """Whether a step was taken: a value on a device, read when somebody asks."""

    def __init__(self, library: FunctionalLibrary, taken: Any) -> None:
        self._library, self._taken = library, taken

    @cached_property
    def applied(self) -> bool:
        """Waits for the device."""
        return bool(self._library.read(self._taken))


class Awaited:
    """What is done once the outcomes of steps are known, in their order."""

    def __init__(self) -> None:
        self._steps: list[tuple[Outcome, Callable[[], None]]] = []
        self._lock = threading.Lock()

    def add(self, outcome: Outcome, action: Callable[[], None]) -> None:
        """Do this if the step was taken."""
        self._steps.append((outcome, action))

    def settle(self) -> None:
        """Wait for all outcomes."""
        if not self._steps:
            return
        with self._lock:
            while self._steps:
                outcome, action = self._steps[0]
                if outcome.applied:
                    action()
                del self._steps[0]

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {}

    def __setstate__(self, _: object) -> None:
        self.__init__()
