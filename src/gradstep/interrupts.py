"""Ctrl-C held back while memory is being written."""

import importlib
import signal
import threading
from types import FrameType
from typing import Any

try:  # the functions that `signal` wraps in enumerations, which cost more than a small step
    _functions: Any = importlib.import_module("_signal")
except ImportError:
    _functions = signal

SIGINT = int(signal.SIGINT)


class InterruptsHeld:
    """Within this context Ctrl-C waits; it takes effect on leaving. Contexts nest.

    Only the main thread receives Ctrl-C, so elsewhere nothing needs to be held.
    """

    def __enter__(self) -> None:
        self._arrived = False
        self._previous: Any = None
        if threading.get_ident() == threading.main_thread().ident:
            # None stands for a handler that was not set from Python: it raises nothing here.
            self._previous = _functions.getsignal(SIGINT)
            if self._previous is not None:
                _functions.signal(SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            _functions.signal(SIGINT, self._previous)
            if self._arrived:
                signal.raise_signal(SIGINT)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._arrived = True
