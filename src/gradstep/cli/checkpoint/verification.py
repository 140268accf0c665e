"""Every byte of a checkpoint compared with what was saved."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradstep.checkpoint.checkpoint_file import CheckpointFile
from gradstep.cli.checkpoint.screen import Reading


@dataclass(frozen=True)
class Verification:
    """What was read, and the keys of the tensors whose bytes are not those that were saved."""

    tensors: int
    bytes: int
    damaged: Sequence[str]


def verified(file: CheckpointFile) -> Verification:
    """Read all tensors and compare each with its SHA-256; that of the header was compared when the file was opened.

    Raises:
        CheckpointError: the file was cut while it was being read.
        OSError: it cannot be read.
    """
    sizes = {key: file.tensors.shape(key).bytes for key in file.tensors.all_keys()}
    damaged: list[str] = []
    with Reading("checking", sum(sizes.values())) as reading:
        for key, size in sizes.items():
            if not file.tensors.is_whole(key):
                damaged.append(key)
            reading.advance(size)
    return Verification(len(sizes), sum(sizes.values()), damaged)
