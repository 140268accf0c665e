"""Where both commands write: tables that fit a terminal and are plain elsewhere, and the progress of long reading."""

import json
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

UNBOUNDED = 100_000  # columns where there is no terminal
ROWS = 60  # of a table that a terminal gets without being asked
QUICK = 1 << 26  # bytes that nobody waits for


def on_terminal() -> bool:
    """Whether stdout is a terminal, and not a file or another program."""
    return sys.stdout.isatty()


def console() -> Console:
    """The console for stdout, as wide as what is printed where that is no terminal."""
    return Console(width=None if on_terminal() else UNBOUNDED, highlight=False)


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table whose cells break, if they must, and never lose a character."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def print_json(content: Any) -> None:
    """One document in ASCII, which every pipe bears."""
    print(json.dumps(content, indent=2, allow_nan=False))


class Reading:
    """A bar of bytes on stderr while much is read, where that is a terminal."""

    def __init__(self, what: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            disable=total < QUICK or not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> "Reading":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """So many more bytes have been read."""
        self._progress.advance(self._task, count)
