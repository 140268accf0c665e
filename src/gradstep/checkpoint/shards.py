"""The files of shards: written and held until their index names them, and removed when no index does."""

import contextlib
import os
import secrets
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

from gradstep.checkpoint.container import Tensor, write
from gradstep.checkpoint.files import create_held, give_mode, remove_unheld, sync, sync_folder, target_of
from gradstep.checkpoint.sharded_file import PART, SHARD_NAME, Shard, shards_named_by
from gradstep.errors import CheckpointError, listing


class Written:
    """A shard that lies on the disk. It is removed at the end of the block that wrote it, unless it `stays`.

    Attributes:
        shard: its path from the index's folder on, and its size.
        hashes: the SHA-256 of each of its tensors.
        stays: whether an index may name it.
    """

    def __init__(self, shard: Shard, hashes: Mapping[str, str]) -> None:
        self.shard, self.hashes, self.stays = shard, hashes, False


@contextlib.contextmanager
def writing(index: Path, rank: int, ranks: int, tensors: Sequence[Tensor]) -> Generator[Written]:
    """Write a shard for the index at `index`; nobody removes the file before the block ends.

    Args:
        index: where the index will be.
        rank, ranks: which of the shards it is, and of how many.
        tensors: the pieces.
    """
    target = target_of(index)
    folder = _folder_of(target)
    folder.mkdir(exist_ok=True)
    hashes: dict[str, str] = {}

    def name() -> Path:
        return folder / f"{secrets.token_hex(6)}-{rank + 1:05}-of-{ranks:05}.safetensors"

    def metadata(found: Mapping[str, str]) -> dict[str, str]:
        hashes.update(found)
        whose = os.fsencode(target.name).decode(errors="backslashreplace")
        return {PART: f"shard {rank + 1} of {ranks} of the checkpoint {whose}"}

    file, place = create_held(name)
    written = None
    try:
        with file:
            give_mode(place, target)
            write(file, tensors, metadata)
            sync(file)
            sync_folder(folder)
            sync_folder(target.parent)
            written = Written(Shard(f"{folder.name}/{place.name}", place.stat().st_size), hashes)
            yield written
    finally:
        if written is None or not written.stays:
            place.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing else is in it


def check_there(index: Path, shards: Sequence[Shard]) -> None:
    """Raise `CheckpointError` unless all shards lie beside the index, as this process sees the folder."""
    for rank, (path, size) in enumerate(shards):
        place = target_of(index).parent / path
        there = place.stat().st_size if place.exists() else None
        if there != size:
            raise CheckpointError(
                f"rank {rank} has written {path} of {size:,} bytes, but here {place} "
                + ("does not exist" if there is None else f"has {there:,}")
                + "; all ranks must save into the same folder, on a disk that they share"
            )


def cleaning(path: str | os.PathLike[str]) -> Callable[[Path], None]:
    """What removes the shards of a checkpoint that is about to be replaced, once it has been.

    It removes those in the checkpoint's folder that no index beside it names, but not what somebody is writing, and is
    to be called while no other process can give a file its name there. Other files, and folders that are links, are
    left alone; so is everything while an index cannot be read, with a warning.
    """
    before = _named_beside(target_of(path), [])
    return lambda target: _remove_left_over(target, before)


def _remove_left_over(target: Path, before: set[str]) -> None:
    """`before`: the shards that were named, so that nobody is writing them, also where files cannot be held."""
    folder = _folder_of(target)
    if not folder.is_dir() or folder.is_symlink():
        return
    unread: list[str] = []
    named = _named_beside(target, unread)
    if unread:
        warnings.warn(
            f"shards in {folder} that no index names any more were left there: {listing(unread)} cannot be read "
            "and may name them; move such files away",
            stacklevel=2,
        )
        return
    for place in folder.iterdir():
        path = f"{folder.name}/{place.name}"
        if SHARD_NAME.fullmatch(place.name) and path not in named:
            with contextlib.suppress(OSError):
                place.unlink() if path in before else remove_unheld(place)
    with contextlib.suppress(OSError):
        folder.rmdir()  # if nothing is left


def _named_beside(target: Path, unread: list[str]) -> set[str]:
    """The shards that the indexes in a folder name."""
    if not _folder_of(target).is_dir():
        return set()
    return {shard for path in target.parent.iterdir() if path.is_file() for shard in _named_by(path, unread)}


def _named_by(path: Path, unread: list[str]) -> Iterator[str]:
    try:
        yield from shards_named_by(path)
    except FileNotFoundError:
        return
    except (CheckpointError, OSError):
        unread.append(path.name)


def _folder_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.shards")
