"""What the numbers are measured on: the processor, its cores, the memory that is free, and versions."""

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from gradstep.program.threads import available_threads

BUSY = 0.6  # of the cores


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpus = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return cpus[0] if cpus else platform.processor() or platform.machine()


def describe(*packages: str) -> str:
    """The processor, how many cores this process may use, and the versions of everything that takes part."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("gradstep", "numpy", "llvmlite", *packages))
    return f"{processor()}, {available_threads()} cores; Python {platform.python_version()}, {versions}"


def busy() -> str | None:
    """A line that says so if others keep much of this machine at work."""
    cores = available_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # of the last minute
    if load <= BUSY * cores:
        return None
    return (
        f"this machine is busy (load {load:.1f}, {cores} cores): times are uncertain, those of peers most, "
        "whose threads wait for each other; measure when it is idle"
    )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within the limit of a container; None where nobody tells."""
    free = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    with suppress(OSError, ValueError):  # no limit is the word "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free.append(max(limit - int((group / "memory.current").read_text()), 0))
    if not free and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=None)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
