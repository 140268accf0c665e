"""As a script, `sharded_checks.py gloo` or `MPI`: sharded steps in one of several processes against steps of one."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs

SHAPES = {"large": (300, 333), "matrix": (40, 64), "odd": (40_001,), "scalar": ()}
STEPS = 3


def arrays(seed: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def averaged(step: int, ranks: int) -> dict[str, Any]:
    """Added in the order of the ranks, as the groups do."""
    first, *others = (arrays((step, rank)) for rank in range(ranks))
    for other in others:
        first = {name: np.asarray(array + other[name]) for name, array in first.items()}
    return {name: np.asarray(array / np.float32(ranks)) for name, array in first.items()}


MAKERS: dict[str, Callable[[], gs.Optimizer]] = {
    "AdamW": lambda: gs.AdamW(gs.cosine_decay(0.1, 10), clip_norm=1.0, bias_correction=True),
    "8 bits": lambda: gs.Adam(0.1, slot_dtype="int8", rounding="stochastic"),
    "several": lambda: gs.MultiOptimizer([gs.Muon(0.02), gs.Lion(1e-2)], ["matrix"], clip_norm=2.0),
}


def gives_the_bits_of_one_process(group: Any, rank: int, ranks: int, make: Callable[[], gs.Optimizer]) -> None:
    ours, params = gs.Sharded(make(), group), {n: torch.from_numpy(a) for n, a in arrays(0).items()}
    one, expected = make(), arrays(0)
    for step in range(1, 1 + STEPS):
        ours.apply_gradients({n: torch.from_numpy(a) for n, a in arrays((step, rank)).items()}, params)
        one.apply_gradients(averaged(step, ranks), expected)
    assert ours.report == one.report, (ours.report, one.report)
    for name, array in expected.items():
        if name == "matrix":  # its products are PyTorch's here, and NumPy's there
            np.testing.assert_allclose(params[name], array, 1e-4, 1e-5)
        else:
            assert params[name].numpy().tobytes() == array.tobytes(), name


def agrees_on_an_error(group: Any, rank: int, ranks: int) -> None:
    opt, params = gs.Sharded(gs.SGD(0.1), group), arrays(0)
    grads = arrays((1, rank))
    if rank == ranks - 1:
        grads["odd"] = grads["odd"][:5]
    with pytest.raises(gs.ShapeError) as caught:
        opt.apply_gradients(grads, params)
    assert str(caught.value) == f"rank {ranks - 1}: grads['odd'] has shape (5,), but params['odd'] has (40001,)"
    opt.apply_gradients(arrays((1, rank)), params)
    assert opt.step == 1


def survives_a_death(group: Any, rank: int, ranks: int) -> None:
    opt, params = gs.Sharded(gs.SGD(0.1), group), arrays(0)
    opt.apply_gradients(arrays((1, rank)), params)
    if rank == ranks - 1:
        os._exit(7)
    before = opt.step
    with pytest.raises(gs.CommunicationError, match="start again from the last checkpoint") as caught:
        opt.apply_gradients(arrays((2, rank)), params)
    assert f"on rank {rank} of {ranks}" in str(caught.value)
    assert opt.step == before


def main(library: str) -> None:
    if library == "gloo":
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
        group = torch.distributed.group.WORLD
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        from mpi4py import MPI

        group, rank, ranks = MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    for make in MAKERS.values():
        gives_the_bits_of_one_process(group, rank, ranks, make)
    agrees_on_an_error(group, rank, ranks)
    print("checked", flush=True)
    if library == "gloo":
        survives_a_death(group, rank, ranks)
        print("told of a death", flush=True)
        os._exit(0)  # the group has no end that all could agree on


if __name__ == "__main__":
    main(sys.argv[1])
