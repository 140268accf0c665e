"""The table of classes and their options, and parameters that two optimizers train side by side."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import gradstep.torch

Kwargs = dict[str, Any]

OPTIONS: dict[str, list[Kwargs]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.2, "maximize": True},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2, "maximize": True},
    ],
    "RMSprop": [
        {},
        {"alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1},
        {"momentum": 0.9},
        {"centered": True, "maximize": True},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
    ],
    "Adagrad": [
        {},
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2},
        {"initial_accumulator_value": 0.5, "eps": 1e-3, "maximize": True},
    ],
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.2, "maximize": True}],
    "Adam": [
        {},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
        {"amsgrad": True, "maximize": True},
        {"weight_decay": 0.2, "decoupled_weight_decay": True},
    ],
    "AdamW": [{}, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}, {"weight_decay": 0, "maximize": True}],
    "Adamax": [{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "maximize": True}],
    "Adafactor": [
        {},
        {"lr": 0.5, "beta2_decay": -0.5, "weight_decay": 0.1, "maximize": True},
        {"eps": (1e-3, 0.1), "d": 2.0},
    ],
    "Lion": [{}, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3, "maximize": True}],
    "Muon": [
        {},
        {"nesterov": False, "weight_decay": 0.0, "ns_steps": 3},
        {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
        {"ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    ],
}

ADDED = {"ns_dtype"}  # arguments that torch does not have

SHAPES = [(), (5,), (4, 3), (3, 4), (2, 4, 3), (0,), (2, 3, 2, 3)]
MATRICES = [(4, 3), (3, 4), (5, 5), (1, 6)]

ALL = [pytest.param(name, kwargs, id=f"{name}-{i}") for name, rows in OPTIONS.items() for i, kwargs in enumerate(rows)]
IN_TORCH = [case for case in ALL if hasattr(torch.optim, str(case.values[0]))]
ELEMENTWISE = [case for case in IN_TORCH if case.values[0] != "Muon"]  # Muon iterates in bfloat16 there
EACH = [pytest.param(name, rows[-1], id=name) for name, rows in OPTIONS.items()]


def ours(name: str) -> Any:
    return getattr(gradstep.torch, name)


def theirs(name: str) -> Any:
    return getattr(torch.optim, name)


def shapes_for(name: str) -> list[tuple[int, ...]]:
    """What a class takes; torch's Adafactor divides by the size, also of what is empty."""
    return {"Muon": MATRICES, "Adafactor": [shape for shape in SHAPES if 0 not in shape]}.get(name, SHAPES)


def random(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Twins:
    """The same parameters twice; both get the same gradients."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 1) -> None:
        self._generator, self._dtype = generator(seed), dtype
        self.mine = [torch.nn.Parameter(random(shape, self._generator, dtype)) for shape in shapes]
        self.other = [torch.nn.Parameter(p.detach().clone()) for p in self.mine]

    def new_gradients(self) -> None:
        for mine, other in zip(self.mine, self.other, strict=True):
            mine.grad = random(mine.shape, self._generator, self._dtype)
            other.grad = mine.grad.clone()

    def step(self, *optimizers: Any, times: int = 1) -> None:
        for _ in range(times):
            self.new_gradients()
            for optimizer in optimizers:
                optimizer.step()

    def assert_equal(self, rtol: float = 1e-12, atol: float = 1e-13) -> None:
        torch.testing.assert_close(self.mine, self.other, rtol=rtol, atol=atol)


def assert_same_state(mine: Any, other: Any, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    """Two `state_dict()`s of one layout, with values that agree."""
    groups = [[{k: v for k, v in g.items() if k not in ADDED} for g in each["param_groups"]] for each in (mine, other)]
    assert groups[0] == groups[1]
    assert list(mine["state"]) == list(other["state"])
    for place, entries in mine["state"].items():
        assert list(entries) == list(other["state"][place])
        for name, value in entries.items():
            wanted = other["state"][place][name]
            assert (value.shape, value.dtype, value.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), name
            torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol)


def linear(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)


def batch(place: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = random((16, 6), generator(100 + place), dtype)
    return inputs, inputs.sum(1, keepdim=True)


def loss_of(model: torch.nn.Module, place: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    inputs, targets = batch(place, dtype)
    return (model(inputs) - targets).square().mean()
