"""Proves that training loops written for torch run unchanged: schedulers, groups, closures, hooks, scaled gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from twins import EACH, MATRICES, Twins, assert_same_state, batch, linear, loss_of, ours

import gradstep.torch

Schedule = Callable[[Any], Any]

SCHEDULES: dict[str, Schedule] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 5)),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
}


def train(model: torch.nn.Module, opt: Any, schedule: Schedule, steps: int = 12) -> list[float]:
    """The rate of each step."""
    scheduler, rates = schedule(opt), []
    for place in range(steps):
        opt.zero_grad()
        loss = loss_of(model, place)
        loss.backward()
        opt.step()
        rates.append(float(opt.param_groups[0]["lr"]))
        scheduler.step(*[loss.detach()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("mine", "theirs", "kwargs"),
    [
        (gradstep.torch.AdamW, torch.optim.AdamW, {"lr": 0.02}),
        (gradstep.torch.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
        (gradstep.torch.RMSprop, torch.optim.RMSprop, {"lr": 0.002, "momentum": 0.5}),
    ],
    ids=["AdamW", "SGD", "RMSprop"],
)
def test_schedulers_drive_the_steps(name: str, mine: Any, theirs: Any, kwargs: dict[str, Any]):
    models = linear(), linear()
    rates = [
        train(model, cls(model.parameters(), **kwargs), SCHEDULES[name])
        for model, cls in zip(models, (mine, theirs), strict=True)
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-10, atol=1e-12)


def test_a_rate_may_be_a_tensor_that_is_written_in_place():
    models, rates = (linear(), linear()), (torch.tensor(0.02), torch.tensor(0.02))
    for model, rate, cls in zip(models, rates, (gradstep.torch.AdamW, torch.optim.AdamW), strict=True):
        opt = cls(model.parameters(), lr=rate)
        train(model, opt, SCHEDULES["StepLR"], 4)
        rate.fill_(0.5)
        train(model, opt, lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1.0), 2)
    # In torch the rate takes part in float32; here it is read as the number that it is.
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rates[0], rates[1])


def test_groups_have_values_of_their_own():
    models, opts = (linear(), linear()), []
    for model, cls in zip(models, (gradstep.torch.AdamW, torch.optim.AdamW), strict=True):
        groups = [
            {"params": model[0].parameters(), "lr": 0.05, "weight_decay": 0.0},
            {"params": [model[2].weight], "betas": (0.5, 0.9), "amsgrad": True},
            {"params": model[2].bias, "maximize": True},
        ]
        opts.append(cls(groups, lr=0.01, eps=1e-6))
    for place in range(5):
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            loss_of(model, place).backward()
            opt.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-13)
    assert_same_state(opts[0].state_dict(), opts[1].state_dict())


def test_a_group_can_join_in_the_midst_of_training():
    models = linear(), linear()
    for model, cls in zip(models, (gradstep.torch.AdamW, torch.optim.AdamW), strict=True):
        opt = cls(model[0].parameters(), lr=0.01)
        for place in range(6):
            if place == 3:
                opt.add_param_group({"params": model[2].parameters(), "lr": 0.1})
            opt.zero_grad()
            loss_of(model, place).backward()
            opt.step()
        assert [int(opt.state[p]["step"]) for p in model.parameters()] == [6, 6, 3, 3]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("setting", ["weight_decay", "amsgrad", "maximize", "betas", "eps"])
def test_any_value_of_a_group_can_be_changed_between_steps(setting: str):
    values = {"weight_decay": [0.0, 0.5, 0.0], "amsgrad": [True, False, True], "maximize": [False, True, False],
              "betas": [(0.9, 0.99), [0.5, 0.9], (0.9, 0.99)], "eps": [1e-8, 1e-2, 0.1]}[setting]  # fmt: skip
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.AdamW(twins.mine, amsgrad=True), torch.optim.AdamW(twins.other, amsgrad=True)
    for value in values:
        mine.param_groups[0][setting] = other.param_groups[0][setting] = value
        twins.step(mine, other, times=2)
        twins.assert_equal()


def test_a_buffer_begins_when_momentum_does():
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.SGD(twins.mine, dampening=0.5), torch.optim.SGD(twins.other, dampening=0.5)
    for momentum in (0, 0.9, 0.9, 0, 0.5):
        mine.param_groups[0]["momentum"] = other.param_groups[0]["momentum"] = momentum
        twins.step(mine, other)
        twins.assert_equal()
        assert_same_state(mine.state_dict(), other.state_dict())


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    model, calls = linear(), []
    opt = gradstep.torch.AdamW(model.parameters())

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert loss is not None
    assert loss > loss_of(model, 0).item()


def test_hooks_surround_the_step():
    model, seen = linear(), []
    opt = gradstep.torch.AdamW(model.parameters(), lr=0.1)
    weight = next(model.parameters())

    def value() -> float:
        return float(weight.detach().sum())

    opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append(value()))
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append(value()))
    loss_of(model, 0).backward()
    before = value()
    opt.step()
    assert seen == [before, value()]
    assert before != value()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_zeroed(set_to_none: bool):
    model = linear()
    opt = gradstep.torch.AdamW(model.parameters())
    loss_of(model, 0).backward()
    opt.step()
    opt.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else not g.any() for g in grads)
    opt.step()  # with gradients of 0, or none
    assert int(opt.state[next(model.parameters())]["step"]) == (1 if set_to_none else 2)


def test_scaled_gradients_are_unscaled_and_infinite_ones_skipped():
    models, scales = (linear(dtype=torch.float32), linear(dtype=torch.float32)), []
    for model, cls in zip(models, (gradstep.torch.AdamW, torch.optim.AdamW), strict=True):
        opt, scaler = cls(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for place in range(6):
            opt.zero_grad()
            loss = loss_of(model, place, torch.float32) * (float("inf") if place == 2 else 1.0)
            scaler.scale(loss).backward()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(opt)
            scaler.update()
            stayed = all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
            assert stayed == (place == 2)
        scales.append(scaler.get_scale())
        assert {int(state["step"]) for state in opt.state.values()} == {5}
    assert scales == [2.0**9] * 2
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-6)


def test_norms_are_clipped_by_torchs_own_function():
    models = linear(), linear()
    for model, cls in zip(models, (gradstep.torch.SGD, torch.optim.SGD), strict=True):
        opt = cls(model.parameters(), lr=0.1)
        for place in range(3):
            opt.zero_grad()
            loss_of(model, place).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-13)


def test_averaged_models_follow():
    model = linear()
    opt, averaged = gradstep.torch.AdamW(model.parameters()), torch.optim.swa_utils.AveragedModel(model)
    for place in range(3):
        loss_of(model, place).backward()
        opt.step()
        averaged.update_parameters(model)
    assert int(averaged.n_averaged) == 3


@pytest.mark.parametrize(("name", "kwargs"), EACH)
def test_every_write_is_noticed_by_autograd(name: str, kwargs: dict[str, Any]):
    twins = Twins(MATRICES)
    opt = ours(name)(twins.mine, **kwargs)
    twins.step(opt)
    tensors = [*twins.mine, *(v for state in opt.state.values() for v in state.values())]
    versions = [t._version for t in tensors]
    twins.step(opt)
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))


def test_a_graph_from_before_the_step_is_refused_as_in_torch():
    model = linear()
    opt = gradstep.torch.AdamW(model.parameters())
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_calls_see_the_parameters_as_they_are():
    model = linear()
    opt = gradstep.torch.AdamW(model.parameters(), lr=0.1)
    inputs, _ = batch(0)
    first = torch.func.functional_call(model, dict(model.named_parameters()), (inputs,)).detach()
    loss_of(model, 0).backward()
    opt.step()
    assert not torch.equal(first, model(inputs))


def test_a_parameter_that_moves_from_one_group_to_the_next_takes_its_rate() -> None:
    results = []
    for module in (torch.optim, gradstep.torch):
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
        opt = module.SGD([{"params": parameters[:2], "lr": 1.0}, {"params": parameters[2:], "lr": 10.0}], lr=1.0)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones(1)
            opt.step()
            opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
        results.append([parameter.item() for parameter in parameters])
    assert results[0] == results[1]
