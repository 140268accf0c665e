"""Proves that checkpoints go from torch's optimizers to these and back, and that training goes on as if alone."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from twins import (
    EACH,
    IN_TORCH,
    MATRICES,
    Kwargs,
    Twins,
    assert_same_state,
    batch,
    linear,
    loss_of,
    ours,
    shapes_for,
    theirs,
)

import gradstep.torch

Loader = Callable[[Any], Any]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = [pytest.param(copy.deepcopy, id="in memory"), pytest.param(through_a_file, id="through a file")]


@pytest.mark.parametrize("carry", WAYS)
@pytest.mark.parametrize(("name", "kwargs"), IN_TORCH)
def test_a_checkpoint_of_torchs_goes_on_here(name: str, kwargs: Kwargs, carry: Loader):
    twins = Twins(shapes_for(name))
    first, alone = theirs(name)(twins.mine, **kwargs), theirs(name)(twins.other, **kwargs)
    twins.step(first, alone, times=4)
    mine = ours(name)(twins.mine)  # the checkpoint brings the options
    mine.load_state_dict(carry(first.state_dict()))
    twins.step(mine, alone, times=4)
    tolerance = 0.05 * 8 * alone.param_groups[0]["lr"] if name == "Muon" else 1e-12
    twins.assert_equal(rtol=tolerance, atol=tolerance)
    assert_same_state(mine.state_dict(), alone.state_dict(), rtol=1e-11)


@pytest.mark.parametrize("carry", WAYS)
@pytest.mark.parametrize(("name", "kwargs"), IN_TORCH)
def test_a_checkpoint_of_these_goes_on_in_torchs(name: str, kwargs: Kwargs, carry: Loader):
    twins = Twins(shapes_for(name))
    first, alone = ours(name)(twins.mine, **kwargs), theirs(name)(twins.other, **kwargs)
    twins.step(first, alone, times=4)
    second = theirs(name)(twins.mine)
    second.load_state_dict(carry(first.state_dict()))
    twins.step(second, alone, times=4)
    tolerance = 0.05 * 8 * alone.param_groups[0]["lr"] if name == "Muon" else 1e-12
    twins.assert_equal(rtol=tolerance, atol=tolerance)
    assert_same_state(second.state_dict(), alone.state_dict(), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["torch first", "gradstep first"])
def test_ten_steps_and_ten_more_are_twenty(order: str, dtype: torch.dtype):
    classes: list[Any] = [torch.optim.AdamW, gradstep.torch.AdamW]
    if order == "gradstep first":
        classes.reverse()

    def train(model: torch.nn.Module, opt: Any, places: range) -> None:
        for place in places:
            opt.zero_grad()
            loss_of(model, place, dtype).backward()
            opt.step()

    parted, *whole = (linear(dtype=dtype) for _ in range(3))
    for model, cls in zip(whole, classes, strict=True):
        train(model, cls(model.parameters(), lr=0.01), range(20))
    first = classes[0](parted.parameters(), lr=0.01)
    train(parted, first, range(10))
    second = classes[1](parted.parameters(), lr=0.01)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(parted, second, range(10, 20))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for model in whole:
        torch.testing.assert_close(parted.state_dict(), model.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "kwargs"), EACH)
def test_a_checkpoint_of_its_own_goes_on_to_the_bit(name: str, kwargs: Kwargs):
    twins = Twins(shapes_for(name), torch.float32)
    mine, other = ours(name)(twins.mine, **kwargs), ours(name)(twins.other, **kwargs)
    twins.step(mine, other, times=3)
    resumed = ours(name)(twins.mine)
    resumed.load_state_dict(through_a_file(mine.state_dict()))
    twins.step(resumed, other, times=3)
    for p, q in zip(twins.mine, twins.other, strict=True):
        assert torch.equal(p, q)
    assert_same_state(resumed.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize(("name", "kwargs"), EACH)
def test_copies_go_on_alike_and_apart(name: str, kwargs: Kwargs, copied: Callable[[Any], Any]):
    twins = Twins(shapes_for(name), torch.float32)
    opt = ours(name)(twins.mine, **kwargs)
    twins.step(opt, times=3)
    clone, twins.other = copied((opt, twins.mine))
    assert not {id(v) for s in opt.state.values() for v in s.values()} & {
        id(v) for s in clone.state.values() for v in s.values()
    }
    before = [p.detach().clone() for p in twins.other]
    twins.step(opt)
    assert all(torch.equal(p, q) for p, q in zip(before, twins.other, strict=True))
    clone.step()
    assert all(torch.equal(p, q) for p, q in zip(twins.mine, twins.other, strict=True))
    assert_same_state(opt.state_dict(), clone.state_dict(), rtol=0, atol=0)


def test_an_older_checkpoint_lacks_arguments_and_counts_in_numbers():
    twins = Twins(MATRICES)
    first, alone = torch.optim.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    twins.step(first, alone, times=3)
    state: Any = copy.deepcopy(first.state_dict())
    for argument in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del state["param_groups"][0][argument]
    for entries in state["state"].values():
        entries["step"] = int(entries["step"])
    mine = gradstep.torch.AdamW(twins.mine)
    mine.load_state_dict(state)
    twins.step(mine, alone, times=3)
    twins.assert_equal()
    assert_same_state(mine.state_dict(), alone.state_dict())


def test_a_checkpoint_of_sgds_may_hold_no_buffer():
    w = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.SGD([w], lr=1.0, momentum=0.9, dampening=0.5)
    state = opt.state_dict()
    opt.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": state["param_groups"]})
    w.grad = torch.ones(3)
    opt.step()
    assert opt.state[w]["momentum_buffer"].tolist() == [1, 1, 1]


def test_a_checkpoint_of_another_dtype_is_cast():
    twins = Twins(MATRICES, torch.float32)
    first = torch.optim.AdamW([p.detach().double().requires_grad_() for p in twins.mine])
    for p, q in zip(first.param_groups[0]["params"], twins.mine, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    first.step()
    mine = gradstep.torch.AdamW(twins.mine)
    mine.load_state_dict(first.state_dict())
    mine.step()
    assert mine.state[twins.mine[0]]["exp_avg"].dtype == torch.float32
    assert mine.state[twins.mine[0]]["step"] == 2


def test_the_options_of_a_graph_capture_do_not_keep_a_checkpoint_from_loading():
    w = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.AdamW([w])
    state = opt.state_dict()
    state["param_groups"][0] |= {"capturable": True, "fused": True}
    opt.load_state_dict(state)
    w.grad = torch.ones(3)
    opt.step()
    assert opt.state[w]["step"] == 1


def test_counts_are_float64_where_torchs_are():
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins([(3,)])
        mine, other = gradstep.torch.Adam(twins.mine), torch.optim.Adam(twins.other)
        twins.step(mine, other, times=2)
        assert_same_state(mine.state_dict(), other.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)


def test_hooks_of_the_state_are_called():
    model, called = linear(), []
    opt = gradstep.torch.AdamW(model.parameters())
    opt.register_state_dict_pre_hook(lambda opt: called.append("before"))
    opt.register_state_dict_post_hook(lambda opt, state: {**state, "mark": 1})
    opt.register_load_state_dict_pre_hook(lambda opt, state: called.append("loading"))
    opt.register_load_state_dict_post_hook(lambda opt: called.append("loaded"))
    state = opt.state_dict()
    assert state["mark"] == 1
    opt.load_state_dict(state)
    assert called == ["before", "loading", "loaded"]


def test_a_checkpoint_is_of_torchs_types_alone():
    model = linear()
    opt = gradstep.torch.AdamW(model.named_parameters())
    inputs, _ = batch(0)
    model(inputs).sum().backward()
    opt.step()
    names = [name for name, _ in model.named_parameters()]
    assert through_a_file(opt.state_dict())["param_groups"][0]["param_names"] == names
