"""As a script, `diloco_checks.py gloo` or `MPI`: outer steps in one of several processes."""

import os
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs

SIZE = 70_001


def gradients(step: int, rank: int) -> dict[str, Any]:
    return {"w": torch.from_numpy(np.random.default_rng((step, rank)).standard_normal(SIZE).astype(np.float32))}


def averages_changes(group: Any, rank: int, ranks: int, wire: Any) -> None:
    opt = gs.DiLoCo(gs.SGD(0.1), gs.SGD(1.0), every=2, wire=wire, group=group)
    params = {"w": torch.zeros(SIZE)}
    for step in range(4):
        opt.apply_gradients(gradients(step, rank), params)
    total = sum(gradients(step, there)["w"] for step in range(4) for there in range(ranks))
    np.testing.assert_allclose(params["w"], -0.1 * total / ranks, 0, 1e-6 if wire == "float32" else 1e-2)
    assert opt.outer_report[:4] == (True, 2, tuple(range(ranks)), ())
    bits = opt.group.gather(params["w"].numpy())
    assert all(row.tobytes() == bits[0].tobytes() for row in bits)


def goes_on_without_the_dead(rank: int, ranks: int) -> None:
    """The last one dies; the others make a group of their own."""
    opt, params = gs.DiLoCo(gs.SGD(0.1), every=2, group=torch.distributed.group.WORLD), {"w": torch.zeros(SIZE)}
    for step in range(3):
        opt.apply_gradients(gradients(step, rank), params)
    if rank == ranks - 1:
        os._exit(7)
    with pytest.raises(gs.CommunicationError, match="the inner step has been taken, the outer step is due"):
        opt.apply_gradients(gradients(3, rank), params)
    assert opt.outer_due
    opt.group = torch.distributed.new_group(list(range(ranks - 1)), use_local_synchronization=True)
    opt.outer_step(params)
    assert opt.outer_report[:4] == (True, 2, tuple(range(ranks - 1)), ())
    bits = opt.group.gather(params["w"].numpy())
    assert all(row.tobytes() == bits[0].tobytes() for row in bits)


def main(library: str) -> None:
    if library == "gloo":
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
        group = torch.distributed.group.WORLD
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        from mpi4py import MPI

        group, rank, ranks = MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    for wire in ("float32", "bfloat16", "int8"):
        averages_changes(group, rank, ranks, wire)
    print("checked", flush=True)
    if library == "gloo":
        goes_on_without_the_dead(rank, ranks)
        print("goes on", flush=True)
        os._exit(0)  # the group has no end that all could agree on


if __name__ == "__main__":
    main(sys.argv[1])
