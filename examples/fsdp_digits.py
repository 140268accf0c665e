"""Handwritten digits with FSDP: parameters are DTensors, and every process steps the shards that it has.

torchrun --nproc-per-node 4 examples/fsdp_digits.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradstep as gs


def train(steps: int = 100) -> tuple[float, int]:
    """The share of test images that are recognised, and the bytes of state on this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    opt = gs.Sharded(gs.AdamW(gs.cosine_decay(3e-3, steps), bias_correction=True, clip_norm=1.0), dist.group.WORLD)
    params = dict(model.named_parameters())  # after fully_shard, which makes new ones
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x[rank:1400:ranks]), y[rank:1400:ranks])
        model.zero_grad()
        loss.backward()
        opt.apply_gradients({name: parameter.grad for name, parameter in params.items()}, params)

    with torch.no_grad():
        recognised = float((model(x[1400:]).argmax(dim=1) == y[1400:]).float().mean())
    return recognised, sum(array.nbytes for slots in opt.state.values() for array in slots.values())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    recognised, kept = train()
    print(f"recognised: {recognised:.1%}, state on this rank: {kept:,} bytes")
    dist.barrier()  # a rank that ends while others still talk may be aborted
    dist.destroy_process_group()
