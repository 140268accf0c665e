"""Handwritten digits on several processes: each has a part of the images and of the optimizer's state.

torchrun --nproc-per-node 4 examples/sharded_digits.py
mpiexec -n 4 python -m mpi4py examples/sharded_digits.py
"""

import os
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import gradstep as gs

BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
if BY_TORCHRUN:
    import torch.distributed
else:
    from mpi4py import MPI

WIDTH = 256


def everybody() -> Any:
    """The processes that torchrun has started, or mpiexec."""
    if BY_TORCHRUN:
        torch.distributed.init_process_group("gloo")
        return torch.distributed.group.WORLD
    return MPI.COMM_WORLD


def gradients(params: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean cross-entropy of a network with one hidden layer."""
    hidden = np.maximum(x @ params["hidden"], 0)
    scores = hidden @ params["output"]
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = odds / odds.sum(axis=1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    back = error @ params["output"].T * (hidden > 0)
    return {"hidden": x.T @ back, "output": hidden.T @ error}


def train(group: Any, steps: int = 100) -> tuple[float, int]:
    """The share of test images that are recognised, and the bytes of state on this rank."""
    images, labels = load_digits(return_X_y=True)
    # Wide features at random, so that there is something to spread.
    rng = np.random.default_rng(0)
    mixed = (images / 16).astype(np.float32) @ rng.standard_normal((64, 512)).astype(np.float32) / 8
    x, test = np.split(np.maximum(mixed, 0), [1400])
    y, answers = np.split(labels, [1400])

    params = {
        "hidden": rng.standard_normal((512, WIDTH)).astype(np.float32) / 32,
        "output": rng.standard_normal((WIDTH, 10)).astype(np.float32) / 32,
    }
    opt = gs.Sharded(gs.AdamW(gs.cosine_decay(3e-3, steps), bias_correction=True, clip_norm=1.0), group)
    mine = slice(opt.group.rank, None, opt.group.size)  # this rank's images; all have equally many

    for _ in range(steps):
        opt.apply_gradients(gradients(params, x[mine], y[mine]), params)

    scores = np.maximum(test @ params["hidden"], 0) @ params["output"]
    recognised = float(np.mean(scores.argmax(axis=1) == answers))
    return recognised, sum(array.nbytes for slots in opt.state.values() for array in slots.values())


if __name__ == "__main__":
    recognised, kept = train(everybody())
    print(f"recognised: {recognised:.1%}, state on this rank: {kept:,} bytes")
    if BY_TORCHRUN:
        torch.distributed.destroy_process_group()  # or the process may be aborted while it ends
