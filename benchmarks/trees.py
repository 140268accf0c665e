"""The sources that a benchmark compares: the work tree, and a commit beside it."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def checked_out(commit: str | None) -> Iterator[Path | None]:
    """The folder of a commit, for as long as it is needed; None for no commit."""
    if commit is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", other, commit], check=True)
        try:
            yield other
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", other], check=True)


def environment(source: Path, **more: str) -> dict[str, str]:
    """The environment in which `import gradstep` finds these sources."""
    return {**os.environ, "PYTHONPATH": str(source / "src"), "PYTHONHASHSEED": "0", **more}
