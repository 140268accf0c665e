"""The character model of low_precision.py on several processes: each draws its own part of every batch.

torchrun --nproc-per-node 2 examples/several_characters.py          all together, the state spread: gs.Sharded
torchrun --nproc-per-node 2 examples/several_characters.py diloco   each by itself, and now and then together: gs.DiLoCo
"""

import sys

import torch
import torch.distributed
from low_precision import draw, loss, parameters, text

import gradstep as gs

STEPS, BATCH = 600, 64


def batches(characters: torch.Tensor) -> list[torch.Tensor]:
    """The examples of every step, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    return [draw(characters, BATCH, generator) for _ in range(STEPS)]


def train(opt: gs.Optimizer, rank: int, ranks: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss on text at random places, and the weights, at the end."""
    characters = text()
    params = parameters(int(characters.max()) + 1)
    for examples in batches(characters):
        weights = {name: array.requires_grad_() for name, array in params.items()}
        gradients = torch.autograd.grad(loss(weights, examples[rank::ranks]), list(weights.values()))
        opt.apply_gradients(dict(zip(weights, gradients, strict=True)), params)
    test = draw(characters, 4096, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return loss(params, test).item(), params


def optimizer() -> gs.Optimizer:
    """The same for all ways."""
    return gs.AdamW(gs.cosine_decay(1e-2, STEPS), bias_correction=True, clip_norm=1.0)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "diloco" in sys.argv:
        opt = gs.DiLoCo(optimizer(), every=30, group=group, wire="int8")
    else:
        opt = gs.Sharded(optimizer(), group)
    print(f"{train(opt, rank, ranks)[0]:.4f} nats per character")
    torch.distributed.destroy_process_group()
