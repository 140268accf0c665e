"""What a step of several processes asks of a communicator, and how one is recognised."""

import sys
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gradstep.errors import ArgumentTypeError, ConfigurationError

Array = np.ndarray[Any, Any]


@runtime_checkable
class Group(Protocol):
    """Processes that work together, numbered from 0: ranks.

    Everybody calls the same methods in the same order. Arrays are NumPy's, in C order; what is given is not kept.
    A member that does not come, or is dead, ends in a `CommunicationError` after the group's timeout.
    """

    rank: int
    size: int
    name: str
    """What does the work, for errors: "gloo", "MPI"."""

    def gather(self, values: Array) -> Array:
        """The values of all ranks, equal in shape and dtype (uint8, int64, float32 or float64), stacked by rank."""
        ...

    def gather_messages(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, of any length, by rank."""
        ...

    def exchange(self, parts: Array) -> Array:
        """Send row r of `parts` to rank r, which gets the rows sent to it, stacked by rank; dtypes as in `gather`."""
        ...


@runtime_checkable
class MeshGroup(Group, Protocol):
    """A group whose ranks are known by other numbers too, those that meshes of DTensors use."""

    members: tuple[int, ...]
    """The ranks, as `torch.distributed` numbers them in all."""


def group_of(group: object, timeout: float | None = None) -> Group:
    """The group behind a communicator: a process group of `torch.distributed`, or a communicator of mpi4py.

    `timeout` in seconds is for the latter alone.
    """
    torch_distributed, mpi = map(sys.modules.get, ("torch.distributed", "mpi4py.MPI"))
    if mpi is not None and isinstance(group, mpi.Comm):
        from gradstep.distributed.mpi_group import MpiGroup

        return MpiGroup(group) if timeout is None else MpiGroup(group, timeout)
    if timeout is not None:
        raise ConfigurationError(
            f"timeout is for a communicator of mpi4py; {group!r} has its own: init_process_group(…, timeout=…)"
        )
    if torch_distributed is not None and isinstance(group, torch_distributed.ProcessGroup):
        from gradstep.distributed.torch_group import TorchGroup

        return TorchGroup(group)
    if isinstance(group, Group):
        return group
    raise ArgumentTypeError(
        f"group must be a process group of torch.distributed or a communicator of mpi4py, got {group!r}; pass "
        "torch.distributed.group.WORLD after init_process_group, or mpi4py.MPI.COMM_WORLD"
    )
