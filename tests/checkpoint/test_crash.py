"""Killed at any moment, or with a disk that refuses: the file is the old one or the new one, whole."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from checkpoints import answer, bits_of, everything, python

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
import gradstep as gs

os.fsync = lambda file: None  # what a killed process has written, nobody loses
folder, keep, kills = Path(sys.argv[1]), int(sys.argv[2]) or None, int(sys.argv[3])
path, chance, size = folder / "run.safetensors", random.Random(keep), 20_000
allowed = {"run.safetensors", *(f"run.{age}.safetensors" for age in range(1, keep or 1))}


def optimizer():
    return gs.SGD(1.0, momentum=0.0), {"w": np.zeros(size, np.float32), "n": np.zeros(1)}


def step(opt, params):
    opt.apply_gradients({name: np.full_like(array, -1) for name, array in params.items()}, params)


def read(file):
    opt, params = optimizer()
    opt.load(file, params)
    assert (params["w"] == opt.step).all() and params["n"] == opt.step, file
    return opt.step


opt, params = optimizer()
step(opt, params)
opt.save(path, params, keep=keep)
at, moved, debris = 1, 0, 0
for _ in range(kills):
    opt.load(path, params)
    step(opt, params)
    child = os.fork()
    if not child:
        try:
            while True:
                opt.save(path, params, keep=keep)
                step(opt, params)
        finally:
            os._exit(1)
    time.sleep(0.03 * chance.random())
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child had ended by itself"
    now = read(path)
    assert now >= at
    moved, at = moved + (now > at), now
    files = {file.name for file in folder.iterdir()}
    left = files - allowed
    assert all(name.startswith(".") for name in left), files
    assert len(left) <= 2, left
    debris += bool(left)
    ages = [read(folder / name) for name in sorted(allowed & files, key=lambda name: (name != path.name, name))]
    assert ages == sorted(ages, reverse=True), ages
assert gs.latest(folder) == path
opt.load(path, params)
step(opt, params)
opt.save(path, params, keep=keep)
print(json.dumps([moved, debris, sorted(os.listdir(folder))]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("keep", "kills"), [(0, 110), (3, 110)])
def test_killed_at_any_moment_the_file_is_whole(keep: int, kills: int, tmp_path: Path) -> None:
    moved, debris, files = answer(KILLED, tmp_path, keep, kills)
    assert moved > kills / 10, "the kills came before anything was saved"
    assert debris > 0, "no kill came while a file was being written"
    assert files == sorted(["run.safetensors", *(f"run.{age}.safetensors" for age in range(1, keep))])


def stepped(value: float) -> tuple[Any, Any]:
    opt, params = gs.Adam(0.1), {"w": np.full(1000, value)}
    opt.apply_gradients({"w": np.full(1000, value)}, params)
    return opt, params


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Refusal:
    """Lets a function of os fail at its nth call."""

    def __init__(self, real: Any, error: BaseException, when: int) -> None:
        self.real, self.error, self.left = real, error, when

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **kwargs)


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=["full", "broken", "interrupted"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("keep", [None, 2])
def test_a_failing_write_leaves_the_old_file_alone(
    name: str, keep: int | None, error: BaseException, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(1.0)
    opt.save(path, params, keep=keep)
    old = path.read_bytes()
    opt, params = stepped(2.0)
    before = everything(opt, report=True), bits_of(params)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, Refusal(getattr(os, name), error, 1))
        with pytest.raises(type(error)):
            opt.save(path, params, keep=keep)
    assert path.read_bytes() == old
    left = contents(tmp_path)
    assert set(left) <= {"run.safetensors", "run.1.safetensors"} and set(left.values()) == {old}
    assert (everything(opt, report=True), bits_of(params)) == before
    opt.save(path, params, keep=keep)
    assert set(contents(tmp_path)) == {"run.safetensors", *(["run.1.safetensors"] if keep else [])}
    assert everything(gs.load(path)) == everything(opt)
    if keep:
        assert (tmp_path / "run.1.safetensors").read_bytes() == old


@pytest.mark.parametrize("number", [1, 2])
def test_a_failing_rotation_loses_no_file(number: int, tmp_path: Path, monkeypatch: Any) -> None:
    """With three files, the newest two survive whatever renaming fails."""
    path = tmp_path / "run.safetensors"
    for value in (1.0, 2.0, 3.0):
        opt, params = stepped(value)
        opt.save(path, params, keep=3)
    old = contents(tmp_path)
    opt, params = stepped(4.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Refusal(os.replace, OSError(errno.EIO, "I/O error"), number))
        with pytest.raises(OSError, match="I/O"):
            opt.save(path, params, keep=3)
    left = contents(tmp_path)
    assert left["run.safetensors"] == old["run.safetensors"]
    assert {old["run.safetensors"], old["run.1.safetensors"]} <= set(left.values()) <= set(old.values())
    opt.save(path, params, keep=3)
    left = contents(tmp_path)
    assert (left["run.1.safetensors"], left["run.2.safetensors"]) == (old["run.safetensors"], old["run.1.safetensors"])
    assert len(left) == 3


FULL = """
import json, os, resource, signal, sys
import numpy as np
import gradstep as gs

