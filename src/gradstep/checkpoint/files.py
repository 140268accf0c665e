"""Files that are replaced whole: written beside their place, synced, and renamed over it."""

import contextlib
import errno
import hashlib
import importlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any = None
with contextlib.suppress(ImportError):
    fcntl = importlib.import_module("fcntl")


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], keep: int = 1, afterwards: Callable[[Path], object] = lambda _: None
) -> Generator[BinaryIO]:
    """A new file, which takes the place of `path` when the block ends without an error.

    Whenever the process is killed, or the machine loses power, `path` is the old file or the new one, whole.

    Args:
        path: the file to be replaced; a link stays one.
        keep: how many files there are to be, the new one and older ones; see `older`.
        afterwards: what is done with the file in its place before another process may rename files of its folder.
    """
    target = target_of(path)
    _remove_left_over(target)
    with _beside(target) as (file, place):
        yield file
        sync(file)
        with _turn(target.parent):
            _rotate(target, keep)
            _rename(file, place, target)
            afterwards(target)
    sync_folder(target.parent)


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file to be replaced, behind links.

    Raises:
        OSError: its folder does not exist, or it is something else.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to save into", str(target.parent))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "expected the name of a file to save into; what is there is no file", str(target))
    return target


def older(path: Path, age: int) -> Path:
    """Where the file lies that was `path` before it was last saved `age` times: `name.1.suffix` and so on."""
    return path.with_name(f"{path.stem}.{age}{path.suffix}")


def _rotate(target: Path, keep: int) -> None:
    """Move older files on by one, over the one that is too old, and give the newest one its second name."""
    newest = older(target, 1)
    if keep < 2 or not target.exists() or (newest.exists() and newest.samefile(target)):
        return  # the last happens after a crash between here and the renaming
    for age in range(keep - 1, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(older(target, age - 1), older(target, age))
    newest.unlink(missing_ok=True)
    try:
        os.link(target, newest)
    except OSError:  # a file system without hard links
        with _beside(newest) as (file, place), target.open("rb") as old:
            shutil.copyfileobj(old, file)
            sync(file)
            shutil.copystat(target, place)  # the time of writing tells which is the newest
            _rename(file, place, newest)


@contextlib.contextmanager
def _beside(target: Path) -> Generator[tuple[BinaryIO, Path]]:
    """A new file in the folder of `target`, held by this process, and removed if it has not been renamed."""
    file, place = create_held(lambda: target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}"))
    try:
        with file:
            give_mode(place, target)
            yield file, place
    finally:
        place.unlink(missing_ok=True)


def give_mode(place: Path, target: Path) -> None:
    """Let a new file be as open to others as the one that it belongs to, if that is there."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(place, stat.S_IMODE(target.stat().st_mode))


def create_held(name: Callable[[], Path]) -> tuple[BinaryIO, Path]:
    """A new file, held by this process for as long as it is open; `name` gives another name at every call."""
    while True:
        place = name()
        file = os.fdopen(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666), "wb")
        if claim(file) is not False and place.exists():  # else somebody has just taken it for left over
            return file, place
        file.close()


def remove_unheld(place: Path) -> None:
    """Remove a file, unless a process holds it."""
    with contextlib.suppress(OSError), place.open("r+b") as file:
        if claim(file) or os.name == "nt":  # where what is open cannot be removed
            place.unlink()


def _rename(file: BinaryIO, place: Path, target: Path) -> None:
    if os.name == "nt":
        file.close()  # what is open cannot be renamed there
    os.replace(place, target)


def _prefix(target: Path) -> str:
    return f".gradstep-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _remove_left_over(target: Path) -> None:
    """Remove what killed processes have left here: nobody holds it any more."""
    for place in target.parent.glob(f"{_prefix(target)}*"):
        remove_unheld(place)


def claim(file: BinaryIO) -> bool | None:
    """Hold a file for as long as it is open; False if somebody else does, None where files cannot be held."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _turn(folder: Path) -> Generator[None]:
    """Let one process after another rename files of a folder, where folders can be held."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync(file: BinaryIO) -> None:
    """Wait until the file is on the disk."""
    file.flush()
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves data in the disk's cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":
        return  # folders cannot be opened there; renaming is journalled
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(handle)
