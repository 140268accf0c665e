"""Signals held back while memory is being written: Ctrl-C, and others whose handlers may raise."""

import importlib
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

try:  # what `signal` wraps in enumerations, which cost more than a small step
    _signals: Any = importlib.import_module("_signal")
except ImportError:
    _signals = importlib.import_module("signal")

NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
HELD = [int(getattr(_signals, name)) for name in NAMES if hasattr(_signals, name)]


class InterruptsHeld:
    """Within this context signals with a handler in Python wait; they take effect on leaving. Contexts nest.

    Only the main thread runs such handlers, so elsewhere nothing needs to be held.
    """

    def __enter__(self) -> None:
        self._arrived: list[int] = []
        self._previous: list[tuple[int, Any]] = []
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in HELD:
                handler = _signals.getsignal(number)
                if callable(handler):
                    self._previous.append((number, handler))
                    _signals.signal(number, self._note)
        except BaseException:  # from the handler of a signal that is not held yet
            _each(_signals.signal, self._previous)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            _each(_signals.signal, self._previous)
        finally:
            _each(_signals.raise_signal, [(number,) for number in dict.fromkeys(self._arrived)])

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._arrived.append(number)


def _each(function: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call `function` for all, whatever one of the calls raises."""
    if arguments:
        try:
            function(*arguments[0])
        finally:
            _each(function, arguments[1:])
