"""Proves what happens at the edges: other devices and dtypes, changed state, wrong values, and steps that fail."""

import copy
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from twins import EACH, MATRICES, OPTIONS, SHAPES, Kwargs, Twins, assert_same_state, generator, ours, random, shapes_for

import gradstep as gs
import gradstep.torch
from gradstep.torch import engine


def everything(opt: Any) -> Any:
    """What a failed step may not change."""
    params = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    return params, copy.deepcopy(opt.state_dict())


def assert_unchanged(opt: Any, before: Any) -> None:
    torch.testing.assert_close(everything(opt), before, rtol=0, atol=0)


# Importing


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_without_torch_the_error_names_the_extra():
    done = run("import sys; sys.modules['torch'] = None\nimport gradstep\nimport gradstep.torch")
    assert done.returncode == 1
    assert 'pip install "gradstep[torch]"' in done.stderr


def test_importing_gradstep_does_not_import_torch():
    assert run("import gradstep, sys; sys.exit('torch' in sys.modules)").returncode == 0


# Who computes


def test_tensors_without_memory_take_steps_by_torchs_operations():
    for name, rows in OPTIONS.items():
        for kwargs in rows:
            params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes_for(name)]
            opt = ours(name)(params, **kwargs)
            for _ in range(2):
                for p in params:
                    p.grad = torch.empty_like(p)
                opt.step()
            assert {v.device.type for s in opt.state.values() for n, v in s.items() if n != "step"} <= {"meta"}
            assert {int(s["step"]) for s in opt.state.values() if "step" in s} <= {2}


def test_kernels_and_operations_share_a_step(monkeypatch: pytest.MonkeyPatch):
    twins = Twins(MATRICES, torch.float32)
    afar = {p.data_ptr() for p in twins.mine[::2]}
    in_reach = engine._in_reach
    monkeypatch.setattr(engine, "_in_reach", lambda t: t.data_ptr() not in afar and in_reach(t))
    mine = gradstep.torch.AdamW(
        [{"params": twins.mine[:2]}, {"params": twins.mine[2:], "lr": 0.1, "amsgrad": True}], lr=0.01
    )
    other = torch.optim.AdamW(
        [{"params": twins.other[:2]}, {"params": twins.other[2:], "lr": 0.1, "amsgrad": True}], lr=0.01
    )
    twins.step(mine, other, times=3)
    assert len(mine._engine._arrangement._others) == 2
    twins.assert_equal(rtol=1e-5, atol=1e-6)
    assert_same_state(mine.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


def test_dtypes_can_be_mixed():
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    mine, other = ([torch.nn.Parameter(random((3, 4), generator(), t)) for t in dtypes] for _ in range(2))
    opts = gradstep.torch.AdamW(mine), torch.optim.AdamW(other)
    for step in range(3):
        for p, q in zip(mine, other, strict=True):
            p.grad = random((3, 4), generator(step + 5), p.dtype)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(p.dtype).eps, atol=4 * torch.finfo(p.dtype).eps)


