"""Fixtures for the tests of the command line: a file for a task, and a race in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
