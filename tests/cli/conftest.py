"""Fixtures for the tests of the command line: a file for a task, a race and other commands in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gradstep.cli.app import run as run_app
from gradstep.cli.race.command import Options, run_race

sys.path.insert(0, str(Path(__file__).parent))  # tests import their helpers by name

from racing import read


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes `my_task.py` with this text and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "my_task.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def race(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Races in this process; returns the exit code and what `race.json` holds."""

    def run(task: str = "digits", **options: Any) -> tuple[int, dict[str, Any]]:
        asked = {"optimizers": None, "rates": None, "seeds": 1, "steps": 20, "output": tmp_path / "out"}
        asked = Options(task, **{**asked, **options})
        code = run_race(asked)
        return code, read(asked.output / "race.json")

    return run


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote."""

    code: object
    output: str
    errors: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `gradstep` in this process; its output goes to no terminal."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["gradstep", *map(str, arguments)])
        capsys.readouterr()
        try:
            code: object = run_app()
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    return run
