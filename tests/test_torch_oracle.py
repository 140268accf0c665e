"""Proves the families against `torch.optim`, in float64, wherever the two compute the same thing.

Lion, and Adam without bias correction, do not exist there. The others are compared where they agree; where they
do not, the test says how they differ.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs

SHAPES = [(), (5,), (4, 3), (3, 4), (2, 4, 3), (2, 3, 2, 3)]
STEPS = 6


def assert_follows(
    opt: Any, make: Callable[..., Any], rtol: float = 1e-12, before: Callable[[Any, int], None] | None = None
) -> None:
    """Step both on the same tensors; `before(oracle, t)` may set the oracle's rate first."""
    generator = torch.Generator().manual_seed(1)

    def random(shape: Any) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ours = {str(shape): random(shape) for shape in SHAPES}
    theirs = {name: torch.nn.Parameter(w.clone()) for name, w in ours.items()}
    oracle = make(list(theirs.values()))
    for t in range(1, STEPS + 1):
        grads = {name: random(w.shape) for name, w in ours.items()}
        for name, g in grads.items():
            theirs[name].grad = g.clone()
        if before:
            before(oracle, t)
        oracle.step()
        opt.apply_gradients(grads, ours)
        for name, w in ours.items():
            np.testing.assert_allclose(w, theirs[name].detach(), rtol, rtol / 10, err_msg=f"{name} at step {t}")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"weight_decay": 0.2},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.2},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    ],
)
def test_sgd_without_dampening(kwargs):
    # With dampening the first steps differ: torch starts v at the first gradient, here it starts at zero.
    assert_follows(gs.SGD(0.1, **kwargs), lambda params: torch.optim.SGD(params, 0.1, **kwargs))


def test_sgd_with_dampening_differs_in_the_first_gradient_only():
    opt, params = gs.SGD(1.0, momentum=0.5, dampening=0.25), {"w": torch.zeros(1)}
    w = torch.nn.Parameter(torch.zeros(1))
    oracle = torch.optim.SGD([w], 1.0, momentum=0.5, dampening=0.25)
    for t in range(3):
        g = torch.tensor([1.0 if t == 0 else 2.0])
        # At the first step torch takes the whole gradient; a larger one here makes up for it.
        opt.apply_gradients({"w": g / 0.75 if t == 0 else g}, params)
        w.grad = g.clone()
        oracle.step()
        torch.testing.assert_close(params["w"], w.detach())


@pytest.mark.parametrize("kwargs", [{}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"betas": (0.0, 0.5)}])
def test_adam_with_bias_correction(kwargs):
    assert_follows(
        gs.Adam(0.01, bias_correction=True, **kwargs), lambda params: torch.optim.Adam(params, 0.01, **kwargs)
    )


@pytest.mark.parametrize("kwargs", [{"weight_decay": 0.0}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}])
def test_adamw_with_bias_correction(kwargs):
    assert_follows(
        gs.AdamW(0.01, bias_correction=True, **kwargs), lambda params: torch.optim.AdamW(params, 0.01, **kwargs)
    )


def test_the_default_weight_decay_of_adamw_is_torchs():
    assert_follows(gs.AdamW(0.01, bias_correction=True), lambda params: torch.optim.AdamW(params, 0.01))


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adagrad(eps):
    assert_follows(gs.Adagrad(0.1, eps=eps), lambda params: torch.optim.Adagrad(params, 0.1, eps=eps))


@pytest.mark.parametrize("kwargs", [{}, {"rho": 0.8, "eps": 1e-3}])
def test_adadelta(kwargs):
    assert_follows(gs.AdaDelta(0.7, **kwargs), lambda params: torch.optim.Adadelta(params, 0.7, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.8, "eps": 1e-3}])
def test_rmsprop(kwargs):
    assert_follows(gs.RMSprop(0.01, **kwargs), lambda params: torch.optim.RMSprop(params, 0.01, **kwargs))


def test_adamax_up_to_the_bias_correction():
    # Torch corrects m by the rate lr / (1 - beta1**t), which is undone here, and adds eps to |g| within the maximum.
    def undo(oracle: Any, t: int) -> None:
        oracle.param_groups[0]["lr"] = 0.01 * (1 - 0.9**t)

    assert_follows(gs.Adamax(0.01, eps=0), lambda params: torch.optim.Adamax(params, 0.01, eps=0), before=undo)


@pytest.mark.parametrize("clip_threshold", [1.0, 2.0])
def test_adafactor_with_the_relative_step(clip_threshold):
    # Torch's "rate" is the bound of the relative step; it clamps where eps[0] = 1e-30 is added here, and its weight
    # decay is a part of the rate, not of the scaled step.
    assert_follows(
        gs.Adafactor(clip_threshold=clip_threshold),
        lambda params: torch.optim.Adafactor(params, 0.01, eps=(1e-30, 1e-3), weight_decay=0.0, d=clip_threshold),
    )


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_up_to_bfloat16(shape, nesterov):
    # Torch iterates in bfloat16, whose error is about 1e-2 of an update's entries, and decouples the weight decay.
    generator = torch.Generator().manual_seed(2)
    w, g = torch.zeros(shape), torch.randn(shape, generator=generator)
    theirs = torch.nn.Parameter(w.clone())
    opt = gs.Muon(1.0, weight_decay=0, nesterov=nesterov)
    oracle = torch.optim.Muon([theirs], 1.0, weight_decay=0, nesterov=nesterov)
    for _ in range(2):
        w.zero_()
        theirs.data.zero_()
        theirs.grad = g.clone()
        oracle.step()
        opt.apply_gradients({"w": g}, {"w": w})
        error = (w - theirs.detach()).norm() / w.norm()
        assert error < 0.02
        g = g + torch.randn(shape, generator=generator)


def test_clipping_within_the_step_and_outside_of_it():
    generator = torch.Generator().manual_seed(3)
    start, g = (torch.randn((20, 30), generator=generator, dtype=torch.float64) for _ in range(2))
    theirs = torch.nn.Parameter(start.clone())
    theirs.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_([theirs], 0.5)
    torch.optim.SGD([theirs], 0.1).step()
    inside, outside = {"w": start.clone()}, {"w": start.clone()}
    opt = gs.SGD(0.1, clip_norm=0.5)
    opt.apply_gradients({"w": g}, inside)
    clipped, total = gs.clip_grad_norm({"w": g}, 0.5)
    gs.SGD(0.1).apply_gradients(clipped, outside)
    assert opt.report.grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert total == opt.report.grad_norm
    for params in (inside, outside):
        torch.testing.assert_close(params["w"], theirs.detach(), rtol=1e-12, atol=1e-13)
