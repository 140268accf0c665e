"""Every group does the same, whatever carries it: threads, gloo or MPI; and a rank that is lost ends in an error."""

import threading
from collections.abc import Callable
from pathlib import Path

import group_checks
import numpy as np
import pytest
from processes import needs_mpi, run_mpi, run_torch
from thread_group import ThreadGroup, run_in_threads

import gradstep as gs
from gradstep.distributed.group import Group, group_of

SCRIPT = Path(group_checks.__file__)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("check", group_checks.CHECKS, ids=lambda check: check.__name__)
def test_threads(check: Callable[[Group], None], size: int):
    run_in_threads(size, check)


def test_gloo():
    *survivors, dead = run_torch(4, SCRIPT, "gloo")
    for rank in survivors:
        assert rank.code == 0, rank.err
        assert rank.out == "checked\nsilence ends\ndeath ends\n"
    assert dead.code == 7, dead.err


@needs_mpi
def test_mpi():
    for rank in run_mpi(4, SCRIPT, "MPI"):
        assert rank.code == 0, rank.err
        assert rank.out == "checked\nsilence ends\ninterrupts get through\n"


@needs_mpi
def test_mpi_ends_all_ranks_when_one_has_died():
    ranks = run_mpi(
        2, "import os; from mpi4py import MPI; MPI.COMM_WORLD.rank and os._exit(7); MPI.COMM_WORLD.Barrier()"
    )
    assert ranks[0].code != 0 and ranks[1].code == 7


def test_threads_end_when_one_fails():
    def fail(group: ThreadGroup) -> None:
        if group.rank == 1:
            raise ValueError("mine")
        group.gather(np.zeros(3))

    with pytest.raises(ValueError, match="mine"):
        run_in_threads(3, fail)


def test_threads_end_when_one_is_silent():
    ready = threading.Event()

    def wait(group: ThreadGroup) -> None:
        if group.rank == 1:
            ready.wait()
        else:
            group.gather(np.zeros(3))

    with pytest.raises(gs.CommunicationError, match="rank 0 of 2 threads: another one failed or is late"):
        run_in_threads(2, wait, timeout=0.1)
    ready.set()


@pytest.mark.parametrize("group", [None, 4, "gloo", np.zeros(3)], ids=repr)
def test_what_is_no_group_is_refused(group: object):
    with pytest.raises(gs.ArgumentTypeError) as caught:
        group_of(group)
    assert str(caught.value) == (
        f"group must be a process group of torch.distributed or a communicator of mpi4py, got {group!r}; pass "
        "torch.distributed.group.WORLD after init_process_group, or mpi4py.MPI.COMM_WORLD"
    )
