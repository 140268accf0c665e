"""The files of shards: written and held until their index names them, and removed when no index does."""

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

from gradstep.checkpoint.checkpoint_file import shards_of
from gradstep.checkpoint.container import Tensor, write
from gradstep.checkpoint.files import create_held, remove_unheld, sync, sync_folder, target_of
from gradstep.checkpoint.sharded_file import PART
from gradstep.errors import CheckpointError


class Written:
    """A shard that lies on the disk: its path from the index's folder on, its size, and its hashes by key.

    It is removed at the end of the block that wrote it, unless `keep` was called.
    """

    def __init__(self, path: str, size: int, hashes: dict[str, str]) -> None:
        self.path, self.size, self.hashes = path, size, hashes
        self.kept = False

    def keep(self) -> None:
        """From now on an index may name it."""
        self.kept = True


@contextlib.contextmanager
def writing(index: Path, save: str, rank: int, ranks: int, tensors: Sequence[Tensor]) -> Generator[Written]:
    """Write a shard for the index at `index`; nobody removes the file before the block ends.

    Args:
        index: where the index will be.
        save: what tells the shards of this save from those of others.
        rank, ranks: which of the shards it is, and of how many.
        tensors: the pieces.
    """
    target = target_of(index)
    path = f"{_folder_name(target)}/{save}-{rank + 1:05}-of-{ranks:05}.safetensors"
    place = target.parent / path
    place.parent.mkdir(exist_ok=True)
    hashes: dict[str, str] = {}

    def metadata(found: Mapping[str, str]) -> dict[str, str]:
        hashes.update(found)
        return {PART: f"shard {rank + 1} of {ranks} of the checkpoint {target.name}"}

    file, _ = create_held(lambda: place)
    written = None
    try:
        with file:
            write(file, tensors, metadata)
            sync(file)
            sync_folder(place.parent)
            sync_folder(target.parent)
            written = Written(path, place.stat().st_size, hashes)
            yield written
    finally:
        if written is None or not written.kept:
            place.unlink(missing_ok=True)


def check_there(index: Path, shards: Sequence[tuple[str, int]]) -> None:
    """Raise `CheckpointError` unless all shards lie beside the index, as this process sees the folder."""
    for rank, (path, size) in enumerate(shards):
        place = index.resolve().parent / path
        there = place.stat().st_size if place.exists() else None
        if there != size:
            raise CheckpointError(
                f"rank {rank} has written {path} of {size:,} bytes, but here {place} "
                + ("does not exist" if there is None else f"has {there:,}")
                + "; all ranks must save into the same folder, on a disk that they share"
            )


def named_beside(index: Path) -> set[str]:
    """The shards that this index and others in its folder name."""
    target = index.resolve()
    beside = target.parent.glob(f"*{target.suffix}")
    return {path for other in beside if _is_index(other) for path in _shards_of(other)}


def remove_left_over(index: Path, before: set[str]) -> None:
    """Remove the shards of an index that no index in its folder names.

    Those that one named `before` are whole, and of no use any more; others may be somebody's who is still writing.
    """
    target, named = index.resolve(), named_beside(index)
    folder = target.parent / _folder_name(target)
    for place in folder.glob("*.safetensors"):
        path = f"{folder.name}/{place.name}"
        if path not in named and path in before:
            place.unlink(missing_ok=True)
        elif path not in named:
            remove_unheld(place)


def _folder_name(target: Path) -> str:
    return f"{target.stem}.shards"


def _is_index(path: Path) -> bool:
    """Whether a file is a header alone."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little") + 8 == os.fstat(file.fileno()).st_size


def _shards_of(path: Path) -> Iterator[str]:
    try:
        yield from shards_of(path)
    except CheckpointError:  # damaged, or something else
        return
