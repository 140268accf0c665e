"""PyTorch's own threads: the team of OpenMP that runs its operations, entered as compiled programs enter it."""

import ctypes
import importlib
import os
from pathlib import Path
from typing import Any

from gradstep.program.threads import Task

torch: Any = importlib.import_module("torch")

LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib")


class OpenMP:
    """The team that GNU's, LLVM's and Intel's OpenMP keep for the calling thread.

    Args:
        parallel: `GOMP_parallel(function, data, threads, flags)`: each thread of the team calls `function(data)`.
    """

    def __init__(self, parallel: Any) -> None:
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        self._parallel = parallel
        self.ready = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.lose)

    def lose(self) -> None:
        """In a forked child the team's threads are gone, and GNU's OpenMP would wait for them forever."""
        self.ready = False

    @property
    def threads(self) -> int:
        """See `Team.threads`."""
        return torch.get_num_threads()

    def run(self, task: Task, job: int, threads: int) -> None:
        """See `Team.run`."""
        self._parallel(task.address, job, threads, 0)


def find_team() -> OpenMP | None:
    """PyTorch's team; None where it is built otherwise, or its OpenMP has no such entry."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    for name in LIBRARIES:
        try:  # a library that is loaded already, through which its own OpenMP is found and nobody else's
            return OpenMP(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel)
        except (OSError, AttributeError):
            continue
    return None
