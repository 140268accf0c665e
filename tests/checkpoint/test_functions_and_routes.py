"""What a checkpoint only names, and how children of a `MultiOptimizer` find each other."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs

Params = dict[str, np.ndarray[Any, Any]]


def made(*names: str) -> Params:
    return {name: np.ones(3, np.float32) for name in names}


def step(opt: gs.Optimizer, params: Params, count: int = 1) -> None:
    for _ in range(count):
        opt.apply_gradients({name: np.ones_like(array) for name, array in params.items()}, params)


def goes_on(opt: gs.Optimizer, params: Params, twin: gs.Optimizer, others: Params) -> bool:
    step(opt, params, 3)
    step(twin, others, 3)
    return all((params[name] == others[name]).all() for name in params)


def multi(filters: Any, *, momentum: float = 0.9) -> gs.MultiOptimizer:
    return gs.MultiOptimizer([gs.SGD(0.1 * (i + 1), momentum=momentum) for i in range(len(filters) + 1)], filters)


class Counting:
    """A schedule that knows how often it was asked."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, now: int) -> float:
        self.steps.append(now)
        return 0.1 / (1 + now)


def test_one_schedule_under_two_globs(tmp_path: Path) -> None:
    shared = gs.cosine_decay(0.1, 100)
    opt = gs.SGD({"*.bias": shared, "*": shared}, momentum=0.9)
    params, others = made("a", "a.bias"), made("a", "a.bias")
    step(opt, params, 3)
    opt.save(tmp_path / "a", params)
    assert goes_on(opt, params, gs.load(tmp_path / "a", others), others)


def test_one_function_under_two_globs_is_asked_once_a_step(tmp_path: Path) -> None:
    opt = gs.SGD({"*.bias": (one := Counting()), "*": one})
    step(opt, made("a", "a.bias"), 3)
    opt.save(tmp_path / "a")
    other = Counting()
    twin = gs.load(tmp_path / "a", functions={"Counting": other})
    step(twin, made("a", "a.bias"), 2)
    assert (one.steps, other.steps) == ([0, 1, 2], [3, 4])


def test_partial_functions_are_told_apart_by_their_arguments(tmp_path: Path) -> None:
    def rate(now: int, a: float) -> float:
        return a

    gs.SGD(functools.partial(rate, a=0.1)).save(tmp_path / "a")
    assert gs.SGD(functools.partial(rate, a=0.1)).load(tmp_path / "a") == []
    with pytest.raises(gs.ConfigurationError, match=r"partial\(.*rate, a=0.1\)"):
        gs.SGD(functools.partial(rate, a=0.7)).load(tmp_path / "a")


def test_the_order_of_keys_means_nothing(tmp_path: Path) -> None:
    """JSON has none, and programs sort."""
    opt = gs.SGD({"w*": gs.step_decay(0.1, 0.5, 2), "*": 0.2}, momentum=0.9)
    params, others = made("w1", "b"), made("w1", "b")
    step(opt, params)
    step(gs.SGD(0.0), others)
    others = {name: array.copy() for name, array in params.items()}
    state = opt.state_dict()
    state["gradstep"] = json.loads(json.dumps(state["gradstep"], sort_keys=True))
    twin = gs.SGD(0.5)
    twin.load_state_dict(state)
    assert twin.hyperparameters == opt.hyperparameters
    assert goes_on(opt, params, twin, others)


def test_nested_functions_of_one_name_find_each_other(tmp_path: Path) -> None:
    def tree() -> gs.MultiOptimizer:
        inner = gs.MultiOptimizer([gs.SGD(lambda now: 0.1), gs.SGD(0.2)], [lambda name, _: name == "b"])
        return gs.MultiOptimizer([inner, gs.SGD(0.3)], [lambda name, _: name != "c"])

    opt, params, others = tree(), made("a", "b", "c"), made("a", "b", "c")
    step(opt, params, 2)
    opt.save(tmp_path / "a", params)
    twin = tree()
    assert twin.load(tmp_path / "a", others) == []
    assert goes_on(opt, params, twin, others)


