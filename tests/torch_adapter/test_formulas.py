"""Proves that every class takes torch's steps and keeps torch's state, by kernels and by torch's own operations."""

import inspect
import math
from typing import Any

import pytest
import torch
from twins import (
    ADDED,
    ALL,
    EACH,
    ELEMENTWISE,
    IN_TORCH,
    MATRICES,
    OPTIONS,
    Kwargs,
    Twins,
    assert_same_state,
    generator,
    ours,
    random,
    shapes_for,
    theirs,
)

import gradstep.torch
from gradstep.torch import engine

STEPS = 6


@pytest.fixture(params=["kernels", "operations"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes; as on another device, no tensor may be in the kernels' reach."""
    if request.param == "operations":
        monkeypatch.setattr(engine, "_in_reach", lambda tensor: False)
    return request.param


def test_the_table_has_every_class():
    assert sorted(OPTIONS) == sorted(gradstep.torch.__all__)


@pytest.mark.parametrize("name", [name for name in OPTIONS if hasattr(torch.optim, name)])
def test_arguments_their_order_and_defaults_are_torchs(name: str):
    mine, wanted = (inspect.signature(cls.__init__).parameters for cls in (ours(name), theirs(name)))
    found = [(p.name, p.kind, p.default) for p in mine.values()]
    assert found[: len(wanted)] == [(p.name, p.kind, p.default) for p in wanted.values()]
    assert {name for name, _, _ in found[len(wanted) :]} <= ADDED


@pytest.mark.parametrize("name", OPTIONS)
def test_every_class_is_a_torch_optimizer_and_documented(name: str):
    cls = ours(name)
    assert issubclass(cls, torch.optim.Optimizer)
    for part in ("```", "Args:", "Raises:", "Example:", ">>>", "Source:"):
        assert part in cls.__doc__
    for argument in list(inspect.signature(cls.__init__).parameters)[1:]:
        assert argument in cls.__doc__, argument


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(("name", "kwargs"), ELEMENTWISE)
def test_steps_and_state_are_torchs_in_float64(name: str, kwargs: Kwargs):
    twins = Twins(shapes_for(name))
    mine, other = ours(name)(twins.mine, **kwargs), theirs(name)(twins.other, **kwargs)
    for _ in range(STEPS):
        twins.step(mine, other)
        twins.assert_equal()
        assert_same_state(mine.state_dict(), other.state_dict())


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(("name", "kwargs"), ELEMENTWISE)
def test_steps_and_state_are_torchs_in_float32(name: str, kwargs: Kwargs):
    twins = Twins(shapes_for(name), torch.float32)
    mine, other = ours(name)(twins.mine, **kwargs), theirs(name)(twins.other, **kwargs)
    twins.step(mine, other, times=STEPS)
    twins.assert_equal(rtol=2e-5, atol=2e-6)
    assert_same_state(mine.state_dict(), other.state_dict(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "kwargs"), ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_follow_torch_within_their_rounding(name: str, kwargs: Kwargs, dtype: torch.dtype):
    twins = Twins([(40,), (6, 5)], dtype)
    mine, other = ours(name)(twins.mine, **kwargs), theirs(name)(twins.other, **kwargs)
    twins.step(mine, other)
    precision = torch.finfo(dtype).eps
    twins.assert_equal(rtol=4 * precision, atol=8 * precision)
    for entries, wanted in zip(mine.state.values(), other.state.values(), strict=True):
        assert {n: v.dtype for n, v in entries.items()} == {n: v.dtype for n, v in wanted.items()}


@pytest.mark.parametrize(("name", "kwargs"), ALL)
def test_narrow_parameters_are_computed_in_float32_and_rounded_once(name: str, kwargs: Kwargs):
    start = [random((6, 5), generator(), torch.bfloat16)]
    narrow, wide = (torch.nn.Parameter(start[0].to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    if name == "Adafactor":
        kwargs = {"eps": (1e-2, 1e-3), **kwargs}  # the default depends on the dtype
    narrow_opt, wide_opt = ours(name)([narrow], **kwargs), ours(name)([wide], **kwargs)
    narrow.grad = random((6, 5), generator(2), torch.bfloat16)
    wide.grad = narrow.grad.float()
    narrow_opt.step()
    wide_opt.step()
    ulp = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(narrow.data, wide.data.bfloat16(), rtol=ulp, atol=0)
    assert (narrow.data == wide.data.bfloat16()).float().mean() > 0.95
    for slot, value in narrow_opt.state[narrow].items():
        if slot != "step":
            torch.testing.assert_close(value, wide_opt.state[wide][slot].bfloat16(), rtol=ulp, atol=0)


def lion_step(w: Any, g: Any, m: Any, *, lr: float, betas: Any, weight_decay: float, maximize: bool) -> Any:
    g = -g if maximize else g
    direction = (m + (g - m) * (1 - betas[0])).sign()
    return w - lr * (direction + weight_decay * w), m.lerp(g, 1 - betas[1])


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("kwargs", OPTIONS["Lion"])
def test_lion_follows_its_paper(kwargs: Kwargs):
    twins = Twins([(5,), (4, 3)])
    mine = gradstep.torch.Lion(twins.mine, **kwargs)
    values = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False, **kwargs}
    momenta = [torch.zeros_like(p) for p in twins.other]
    for _ in range(STEPS):
        twins.step(mine)
        for i, p in enumerate(twins.other):
            p.data, momenta[i] = lion_step(p.data, p.grad, momenta[i], **values)
    twins.assert_equal()
    assert [list(state) for state in mine.state.values()] == [["exp_avg"]] * 2
    torch.testing.assert_close([mine.state[p]["exp_avg"] for p in twins.mine], [m.detach() for m in momenta])


def newton_schulz(x: Any, coefficients: Any, steps: int, eps: float) -> Any:
    """By the singular values, which is what the iteration acts on."""
    a, b, c = coefficients
    u, s, v = torch.linalg.svd(x / max(float(x.norm()), eps), full_matrices=False)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("kwargs", OPTIONS["Muon"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=str)
def test_muon_follows_torchs_formula_in_full_precision(kwargs: Kwargs, dtype: torch.dtype, tolerance: float):
    twins = Twins(MATRICES, dtype)
    mine = gradstep.torch.Muon(twins.mine, **kwargs)
    values: Any = {name: group for name, group in mine.param_groups[0].items() if name != "params"}
    buffers = [torch.zeros(p.shape, dtype=torch.float64) for p in twins.other]
    wanted = [p.detach().double() for p in twins.other]
    for _ in range(STEPS):
        twins.step(mine)
        for i, p in enumerate(twins.other):
            g, (rows, columns), momentum = p.grad.double(), p.shape, values["momentum"]
            buffers[i] = buffers[i].lerp(g, 1 - momentum)
            update = g.lerp(buffers[i], momentum) if values["nesterov"] else buffers[i]
            update = newton_schulz(update, values["ns_coefficients"], values["ns_steps"], values["eps"])
            ratio = math.sqrt(max(1, rows / columns))
            if values["adjust_lr_fn"] == "match_rms_adamw":
                ratio = 0.2 * math.sqrt(max(rows, columns))
            wanted[i] = wanted[i] * (1 - values["lr"] * values["weight_decay"]) - values["lr"] * ratio * update
    rtol = 4 * torch.finfo(dtype).eps  # of the parameters themselves
    found = [p.detach().double() for p in twins.mine]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=tolerance * values["lr"])


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("scale", [0.0, 1e-5])
def test_muon_divides_by_no_less_than_eps(scale: float):
    w = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    opt = gradstep.torch.Muon([w], lr=0.0, weight_decay=0, momentum=0, ns_steps=2)
    w.grad = random(w.shape, generator())
    opt.step()
    opt.param_groups[0] |= {"lr": 0.1, "eps": 1e-3}
    w.grad = scale * random(w.shape, generator())
    opt.step()
    wanted = newton_schulz(w.grad, opt.param_groups[0]["ns_coefficients"], 2, 1e-3) if scale else torch.zeros(3, 4)
    assert bool(wanted.any()) == bool(scale)
    torch.testing.assert_close(w.detach(), 1 - 0.1 * wanted.double(), rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("kwargs", OPTIONS["Muon"])
def test_muon_is_torchs_within_the_precision_of_bfloat16(kwargs: Kwargs):
    twins = Twins(MATRICES, torch.float32)
    mine, other = gradstep.torch.Muon(twins.mine, **kwargs), torch.optim.Muon(twins.other, **kwargs)
    twins.step(mine, other, times=STEPS)
    twins.assert_equal(rtol=0, atol=0.05 * STEPS * kwargs.get("lr", 1e-3))
    assert_same_state(mine.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


def test_centered_rmsprop_survives_a_variance_of_zero():
    w = torch.nn.Parameter(torch.ones(64))
    opt = gradstep.torch.RMSprop([w], lr=1e-12, centered=True, alpha=0.3)
    for _ in range(40):  # the mean of the squares and the square of the mean become equal up to rounding
        w.grad = torch.linspace(0.1, 3.0, 64)
        opt.step()
    assert w.isfinite().all()


@pytest.mark.parametrize(("name", "kwargs"), EACH)
def test_parameters_without_a_gradient_are_left_out_of_step_and_state(name: str, kwargs: Kwargs):
    twins = Twins(MATRICES)
    mine = ours(name)(twins.mine, **kwargs)
    before = twins.mine[1].detach().clone()
    twins.new_gradients()
    twins.mine[1].grad = None
    mine.step()
    assert torch.equal(twins.mine[1], before)
    if name != "Adagrad":
        assert [p is twins.mine[1] for p in mine.state] == [False] * 3
    if "step" in mine.state[twins.mine[0]]:
        twins.step(mine)
        assert mine.state[twins.mine[0]]["step"] == 2
        assert mine.state[twins.mine[1]]["step"] == 1


@pytest.mark.parametrize(("name", "kwargs"), IN_TORCH)
def test_gradients_that_come_and_go_are_followed(name: str, kwargs: Kwargs):
    twins = Twins(MATRICES)
    mine, other = ours(name)(twins.mine, **kwargs), theirs(name)(twins.other, **kwargs)
    for t in range(6):
        twins.new_gradients()
        for place in range(len(MATRICES)):
            if (t + place) % 3 == 0:
                twins.mine[place].grad = twins.other[place].grad = None
        mine.step()
        other.step()
    tolerance = 0.05 * 6 * mine.param_groups[0]["lr"] if name == "Muon" else 1e-12
    twins.assert_equal(rtol=tolerance, atol=tolerance)
    states = [[opt.state[p] for p in params] for opt, params in ((mine, twins.mine), (other, twins.other))]
    torch.testing.assert_close(*states, rtol=1e-11, atol=1e-13)


def test_a_step_without_any_gradient_does_nothing():
    w = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.AdamW([w])
    opt.step()
    assert w.tolist() == [1, 1, 1]
    assert not opt.state
