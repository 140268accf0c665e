"""Ctrl-C held back while memory is being written."""

import signal
import threading
from types import FrameType
from typing import Any


class InterruptsHeld:
    """Within this context Ctrl-C waits; it takes effect on leaving. Contexts nest.

    Only the main thread receives Ctrl-C, so elsewhere nothing needs to be held.
    """

    def __enter__(self) -> None:
        self._arrived = False
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            # None stands for a handler that was not set from Python: it raises nothing here.
            self._previous = signal.getsignal(signal.SIGINT)
            if self._previous is not None:
                signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            if self._arrived:
                signal.raise_signal(signal.SIGINT)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._arrived = True
