"""What commands share of the terminal: where they print, and how Ctrl-C ends them."""

import logging
import signal
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

INTERRUPTED = 130  # the exit code


def console(stderr: bool = False) -> Console:
    """A console that never wraps tables to 80 columns when it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 140, highlight=False, soft_wrap=False)


def show_files(files: Sequence[Path], screen: Console) -> None:
    """Where the results lie."""
    screen.print(Text("\nWrote " + " and ".join(map(str, files))), soft_wrap=True)


@contextmanager
def quiet() -> Generator[None]:
    """No warnings of other packages about themselves, which would run through the table and the bar."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


class InterruptSwitch:
    """Ctrl-C as usual, until `held` is set: from then on it is ignored, so that results reach the disk."""

    def __init__(self) -> None:
        self.held = False

    def __enter__(self) -> "InterruptSwitch":
        self.before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.held:
            raise KeyboardInterrupt
