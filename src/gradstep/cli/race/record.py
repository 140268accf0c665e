"""The files of a race: what `race.json` holds, and how a file is written whole or not at all."""

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
from gradstep.cli.race.contest import Run
from gradstep.cli.race.ranking import Place

SCHEMA = 1


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


def document(
    options: Mapping[str, object], runs: Sequence[Run], places: Sequence[Place], planned: int
) -> dict[str, object]:
    """Everything about a race, as plain values; `complete` is false when it was cut short."""
    return {
        "schema": SCHEMA,
        "complete": len(runs) == planned,
        "planned_runs": planned,
        "made": _made(),
        "options": dict(options),
        "ranking": [_place(number, place) for number, place in enumerate(places, 1)],
        "runs": [_run(run) for run in runs],
    }


def encode(content: Mapping[str, object]) -> bytes:
    """JSON with one place and one run per line; NaN and infinity, which JSON lacks, become null."""
    lines = [f" {json.dumps(key)}: {_lines(_plain(value))}" for key, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _made() -> dict[str, object]:
    torch = sys.modules.get("torch")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gradstep": gs.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **({"torch": str(cast("Any", torch).__version__)} if torch else {}),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _place(number: int, place: Place) -> dict[str, object]:
    spread = dict(zip(("lowest", "highest"), place.range or (None, None), strict=True))
    return {
        "place": number,
        "optimizer": place.entrant.name,
        "configuration": place.best.runs[0].configuration,
        "best_rate": None if place.final_loss is None else place.best.rate,
        "edge": place.edge,
        "usual_rate": place.entrant.usual,
        "final_loss": {"median": place.final_loss, **spread},
        "metrics": place.metrics,
        "step_us": place.step_us,
        "state_bytes": place.state_bytes,
        "runs": len(place.runs),
        "diverged": place.diverged,
        "diverged_at": place.diverged_at,
    }


def _run(run: Run) -> dict[str, object]:
    return {
        "optimizer": run.entrant,
        "rate": run.rate,
        "seed": run.seed,
        "configuration": run.configuration,
        "first_loss": run.first_loss,
        "final_loss": run.final_loss,
        "metrics": run.metrics,
        "step_us": run.step_us,
        "state_bytes": run.state_bytes,
        "diverged_at": run.diverged_at,
        "diverged_how": run.diverged_how,
        # losses[i] is the mean over the steps i*window to (i+1)*window - 1
        "curve": {"window": run.curve.window, "losses": [float(f"{loss:.6g}") for loss in run.curve.losses]},
    }


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
