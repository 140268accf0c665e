"""The files that commands write: whole or not at all, as JSON that says where and with what it was made."""

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

import gradstep as gs
from gradstep.cli.complaint import Complaint
from gradstep.program.threads import available_threads


def check_folder(folder: Path, names: Sequence[str]) -> None:
    """Make the folder where needed, and make sure that these files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _beside(folder / names[0])
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise Complaint(
            f"--output {folder}: nothing can be written there ({error.strerror}); name a folder of yours"
        ) from None
    for name in names:
        if (folder / name).is_dir():
            raise Complaint(f"--output {folder}: {folder / name} is a folder and stands in the way of the file")


def write_whole(path: Path, content: bytes) -> None:
    """Write the file beside its place and move it there: whoever looks sees the old file or the new one."""
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_or_complain(path: Path, content: bytes) -> None:
    """The same; a disk that refuses is a complaint."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise Complaint(f"{path} could not be written: {error.strerror}") from None


def made() -> dict[str, object]:
    """When, with which versions and on what kind of machine a file is made."""
    torch = sys.modules.get("torch")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gradstep": gs.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **({"torch": str(cast("Any", torch).__version__)} if torch else {}),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": available_threads(),
    }


def encode(content: Mapping[str, object]) -> bytes:
    """JSON with one entry of a list per line; NaN and infinity, which JSON lacks, become null."""
    lines = [f" {json.dumps(key)}: {_lines(_plain(value))}" for key, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in cast("Sequence[object]", value)]
    return value


def _lines(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [json.dumps(entry, allow_nan=False) for entry in cast("list[object]", value)]
        return "[\n  " + ",\n  ".join(entries) + "\n ]"
    return json.dumps(value, allow_nan=False)
