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
    try:
        if path.is_dir():
            raise Complaint(f"{path} is a folder; name a checkpoint in it")
        with checkpoint_file.opened(path) as file:
            yield file
    except CheckpointError as error:
        raise Complaint(str(error)) from None
    except OSError as error:
        raise Complaint(f"{path} cannot be read: {error.strerror or error}") from None