def test_a_function_of_another_name_serves_if_it_is_given(tmp_path: Path) -> None:
    def is_bias(name: str, _: object) -> bool:
        return name.endswith("bias")

    opt, params, others = multi([lambda name, _: name.endswith("bias")]), made("a", "a.bias"), made("a", "a.bias")
    step(opt, params, 2)
    opt.save(tmp_path / "a", params)
    name = f"{test_a_function_of_another_name_serves_if_it_is_given.__qualname__}.<locals>.<lambda>"
    twin = gs.load(tmp_path / "a", others, functions={name: is_bias})
    assert goes_on(opt, params, twin, others)


def test_a_glob_and_a_function_of_one_name_are_two_routes(tmp_path: Path) -> None:
    def bias(name: str, _: object) -> bool:
        return "bias" in name

    bias.__qualname__ = "bias"
    multi(["bias", bias]).save(tmp_path / "a")
    twin = multi([bias, "bias"])
    twin.load(tmp_path / "a")
    assert [child.learning_rate for child in twin.optimizers] == pytest.approx([0.2, 0.1, 0.3])


def test_parameters_that_go_another_way_than_their_state_are_an_error(tmp_path: Path) -> None:
    opt, params = multi(["*.bias", "a.*"]), made("a.bias", "a.w", "c")
    step(opt, params, 3)
    opt.save(tmp_path / "a", params)
    twin = multi(["a.*", "*.bias"])
    with pytest.raises(gs.MismatchError, match=r"a\.bias"):
        twin.load(tmp_path / "a", like=params)
    twin.load(tmp_path / "a")
    before = {name: array.copy() for name, array in params.items()}
    with pytest.raises(gs.MismatchError, match=r"a\.bias"):
        step(twin, params)
    assert all((params[name] == before[name]).all() for name in params)


