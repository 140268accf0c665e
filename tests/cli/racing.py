"""Helpers for the tests of `gradstep race`: the command in another process, its JSON, and a task to count by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

MAIN = "from gradstep.cli import main; main()"


class Bowl:
    """loss = sum of w * w: everything about it can be worked out by hand."""

    def init(self, seed: int) -> dict[str, Any]:
        return {"w": np.array([1.0 + seed, -2.0])}

    def loss_and_grads(self, params: dict[str, Any], step: int, rng: Any) -> tuple[float, dict[str, Any]]:
        return float(np.sum(params["w"] ** 2)), {"w": 2 * params["w"]}


def read(path: Path) -> dict[str, Any]:
    """The JSON in a file; NaN and infinity, which are no JSON, are an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def environment() -> dict[str, str]:
    """The variables for another process, without those that would force colours or a width on it."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE")
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUTF8": "1"}


def run_gradstep(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command `gradstep` in another process, its output going to pipes."""
    command = [sys.executable, "-c", f"{before}\n{MAIN}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
