"""What every group must do. As a script, `group_checks.py gloo` or `MPI`, checks it in one of several processes."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest

import gradstep as gs
from gradstep.distributed.collective import sum_parts
from gradstep.distributed.group import Group, group_of

SHORT = 3.0  # seconds, the timeout of groups with a rank that is silent


def is_a_group(group: Group) -> None:
    assert isinstance(group, Group) and group_of(group) is group
    assert 0 <= group.rank < group.size


def gathers_every_dtype(group: Group) -> None:
    for dtype in (np.uint8, np.int64, np.float32, np.float64):
        for shape in ((), (1,), (5,), (2, 3), (0,), (3, 0)):
            gathered = group.gather(np.full(shape, 7 + group.rank, dtype))
            assert gathered.dtype == dtype and gathered.shape == (group.size, *shape)
            assert gathered.flags.c_contiguous and gathered.flags.writeable
            assert all((gathered[rank] == 7 + rank).all() for rank in range(group.size))


def gathers_bits(group: Group) -> None:
    bits = np.array([np.nan, -0.0, np.inf, 5e-324, group.rank])
    assert group.gather(bits)[group.rank].tobytes() == bits.tobytes()


def gathers_from_read_only_memory_and_keeps_nothing(group: Group) -> None:
    values = np.full(3, group.rank, np.float32)
    values.setflags(write=False)
    gathered = group.gather(values)
    values.setflags(write=True)
    values[:] = -1
    assert np.array_equal(gathered, np.repeat(np.arange(group.size), 3).reshape(-1, 3))


def gathers_messages_of_different_lengths(group: Group) -> None:
    assert group.gather_messages(bytes(group.rank)) == [bytes(rank) for rank in range(group.size)]
    assert group.gather_messages(b"all empty"[:0]) == [b""] * group.size
    text = [f"rank {rank}: \0 {'é' * 1000 * (group.size - rank)}".encode() for rank in range(group.size)]
    assert group.gather_messages(text[group.rank]) == text


def exchanges_every_dtype(group: Group) -> None:
    to = np.arange(group.size)
    for dtype in (np.uint8, np.int64, np.float32, np.float64):
        for shape in ((), (3,), (2, 2), (0,)):
            sent = np.broadcast_to((10 * group.rank + to).reshape(-1, *[1] * len(shape)), (group.size, *shape))
            received = group.exchange(sent.astype(dtype))
            assert received.dtype == dtype and received.shape == (group.size, *shape)
            assert received.flags.c_contiguous and received.flags.writeable
            assert all((received[rank] == 10 * rank + group.rank).all() for rank in to)


def sums_parts(group: Group) -> None:
    for dtype in (np.float32, np.float64):
        for shape in ((), (1,), (7,), (4, 5), (0,), (100_003,)):
            every = np.random.default_rng(3).integers(-1000, 1000, (group.size, group.size, *shape)).astype(dtype)
            mine = every[group.rank].copy()
            total = sum_parts(group, mine)
            assert total.dtype == dtype and total.shape == shape
            assert np.array_equal(total, every.sum(axis=0)[group.rank])
            assert np.array_equal(mine, every[group.rank])


def adds_ranks_in_order(group: Group) -> None:
    every = np.random.default_rng(4).standard_normal((group.size, group.size, 1001)).astype(np.float32)
    expected = every[0, group.rank]
    for rank in range(1, group.size):
        expected = expected + every[rank, group.rank]
    for _ in range(3):
        assert sum_parts(group, every[group.rank]).tobytes() == expected.tobytes()


CHECKS: list[Callable[[Group], None]] = [
    is_a_group,
    gathers_every_dtype,
    gathers_bits,
    gathers_from_read_only_memory_and_keeps_nothing,
    gathers_messages_of_different_lengths,
    exchanges_every_dtype,
    sums_parts,
    adds_ranks_in_order,
]


def check(group: Group) -> None:
    for each in CHECKS:
        each(group)


def check_absence(group: Group) -> None:
    """Gather while a rank is missing."""
    with pytest.raises(gs.CommunicationError) as caught:
        group.gather(np.zeros(3))
    error = str(caught.value)
    assert error.startswith(f"gathering values through {group.name} failed on rank {group.rank} of {group.size} after ")
    assert error.endswith("parameters may differ between ranks now: start again from the last checkpoint")


def check_gloo() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    world = group_of(dist.group.WORLD)
    last = world.size - 1
    assert world.name == "gloo"
    check(world)

    alone = [dist.new_group([rank]) for rank in range(world.size)]
    check(group_of(alone[world.rank]))
    backwards = dist.new_group(list(range(last, -1, -1)), sort_ranks=False)
    check(group_of(backwards))
    assert group_of(backwards).rank == last - world.rank
    with pytest.raises(gs.ConfigurationError, match=r'on cuda alone, through gloo; .*new_group\(backend="gloo"\)'):
        group_of(dist.new_group(backend="cuda:gloo"))
    print("checked", flush=True)

    impatient = group_of(dist.new_group(timeout=timedelta(seconds=SHORT)))
    if world.rank != last:
        check_absence(impatient)
    world.gather(np.zeros(1))
    print("silence ends", flush=True)

    if world.rank == last:
        os._exit(7)
    check_absence(world)
    print("death ends", flush=True)
    os._exit(0)  # without a goodbye to the dead rank


def check_mpi() -> None:
    from mpi4py import MPI

    from gradstep.distributed.mpi_group import MpiGroup

    world = group_of(MPI.COMM_WORLD)
    last = world.size - 1
    assert world.name == "MPI"
    check(world)

    check(group_of(MPI.COMM_SELF))
    halves = group_of(MPI.COMM_WORLD.Split(world.rank % 2, key=-world.rank))
    check(halves)
    assert halves.rank == (last - world.rank) // 2
    with pytest.raises(gs.ConfigurationError, match="must be an intracommunicator that this process belongs to, got"):
        group_of(MPI.COMM_NULL)
    communicator = MPI.COMM_SELF.Dup()
    freed = group_of(communicator)
    communicator.Free()
    with pytest.raises(
        gs.CommunicationError, match="exchanging parts through MPI failed on rank 0 of 1 after"
    ) as caught:
        freed.exchange(np.zeros((1, 3)))
    assert isinstance(caught.value.__cause__, MPI.Exception)
    print("checked", flush=True)

    impatient = MpiGroup(MPI.COMM_WORLD.Dup(), timeout=SHORT)
    if world.rank != last:
        check_absence(impatient)
    world.gather(np.zeros(1))
    if world.rank == last:
        impatient.gather(np.zeros(3))  # late: the others' memory is still there
    print("silence ends", flush=True)

    interrupted = group_of(MPI.COMM_WORLD.Dup())
    if world.rank != last:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            interrupted.gather(np.zeros(3))
    world.gather(np.zeros(1))
    if world.rank == last:
        interrupted.gather(np.zeros(3))
    print("interrupts get through", flush=True)


if __name__ == "__main__":
    {"gloo": check_gloo, "MPI": check_mpi}[sys.argv[1]]()
