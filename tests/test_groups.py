"""Hyperparameters by name: parameters of different groups step as under plain optimizers of their own."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import optax
import pytest
import torch

import gradstep as gs
import gradstep.mlx
import gradstep.optax
import gradstep.torch
from families import FAMILIES, assert_same_bits, public_optimizers

LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.array,
    "torch": torch.tensor,
    "jax": jnp.array,
    "mlx": mx.array,
}
SHAPES = {"embed.weight": (5, 3), "layer.weight": (3, 3), "layer.bias": (3,), "norm.scale": (3,), "head.weight": (2, 3)}

every_library = pytest.mark.parametrize("library", LIBRARIES)


def tree(seed: int = 0, library: str = "numpy") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: LIBRARIES[library](rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}


def in_plain_numpy(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(array) for name, array in arrays.items()}


def train(opt: Any, library: str = "numpy", names: Any = SHAPES, steps: int = 3) -> tuple[dict[str, Any], Any]:
    """The parameters of these names and their slots after some steps."""
    params = {name: array for name, array in tree(0, library).items() if name in names}
    for step in range(steps):
        opt.apply_gradients({name: g for name, g in tree(step + 1, library).items() if name in names}, params)
    slots = {name: in_plain_numpy(dict(opt.state[name])) for name in names}
    return in_plain_numpy(params), slots


def assert_each_steps_as_if_alone(grouped: Any, plain: dict[str, Any], library: str = "numpy") -> None:
    """`plain` has an optimizer for each parameter; the grouped one must do what each of them does."""
    params, slots = train(grouped, library)
    for name, opt in plain.items():
        alone, slots_alone = train(opt, library, [name])
        assert_same_bits(params[name], alone[name], name)
        assert slots[name].keys() == slots_alone[name].keys(), name
        for slot, array in slots[name].items():
            assert_same_bits(array, slots_alone[name][slot], f"{name} {slot}")


# Values by name


@every_library
def test_each_parameter_gets_the_value_of_the_first_glob_that_matches(library: str) -> None:
    rate = gs.linear_schedule(1e-1, 1e-2, 5)
    grouped = gs.AdamW(
        {"embed.*": 1e-2, "*": rate},
        betas={"*.weight": (0.8, 0.95), "*": (0.9, lambda step: 0.9 + 0.01 * step)},
        weight_decay={"*.bias": 0, "*norm*": 0, "*": 0.1},
        bias_correction=True,
    )
    late = 0.9, lambda step: 0.9 + 0.01 * step
    plain = {
        "embed.weight": gs.AdamW(1e-2, betas=(0.8, 0.95), weight_decay=0.1, bias_correction=True),
        "layer.weight": gs.AdamW(rate, betas=(0.8, 0.95), weight_decay=0.1, bias_correction=True),
        "head.weight": gs.AdamW(rate, betas=(0.8, 0.95), weight_decay=0.1, bias_correction=True),
        "layer.bias": gs.AdamW(rate, betas=late, weight_decay=0, bias_correction=True),
        "norm.scale": gs.AdamW(rate, betas=late, weight_decay=0, bias_correction=True),
    }
    assert_each_steps_as_if_alone(grouped, plain, library)


def scaled(value: Any, factor: float) -> Any:
    return tuple(scaled(part, factor) for part in value) if isinstance(value, tuple) else value * factor


@pytest.mark.parametrize("cls", public_optimizers(), ids=lambda cls: cls.__name__)
def test_every_scalar_of_every_family_takes_a_mapping(cls: Any) -> None:
    for kwargs in FAMILIES[cls.__name__]:
        given = cls(**kwargs).hyperparameters
        scalars = {n: v for n, v in given.items() if isinstance(v, (float, tuple)) and n != "clip_threshold"}
        for name, value in scalars.items():
            other = scaled(value, 0.5)
            grouped = cls(**{**kwargs, name: {"layer.*": other, "*": value}})
            plain = {n: cls(**{**kwargs, name: other if n.startswith("layer.") else value}) for n in SHAPES}
            assert_each_steps_as_if_alone(grouped, plain)


@every_library
def test_a_fixed_zero_removes_the_slot_of_its_group_alone(library: str) -> None:
    grouped = gs.SGD(0.1, momentum={"*.bias": 0, "*.scale": lambda step: 0.0, "*": 0.9})
    _, slots = train(grouped, library)
    assert {name: list(kept) for name, kept in slots.items()} == {
        name: [] if name == "layer.bias" else ["v"] for name in SHAPES
    }
    plain = {name: gs.SGD(0.1, momentum=0.9) for name in SHAPES if name.endswith("weight")}
    assert_each_steps_as_if_alone(
        copy.deepcopy(gs.SGD(0.1, momentum=grouped.hyperparameters["momentum"])), plain, library
    )


def test_what_may_be_absent_may_be_absent_for_some() -> None:
    grouped = gs.Adafactor({"embed*": 0.1, "*": None}, beta_1={"layer*": 0.9, "*": None})
    plain = {
        "embed.weight": gs.Adafactor(0.1),
        "layer.weight": gs.Adafactor(beta_1=0.9),
        "layer.bias": gs.Adafactor(beta_1=0.9),
        "head.weight": gs.Adafactor(),
        "norm.scale": gs.Adafactor(),
    }
    assert_each_steps_as_if_alone(grouped, plain)
    assert grouped.learning_rate == {"embed*": 0.1, "*": None}
    assert set(grouped.state["layer.weight"]) == {"row", "col", "m"}


@gs.rule
def Signum(w, g, m, *, learning_rate, momentum=0.9):
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * gs.sign(m), m


@every_library
def test_rules_of_ones_own_take_mappings(library: str) -> None:
    grouped = Signum({"*.bias": 0.5, "*": 0.1}, momentum={"*.weight": 0.5, "*": 0.9})
    values = {n: (0.5 if n.endswith("bias") else 0.1, 0.5 if n.endswith("weight") else 0.9) for n in SHAPES}
    plain = {name: Signum(rate, momentum=momentum) for name, (rate, momentum) in values.items()}
    assert_each_steps_as_if_alone(grouped, plain, library)


def test_groups_in_which_a_rule_is_the_same_share_one_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstep.step.launch import Launch

    calls: list[Any] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: calls.append(self) or run(self))
    shapes = {"embed.weight": (4,), "layer.weight": (4,), "layer.bias": (4,)}
    params, grads = ({name: np.ones(shape, np.float32) for name, shape in shapes.items()} for _ in range(2))
    gs.AdamW({"embed*": 0.1, "*": 0.2}, weight_decay={"*bias": 0.2, "*": 0.1}).apply_gradients(grads, params)
    assert len(calls) == 1
    gs.AdamW(0.1, weight_decay={"*bias": 0, "*": 0.1}).apply_gradients(grads, params)
    assert len(calls) == 3


def test_an_eps_that_vanishes_in_float32_may_hold_for_float64_alone() -> None:
    opt = gs.RMSprop(0.1, eps={"wide": 1e-50, "*": 1e-8})
    opt.apply_gradients(
        {"wide": np.ones(2), "w": np.ones(2, np.float32)}, {"wide": np.ones(2), "w": np.ones(2, np.float32)}
    )
    opt.init({"wide": np.ones(2, np.float32)})
    with pytest.raises(gs.OutOfRangeError, match=r"RMSprop's eps\['wide'\] = 1e-50 becomes 0\.0 in float32"):
        opt.apply_gradients({"wide": np.ones(2, np.float32)}, {"wide": np.ones(2, np.float32)})


# Schedules


def counting(calls: list[int], value: float = 0.1) -> Callable[[int], float]:
    return lambda step: calls.append(step) or value


@every_library
def test_a_schedule_is_called_once_per_step_for_all_its_parameters_and_globs(library: str) -> None:
    calls: list[int] = []
    others: list[int] = []
    rate = counting(calls)
    opt = gs.Adam({"embed.*": rate, "head.*": counting(others, 0.2), "*": rate}, betas={"*": (counting(others), 0.9)})
    train(opt, library)
    assert calls == [0, 1, 2]
    assert sorted(others) == [0, 0, 1, 1, 2, 2]
    opt.preflight()
    opt.preflight()
    assert calls == [0, 1, 2, 3]
    assert opt.learning_rate == {"embed.*": 0.1, "head.*": 0.2, "*": 0.1}


def test_a_retry_calls_only_the_schedule_that_failed() -> None:
    calls: list[int] = []

    def failing(step: int) -> float:
        fails.append(step)
        return float("nan") if fails == [0, 1] else 0.25

    fails: list[int] = []
    opt = gs.SGD({"embed.*": counting(calls), "*": failing})
    params = tree()
    opt.apply_gradients(tree(1), params)
    before, state = copy.deepcopy(params), (opt.step, opt.steps, opt.learning_rate)
    with pytest.raises(gs.NonFiniteScalarError, match=r"SGD's learning_rate\['\*'\]: at step 1 the schedule"):
        opt.apply_gradients(tree(2), params)
    assert (opt.step, opt.steps, opt.learning_rate) == state
    assert all((params[name] == before[name]).all() for name in params)
    opt.apply_gradients(tree(2), params)
    assert calls == [0, 1]
    assert fails == [0, 1, 1]


def test_the_rates_are_read_by_glob() -> None:
    opt = gs.SGD({"embed.*": gs.linear_schedule(1, 0, 4), "*": 0.5}, momentum={"*": 0.9})
    assert opt.learning_rate == {"embed.*": 1.0, "*": 0.5}
    train(opt)
    assert opt.learning_rate == opt.get_hyperparameter("learning_rate") == {"embed.*": 0.5, "*": 0.5}
    assert opt.report.learning_rate == {"embed.*": 0.5, "*": 0.5}
    assert opt.momentum == {"*": 0.9}
    assert gs.Adam(0.1, betas={"*": [0.5, lambda step: 0.75]}).betas == {"*": (0.5, 0.75)}


def test_what_was_given_is_shown_and_is_a_copy() -> None:
    rate = gs.cosine_decay(1e-3, 10)
    given = {"embed.*": 1, "*": rate}
    opt = gs.Lion(given, betas={"*": [0.5, 0.75]})
    given["*"] = 7
    assert opt.hyperparameters["learning_rate"] == {"embed.*": 1.0, "*": rate}
    opt.hyperparameters["learning_rate"]["*"] = 7
    opt.learning_rate["*"] = 7
    assert opt.hyperparameters["learning_rate"] == {"embed.*": 1.0, "*": rate}
    assert "learning_rate={'embed.*': 1.0, '*': cosine_decay(init=0.001, decay_steps=10, end=0.0)}, " in repr(opt)
    assert "betas={'*': (0.5, 0.75)}" in repr(opt)
    again = eval(repr(opt), {name: getattr(gs, name) for name in gs.__all__})
    assert again.hyperparameters == opt.hyperparameters


# Setting values


@pytest.mark.parametrize("how", ["attribute", "set_hyperparameters"])
def test_mappings_may_be_set_and_replaced(how: str) -> None:
    def put(opt: Any, name: str, value: Any) -> None:
        setattr(opt, name, value) if how == "attribute" else opt.set_hyperparameters({name: value})

    opt, plain = gs.SGD(0.1), {name: gs.SGD(0.1) for name in SHAPES}
    params, others = tree(), tree()
    settings = [
        {"*": 0.5},
        {"*.bias": 0.25, "*": 0.5},
        {"*.bias": 0.75, "*": 0.5},  # the same globs
        {"embed*": 0.75, "*": 1.5},  # others
        {"*": 1.5, "embed*": 0.75},  # in another order
        0.125,
    ]
    chosen = [
        lambda name: 0.5,
        lambda name: 0.25 if name == "layer.bias" else 0.5,
        lambda name: 0.75 if name == "layer.bias" else 0.5,
        lambda name: 0.75 if name == "embed.weight" else 1.5,
        lambda name: 1.5,
        lambda name: 0.125,
    ]
    for seed, (value, value_of) in enumerate(zip(settings, chosen, strict=True)):
        put(opt, "learning_rate", value)
        opt.apply_gradients(tree(seed), params)
        for name in SHAPES:
            plain[name].learning_rate = value_of(name)
            plain[name].apply_gradients({name: tree(seed)[name]}, {name: others[name]})
    for name in SHAPES:
        assert_same_bits(params[name], others[name], name)


def test_a_setting_that_fails_leaves_the_old_values_in_force() -> None:
    opt = gs.AdamW({"*": 0.1})
    for value in ({"*": float("nan")}, {}, {3: 0.1}, {"*": "fast"}, {"*": 0.1, "a": lambda step: float("inf")}):
        with pytest.raises(gs.GradstepError):
            opt.learning_rate = value
    assert opt.learning_rate == {"*": 0.1}


def test_values_that_do_not_go_together_are_refused_when_they_are_set() -> None:
    opt = gs.SGD(0.1, momentum=0.9, nesterov=True, dampening={"embed*": 0, "*": 0})
    train(opt)
    with pytest.raises(
        gs.ConfigurationError, match=r"nesterov=True needs .* dampening=0\.5 \(for params\['layer.weight'\]\)"
    ):
        opt.dampening = {"embed*": 0, "*": 0.5}
    assert opt.dampening == {"embed*": 0.0, "*": 0.0}
    train(opt)


# Errors


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight_decay": {}}, gs.ArgumentTypeError, r"AdamW's weight_decay is an empty mapping, .*write \{'\*': …\}"),
    ({"weight_decay": {1: 0.5}}, gs.ArgumentTypeError, r"AdamW's weight_decay maps names .* got the key 1"),
    ({"weight_decay": {"*": -1}}, gs.OutOfRangeError, r"AdamW's weight_decay\['\*'\] must be >= 0, got -1\.0"),
    (
        {"weight_decay": {"*": None}},
        gs.ArgumentTypeError,
        r"AdamW's weight_decay\['\*'\] must be a number or a schedule",
    ),
    ({"weight_decay": {"*": {"*": 1}}}, gs.ArgumentTypeError, r"AdamW's weight_decay\['\*'\] must be a number"),
    ({"betas": {"a*": (0.5, 0.5), "*": 0.5}}, gs.ArgumentTypeError, r"AdamW's betas\['\*'\] must be two numbers"),
    ({"betas": {"*": (0.5, 1.5)}}, gs.OutOfRangeError, r"AdamW's betas\['\*'\]\[1\] must be in \[0, 1\), got 1\.5"),
    ({"eps": {"*": lambda step: -1}}, gs.OutOfRangeError, r"AdamW's eps\['\*'\] must be >= 0, got -1\.0 \(step 0"),
    ({"bias_correction": {"*": True}}, gs.ArgumentTypeError, r"AdamW's bias_correction is configuration, .*MultiOptim"),
]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"), BAD, ids=[str(next(iter(kwargs))) + str(i) for i, (kwargs, _, _) in enumerate(BAD)]
)
def test_a_bad_mapping_is_refused_with_its_hyperparameter_and_glob(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        gs.AdamW(0.1, **kwargs)


def test_counts_and_own_configuration_take_no_mapping() -> None:
    with pytest.raises(gs.ArgumentTypeError, match="Muon's ns_steps is configuration"):
        gs.Muon(0.1, ns_steps={"*": 3})

    @gs.rule(static=["power"])
    def Own(w, g, *, learning_rate, power=2):
        return w - learning_rate * g

    with pytest.raises(gs.ArgumentTypeError, match="Own's power is configuration"):
        Own(0.1, power={"*": 3})


@every_library
@pytest.mark.parametrize("call", ["apply_gradients", "init", "describe"])
def test_a_parameter_without_a_value_is_an_error_before_anything_happens(
    library: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = gs.AdamW(0.1, weight_decay={"*.bias": 0, "*weight": 0.1})
    params = tree(0, library)
    before = in_plain_numpy(copy.deepcopy(params))
    made: list[Any] = []
    for module in ("gradstep.step.match", "gradstep.step.forms", "gradstep.step.plan", "gradstep.step.leaf"):
        for name in ("make_slots", "match"):
            monkeypatch.setattr(f"{module}.{name}", lambda *args: made.append(args), raising=False)
    message = (
        r"AdamW's weight_decay has no value for params\['norm.scale'\], which matches none of its patterns "
        r"'\*\.bias', '\*weight'; end the mapping with '\*'"
    )
    with pytest.raises(gs.ConfigurationError, match=message):
        getattr(opt, call)(*([tree(1, library), params] if call == "apply_gradients" else [params]))
    assert not made
    assert (opt.step, opt.steps, dict(opt.state), opt.report) == (0, {}, {}, None)
    assert all((np.asarray(params[name]) == before[name]).all() for name in params)


def test_a_parameter_that_gets_no_gradient_needs_no_value() -> None:
    opt = gs.SGD({"layer.*": 0.1})
    opt.apply_gradients({"layer.bias": np.ones(3, np.float32)}, tree())
    assert opt.steps == {"layer.bias": 1}


def test_groups_that_do_not_go_together_are_refused_with_a_parameter() -> None:
    opt = gs.SGD(0.1, momentum={"*.bias": 0, "*": 0.9}, nesterov=True)
    with pytest.raises(gs.ConfigurationError, match=r"momentum > 0 .*got momentum=0\.0.*for params\['layer.bias'\]"):
        opt.apply_gradients(tree(1), tree())
    assert not opt.state
    opt.apply_gradients({"layer.weight": tree(1)["layer.weight"]}, tree())
    rate = gs.Adafactor({"embed*": 0.1, "*": None}, relative_step=True)
    with pytest.raises(gs.ConfigurationError, match=r"needs no learning rate, got 0\.1.*for params\['embed.weight'\]"):
        rate.init(tree())


# The whole life


@every_library
def test_init_makes_the_slots_of_each_group(library: str) -> None:
    opt = gs.SGD(0.1, momentum={"*.bias": 0, "*": 0.9})
    opt.init(tree(0, library))
    assert {name: list(slots) for name, slots in opt.state.items()} == {
        name: [] if name == "layer.bias" else ["v"] for name in SHAPES
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deep", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_goes_on_alone(copied: Any, steps: int) -> None:
    rate = gs.linear_schedule(0.1, 0.01, 9)
    opt = gs.AdamW({"embed*": rate, "head*": 0.1, "*": rate}, weight_decay={"*bias": 0, "*": rate}, frozen=["norm*"])
    params = tree()
    for step in range(steps):
        opt.apply_gradients(tree(step), params)
    twin, others = copied(opt), copy.deepcopy(params)
    before = opt.learning_rate
    for step in range(5, 8):
        twin.apply_gradients(tree(step), others)
    assert opt.learning_rate == before
    for step in range(5, 8):
        opt.apply_gradients(tree(step), params)
    assert (twin.learning_rate, twin.steps, repr(twin)) == (opt.learning_rate, opt.steps, repr(opt))
    for name in SHAPES:
        assert_same_bits(params[name], others[name], name)


@pytest.mark.parametrize("options", [{"clip_norm": 0.5}, {"nonfinite": "skip"}])
@every_library
def test_options_see_all_groups_together(library: str, options: Any) -> None:
    """The norm is global: the same steps as a MultiOptimizer with a child for each group."""
    grouped = gs.AdamW({"embed*": 0.5, "*": 0.1}, weight_decay={"*bias": 0, "*": 0.1}, **options)
    children = [gs.AdamW(0.5, weight_decay=0.1), gs.AdamW(0.1, weight_decay=0), gs.AdamW(0.1, weight_decay=0.1)]
    apart = gs.MultiOptimizer(children, ["embed*", "*bias"], **options)
    (params, slots), (others, other_slots) = train(grouped, library), train(apart, library)
    for name in SHAPES:
        assert_same_bits(params[name], others[name], name)
        assert all((slots[name][slot] == other_slots[name][slot]).all() for slot in other_slots[name])
    assert grouped.report.grad_norm == apart.report.grad_norm


def test_children_of_a_multi_optimizer_may_be_grouped() -> None:
    calls: list[int] = []
    inner = gs.MultiOptimizer([gs.Muon({"layer*": 0.1, "*": counting(calls, 0.2)}), gs.SGD({"*": 0.5})], ["*weight"])
    opt = gs.MultiOptimizer([gs.AdamW({"*": 0.1, "never": counting(calls)}), inner], ["embed*"])
    params, _ = train(opt)
    assert calls == [0, 0, 1, 1, 2, 2]
    assert opt.learning_rate == opt.report.learning_rate == {"*": 0.1, "never": 0.1}
    plain = {
        "embed.weight": gs.AdamW(0.1), "layer.weight": gs.Muon(0.1), "head.weight": gs.Muon(0.2),
        "layer.bias": gs.SGD(0.5), "norm.scale": gs.SGD(0.5),
    }  # fmt: skip
    for name, alone in plain.items():
        assert_same_bits(params[name], train(alone, names=[name])[0][name], name)


def test_a_failure_in_one_child_leaves_all_as_it_was() -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), gs.SGD({"layer*": 0.1})], ["embed*"])
    params = tree()
    with pytest.raises(gs.ConfigurationError, match=r"no value for params\['norm.scale'\]"):
        opt.apply_gradients(tree(1), params)
    assert (opt.step, opt.steps, dict(opt.state)) == (0, {}, {})
    assert all((params[name] == tree()[name]).all() for name in params)


def test_a_parameter_that_comes_late_counts_its_own_steps() -> None:
    grouped = gs.Adam({"embed*": 0.1, "*": 0.2}, bias_correction=True)
    late, early = gs.Adam(0.2, bias_correction=True), gs.Adam(0.1, bias_correction=True)
    params, others = tree(), tree()
    for step in range(4):
        names = ["embed.weight", *(["layer.bias", "norm.scale"] if step > 1 else [])]
        grouped.apply_gradients({name: tree(step)[name] for name in names}, params)
        for opt, mine in (early, names[:1]), (late, names[1:]):
            if mine:
                opt.apply_gradients({name: tree(step)[name] for name in mine}, others)
    for name in ("embed.weight", "layer.bias", "norm.scale"):
        assert_same_bits(params[name], others[name], name)
    assert grouped.steps == {"embed.weight": 4, "layer.bias": 2, "norm.scale": 2}


def test_names_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    opt = gs.SGD({"embed*": 0.1, "*": lambda step: 0.2 + step}, weight_decay={"*bias": 0.5, "*": 0})
    look = type(opt._leaf.settings).group_of
    monkeypatch.setattr(type(opt._leaf.settings), "group_of", lambda self, name: asked.append(name) or look(self, name))
    train(opt)
    opt.apply_gradients({"layer.bias": tree()["layer.bias"]}, tree())  # a new plan
    opt.learning_rate = {"embed*": 0.3, "*": 0.4}
    train(opt)
    assert sorted(asked) == sorted(SHAPES)


# Elsewhere


def test_explain_prints_each_program_once_and_for_which_globs(capsys: pytest.CaptureFixture[str]) -> None:
    gs.explain(gs.AdamW({"a": 1, "*": 2}, weight_decay={"*.bias": 0, "*norm*": 0, "*": 0.1}), ir=False)
    shown = capsys.readouterr().out
    assert shown.count("AdamW, float32, 2 dimensions") == 2
    first, second = shown.split("\n\n")
    assert "for parameters with weight_decay from '*.bias', '*norm*'\n" in first
    assert "for parameters with weight_decay from '*'\n" in second
    assert "weight_decay" not in first.split("\n", 2)[2]
    assert "1 - learning_rate * weight_decay" in second
    gs.explain(gs.AdamW(1, weight_decay={"a": 0.1, "*": 0.2}), ir=False)
    assert "for parameters" not in capsys.readouterr().out


@pytest.mark.parametrize("cls", [gs.AdamW, gs.SGD, gs.Lion], ids=lambda cls: cls.__name__)
def test_optax_takes_grouped_optimizers(cls: Any) -> None:
    rate = gs.linear_schedule(0.1, 0.01, 5)
    opt = cls({"embed*": rate, "*": 0.2}, weight_decay={"*bias": 0, "*": 0.1})
    tx = gradstep.optax.from_optimizer(opt)
    params = {"embed": {"weight": jnp.ones((2, 2))}, "layer": {"weight": jnp.ones(2), "bias": jnp.ones(2)}}
    state, others = tx.init(params), jax.tree.map(jnp.array, params)
    for step in range(3):
        grads = jax.tree.map(lambda x: x * (step + 0.5), params)  # noqa: B023
        updates, state = jax.jit(tx.update)(grads, state, params)
        opt.apply_gradients(jax.tree.map(lambda x: x * (step + 0.5), others), others)  # noqa: B023
        params = optax.apply_updates(params, updates)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    with pytest.raises(gs.ConfigurationError, match=r"no value for params\['layer.bias'\]"):
        gradstep.optax.from_optimizer(cls({"*weight": 0.1})).init(params)


def test_torchs_manner_has_groups_of_its_own() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(
        gs.ArgumentTypeError, match=r"weight_decay must be one value, got the mapping .*parameter groups"
    ):
        gradstep.torch.AdamW([weight], weight_decay={"*": 0.1})
    opt = gradstep.torch.AdamW([weight])
    weight.sum().backward()
    opt.param_groups[0]["lr"] = {"*": 0.1}
    with pytest.raises(gs.ArgumentTypeError, match="lr must be one value"):
        opt.step()
    assert torch.equal(weight, torch.ones(2))


def test_mlxs_manner_knows_no_names() -> None:
    with pytest.raises(
        gs.ArgumentTypeError, match=r"AdamW's weight_decay must be one value, got the mapping .*MultiOpt"
    ):
        gradstep.mlx.AdamW(0.1, weight_decay={"*": 0.1})
    opt = gradstep.mlx.Lion(0.1)
    with pytest.raises(gs.ArgumentTypeError, match="Lion's betas must be one value"):
        opt.betas = {"*": (0.5, 0.5)}
    with pytest.raises(gs.ArgumentTypeError, match="learning rate must be a number"):
        opt.learning_rate = {"*": 0.1}
    assert opt.betas == (0.9, 0.99)


def test_a_method_under_two_globs_is_called_once_per_step():
    class Plan:
        def __init__(self) -> None:
            self.calls: list[int] = []

        def rate(self, step: int) -> float:
            self.calls.append(step)
            return 0.1

    plan = Plan()
    opt = gs.SGD({"a": plan.rate, "*": plan.rate})
    for _ in range(2):
        opt.apply_gradients({n: np.ones(2) for n in "ab"}, {n: np.ones(2) for n in "ab"})
    assert plan.calls == [0, 1]


def test_init_refuses_options_of_children_before_it_allocates():
    child = gs.SGD(0.1, momentum=0.9)
    opt = gs.MultiOptimizer([child])
    child.frozen = ["a"]
    with pytest.raises(gs.ConfigurationError, match="outermost"):
        opt.init({"a": np.ones(2)})
    assert not opt.state
