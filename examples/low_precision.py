"""What narrower numbers cost in training: a character model on the standard library's source, kept in six ways."""

import difflib
import inspect
import pathlib
import statistics
import tarfile
import textwrap
import typing
import zipfile
from typing import Any

import torch
from torch.nn.functional import cross_entropy, gelu, rms_norm

import gradstep as gs

CONTEXT, WIDTH = 16, 128
MODULES = (difflib, inspect, statistics, tarfile, textwrap, typing, zipfile)

WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, slots in 8 bits": (torch.float32, {"slot_dtype": "int8"}),
    "bfloat16, stochastic rounding": (torch.bfloat16, {"slot_dtype": "bfloat16", "rounding": "stochastic"}),
    "bfloat16, stochastic, slots in 8 bits": (torch.bfloat16, {"slot_dtype": "int8", "rounding": "stochastic"}),
    "bfloat16, float32 copies": (torch.bfloat16, {"master_weights": True}),
    "bfloat16, rounded to nearest": (torch.bfloat16, {"slot_dtype": "bfloat16"}),
}


def text() -> torch.Tensor:
    """The characters as numbers."""
    source = "".join(pathlib.Path(str(module.__file__)).read_text() for module in MODULES)
    alphabet = {character: number for number, character in enumerate(sorted(set(source)))}
    return torch.tensor([alphabet[character] for character in source])


def parameters(characters: int) -> dict[str, torch.Tensor]:
    """Weights at the start, the same in every run."""
    torch.manual_seed(0)
    shapes = {"embed": (characters, 16), "first": (16 * CONTEXT, WIDTH), "second": (WIDTH, WIDTH)}
    weights = {name: torch.randn(shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    return {**weights, "norm": torch.ones(WIDTH), "out": torch.randn(WIDTH, characters) * WIDTH**-0.5}


def loss(params: dict[str, torch.Tensor], examples: torch.Tensor) -> torch.Tensor:
    """Nats per character, computed in float32 from weights as they are kept."""
    p = {name: weights.float() for name, weights in params.items()}
    x = gelu(p["embed"][examples[:, :CONTEXT]].flatten(1) @ p["first"])
    x = x + gelu(rms_norm(x, (WIDTH,), p["norm"]) @ p["second"])
    return cross_entropy(x @ p["out"], examples[:, CONTEXT])


def draw(characters: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pieces of text, each with the character that follows."""
    starts = torch.randint(len(characters) - CONTEXT, (count, 1), generator=generator)
    return characters[starts + torch.arange(CONTEXT + 1)]


def train(dtype: torch.dtype, options: dict[str, Any], steps: int = 1500) -> float:
    """The loss on text that was not trained on."""
    characters = text()
    known, unknown = characters[: len(characters) * 9 // 10], characters[len(characters) * 9 // 10 :]
    params = {n: w.to(dtype).requires_grad_() for n, w in parameters(int(characters.max()) + 1).items()}
    opt = gs.AdamW(gs.cosine_decay(1e-3, steps), bias_correction=True, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        grads = torch.autograd.grad(loss(params, draw(known, 64, generator)), list(params.values()))
        opt.apply_gradients(dict(zip(params, grads, strict=True)), params)
    with torch.no_grad():
        return loss(params, draw(unknown, 20_000, generator)).item()


if __name__ == "__main__":
    for way, (dtype, options) in WAYS.items():
        print(f"{way:40}{train(dtype, options):.3f} nats per character")
