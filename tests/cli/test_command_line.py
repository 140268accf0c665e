"""The command as a person runs it: exit codes, missing packages, Ctrl-C, a terminal, and the examples."""

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from racing import MAIN, environment, read, run_gradstep
from typer.testing import CliRunner

import gradstep as gs
from gradstep.cli.app import app

EXAMPLES = Path(__file__).parents[2] / "examples"

SLOW_TASK = """
import sys, time
import numpy as np
class Task:
    starts = 0
    def init(self, seed):
        Task.starts += 1
        return {"w": np.array([1.0, -2.0])}
    def loss_and_grads(self, params, step, rng):
        if Task.starts == FIRST + 7 and step == 3:
            print("in the eighth run", flush=True)
            time.sleep(60)
        return np.sum(params["w"] ** 2), {"w": 2 * params["w"]}
"""


def test_version_and_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output == f"gradstep {gs.__version__}\n"
    text = runner.invoke(app, ["race", "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    for option in ("--optimizers", "--rates", "--seeds", "--steps", "--output"):
        assert option in text


@pytest.mark.parametrize("arguments", [["race", "--steps", "0"], ["race", "--seeds", "none"], ["sprint"]])
def test_wrong_usage_ends_with_two(arguments: list[str]):
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("package", "arguments", "what", "extra"),
    [
        ("typer", ["--version"], "The command line", "cli"),
        ("rich", ["inspect", "run.safetensors"], "gradstep inspect", "cli"),
        ("rich", ["diff", "a.safetensors", "b.safetensors"], "gradstep diff", "cli"),
        ("rich", ["race"], "gradstep race", "race"),
        ("matplotlib", ["race"], "gradstep race", "race"),
        ("sklearn", ["race"], "The task digits", "race"),
        ("matplotlib", ["bench"], "gradstep bench", "bench"),
    ],
)
def test_a_missing_package_is_one_line(package: str, arguments: list[str], what: str, extra: str, tmp_path: Path):
    block = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{package!r}] = None"
    result = run_gradstep(*arguments, before=block)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(
        rf'error: {what} needs the package {package}, which is not installed: pip install "gradstep\[{extra}\]"\n',
        result.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_broken_task_ends_with_two_and_without_our_traceback(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "class task:\n    def init(self, seed):\n        return missing\n    loss_and_grads = None\n"
    )
    result = run_gradstep("race", f"{tmp_path}/mine.py", "--output", str(tmp_path / "out"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "has no method loss_and_grads(params, step, rng)" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path):
    checks = 2 + 3  # the task is tried with two starts, each of three optimizers with one
    (tmp_path / "slow.py").write_text(SLOW_TASK.replace("FIRST", str(checks + 1)))
    command = [sys.executable, "-c", MAIN, "race", "slow.py:Task", "--optimizers", "sgd,adam,lion", "--seeds", "2"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the eighth run\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Cut short by Ctrl-C: 7 of 30 runs are finished and count." in output
    assert "Traceback" not in errors
    content = read(tmp_path / "race.json")
    assert content["complete"] is False
    assert (len(content["runs"]), content["planned_runs"]) == (7, 30)
    assert {place["optimizer"] for place in content["ranking"]} == {"SGD", "Adam", "Lion"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != "") == ["race.json", "race.png", "slow.py"]


def test_ctrl_c_before_anything_is_finished_writes_nothing(tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW_TASK.replace("FIRST + 7", "4"))
    (tmp_path / "race.json").write_text("from an earlier race")
    command = [sys.executable, "-c", MAIN, "race", "slow.py:Task", "--optimizers", "sgd"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "nothing was written" in errors
    assert (tmp_path / "race.json").read_text() == "from an earlier race"


def test_the_examples_race(tmp_path: Path):
    result = run_gradstep(
        "race", f"{EXAMPLES}/my_task.py:task", "--optimizers", f"{EXAMPLES}/signum.py:Signum,sgd",
        "--seeds", "1", "--steps", "300", "--output", str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    content = read(tmp_path / "race.json")
    places = {place["optimizer"]: place for place in content["ranking"]}
    assert places.keys() == {"SGD", "Signum"}
    assert places["SGD"]["final_loss"]["median"] == pytest.approx(0.1**2, rel=0.3)  # the noise that no line explains
    assert places["SGD"]["metrics"]["slope error"] < 0.1
    assert places["Signum"]["configuration"].startswith("Signum(learning_rate=")


def test_on_a_terminal_there_is_a_live_board_and_then_the_ranking(tmp_path: Path):
    pty: Any = pytest.importorskip("pty")
    arguments = [
        "race",
        f"{EXAMPLES}/my_task.py",
        "--optimizers",
        "sgd,lion",
        "--steps",
        "100",
        "--output",
        str(tmp_path),
    ]
    terminal, other_side = pty.openpty()
    variables = {**environment(), "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"}
    command = [sys.executable, "-c", MAIN, *arguments]
    process = subprocess.Popen(command, env=variables, stdin=other_side, stdout=other_side, stderr=other_side)
    os.close(other_side)
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side has ended
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    text = shown.decode()
    assert process.wait() == 0, text
    board, _, ranking = text.rpartition("my_task.py: 2 optimizers")
    assert "Ctrl-C keeps what is finished" in board
    last_board = board.rpartition("Ctrl-C keeps what is finished")[2]
    assert "\x1b[2K" in last_board  # it is erased, not left above the ranking
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ranking)
    assert "final loss" in plain
    assert "Wrote " in plain