def test_a_child_that_the_file_lacks_goes_on_with_the_others_count(tmp_path: Path) -> None:
    opt, params = multi(["a"]), made("a", "b")
    step(opt, params, 5)
    opt.save(tmp_path / "a")
    twin = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), gs.SGD(gs.cosine_decay(0.1, 100)), gs.SGD(0.2)], ["a", "x"])
    found = twin.load(tmp_path / "a", strict=False)
    assert [(one.kind, one.where) for one in found] == [("missing", "opt['x']")]
    step(twin, params)
    assert [twin.step, *(child.step for child in twin.optimizers)] == [6] * 4
    assert twin.optimizers[1].learning_rate == gs.cosine_decay(0.1, 100)(5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("with_params", [False, True])
def test_what_does_not_fit_stays_where_it_is(with_params: bool, tmp_path: Path) -> None:
    opt, params = gs.SGD(0.1, momentum=0.9), {"w": np.ones(2, np.float32)}
    step(opt, params)
    opt.save(tmp_path / "a", params if with_params else None)
    twin = gs.SGD(0.1, momentum=0.9)
    step(twin, made("w"))
    assert len(twin.load(tmp_path / "a", strict=False)) == 1
    assert twin.state["w"]["v"].shape == (3,)


def test_a_round_of_another_length_is_dropped_where_that_is_allowed(tmp_path: Path) -> None:
    opt, twin = gs.Accumulate(gs.SGD(0.1), every=2), gs.Accumulate(gs.SGD(0.1), every=3)
    step(opt, made("w"))
    opt.save(tmp_path / "a")
    step(twin, made("w"))
    with pytest.raises(gs.MismatchError, match=r"every=2.*every=3"):
        twin.load(tmp_path / "a")
    assert twin.micro_step == 1
    assert len(twin.load(tmp_path / "a", strict=False)) == 1
    assert (twin.micro_step, dict(twin.sums)) == (0, {})
    opt.discard()
    opt.save(tmp_path / "a")
    assert gs.Accumulate(gs.SGD(0.1), every=3).load(tmp_path / "a", hyperparameters="mine") == []


def test_a_call_that_fails_leaves_loaded_sums_to_any_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    opt, params = gs.Accumulate(gs.SGD(0.1), every=2), made("w")
    step(opt, params)
    opt.save(tmp_path / "a", params)
    twin = gs.load(tmp_path / "a", others := made("w"))
    with pytest.raises(gs.ArgumentTypeError):
        twin.apply_gradients({"w": np.ones(3, np.float32)}, {"w": torch.ones(3)})
    assert goes_on(opt, params, twin, others)


def test_parameters_that_are_left_alone_are_warned_of(tmp_path: Path) -> None:
    params = made("w")
    gs.SGD(0.1).save(tmp_path / "a", params)
    for load in (gs.load, gs.SGD(0.1).load):
        with pytest.warns(UserWarning, match="holds the parameters too") as caught:
            load(tmp_path / "a")
        assert caught[0].filename == __file__
        load(tmp_path / "a", like=params)
        load(tmp_path / "a", params)


def test_files_of_other_numbers_are_left_alone(tmp_path: Path) -> None:
    for number in range(2, 6):
        (tmp_path / f"run.{number}.safetensors").write_text("mine")
    for _ in range(3):
        gs.SGD(0.1).save(tmp_path / "run.safetensors", keep=2)
    assert {path.name for path in tmp_path.iterdir() if path.read_bytes() == b"mine"} == {
        f"run.{number}.safetensors" for number in range(2, 6)
    }


def test_the_newest_is_found_where_files_cannot_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    opt, params = gs.SGD(0.1), made("w")
    for _ in range(3):
        step(opt, params)
        opt.save(tmp_path / "run.safetensors", params, keep=2)
    assert gs.latest(tmp_path) == tmp_path / "run.safetensors"
    assert gs.load(tmp_path / "run.1.safetensors", made("w")).step == 2


def test_a_parameter_without_state_may_be_loaded_after_hyperparameters_were_changed(tmp_path: Path) -> None:
    for before, after in ((0.0, 0.9), (0.9, 0.0)):
        opt, params, others = gs.SGD(0.1, momentum=before), made("w"), made("w")
        step(opt, params)
        opt.momentum = after
        opt.save(tmp_path / "a", params)
        assert goes_on(opt, params, gs.load(tmp_path / "a", others), others)


def test_a_round_of_which_a_sum_does_not_fit_begins_anew(tmp_path: Path) -> None:
    opt = gs.Accumulate(gs.SGD(0.1), every=2)
    step(opt, made("a", "b"))
    opt.save(tmp_path / "a")
    twin = gs.Accumulate(gs.SGD(0.1), every=2)
    like = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}
    found = twin.load(tmp_path / "a", like=like, strict=False)
    assert [one.where for one in found] == ["sums['b']"]
    assert (twin.micro_step, dict(twin.sums)) == (0, {})


def test_a_folder_of_damaged_checkpoints_is_no_empty_one(tmp_path: Path) -> None:
    gs.SGD(0.1).save(tmp_path / "run.safetensors")
    content = (tmp_path / "run.safetensors").read_bytes()
    (tmp_path / "run.safetensors").write_bytes(content[:-20])
    with (
        pytest.warns(UserWarning, match="was left out"),
        pytest.raises(gs.CheckpointError, match="no whole"),
    ):
        gs.latest(tmp_path)
    gs.SGD(0.1).save(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="was left out"):
        assert gs.latest(tmp_path) == tmp_path / "checkpoint"


def test_arguments_of_other_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    gs.SGD(0.1).save(path)
    for wrong in (
        lambda: gs.SGD(0.1).load(path, strict="no"),  # type: ignore[arg-type]
        lambda: gs.load(path, functions=len),  # type: ignore[arg-type]
        lambda: gs.load(path, rules=["SGD"]),  # type: ignore[list-item]
        lambda: gs.load(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(gs.ArgumentTypeError):
            wrong()
