"""Proves that kernels are kept on disk and found again, and that no bad, foreign or unwritable folder does harm."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

on_posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and permissions of files")

STEPS = """
import atexit
import llvmlite.binding
import numpy as np
import gradstep as gs

compiled = []
emit = llvmlite.binding.TargetMachine.emit_object
llvmlite.binding.TargetMachine.emit_object = lambda self, module: compiled.append(1) or emit(self, module)
atexit.register(lambda: print("compiled", len(compiled)))

for dtype in (np.float32, np.float64):
    for opt in (gs.SGD(0.5), gs.SGD(0.5, momentum=0.5)):
        w = {"w": np.array([1.0, 2.0], dtype)}
        opt.apply_gradients({"w": np.array([1.0, -1.0], dtype)}, w)
        assert w["w"].tolist() == [0.5, 2.5]
"""
KERNELS = 4  # of these steps, at least


def start(folder: Path, *scripts: str) -> subprocess.Popen[str]:
    """A new process that runs the scripts with this cache folder, and tells how often it compiled."""
    code = "\n".join(textwrap.dedent(script) for script in (*scripts, STEPS))
    return subprocess.Popen(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        env=os.environ | {"GRADSTEP_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How often the process compiled, and what it warned of; it ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return int(out.removeprefix("compiled ")), err


def run(folder: Path, *scripts: str) -> tuple[int, str]:
    return finish(start(folder, *scripts))


def kernels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, made by gradstep, with the kernels of the steps above."""
    folder = tmp_path_factory.mktemp("cache") / "deep" / "kernels"
    compiled, warned = run(folder)
    assert warned == ""
    assert compiled == len(kernels(folder)) >= KERNELS
    return folder


@pytest.fixture
def filled(template: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(template, tmp_path / "kernels")


def test_a_second_process_compiles_nothing(filled):
    assert run(filled) == (0, "")


@on_posix
def test_folder_and_files_are_private(template):
    assert stat.S_IMODE(template.stat().st_mode) == 0o700
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o077 for path in kernels(template))


def test_spoilt_files_are_ignored_and_replaced(filled):
    before = {path: path.read_bytes() for path in kernels(filled)}
    first, second, third, fourth, *others = before
    middle = len(before[first]) // 2
    first.write_bytes(before[first][:middle] + bytes([before[first][middle] ^ 1]) + before[first][middle + 1 :])
    second.write_bytes(before[second][:-100])
    third.write_bytes(before[fourth])  # the kernel of another source
    fourth.write_bytes(b"")
    for path in others:
        path.write_bytes(before[path] + b"x")
    assert run(filled) == (len(before), "")
    assert {path: path.read_bytes() for path in kernels(filled)} == before


@on_posix
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_refused_with_a_warning(filled, mode):
    filled.chmod(mode)
    times = {path: path.stat().st_mtime_ns for path in filled.iterdir()}
    compiled, warned = run(filled)
    assert compiled == len(times)
    assert warned.count("RuntimeWarning") == 1
    assert str(filled) in warned
    assert "chmod 700" in warned
    assert {path: path.stat().st_mtime_ns for path in filled.iterdir()} == times


@on_posix
def test_a_file_that_others_can_write_is_not_run(filled):
    kernels(filled)[0].chmod(0o666)
    kernels(filled)[1].chmod(0o620)
    assert run(filled) == (2, "")


@on_posix
@pytest.mark.skipif(getattr(os, "geteuid", int)() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_refused(filled):
    os.chown(kernels(filled)[0], 12345, -1)
    assert run(filled) == (1, "")
    os.chown(filled, 12345, -1)
    compiled, warned = run(filled)
    assert compiled >= KERNELS
    assert "RuntimeWarning" in warned


def test_a_folder_that_cannot_be_made_means_compiling_in_memory(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    compiled, warned = run(tmp_path / "file" / "kernels")
    assert compiled >= KERNELS
    assert warned == ""


@on_posix
def test_a_folder_that_cannot_be_written_is_still_read(filled):
    missing = kernels(filled)[0]
    missing.unlink()
    filled.chmod(0o500)
    # Root may write anywhere: a failing write stands in for the permission.
    refusing = """
    import tempfile
    def refuse(*_, **__):
        raise PermissionError("read-only")
    tempfile.mkstemp = refuse
    """
    assert run(filled, refusing) == (1, "")
    assert not missing.exists()


def test_processes_that_fill_one_cache_at_once_agree(template, tmp_path):
    processes = [start(tmp_path / "kernels") for _ in range(4)]
    assert [finish(process)[1] for process in processes] == [""] * 4
    found = {path.name: path.read_bytes() for path in (tmp_path / "kernels").iterdir()}
    assert found == {path.name: path.read_bytes() for path in kernels(template)}


def test_other_numbers_need_no_other_kernel(filled):
    further = "import gradstep as gs, numpy as np\nopt = gs.SGD(0.25, momentum=0.1)\nw = np.ones((3, 4, 5))"
    assert run(filled, further, "opt.apply_gradients({'w': w.copy()}, {'w': w})") == (0, "")


def test_without_the_variable_the_users_cache_folder_serves(tmp_path):
    homes = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA")}
    run(tmp_path / "unused", f"import os\nos.environ.update({homes})\ndel os.environ['GRADSTEP_CACHE_DIR']")
    assert not (tmp_path / "unused").exists()
    assert {path.parent.name for path in (tmp_path / "home").rglob("*.o")} == {"gradstep"}
