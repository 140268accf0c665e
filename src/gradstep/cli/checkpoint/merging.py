"""`gradstep merge`."""

import os
from pathlib import Path

from gradstep.checkpoint.checkpoint_file import merge
from gradstep.cli.checkpoint.inspection_screen import bytes_and_count
from gradstep.cli.checkpoint.opening import complaining, opened
from gradstep.cli.checkpoint.screen import Reading, console
from gradstep.cli.complaint import Complaint


def run_merge(index: Path, path: Path) -> int:
    """Write what an index and its shards hold as one file; returns the exit code."""
    if os.path.lexists(path):
        raise Complaint(f"{path} is there already; remove it, or name another file")
    with opened(index) as file:
        shards, keys = file.tensors.shards, file.tensors.all_keys()
        total = sum(file.tensors.shape(key).bytes for key in keys)
    with complaining(path, "read or written"), Reading("merging", total) as reading:
        merge(index, path, reading.advance)
    written = bytes_and_count(path.stat().st_size)
    what = f"{shards} shard{'s' * (shards != 1)}" if shards else "one file, which was one already"
    console().print(f"{path}: {len(keys):,} tensors of {what}, {written}", soft_wrap=True)
    return 0
