"""Several optimizers as one: each parameter goes to one child, and together they do what they would do apart."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import configurations


def tree(seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {
        "embed.weight": (4, 3),
        "layer.0.weight": (3, 3),
        "layer.0.bias": (3,),
        "head.weight": (2, 3),
        "head.bias": (2,),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def takers(opt: gs.MultiOptimizer) -> list[set[str]]:
    """The names that each child has taken."""
    return [set(child.steps) for child in opt.optimizers]


def matrices(name: str, parameter: Any) -> bool:
    return parameter.ndim == 2 and "embed" not in name


# Routing


@pytest.mark.parametrize(
    ("accepts", "claimed"),
    [
        ("*.bias", {"layer.0.bias", "head.bias"}),
        ("head.*", {"head.weight", "head.bias"}),
        ("layer.?.weight", {"layer.0.weight"}),
        ("[eh]*.weight", {"embed.weight", "head.weight"}),
        ("HEAD.*", set()),
        ("*", set(tree())),
        ("", set()),
        (matrices, {"layer.0.weight", "head.weight"}),
        (lambda name, parameter: parameter.size > 8, {"embed.weight", "layer.0.weight"}),
    ],
)
def test_a_filter_claims_its_parameters_and_the_last_optimizer_takes_the_rest(accepts: Any, claimed: Any) -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], [accepts])
    opt.apply_gradients(tree(1), tree())
    assert takers(opt) == [claimed, set(tree()) - claimed]


def test_the_first_filter_that_accepts_decides() -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.Lion(0.1), gs.Adam(0.1)], ["head.*", "*.bias"])
    opt.apply_gradients(tree(1), tree())
    assert takers(opt) == [{"head.weight", "head.bias"}, {"layer.0.bias"}, {"embed.weight", "layer.0.weight"}]


def test_a_predicate_is_asked_once_per_name_with_the_parameter() -> None:
    asked: list[tuple[str, int]] = []

    def claims(name: str, parameter: Any) -> bool:
        asked.append((name, parameter.ndim))
        return parameter.ndim == 1

    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], [claims])
    params = tree()
    opt.apply_gradients({"head.bias": tree(1)["head.bias"]}, params)
    assert asked == [("head.bias", 1)]
    for _ in range(3):
        opt.apply_gradients(tree(1), params)
    assert sorted(asked) == sorted((name, array.ndim) for name, array in params.items())


def test_a_later_filter_is_asked_only_for_what_the_earlier_ones_left() -> None:
    asked: list[str] = []
    opt = gs.MultiOptimizer(
        [gs.SGD(0.1), gs.Lion(0.1), gs.Adam(0.1)], ["*.weight", lambda name, _: asked.append(name) or False]
    )
    opt.apply_gradients(tree(1), tree())
    assert sorted(asked) == ["head.bias", "layer.0.bias"]


def test_init_asks_the_filters_anew_and_makes_all_slots() -> None:
    claimed = {"head.bias"}
    opt = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), gs.Adam(0.1)], [lambda name, _: name in claimed])
    opt.apply_gradients(tree(1), tree())
    claimed.add("head.weight")
    opt.apply_gradients(tree(1), tree())
    assert takers(opt)[0] == {"head.bias"}
    opt.init(tree())
    assert takers(opt)[0] == {"head.bias", "head.weight"}
    assert opt.steps == dict.fromkeys(tree(), 0)
    assert opt.step == 2
    assert not any(array.any() for slots in opt.state.values() for array in slots.values())


def test_a_predicate_that_fails_changes_nothing_and_is_asked_again() -> None:
    patience = [KeyError("not yet"), None]

    def claims(name: str, parameter: Any) -> bool:
        if name == "head.bias" and (error := patience.pop(0)):
            raise error
        return name == "head.bias"

    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], [claims])
    params = tree()
    with pytest.raises(KeyError, match="not yet"):
        opt.apply_gradients(tree(1), params)
    assert opt.step == 0
    assert not opt.state
    assert all((params[name] == tree()[name]).all() for name in params)
    opt.apply_gradients(tree(1), params)
    assert takers(opt)[0] == {"head.bias"}


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    opt = gs.MultiOptimizer([gs.Muon(0.02), gs.AdamW(0.01)], [matrices])
    apart = gs.Muon(0.02), gs.AdamW(0.01)
    params, others = tree(), tree()
    for seed in range(1, 4):
        grads = tree(seed)
        opt.apply_gradients(grads, params)
        for child, wanted in zip(apart, (True, False), strict=True):
            child.apply_gradients({n: g for n, g in grads.items() if matrices(n, g) is wanted}, others)
    assert all((params[name] == others[name]).all() for name in params)
    assert set(opt.state["head.weight"]) == {"v"}
    assert set(opt.state["embed.weight"]) == {"m", "v"}


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_children_together_equal_separate_optimizers_bit_for_bit(cls: Any, kwargs: Any) -> None:
    inner = gs.MultiOptimizer([cls(**kwargs), gs.Lion(0.1)], ["head.*"])
    opt = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), inner], ["*.bias"])
    sgd, own, lion = gs.SGD(0.1, momentum=0.9), cls(**kwargs), gs.Lion(0.1)
    shares = {sgd: ["layer.0.bias", "head.bias"], own: ["head.weight"], lion: ["embed.weight", "layer.0.weight"]}
    params, others = tree(), tree()
    for seed in range(1, 4):
        grads = tree(seed)
        opt.apply_gradients(grads, params)
        for child, names in shares.items():
            child.apply_gradients({name: grads[name] for name in names}, others)
    assert all((params[name] == others[name]).all() for name in params)
    for child in shares:
        for name, slots in child.state.items():
            assert all((opt.state[name][slot] == array).all() for slot, array in slots.items())


def test_tensors_and_other_dtypes_are_routed_alike() -> None:
    opt = gs.MultiOptimizer([gs.SGD(1.0), gs.SGD(2.0)], ["*.bias"])
    params = {
        "weight": torch.zeros(2, dtype=torch.float64),
        "layer": {"weight": torch.zeros(2), "bias": torch.zeros(2)},
    }
    opt.apply_gradients({"weight": torch.ones(2), "layer": {"weight": torch.ones(2), "bias": torch.ones(2)}}, params)
    assert params["weight"].tolist() == params["layer"]["weight"].tolist() == [-2, -2]
    assert params["layer"]["bias"].tolist() == [-1, -1]


# One step of all


def test_every_child_counts_every_step_even_without_a_share() -> None:
    asked: list[int] = []
    idle = gs.SGD(lambda step: asked.append(step) or 0.1)
    inner = gs.MultiOptimizer([idle])
    opt = gs.MultiOptimizer([inner, gs.Adam(0.1)], ["nothing"])
    for _ in range(3):
        opt.apply_gradients(tree(1), tree())
    opt.apply_gradients({}, {})
    assert [each.step for each in (opt, inner, idle, opt.optimizers[1])] == [4, 4, 4, 4]
    assert asked == [0, 1, 2, 3]
    assert idle.steps == {}


def test_state_and_steps_are_the_union_of_the_childrens() -> None:
    opt = gs.MultiOptimizer(
        [gs.SGD(0.1, momentum=0.9), gs.MultiOptimizer([gs.Adam(0.1), gs.SGD(0.1)], ["*.weight"])], ["h*"]
    )
    view = opt.state
    opt.apply_gradients(tree(1), tree())
    opt.apply_gradients({"head.bias": tree(1)["head.bias"]}, tree())
    assert {name: set(slots) for name, slots in view.items()} == {
        "head.weight": {"v"},
        "head.bias": {"v"},
        "embed.weight": {"m", "v"},
        "layer.0.weight": {"m", "v"},
        "layer.0.bias": set(),
    }
    assert opt.steps == {**dict.fromkeys(tree(), 1), "head.bias": 2}
    assert len(view) == 5
    assert view["head.bias"]["v"] is opt.optimizers[0].state["head.bias"]["v"]
    with pytest.raises(TypeError):
        view["new"] = {}
    with pytest.raises(TypeError):
        view["head.bias"]["v"] = None


def test_the_report_is_the_outers() -> None:
    opt = gs.MultiOptimizer([gs.SGD(lambda step: 1.0 + step), gs.Adam(0.1)], ["*.bias"], clip_norm=1.0)
    opt.apply_gradients({"head.bias": np.array([3.0, 4.0])}, {"head.bias": np.zeros(2)})
    assert opt.report == gs.Report(True, 1, 1.0, 5.0, ())
    assert [child.report for child in opt.optimizers] == [None, None]


def test_culprits_are_named_wherever_they_are() -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.MultiOptimizer([gs.Adam(0.1)])], ["*.bias"], nonfinite="skip")
    grads = tree(1)
    grads["layer.0.bias"][1], grads["embed.weight"][0, 0] = np.nan, np.inf
    params = tree()
    opt.apply_gradients(grads, params)
    assert set(opt.report.culprits) == {"layer.0.bias", "embed.weight"}
    assert not opt.report.applied
    assert opt.step == 0
    assert all(child.step == 0 for child in opt.optimizers)
    assert all((params[name] == tree()[name]).all() for name in params)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_norm_is_that_of_all_gradients_together(dtype: Any) -> None:
    def make(**kwargs: Any) -> gs.MultiOptimizer:
        inner = gs.MultiOptimizer([gs.Adam(0.1), gs.Adafactor(0.1)], ["embed*"])
        return gs.MultiOptimizer([gs.SGD(0.1), inner], ["*.bias"], **kwargs)

    opt, plain = make(clip_norm=0.5), make()
    params, others = tree(dtype=dtype), tree(dtype=dtype)
    for seed in range(1, 4):
        grads = tree(seed, dtype)
        clipped, norm = gs.clip_grad_norm(grads, 0.5)
        opt.apply_gradients(grads, params)
        plain.apply_gradients(clipped, others)
        exact = math.sqrt(math.fsum(float(x) ** 2 for g in grads.values() for x in g.flat))
        assert opt.report.grad_norm == norm == pytest.approx(exact, rel=1e-14)
    assert all((params[name] == others[name]).all() for name in params)


def test_a_schedule_that_turns_nan_in_the_second_child_of_a_nested_optimizer_stops_all() -> None:
    asked: list[int] = []
    rates = [0.1, math.nan]
    inner = gs.MultiOptimizer([gs.Lion(0.1), gs.Adam(lambda step: rates[step])], ["*.weight"])
    opt = gs.MultiOptimizer([gs.SGD(lambda step: asked.append(step) or 1.0 / (step + 1)), inner], ["head.*"])
    params = tree()
    opt.apply_gradients(tree(1), params)
    before = {name: array.copy() for name, array in params.items()}
    for _ in range(2):
        with pytest.raises(gs.NonFiniteScalarError, match=r"Adam's learning_rate.*step 1"):
            opt.apply_gradients(tree(2), params)
    assert all((params[name] == before[name]).all() for name in params)
    assert opt.learning_rate == 1.0
    assert opt.steps == dict.fromkeys(tree(), 1)
    assert [each.step for each in (opt, *opt.optimizers, *inner.optimizers)] == [1] * 5
    rates[1] = 0.1
    opt.apply_gradients(tree(2), params)
    assert asked == [0, 1]
    assert opt.learning_rate == 0.5


# What belongs where


def test_the_rate_is_the_first_childs_and_set_there() -> None:
    opt = gs.MultiOptimizer([gs.MultiOptimizer([gs.SGD(0.3)]), gs.Adam(0.1)], ["*.bias"])
    assert opt.learning_rate == 0.3
    with pytest.raises(gs.ConfigurationError, match=r"child.*opt\.optimizers\[0\]\.learning_rate"):
        opt.learning_rate = 0.1
    assert opt.learning_rate == 0.3
    opt.optimizers[0].optimizers[0].learning_rate = 0.2
    assert opt.learning_rate == 0.2
    assert gs.MultiOptimizer([gs.Adafactor()]).learning_rate is None


def test_it_has_no_hyperparameters_of_its_own() -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.1)])
    assert opt.hyperparameters == {}
    with pytest.raises(AttributeError):
        opt.momentum = 0.9


@pytest.mark.parametrize("option", [{"clip_norm": 1.0}, {"nonfinite": "raise"}, {"nonfinite": "skip"}])
@pytest.mark.parametrize("wrap", [lambda child: child, lambda child: gs.MultiOptimizer([child])])
def test_options_on_a_child_are_an_error_at_construction(option: Any, wrap: Any) -> None:
    with pytest.raises(gs.ConfigurationError, match="outermost"):
        gs.MultiOptimizer([gs.SGD(0.1), wrap(gs.Adam(0.1, **option))], ["*.bias"])


def test_options_on_an_inner_multi_optimizer_are_an_error_too() -> None:
    inner = gs.MultiOptimizer([gs.SGD(0.1)], clip_norm=1.0)
    with pytest.raises(gs.ConfigurationError, match="outermost"):
        gs.MultiOptimizer([inner])


@pytest.mark.parametrize(("option", "value", "default"), [("clip_norm", 1.0, None), ("nonfinite", "skip", "allow")])
def test_options_set_on_a_child_later_are_an_error_at_the_next_step(option: str, value: Any, default: Any) -> None:
    leaf = gs.Adam(0.1)
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.MultiOptimizer([leaf])], ["*.bias"])
    params = tree()
    setattr(leaf, option, value)
    for act in (opt.preflight, lambda: opt.apply_gradients(tree(1), params)):
        with pytest.raises(gs.ConfigurationError, match="outermost"):
            act()
    assert opt.step == 0
    assert all((params[name] == tree()[name]).all() for name in params)
    setattr(leaf, option, default)
    opt.apply_gradients(tree(1), params)
    assert opt.step == 1


def test_a_child_is_given_only_once() -> None:
    sgd, adam = gs.SGD(0.1), gs.Adam(0.1)
    for optimizers in (
        [sgd, sgd],
        [sgd, gs.MultiOptimizer([adam, sgd], ["*"])],
        [gs.MultiOptimizer([sgd]), gs.MultiOptimizer([sgd])],
    ):
        with pytest.raises(gs.ConfigurationError, match="same optimizer twice"):
            gs.MultiOptimizer(optimizers, ["*.bias"])


@pytest.mark.parametrize(("optimizers", "filters"), [(1, 1), (2, 0), (2, 2), (3, 1)])
def test_there_is_one_filter_fewer_than_optimizers(optimizers: int, filters: int) -> None:
    children = [gs.SGD(0.1) for _ in range(optimizers)]
    with pytest.raises(gs.ConfigurationError, match=f"fewer than the {optimizers} optimizers, got {filters}"):
        gs.MultiOptimizer(children, ["*"] * filters)


def test_at_least_one_child_is_needed() -> None:
    with pytest.raises(gs.ConfigurationError, match="at least one"):
        gs.MultiOptimizer([])


@pytest.mark.parametrize(
    ("optimizers", "filters"),
    [([0.1], []), ([gs.SGD], []), ([None], []), ([gs.SGD(0.1), gs.SGD(0.2)], "*"), ([gs.SGD(0.1), gs.SGD(0.2)], [1])],
)
def test_children_and_filters_of_other_types_are_refused(optimizers: Any, filters: Any) -> None:
    with pytest.raises(gs.ArgumentTypeError):
        gs.MultiOptimizer(optimizers, filters)


def test_the_repr_shows_children_filters_and_options() -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.Lion(0.2)], ["*.bias"], clip_norm=1.0)
    assert repr(opt) == f"MultiOptimizer([{gs.SGD(0.1)!r}, {gs.Lion(0.2)!r}], ['*.bias'], clip_norm=1.0)"
    again = eval(repr(opt), {name: getattr(gs, name) for name in gs.__all__})
    assert repr(again) == repr(opt)


def test_a_child_may_step_alone_in_between() -> None:
    def make() -> tuple[Any, Any]:
        return gs.Adam(0.1, bias_correction=True), gs.SGD(0.1, momentum=0.9)

    (adam, sgd), apart = make(), make()
    opt = gs.MultiOptimizer([adam, sgd], ["*.bias"])
    params, others = tree(), tree()
    biases = {name: gradient for name, gradient in tree(1).items() if name.endswith("bias")}
    rest = {name: gradient for name, gradient in tree(1).items() if name not in biases}
    for act in ("both", "child", "both", "both", "child", "child", "both"):
        if act == "child":
            adam.apply_gradients(biases, params)
        else:
            opt.apply_gradients({**biases, **rest}, params)
            apart[1].apply_gradients(rest, others)
        apart[0].apply_gradients(biases, others)
    assert all((params[name] == others[name]).all() for name in params)
    assert (opt.step, adam.step, sgd.step) == (4, 7, 4)
    assert opt.steps == {**dict.fromkeys(biases, 7), **dict.fromkeys(rest, 4)}
