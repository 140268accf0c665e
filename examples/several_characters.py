"""The character model of low_precision.py on several processes: each draws its own part of every batch.

torchrun --nproc-per-node 2 examples/several_characters.py          all together, the state spread: gs.Sharded
torchrun --nproc-per-node 2 examples/several_characters.py diloco   each by itself, and now and then together: gs.DiLoCo
"""

import sys

import torch
import torch.distributed
from low_precision import draw, loss, parameters, text

import gradstep as gs

STEPS, BATCH = 1000, 64


def train(opt: gs.Optimizer, rank: int = 0, ranks: int = 1) -> float:
    """The loss on text that was not trained on."""
    characters = text()
    known, unknown = characters[: len(characters) * 9 // 10], characters[len(characters) * 9 // 10 :]
    params = {name: array.requires_grad_() for name, array in parameters(int(characters.max()) + 1).items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        mine = draw(known, BATCH, generator)[rank::ranks]  # all ranks draw the same batch, and take their part of it
        grads = torch.autograd.grad(loss(params, mine), list(params.values()))
        opt.apply_gradients(dict(zip(params, grads, strict=True)), params)
    with torch.no_grad():
        return loss(params, draw(unknown, 20_000, generator)).item()


def optimizer() -> gs.Optimizer:
    """The same for all ways."""
    return gs.AdamW(gs.cosine_decay(1e-3, STEPS), bias_correction=True, clip_norm=1.0)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "diloco" in sys.argv:
        opt = gs.DiLoCo(optimizer(), every=20, group=group, wire="int8")
    else:
        opt = gs.Sharded(optimizer(), group)
    print(f"{train(opt, rank, ranks):.4f} nats per character")
    torch.distributed.destroy_process_group()