path = sys.argv[1] + "/run.safetensors"
opt, params = gs.Adam(0.1), {"w": np.ones(100_000, np.float32)}
opt.apply_gradients({"w": np.ones(100_000, np.float32)}, params)
opt.save(path, params)
old = open(path, "rb").read()
opt.apply_gradients({"w": np.ones(100_000, np.float32)}, params)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = []
for limit in (0, 1, 100, 5000, 300_000, 1_000_000, len(old) - 1, len(old) - 500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        opt.save(path, params)
    except OSError as error:
        found.append(error.errno)
    assert open(path, "rb").read() == old
    assert os.listdir(sys.argv[1]) == ["run.safetensors"], limit
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
opt.save(path, params)
assert gs.load(path).step == 2
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    assert answer(FULL, tmp_path) == [errno.EFBIG] * 8


@pytest.mark.parametrize("bad", ["dtype", "keep", "keep's type", "folder"])
def test_what_cannot_be_saved_leaves_the_old_file_and_nothing_else(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(1.0)
    opt.save(path, params)
    before = contents(tmp_path)
    if bad == "dtype":
        with pytest.raises(gs.DtypeError, match=r"'c'.*complex128"):
            opt.save(path, {**params, "c": np.ones(2, np.complex128)})
    elif bad == "keep":
        with pytest.raises(gs.OutOfRangeError, match="keep"):
            opt.save(path, keep=0)
    elif bad == "keep's type":
        for keep in (True, 1.5, "3"):
            with pytest.raises(gs.ArgumentTypeError, match="keep"):
                opt.save(path, keep=keep)  # type: ignore[arg-type]
    else:
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match=r"."):
            opt.save(tmp_path / "folder")
        assert not list((tmp_path / "folder").iterdir())
        (tmp_path / "folder").rmdir()
        with pytest.raises(FileNotFoundError):
            opt.save(tmp_path / "no" / "run.safetensors")
    assert contents(tmp_path) == before


BESIDE = """
import sys, time
from pathlib import Path
import numpy as np
import gradstep as gs

folder, me = Path(sys.argv[1]), int(sys.argv[2])
opt, params = gs.SGD(0.1), {"w": np.full(20_000, float(me))}
for number in range(40):
    opt.save(folder / "run.safetensors", params)
    params["w"][:] = -1
    gs.load(folder / "run.safetensors", params)
    assert len(set(params["w"].tolist())) == 1
    params["w"][:] = me
"""


def test_processes_that_save_the_same_file_do_not_take_each_others(tmp_path: Path) -> None:
    import threading

    done: list[Any] = []
    threads = [threading.Thread(target=lambda me=me: done.append(python(BESIDE, tmp_path, me))) for me in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.returncode for process in done] == [0, 0], [process.stderr[-2000:] for process in done]
    assert list(contents(tmp_path)) == ["run.safetensors"]
