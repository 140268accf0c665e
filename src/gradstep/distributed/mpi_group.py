"""Communicators of mpi4py. Importing `mpi4py.MPI` starts MPI: only a group does it, whose caller has done it before."""

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gradstep.distributed.collective import EXCHANGING, GATHERING, communication_error, gather_messages
from gradstep.distributed.group import Array
from gradstep.errors import ConfigurationError

TIMEOUT = 1800.0
"""Seconds until a rank that does not come is given up: as long as a process group of torch waits."""
HOT = 1e-3
"""Seconds of waiting without sleep, but with a way for ranks that share the processor."""
NAP = 1e-4
"""Seconds between two looks after that: MPI moves data only while somebody looks."""
_give_way: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))
_abandoned: list[Any] = []  # MPI may still write to what these requests hold


class MpiGroup:
    """An intracommunicator, with a timeout in seconds, which MPI does not have.

    Start ranks with `mpiexec -n 4 python -m mpi4py train.py`: an error then ends all of them. Without `-m mpi4py` a
    rank that fails waits for the others when it exits.
    """

    name = "MPI"

    def __init__(self, communicator: Any, timeout: float = TIMEOUT) -> None:
        self._mpi: Any = importlib.import_module("mpi4py.MPI")
        if not isinstance(communicator, self._mpi.Intracomm) or communicator == self._mpi.COMM_NULL:
            raise ConfigurationError(
                "group must be an intracommunicator that this process belongs to, got "
                f"{communicator!r}; pass mpi4py.MPI.COMM_WORLD or what its Split returns"
            )
        self.rank: int = communicator.rank
        self.size: int = communicator.size
        self._communicator: Any = communicator
        self._timeout = timeout

    def gather(self, values: Array) -> Array:
        """See `Group.gather`."""
        gathered = np.empty((self.size, *values.shape), values.dtype)
        self._run(GATHERING, self._communicator.Iallgather, values, gathered)
        return gathered

    def gather_messages(self, message: bytes) -> list[bytes]:
        """See `Group.gather_messages`."""
        return gather_messages(self.gather, message)

    def exchange(self, parts: Array) -> Array:
        """See `Group.exchange`."""
        received = np.empty_like(parts, order="C")
        self._run(EXCHANGING, self._communicator.Ialltoall, parts, received)
        return received

    def _run(self, doing: str, operation: Any, values: Array, to: Array) -> None:
        started = time.monotonic()
        try:
            done = self._wait(operation(values, to))
        except self._mpi.Exception as error:
            waited = time.monotonic() - started
            raise communication_error(doing, self.rank, self.size, self.name, waited, error) from error
        if not done:
            why = f"the timeout of {self._timeout:g} s is over"
            raise communication_error(doing, self.rank, self.size, self.name, self._timeout, why)

    def _wait(self, request: Any) -> bool:
        """Whether the request is done within the timeout. Between two looks Ctrl-C gets through."""
        started = time.monotonic()
        try:
            while not request.Test():
                waited = time.monotonic() - started
                if waited > self._timeout:
                    return False
                if waited < HOT:
                    _give_way()
                else:
                    time.sleep(NAP)
            return True
        finally:
            if request != self._mpi.REQUEST_NULL:
                _abandoned.append(request)
