"""Files that are kept, and the newest of a folder."""

import os
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from checkpoints import bits_of, everything


def stepped(steps: int) -> tuple[Any, Any]:
    opt, params = gs.SGD(0.1, momentum=0.9), {"w": np.ones(10)}
    for _ in range(steps):
        opt.apply_gradients({"w": np.ones(10)}, params)
    return opt, params


def ages(folder: Path) -> dict[str, int]:
    return {file.name: gs.load(file).step for file in folder.iterdir()}


@pytest.mark.parametrize("keep", [None, 1, 2, 3, 5])
def test_as_many_files_are_kept_as_were_asked_for(keep: int | None, tmp_path: Path) -> None:
    opt, params = stepped(0)
    for step in range(1, 9):
        opt.apply_gradients({"w": np.ones(10)}, params)
        opt.save(tmp_path / "run.safetensors", params, keep=keep)
        wanted = {f"run.{age}.safetensors": step - age for age in range(1, min(step, keep or 1))}
        assert ages(tmp_path) == {"run.safetensors": step, **wanted}


def test_when_fewer_files_are_asked_for_the_older_ones_are_left_alone(tmp_path: Path) -> None:
    """They may be anybody's."""
    path = tmp_path / "run.safetensors"
    for step in range(1, 5):
        stepped(step)[0].save(path, keep=3)
    stepped(5)[0].save(path, keep=2)
    assert ages(tmp_path) == {"run.safetensors": 5, "run.1.safetensors": 4, "run.2.safetensors": 2}


@pytest.mark.parametrize(
    "name", ["run", "run.final.safetensors", ".hidden.safetensors", "run.1.safetensors", "a b*[x]"]
)
def test_any_name_can_be_kept(name: str, tmp_path: Path) -> None:
    for step in range(1, 5):
        stepped(step)[0].save(tmp_path / name, keep=2)
    (tmp_path / "other.txt").write_text("mine")
    assert gs.load(tmp_path / name).step == 4
    assert len(list(tmp_path.iterdir())) == 3


def test_paths_may_be_texts_and_relative(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    opt, params = stepped(2)
    opt.save("run.safetensors", params, keep=2)
    opt.save("run.safetensors", params, keep=2)
    assert gs.load("run.safetensors").step == 2
    assert gs.latest(".") == Path("run.safetensors")
    assert len(os.listdir()) == 2


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "run.safetensors").symlink_to(tmp_path / "there" / "real.safetensors")
    for step in (1, 2):
        stepped(step)[0].save(tmp_path / "run.safetensors")
        assert (tmp_path / "run.safetensors").is_symlink()
        assert ages(tmp_path / "there") == {"real.safetensors": step}


@pytest.mark.skipif(sys.platform == "win32", reason="no modes there")
def test_the_mode_is_that_of_the_old_file_or_of_any_new_one(tmp_path: Path) -> None:
    path, plain = tmp_path / "run.safetensors", tmp_path / "plain"
    plain.write_bytes(b"")
    stepped(1)[0].save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    stepped(2)[0].save(path, keep=2)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*.safetensors")} == {0o640}


def test_without_hard_links_older_files_are_kept_too(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    for step in range(1, 6):
        stepped(step)[0].save(tmp_path / "run.safetensors", keep=3)
    assert ages(tmp_path) == {"run.safetensors": 5, "run.1.safetensors": 4, "run.2.safetensors": 3}


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    mine = [".gradstep-mine", "run.safetensors.tmp", "run.7.safetensors", ".run.safetensors", "run.1.txt", "other"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    for step in range(1, 4):
        stepped(step)[0].save(tmp_path / "run.safetensors", keep=2)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


def test_the_same_state_gives_the_same_file(tmp_path: Path) -> None:
    opt, params = stepped(2)
    opt.save(tmp_path / "a", params)
    opt.save(tmp_path / "b", params)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# The newest


def test_nothing_is_the_newest_of_nothing(tmp_path: Path) -> None:
    assert gs.latest(tmp_path) is None
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "data.bin").write_bytes(bytes(1000))
    (tmp_path / "empty").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    assert gs.latest(tmp_path) is None
    assert gs.latest(str(tmp_path)) is None
    with pytest.raises(FileNotFoundError):
        gs.latest(tmp_path / "no")


def test_the_newest_is_the_one_written_last(tmp_path: Path) -> None:
    for number, name in enumerate(["c.safetensors", "a.safetensors", "b.safetensors"]):
        stepped(number)[0].save(tmp_path / name)
        os.utime(tmp_path / name, (1000 + number, 1000 + number))
    assert gs.latest(tmp_path) == tmp_path / "b.safetensors"


def test_files_of_the_same_moment_are_told_apart(tmp_path: Path) -> None:
    """Clocks of file systems tick slower than small files are written."""
    for keep in (2, 3):
        path = tmp_path / f"{keep}" / "run.safetensors"
        path.parent.mkdir()
        for step in range(1, 5):
            stepped(step)[0].save(path, keep=keep)
        for file in path.parent.iterdir():
            os.utime(file, (1000, 1000))
        assert gs.latest(path.parent) == path


@pytest.mark.parametrize("how", ["cut", "a byte of a tensor", "a byte of the header", "empty", "noise"])
def test_a_damaged_file_is_left_out_with_a_warning(how: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for step in (1, 2, 3):
        opt, params = stepped(step)
        opt.save(path, params, keep=3)
        os.utime(path, (1000 + step, 1000 + step))
    content = bytearray(path.read_bytes())
    if how == "a byte of a tensor":
        content[-3] ^= 1
    elif how == "a byte of the header":
        content[content.index(b"momentum")] ^= 1
    content = {"cut": content[:-1], "empty": b"", "noise": bytes(range(256)) * 4}.get(how, content)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"run\.safetensors") as caught:
        found = gs.latest(tmp_path)
    assert found == tmp_path / "run.1.safetensors"
    assert len(caught) == 1 and caught[0].filename == __file__
    assert gs.load(found).step == 2
    for file in tmp_path.iterdir():
        file.write_bytes(content)
    with warnings.catch_warnings(record=True) as several:
        warnings.simplefilter("always")
        with pytest.raises(gs.CheckpointError, match="no whole checkpoint"):
            gs.latest(tmp_path)
    assert len(several) == 3


def test_resuming_from_the_newest(tmp_path: Path) -> None:
    opt, params = stepped(3)
    opt.save(tmp_path / "run.safetensors", params, keep=2)
    others = {"w": np.zeros(10)}
    path = gs.latest(tmp_path)
    assert path is not None
    twin = gs.load(path, others)
    assert everything(twin) == everything(opt)
    assert bits_of(others) == bits_of(params)
