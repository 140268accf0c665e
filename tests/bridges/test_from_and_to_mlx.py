"""Proves that MLX's optimizers go on in the core and back, all ten of them."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from bridging import AFTER, BEFORE, Named, assert_close, grads, params
from mlx.utils import tree_flatten

import gradstep as gs
import gradstep.mlx

SHAPES = {"layers.0.weight": (4, 3), "layers.0.bias": (4,), "conv": (3, 2, 2)}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.2}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"alpha": 0.8, "eps": 1e-3}),
    ("Adagrad", {"eps": 1e-3}),
    ("AdaDelta", {"rho": 0.8, "eps": 1e-3}),
    ("Adam", {"betas": (0.8, 0.95), "eps": 1e-3}),
    ("Adam", {"bias_correction": True}),
    ("AdamW", {"weight_decay": 0.3}),
    ("Adamax", {"betas": (0.8, 0.95)}),
    ("Lion", {"betas": (0.8, 0.95), "weight_decay": 0.3}),
    ("Adafactor", {"learning_rate": None}),
    ("Adafactor", {"learning_rate": None, "beta_1": 0.9, "weight_decay": 0.1, "warmup_init": True}),
    ("Adafactor", {"relative_step": False, "scale_parameter": False}),
    ("Muon", {}),
    ("Muon", {"momentum": 0.8, "weight_decay": 0, "nesterov": False, "ns_steps": 2}),
]
LOOSE = {
    "Adam": {"atol": 1e-6},  # MLX computes 1 - 0.999**t in float32, off by 3e-5: of a rate of 0.01, over 7 steps
    "Adafactor": {"rtol": 1e-5}, "Muon": {"rtol": 1e-4, "atol": 1e-5},  # sums and products
}  # fmt: skip
every_family = pytest.mark.parametrize(("name", "arguments"), ROWS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ROWS)])
either = pytest.mark.parametrize("library", [mlx.optimizers, gradstep.mlx], ids=["mlx", "gradstep.mlx"])


def made(library: Any, name: str, arguments: dict[str, Any]) -> Any:
    return getattr(library, name)(**{"learning_rate": 0.01, **arguments})


def mine(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(gs, name)(**{"learning_rate": 0.01, **arguments})


def nested(named: Named) -> Any:
    """As models of MLX have their parameters."""
    array = {name: mx.array(value) for name, value in named.items()}
    return {"layers": [{"weight": array["layers.0.weight"], "bias": array["layers.0.bias"]}], "conv": array["conv"]}


def flat(tree: Any) -> Named:
    named = dict(tree_flatten(tree))
    return {name: np.array(named[name]) for name in SHAPES}


def taken(optimizer: Any, weights: Named, first: int, last: int) -> Named:
    tree = nested(weights)
    for step in range(first, last):
        tree = optimizer.apply_gradients(nested(grads(step, SHAPES)), tree)
    return flat(tree)


def steps(opt: Any, weights: Named, first: int, last: int, array: Any) -> Named:
    held = {name: array(weight) for name, weight in weights.items()}
    for step in range(first, last):
        opt.apply_gradients({name: array(g) for name, g in grads(step, SHAPES).items()}, held)
    return {name: np.asarray(weight).copy() for name, weight in held.items()}


@pytest.mark.parametrize("array", [np.array, mx.array], ids=["numpy", "mlx"])
@every_family
def test_the_core_goes_on_where_mlx_left_off(name: str, arguments: Any, array: Any):
    theirs = made(mlx.optimizers, name, arguments)
    middle = taken(theirs, params(0, SHAPES), 0, BEFORE)
    opt = mine(name, arguments)
    like = {name: array(weight) for name, weight in middle.items()}
    assert opt.load_state_dict(gs.from_mlx(theirs.state), like=like) == []
    assert opt.step == BEFORE and set(opt.steps.values()) == {BEFORE}
    found = steps(opt, middle, BEFORE, BEFORE + AFTER, array)
    assert_close(found, taken(theirs, middle, BEFORE, BEFORE + AFTER), **LOOSE.get(name, {}))


@pytest.mark.parametrize("given", [True, False], ids=["like params", "by name"])
@either
@every_family
def test_mlx_goes_on_where_the_core_left_off(name: str, arguments: Any, library: Any, given: bool):
    theirs = made(library, name, arguments)
    opt = mine(name, arguments)
    start = params(0, SHAPES)
    expected = taken(theirs, start, 0, BEFORE + AFTER)
    middle = steps(opt, start, 0, BEFORE, np.array)
    new = made(library, name, {**arguments, "learning_rate": 0.5} if arguments.get("learning_rate", 1) else arguments)
    new.state = gs.to_mlx(opt, nested(middle) if given else None)
    assert_close(taken(new, middle, BEFORE, BEFORE + AFTER), expected, **LOOSE.get(name, {}))


@either
@every_family
def test_there_and_back_changes_no_bit(name: str, arguments: Any, library: Any):
    theirs = made(library, name, arguments)
    middle = taken(theirs, params(0, SHAPES), 0, BEFORE)
    opt = mine(name, arguments)
    opt.load_state_dict(gs.from_mlx(theirs.state))
    for given in (None, nested(middle)):
        back = made(library, name, arguments)
        back.state = gs.to_mlx(opt, given)
        back.init(nested(middle))  # SGD without momentum has no slots in the core; MLX makes its zeros anew
        assert_same_tree(back.state, theirs.state)


def assert_same_tree(found: Any, expected: Any):
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert isinstance(found[name], mx.array) and mx.array_equal(found[name], array), name


def test_the_rate_is_the_optimizers_and_goes_to_mlx():
    theirs = mlx.optimizers.Lion(0.25)
    taken(theirs, params(0, SHAPES), 0, 1)
    opt = gs.Lion(lambda step: 0.5 + step)
    opt.load_state_dict(gs.from_mlx(theirs.state))
    assert opt.hyperparameters["betas"] == (0.9, 0.99)
    assert opt.learning_rate == 1.5  # resolved at the step of the state
    assert gs.to_mlx(opt)["learning_rate"].item() == 1.5
    assert "learning_rate" not in gs.to_mlx(gs.Adafactor())


def test_a_schedule_of_mlx_goes_on_from_the_step():
    rate = mlx.optimizers.linear_schedule(0.1, 0.0, 10)
    theirs, opt = mlx.optimizers.AdamW(rate), gs.AdamW(gs.linear_schedule(0.1, 0.0, 10))
    start = params(0, SHAPES)
    expected = taken(theirs, start, 0, BEFORE + AFTER)
    middle = steps(opt, start, 0, BEFORE, np.array)
    new = mlx.optimizers.AdamW(rate)
    new.state = gs.to_mlx(opt)
    assert_close(taken(new, middle, BEFORE, BEFORE + AFTER), expected)


def test_a_model_with_layers_that_have_no_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    gradients = nn.value_and_grad(model, lambda x: model(x).sum())(mx.ones(3))[1]
    theirs = mlx.optimizers.AdamW(0.1)
    theirs.update(model, gradients)
    opt = gs.AdamW(0.1)
    opt.load_state_dict(gs.from_mlx(theirs.state))
    assert set(opt.state) == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    new = mlx.optimizers.AdamW(0.1)
    new.state = gs.to_mlx(opt, model.trainable_parameters())
    assert_same_tree(new.state, theirs.state)
    new.update(model, gradients)
    by_name = gs.to_mlx(opt)
    assert len(by_name["layers"]) == 3 and by_name["layers"][1] == {}


def test_tuples_and_parameters_without_state_keep_their_places():
    opt = gs.Lion(0.1)
    opt.init({"a": [np.ones(2, np.float32)]})
    state = gs.to_mlx(opt, {"a": (mx.ones(2),), "b": {"c": mx.ones(3)}})
    assert type(state["a"]) is tuple and state["b"] == {"c": {}}


def test_a_state_before_the_first_step_keeps_its_zeros():
    theirs = mlx.optimizers.RMSprop(0.1)
    theirs.init(nested(params(0, SHAPES)))
    opt = gs.RMSprop(0.1)
    like = params(0, SHAPES)
    assert opt.load_state_dict(gs.from_mlx(theirs.state), like=like) == []
    assert opt.step == 0 and not opt.state["conv"]["v"].any()


def test_bfloat16_slots_pass_as_they_are():
    theirs = mlx.optimizers.Lion(0.1)
    theirs.apply_gradients({"w": mx.full((3,), 0.3, mx.bfloat16)}, {"w": mx.ones(3, mx.bfloat16)})
    opt = gs.Lion(0.1, slot_dtype="bfloat16")
    assert opt.load_state_dict(gs.from_mlx(theirs.state), like={"w": mx.ones(3, mx.bfloat16)}) == []
    assert_same_tree(gs.to_mlx(opt), theirs.state)


def test_float64_slots_pass_as_they_are():
    opt = gs.Lion(0.1)
    opt.apply_gradients({"w": np.full(3, 0.3)}, {"w": np.ones(3)})
    assert gs.to_mlx(opt)["w"]["m"].dtype == mx.float64


# Refusals


def test_what_is_no_state_of_one_optimizer_is_refused():
    both = mlx.optimizers.MultiOptimizer([mlx.optimizers.Lion(0.1), mlx.optimizers.SGD(0.1)], [lambda *_: True])
    both.init(nested(params(0, SHAPES)))
    step = {"step": mx.array(1)}
    for state, error, what in (
        (both.state, gs.ConfigurationError, "'states'.*MultiOptimizer's"),
        ({"w": {"m": mx.ones(2)}}, gs.ConfigurationError, "entry 'step', got 'w'"),
        (mlx.optimizers.Lion(0.1), gs.ArgumentTypeError, r"got a Lion; pass optimizer\.state"),
        ([], gs.ArgumentTypeError, "got a list"),
        ({**step, "w": {"other": mx.ones(2)}}, gs.ConfigurationError, "the state of 'w' has 'other'"),
        ({**step, "a": [mx.ones(2)]}, gs.ConfigurationError, r"state at 'a\.0' is of type array"),
        ({"step": mx.ones(2)}, gs.ConfigurationError, "'step' must be a number of steps"),
        ({**step, "a.b": {"m": mx.ones(2)}, "a": {"b": {"m": mx.ones(2)}}}, gs.DuplicateNameError, r"'a\.b'"),
    ):
        with pytest.raises(error, match=what):
            gs.from_mlx(state)


def stepped(opt: Any, name: str = "w") -> Any:
    opt.apply_gradients({name: np.ones(2, np.float32)}, {name: np.ones(2, np.float32)})
    return opt


def test_optimizers_that_mlx_cannot_continue_are_refused():
    @gs.rule
    def Mine(w: Any, g: Any, *, learning_rate: Any):
        return w - learning_rate * g

    uneven = stepped(stepped(gs.Adam(0.1, bias_correction=True), "a"), "b")
    gap = stepped(gs.Adafactor())
    gap.apply_gradients({}, {"w": np.ones(2, np.float32)})
    rates = gs.Lion({"a": 0.1, "*": 0.2})
    stepped(stepped(rates, "a"), "b")
    for opt, error, what in (
        (stepped(Mine(0.1)), gs.ConfigurationError, "a rule of your own"),
        (gs.MultiOptimizer([gs.SGD(0.1)], []), gs.ConfigurationError, r"convert each of opt\.optimizers"),
        (stepped(gs.Lion(0.1, slot_dtype="int8")), gs.ConfigurationError, r"'m\.codes'"),
        (rates, gs.ConfigurationError, "one learning rate for all parameters"),
        (gap, gs.ConfigurationError, "has taken 2 and its parameters 1"),
        (stepped(gs.Lion(0.1), "step"), gs.ConfigurationError, "MLX keeps 'step'"),
        (stepped(gs.Lion(0.1), "0.w"), gs.ConfigurationError, "begin with numbers"),
        (mlx.optimizers.Lion(0.1), gs.ArgumentTypeError, "of gradstep's core"),
    ):
        with pytest.raises(error, match=what):
            gs.to_mlx(opt)
    uneven.apply_gradients({"a": np.ones(2, np.float32)}, {"a": np.ones(2, np.float32)})
    with pytest.raises(gs.ConfigurationError, match="1 steps: 'b'; 2 steps: 'a'"):
        gs.to_mlx(uneven)
    assert gs.to_mlx(stepped(gs.Lion({"a": 0.1, "*": 0.25})))["learning_rate"].item() == 0.25


def test_params_must_cover_the_state():
    opt = stepped(gs.Lion(0.1))
    with pytest.raises(gs.MismatchError, match=r"params lacks 'w'.*it has 'v'"):
        gs.to_mlx(opt, {"v": mx.ones(2)})
    with pytest.raises(gs.ArgumentTypeError, match=r"pass model\.trainable_parameters"):
        gs.to_mlx(opt, nn.Linear(2, 2))
    with pytest.raises(gs.ArgumentTypeError, match="params must be a dict"):
        gs.to_mlx(opt, [mx.ones(2)])
