"""Groups of `torch.distributed`. This module is imported only where the caller has imported it."""

import importlib
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from gradstep.distributed.collective import EXCHANGING, GATHERING, communication_error, gather_messages
from gradstep.distributed.group import Array
from gradstep.errors import CommunicationError, ConfigurationError

torch: Any = importlib.import_module("torch")
distributed: Any = importlib.import_module("torch.distributed")


class TorchGroup:
    """A process group with a backend for the CPU, mostly gloo. Its timeout is the process group's."""

    def __init__(self, group: Any) -> None:
        backends = dict(pair.split(":") for pair in distributed.get_backend_config(group).split(","))
        if "cpu" not in backends:
            raise ConfigurationError(
                f"group exchanges arrays on {' and '.join(backends)} alone, through {' and '.join(backends.values())}; "
                'gradstep exchanges them on the CPU: pass torch.distributed.new_group(backend="gloo")'
            )
        self.name: str = backends["cpu"]
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.members: tuple[int, ...] = tuple(distributed.get_process_group_ranks(group))
        self._group = weakref.ref(group)  # one that outlives `destroy_process_group` ends the process with an abort

    def gather(self, values: Array) -> Array:
        """See `Group.gather`."""
        gathered = np.empty((self.size, *values.shape), values.dtype)
        self._run(GATHERING, distributed.all_gather_single, gathered, values)
        return gathered

    def gather_messages(self, message: bytes) -> list[bytes]:
        """See `Group.gather_messages`."""
        return gather_messages(self.gather, message)

    def exchange(self, parts: Array) -> Array:
        """See `Group.exchange`."""
        received = np.empty_like(parts, order="C")
        self._run(EXCHANGING, distributed.all_to_all_single, received, parts)
        return received

    def _run(self, doing: str, operation: Callable[..., object], to: Array, values: Array) -> None:
        started, group = time.monotonic(), self._group()
        if group is None:
            raise CommunicationError("the process group has been destroyed; make a new one, and an optimizer with it")
        try:
            operation(_lend(to), _lend(values), group=group)
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise communication_error(doing, self.rank, self.size, self.name, waited, error) from error


def _lend(values: Array) -> Any:
    """A tensor on the array's memory, or on a copy of it where it is read-only: torch would warn of writing there."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]).reshape(-1))
