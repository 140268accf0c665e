"""Opening a checkpoint for a person: whatever is wrong with the file is a complaint."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from gradstep.checkpoint import checkpoint_file
from gradstep.checkpoint.checkpoint_file import CheckpointFile
from gradstep.cli.complaint import Complaint
from gradstep.errors import CheckpointError


@contextlib.contextmanager
def opened(path: Path) -> Generator[CheckpointFile]:
    """Open a checkpoint to read it.

    Raises:
        Complaint: the file is damaged, no checkpoint, or cannot be read, now or while it is open.
    """
    with complaining(path):
        if path.is_dir():
            raise Complaint(f"{path} is a folder; name a checkpoint in it")
        with checkpoint_file.opened(path) as file:
            yield file


@contextlib.contextmanager
def complaining(path: Path, doing: str = "read") -> Generator[None]:
    """Turn what is wrong with files into a complaint."""
    try:
        yield
    except CheckpointError as error:
        raise Complaint(str(error)) from None
    except OSError as error:
        raise Complaint(f"{error.filename or path} cannot be {doing}: {error.strerror or error}") from None
