"""What the numbers were measured on, and how: alternating, in one process, medians."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

REST = 0.02  # seconds


def describe(*packages: str) -> str:
    """The processor, how many of them this process may use, and the versions of everything that takes part."""
    cpus = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    model = cpus[0] if cpus else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("gradstep", "numpy", "llvmlite", *packages))
    return f"{model}, {_cores()} cores; Python {platform.python_version()}, {versions}"


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def medians(
    sides: Sequence[Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None, warm: int = 0
) -> list[float]:
    """The median time of each side in milliseconds; they take turns, and the first rounds are not counted.

    Before each turn there is a rest, so that no side's threads still spin, waiting for work, in the other's time, and
    then `warm` steps that are not counted: on a virtual machine a processor that has slept takes milliseconds to wake.
    """
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 3):
        before()
        for side, kept in zip(sides, times, strict=True):
            time.sleep(REST)
            for _ in range(warm):
                side()
            start = time.perf_counter()
            side()
            kept.append(time.perf_counter() - start)
    return [1e3 * statistics.median(kept[3:]) for kept in times]
