"""`race.json` and `race.png`: what they hold, and that they are written whole or not at all."""

import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from racing import read

import gradstep as gs
from gradstep.cli.complaint import Complaint
from gradstep.cli.files import check_folder, write_whole
from gradstep.cli.race import command, picture

Race = Callable[..., tuple[int, dict[str, Any]]]

TASK = """
import numpy as np
class Task:
    def init(self, seed):
        return {"w": np.array([1.0 + seed, -2.0])}
    def loss_and_grads(self, params, step, rng):
        return np.sum(params["w"] ** 2), {"w": 2 * params["w"]}
    def evaluate(self, params):
        return {"size": np.abs(params["w"]).max(), "nonsense": np.nan}
task = Task()
"""


@pytest.fixture
def bowl(task_file: Callable[[str], Path]) -> str:
    return str(task_file(TASK))


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_every_family_races_on_the_digits(race: Race, tmp_path: Path):
    code, content = race(steps=20)
    assert code == 0
    assert len(content["runs"]) == len({(run["optimizer"], run["rate"]) for run in content["runs"]}) == 10 * 5
    assert [place["place"] for place in content["ranking"]] == list(range(1, 11))
    for place in content["ranking"]:
        assert set(place["metrics"]) == {"test accuracy", "test loss"}
        assert place["final_loss"]["median"] < 2.5
        assert place["step_us"] > 0
    assert png_size(tmp_path / "out" / "race.png")[0] > 1000
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]


def test_the_record_says_what_was_asked_for_and_what_came_out(race: Race, bowl: str):
    _, content = race(bowl, optimizers="sgd,adam", rates="0.1,0.01", seeds=2, steps=30)
    assert content["schema"] == 1
    assert content["complete"] is True
    assert content["planned_runs"] == len(content["runs"]) == 8
    assert content["options"] == {
        "task": bowl, "optimizers": ["sgd", "adam"], "rates": [0.01, 0.1], "seeds": 2, "steps": 30,
    }  # fmt: skip
    assert content["made"]["gradstep"] == gs.__version__
    assert content["made"]["numpy"] == np.__version__
    run = content["runs"][0]
    assert set(run) == {
        "optimizer", "rate", "seed", "configuration", "first_loss", "final_loss", "metrics", "step_us", "state_bytes",
        "diverged_at", "diverged_how", "curve",
    }  # fmt: skip
    assert run["configuration"].startswith("SGD(learning_rate=0.01")
    assert "momentum=0.9" in run["configuration"]
    assert len(run["curve"]["losses"]) == 30
    assert run["metrics"]["nonsense"] is None
    best = content["ranking"][0]
    own = [run for run in content["runs"] if (run["optimizer"], run["rate"]) == (best["optimizer"], best["best_rate"])]
    losses = [run["final_loss"] for run in own]
    assert best["final_loss"] == {"median": np.median(losses), "lowest": min(losses), "highest": max(losses)}
    assert best["final_loss"]["median"] == min(place["final_loss"]["median"] for place in content["ranking"])


def test_only_timings_and_the_date_differ_between_two_races(race: Race, bowl: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(picture, "draw", lambda *_, **__: b"")

    def bare(content: dict[str, Any]) -> dict[str, Any]:
        for entry in [*content["ranking"], *content["runs"]]:
            del entry["step_us"]
        return {**content, "made": None}

    first, second = (bare(race(bowl, seeds=2)[1]) for _ in range(2))
    assert first == second


def test_a_diverged_optimizer_is_last_and_the_race_goes_on(race: Race, bowl: str, capsys: pytest.CaptureFixture[str]):
    code, content = race(bowl, optimizers="sgd,lion", rates="40,100", steps=50)
    assert code == 0
    assert [place["optimizer"] for place in content["ranking"]] == ["Lion", "SGD"]
    last = content["ranking"][1]
    assert last["best_rate"] is None
    assert last["final_loss"] == {"median": None, "lowest": None, "highest": None}
    assert last["diverged"] == 2
    assert last["diverged_at"] == max(run["diverged_at"] for run in content["runs"] if run["optimizer"] == "SGD")
    assert f"diverged at step {last['diverged_at']}" in capsys.readouterr().out


def test_a_race_that_all_diverged_still_has_its_files(race: Race, bowl: str, tmp_path: Path, capsys: Any):
    code, content = race(bowl, optimizers="sgd", rates="100", steps=50)
    assert code == 0
    assert content["ranking"][0]["final_loss"]["median"] is None
    assert "Every run diverged" in capsys.readouterr().out
    assert png_size(tmp_path / "out" / "race.png")


def test_a_picture_that_fails_costs_only_the_picture(
    race: Race, bowl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: Any) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr(picture, "draw", fail)
    code, content = race(bowl, optimizers="sgd")
    output = capsys.readouterr()
    assert code == 1
    assert content["complete"]
    assert "RuntimeError: no ink" in output.err
    assert "race.png" not in output.out
    assert not (tmp_path / "out" / "race.png").exists()


def test_many_entrants_and_one_step_can_be_drawn(race: Race, bowl: str, tmp_path: Path):
    rules = tmp_path / "rules.py"
    text = "import gradstep as gs\n"
    for number in range(6):
        text += f"@gs.rule\ndef R{number}(w, g, *, learning_rate): return w - learning_rate * g * {number}\n"
    rules.write_text(text)
    names = ",".join(["sgd", "adam", *(f"{rules}:R{number}" for number in range(6))])
    code, content = race(bowl, optimizers=names, steps=1)
    assert code == 0
    assert len(content["ranking"]) == 8


def test_a_problem_of_the_task_in_the_middle_keeps_what_is_finished(
    race: Race, task_file: Callable[[str], Path], tmp_path: Path
):
    text = TASK.replace("return {", "self.seed = seed; return {", 1)
    path = task_file(text.replace("return np.sum", "self.seed == 2 and step == 17 and batch; return np.sum"))
    with pytest.raises(Complaint, match=r"loss_and_grads raised NameError(.|\n)*my_task\.py"):
        race(str(path), optimizers="sgd", seeds=4)
    content = read(tmp_path / "out" / "race.json")
    assert content["complete"] is False
    assert [run["seed"] for run in content["runs"]] == [0] * 5 + [1] * 5


def test_writing_replaces_the_file_whole_or_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "race.json"
    write_whole(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_whole(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("race.json", b"old")]
    with path.open("rb") as reader:  # whoever has the old file open keeps the old file
        write_whole(path, b"new")
        assert reader.read() == b"old"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("race.json", b"new")]


def test_a_folder_that_cannot_be_used_is_found_before_the_race(tmp_path: Path, race: Race, bowl: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(Complaint, match=r"--output .*file"):
        race(bowl, output=tmp_path / "file")
    (tmp_path / "out" / "race.png").mkdir(parents=True)
    with pytest.raises(Complaint, match=r"race\.png is a folder"):
        race(bowl)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "race.png"]
    check_folder(tmp_path / "new" / "folder", ["race.json"])
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_ctrl_c_while_the_record_is_written_waits(race: Race, bowl: str, monkeypatch: pytest.MonkeyPatch):
    whole = command.encode

    def interrupted(content: Any) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return whole(content)

    monkeypatch.setattr(command, "encode", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, content = race(bowl, optimizers="sgd")
    assert code == 0
    assert content["complete"]
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_while_the_picture_is_drawn_skips_it(
    race: Race, bowl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: Any) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return b"never reached"

    monkeypatch.setattr(picture, "draw", interrupted)
    code, content = race(bowl, optimizers="sgd")
    assert code == 130
    assert content["complete"]
    assert "picture was skipped" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["race.json"]