class Labelled(torch.Tensor):
    """A subclass that takes part in every operation itself."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_subclass_with_operations_of_its_own_is_left_to_them():
    assert not engine._in_reach(torch.ones(2).as_subclass(Labelled))
    assert engine._in_reach(torch.nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize(("name", "kwargs"), EACH)
@pytest.mark.parametrize(
    "view", [lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], -1)[..., ::2]], ids=["transposed", "strided"]
)
def test_parameters_and_gradients_may_lie_anyhow(name: str, kwargs: Kwargs, view: Any):
    gen = generator()
    w, grads = random((4, 6), gen), [random((4, 6), gen) for _ in range(3)]
    plain, lying = torch.nn.Parameter(w.clone()), torch.nn.Parameter(view(w))
    opts = ours(name)([plain], **kwargs), ours(name)([lying], **kwargs)
    lying.data.copy_(plain.data)
    for g in grads:
        plain.grad, lying.grad = g.clone(), view(g)
        lying.grad.copy_(g)
        for opt in opts:
            opt.step()
    torch.testing.assert_close(plain, lying, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reach", [True, False], ids=["kernels", "operations"])
def test_empty_parameters_count_steps(reach: bool, monkeypatch: pytest.MonkeyPatch):
    if not reach:
        monkeypatch.setattr(engine, "_in_reach", lambda tensor: False)
    for name in ("AdamW", "Adafactor"):
        w = torch.nn.Parameter(torch.ones(0, 3))
        opt = ours(name)([w])
        w.grad = torch.ones(0, 3)
        opt.step()
        assert opt.state[w]["step"] == 1
        assert all(v.isfinite().all() for v in opt.state[w].values())


def test_gradients_may_be_narrower_than_their_parameters():
    w = torch.nn.Parameter(torch.ones(3))
    if not hasattr(w, "grad_dtype"):
        pytest.skip("this torch wants gradients in the dtype of the parameter")
    opt = gradstep.torch.SGD([w], lr=0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        w.grad = None
        w.grad_dtype = dtype
        w.grad = torch.full((3,), 0.25, dtype=dtype)
        opt.step()
    assert w.tolist() == [0.625] * 3


def test_gradients_may_be_lazily_negated():
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    for lazily in (False, True, False):
        twins.new_gradients()
        if lazily:
            twins.mine[1].grad = torch._neg_view(-twins.mine[1].grad)
        mine.step()
        other.step()
    twins.assert_equal()


# State that others change


def test_states_that_change_places_are_followed():
    twins = Twins([(3, 4), (3, 4)])
    mine, other = gradstep.torch.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    twins.step(mine, other)
    for opt, (p, q) in ((mine, twins.mine), (other, twins.other)):
        first, second = opt.state.pop(p), opt.state.pop(q)
        opt.state[q], opt.state[p] = first, second
    twins.step(mine, other)
    twins.assert_equal()


def test_slots_may_have_another_dtype_than_their_parameter():
    twins = Twins(MATRICES, torch.float32)
    mine, other = gradstep.torch.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    twins.step(mine, other)
    for state in mine.state.values():
        state["exp_avg"] = state["exp_avg"].double()
    twins.step(mine, other)
    twins.assert_equal(rtol=1e-5, atol=1e-6)
    assert all(state["exp_avg"].dtype == torch.float64 for state in mine.state.values())


def test_row_and_column_means_may_lie_anyhow():
    twins = Twins([(2, 4, 3)])
    mine, other = gradstep.torch.Adafactor(twins.mine), torch.optim.Adafactor(twins.other)
    twins.step(mine, other)
    state = mine.state[twins.mine[0]]
    for slot in ("row_var", "col_var"):
        state[slot] = torch.stack([state[slot], state[slot]], -1)[..., 0]
        assert not state[slot].is_contiguous()
    twins.step(mine, other, times=2)
    twins.assert_equal()
    assert_same_state(mine.state_dict(), other.state_dict())


def test_a_group_may_be_empty():
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    twins.step(mine, other)
    mine.add_param_group({"params": []})
    twins.step(mine, other)
    twins.assert_equal()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        for change in ("replace", "move", "write", "clear", "delete", "new dict", "step", "step in place")
        for name in ("AdamW", "Adafactor", "SGD")
        if name != "SGD" or "step" not in change  # which does not count
    ],
)
def test_the_truth_is_torchs_state(name: str, change: str):
    twins = Twins(MATRICES)
    kwargs = {"momentum": 0.9} if name == "SGD" else {}
    mine, other = ours(name)(twins.mine, **kwargs), getattr(torch.optim, name)(twins.other, **kwargs)
    twins.step(mine, other, times=3)
    for opt, params in ((mine, twins.mine), (other, twins.other)):
        state = opt.state[params[1]]
        slot = next(n for n in state if n != "step")
        if change == "replace":
            state[slot] = torch.full_like(state[slot], 0.5)
        elif change == "move":
            state[slot].data = torch.full_like(state[slot], 0.25)
        elif change == "write":
            state[slot].mul_(2)
        elif change == "clear":
            opt.state.clear()
        elif change == "delete":
            del opt.state[params[1]]
        elif change == "new dict":
            opt.state[params[1]] = {n: v.clone() for n, v in state.items()}
        elif change == "step":
            state["step"] = torch.tensor(100.0)
        else:
            state["step"].fill_(50)
    twins.step(mine, other, times=3)
    twins.assert_equal()
    torch.testing.assert_close([mine.state[p] for p in twins.mine], [other.state[p] for p in twins.other])


def test_parameters_may_move():
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    twins.step(mine, other, times=2)
    for p in (*twins.mine, *twins.other):
        p.data = p.data.clone()
    twins.step(mine, other, times=2)
    twins.assert_equal()


def test_adagrads_sums_can_be_shared_in_the_midst_of_training():
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.Adagrad(twins.mine), torch.optim.Adagrad(twins.other)
    twins.step(mine, other, times=2)
    mine.share_memory()
    assert all(state["sum"].is_shared() for state in mine.state.values())
    twins.step(mine, other, times=2)
    twins.assert_equal()


def test_the_list_of_a_group_may_be_changed():
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.AdamW(twins.mine[:2]), torch.optim.AdamW(twins.other[:2])
    twins.step(mine, other)
    for opt, params in ((mine, twins.mine), (other, twins.other)):
        opt.param_groups[0]["params"] = params[1:]
    twins.step(mine, other, times=2)
    twins.assert_equal()


def test_many_groups_are_one_step():
    twins = Twins([(3,)] * 1200)
    groups = [{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(twins.mine)]
    mine = gradstep.torch.SGD(groups)
    twins.step(mine)
    for i, (p, q) in enumerate(zip(twins.mine, twins.other, strict=True)):
        torch.testing.assert_close(p.detach(), q.detach() - 0.001 * (i + 1) * q.grad)


# Steps that fail


@pytest.mark.parametrize("reach", [True, False], ids=["kernels", "operations"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_one_bad_gradient_in_the_second_group_leaves_the_first_untouched(
    reach: bool, steps_before: int, monkeypatch: pytest.MonkeyPatch
):
    if not reach:
        monkeypatch.setattr(engine, "_in_reach", lambda tensor: False)
    twins = Twins(MATRICES)
    opt = gradstep.torch.AdamW([{"params": twins.mine[:2]}, {"params": twins.mine[2:]}], lr=0.1)
    twins.step(opt, times=steps_before)
    before = everything(opt)
    twins.new_gradients()
    good = twins.mine[2].grad
    twins.mine[2].grad = good.to_sparse()
    with pytest.raises(gs.ArgumentTypeError, match=r"the gradient of parameter 0 of group 1 is sparse.*sparse=False"):
        opt.step()
    assert_unchanged(opt, before)
    twins.mine[2].grad = good
    opt.step()
    other = torch.optim.AdamW(twins.other, lr=0.1)
    again = Twins(MATRICES)
    again.mine = twins.other
    again.step(other, times=steps_before + 1)
    twins.assert_equal()


def test_an_interrupt_waits_until_parameters_and_state_are_whole(monkeypatch: pytest.MonkeyPatch):
    twins = Twins(MATRICES)
    mine, other = gradstep.torch.AdamW(twins.mine), torch.optim.AdamW(twins.other)
    twins.step(mine, other)
    tick = engine.Clock.tick

    def interrupted(clock: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        tick(clock)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Clock, "tick", interrupted)
        twins.new_gradients()
        with pytest.raises(KeyboardInterrupt):
            mine.step()
        other.step()
    assert_same_state(mine.state_dict(), other.state_dict())
    twins.step(mine, other)
    twins.assert_equal()
    assert_same_state(mine.state_dict(), other.state_dict())


def test_named_parameters_are_called_by_their_names():
    model = torch.nn.Embedding(4, 3, sparse=True)
    opt = gradstep.torch.AdamW(model.named_parameters())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(gs.ArgumentTypeError, match=r"parameter 0 of group 0 \('weight'\)"):
        opt.step()


def test_a_rate_that_is_not_finite_stops_the_step():
    twins = Twins(MATRICES)
    opt = gradstep.torch.AdamW([{"params": twins.mine[:2]}, {"params": twins.mine[2:]}], lr=0.1)
    twins.step(opt)
    before = everything(opt)
    opt.param_groups[1]["lr"] = float("nan")
    twins.new_gradients()
    with pytest.raises(ValueError, match="AdamW's lr"):
        opt.step()
    opt.param_groups[1]["lr"] = 0.1
    assert_unchanged(opt, before)
    opt.step()


def test_parameters_that_share_memory_are_refused_before_anything_happens():
    w = torch.zeros(6)
    first, second = torch.nn.Parameter(w[:4]), torch.nn.Parameter(w[2:])
    opt = gradstep.torch.AdamW([first, second])
    first.grad, second.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(gs.AliasedParametersError, match=r"0\.0.*0\.1") as caught:
        opt.step()
    assert any("group.place" in note for note in caught.value.__notes__)
    assert not w.any()
    assert not opt.state


def test_a_checkpoint_of_another_model_is_refused_at_the_step():
    w = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.AdamW([w])
    entry = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
    opt.load_state_dict({"state": {0: entry}, "param_groups": opt.state_dict()["param_groups"]})
    w.grad = torch.ones(3)
    with pytest.raises(gs.ShapeError, match=r"exp_avg.*parameter 0 of group 0 has shape \(4,\), expected \(3,\)"):
        opt.step()
    assert w.tolist() == [1, 1, 1]


# Values that cannot serve


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("AdamW", {"lr": -1}, "AdamW's lr must be >= 0, got -1"),
        ("AdamW", {"betas": (1.0, 0.9)}, r"AdamW's betas\[0\] must be in \[0, 1\)"),
        ("Adam", {"eps": -1e-8}, "Adam's eps must be >= 0"),
        ("AdamW", {"weight_decay": -0.1}, "AdamW's weight_decay must be >= 0"),
        ("AdamW", {"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
        ("AdamW", {"differentiable": True}, "AdamW does not support differentiable=True"),
        ("Adam", {"capturable": True}, "Adam does not support capturable=True"),
        ("SGD", {"nesterov": True}, "nesterov=True needs momentum > 0"),
        ("SGD", {"momentum": -1}, "SGD's momentum must be >= 0"),
        ("RMSprop", {"alpha": -1}, "RMSprop's alpha must be >= 0"),
        ("Adagrad", {"initial_accumulator_value": -1}, "initial_accumulator_value must be >= 0"),
        ("Adadelta", {"rho": 1.5}, r"rho must be in \[0, 1\]"),
        ("Adamax", {"betas": (0.9, 1.0)}, r"Adamax's betas\[1\]"),
        ("Adafactor", {"d": 0.5}, "Adafactor's d must be >= 1"),
        ("Adafactor", {"beta2_decay": 0.5}, "beta2_decay must be <= 0"),
        ("Lion", {"betas": (0.9, 2.0)}, r"Lion's betas\[1\]"),
        ("Muon", {"adjust_lr_fn": "other"}, "adjust_lr_fn must be one of"),
        ("Muon", {"eps": 0.0}, "Muon's eps must be > 0"),
        ("Muon", {"ns_steps": 100}, "ns_steps must be <= 99"),
        ("Muon", {"ns_coefficients": (1.0, 2.0)}, "three numbers"),
    ],
)
def test_wrong_values_are_value_errors_here_and_in_groups(name: str, kwargs: Kwargs, message: str):
    w, other = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match=message) as caught:
        ours(name)([w], **kwargs)
    assert isinstance(caught.value, gs.GradstepError)
    opt = ours(name)([w])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [other], **kwargs})
    assert len(opt.param_groups) == 1


def test_parameters_that_cannot_be_trained_are_refused():
    with pytest.raises(gs.DtypeError, match="parameter 0 of group 0 is complex"):
        gradstep.torch.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(gs.ShapeError, match="Muon takes matrices"):
        gradstep.torch.Muon([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="empty parameter list"):
        gradstep.torch.AdamW([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        gradstep.torch.AdamW(torch.ones(2))


def test_arguments_that_choose_torchs_implementation_are_accepted():
    for kwargs in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        twins = Twins(SHAPES)
        mine, other = gradstep.torch.AdamW(twins.mine, **kwargs), torch.optim.AdamW(twins.other, **kwargs)
        twins.step(mine, other, times=2)
        twins.assert_equal()


def test_repr_is_torchs():
    w = torch.nn.Parameter(torch.ones(2))
    assert repr(gradstep.torch.AdamW([w])) == repr(torch.optim.AdamW([w]))


def test_a_schedule_is_not_a_rate_here() -> None:
    with pytest.raises(gs.ArgumentTypeError, match=r"AdamW's lr must be a number, .*lr_scheduler"):
        gradstep.torch.AdamW([torch.nn.Parameter(torch.ones(1))], lr=gs.cosine_decay(0.1, 10))  # type: ignore[arg-type]
