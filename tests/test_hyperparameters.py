"""Hyperparameters: given, read back, scheduled, set later, and shown."""

import math
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from families import FAMILIES, configurations, public_optimizers

every_configuration = pytest.mark.parametrize(("cls", "kwargs"), configurations())

DEFAULTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0, "weight_decay": 0, "dampening": 0, "nesterov": False},
    "RMSprop": {"alpha": 0.99, "eps": 1e-8},
    "Adagrad": {"eps": 1e-8},
    "AdaDelta": {"rho": 0.9, "eps": 1e-6},
    "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "bias_correction": False},
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "bias_correction": False},
    "Adamax": {"betas": (0.9, 0.999), "eps": 1e-8},
    "Lion": {"betas": (0.9, 0.99), "weight_decay": 0},
    "Adafactor": {
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta_1": None,
        "weight_decay": 0,
        "scale_parameter": True,
        "relative_step": None,
        "warmup_init": False,
    },
    "Muon": {"momentum": 0.95, "weight_decay": 0.01, "nesterov": True, "ns_steps": 5, "ns_dtype": None},
}


def scalars_of(cls: Any, kwargs: dict[str, Any]) -> list[str]:
    """The hyperparameters that may be schedules; those left at None are not."""
    given = cls(**kwargs).hyperparameters
    return [name for name, value in given.items() if isinstance(value, (float, tuple))]


@pytest.mark.parametrize("cls", public_optimizers(), ids=lambda cls: cls.__name__)
def test_defaults_are_those_of_the_contract_in_its_order(cls: Any) -> None:
    hyperparameters = cls(0.5).hyperparameters
    expected = {"learning_rate": 0.5, **DEFAULTS[cls.__name__]}
    assert hyperparameters == expected
    assert list(hyperparameters) == list(expected)


@every_configuration
def test_each_hyperparameter_is_an_entry_and_an_attribute(cls: Any, kwargs: Any) -> None:
    opt = cls(**kwargs)
    expected = {"learning_rate": None, **DEFAULTS[cls.__name__], **kwargs}
    assert opt.hyperparameters == expected
    assert {name: getattr(opt, name) for name in expected} == expected


def test_the_dictionary_is_a_copy() -> None:
    opt = gs.Adam(0.1)
    opt.hyperparameters["eps"] = 1.0
    assert opt.eps == opt.hyperparameters["eps"] == 1e-8


def test_a_schedule_is_given_back_and_its_value_is_the_attribute() -> None:
    rate, beta = gs.linear_schedule(1.0, 0.0, 4), gs.exponential_decay(0.5, 0.5)
    opt = gs.Adam(rate, betas=[0.9, beta])
    assert opt.hyperparameters["learning_rate"] is rate
    assert opt.hyperparameters["betas"] == (0.9, beta)
    seen = []
    for _ in range(3):
        opt.apply_gradients({}, {})
        seen.append((opt.learning_rate, opt.betas))
    assert seen == [(1.0, (0.9, 0.5)), (0.75, (0.9, 0.25)), (0.5, (0.9, 0.125))]


@every_configuration
def test_every_scalar_takes_a_schedule(cls: Any, kwargs: Any) -> None:
    """Scheduled, each scalar has at each step the effect of the number set by hand."""

    def scaled(value: float, step: int) -> float:
        return value * (1 - 0.1 * step) if value else 0.01 * (step + 1)

    def schedule(value: Any) -> Any:
        return tuple(map(schedule, value)) if isinstance(value, tuple) else lambda step: scaled(value, step)

    names = scalars_of(cls, kwargs)
    given = {name: value for name, value in cls(**kwargs).hyperparameters.items() if name in names}
    if kwargs.get("nesterov"):
        given["momentum"] = 0.9
        names.remove("dampening") if "dampening" in names else None
    scheduled = cls(**{**kwargs, **{name: schedule(given[name]) for name in names}})
    by_hand = cls(**kwargs)
    rng = np.random.default_rng(0)
    params, others = ({"w": np.ones((3, 4)), "b": np.ones(3)} for _ in range(2))
    for step in range(4):
        grads = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(3)}
        for name in names:
            value = given[name]
            now = tuple(scaled(x, step) for x in value) if isinstance(value, tuple) else scaled(value, step)
            setattr(by_hand, name, now)
        scheduled.apply_gradients(grads, params)
        by_hand.apply_gradients(grads, others)
        assert {name: getattr(scheduled, name) for name in names} == {name: getattr(by_hand, name) for name in names}
        assert all((params[name] == others[name]).all() for name in params)


def test_a_scheduled_zero_keeps_the_slot_that_a_fixed_zero_removes() -> None:
    fixed, scheduled = gs.SGD(0.1, momentum=0.0), gs.SGD(0.1, momentum=lambda step: 0.0)
    params, others = {"w": np.ones(2)}, {"w": np.ones(2)}
    fixed.apply_gradients({"w": np.ones(2)}, params)
    scheduled.apply_gradients({"w": np.ones(2)}, others)
    assert set(fixed.state["w"]) == set()
    assert set(scheduled.state["w"]) == {"v"}
    assert (params["w"] == others["w"]).all()


def test_a_schedule_is_called_with_the_step_before_the_step() -> None:
    asked: list[int] = []
    opt = gs.Muon(0.1, momentum=lambda step: asked.append(step) or 0.5)
    for _ in range(3):
        opt.apply_gradients({}, {})
    assert asked == [0, 1, 2]
    assert all(type(step) is int for step in asked)


def test_a_value_set_counts_from_the_next_step() -> None:
    opt = gs.SGD(1.0, weight_decay=0.0)
    params = {"w": np.ones(1)}
    opt.apply_gradients({"w": np.zeros(1)}, params)
    assert params["w"] == 1.0
    opt.weight_decay = 0.5
    opt.apply_gradients({"w": np.zeros(1)}, params)
    assert params["w"] == 0.5
    assert opt.hyperparameters["weight_decay"] == 0.5


def test_setting_one_value_asks_no_other_schedule() -> None:
    asked: list[int] = []
    opt = gs.AdamW(lambda step: asked.append(step) or 0.1)
    opt.apply_gradients({}, {})
    opt.weight_decay = 0.5
    opt.betas = (0.5, 0.6)
    assert asked == [0]
    assert opt.betas == (0.5, 0.6)
    opt.apply_gradients({}, {})
    assert asked == [0, 1]


def test_a_failed_setting_leaves_the_old_value_in_force() -> None:
    opt = gs.Adam(0.1)
    with pytest.raises(gs.OutOfRangeError, match=r"betas\[1\]"):
        opt.betas = (0.5, 1.0)
    assert opt.betas == (0.9, 0.999)


def test_learning_rates_may_be_zero_or_negative() -> None:
    for rate in (0.0, -0.5):
        opt = gs.SGD(rate)
        params = {"w": np.ones(1)}
        opt.apply_gradients({"w": np.ones(1)}, params)
        assert params["w"] == 1 - rate


# What is shown


@every_configuration
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "nonfinite": "skip"}])
def test_the_repr_shows_everything_and_evaluates_back(cls: Any, kwargs: Any, options: Any) -> None:
    opt = cls(**kwargs, **options)
    shown = repr(opt)
    assert shown.startswith(f"{cls.__name__}(")
    assert all(f"{name}={value!r}" in shown for name, value in opt.hyperparameters.items())
    again = eval(shown, {cls.__name__: cls})
    assert type(again) is cls
    assert repr(again) == shown
    assert again.hyperparameters == opt.hyperparameters
    assert (again.clip_norm, again.nonfinite) == (opt.clip_norm, opt.nonfinite)


def test_the_repr_shows_schedules_readably() -> None:
    opt = gs.AdamW(gs.cosine_decay(1e-3, 1000), betas=(0.9, gs.linear_schedule(0.9, 0.99, 10)))
    shown = repr(opt)
    assert "learning_rate=cosine_decay(init=0.001, decay_steps=1000, end=0.0)" in shown
    again = eval(shown, {name: getattr(gs, name) for name in gs.__all__})
    assert again.hyperparameters == opt.hyperparameters


def test_the_repr_of_a_new_value_is_shown() -> None:
    opt = gs.SGD(0.1)
    opt.learning_rate = 0.25
    assert "learning_rate=0.25" in repr(opt)


# LearningRate


def test_a_learning_rate_is_fixed_or_a_schedule() -> None:
    fixed, scheduled = gs.LearningRate(0.5), gs.LearningRate(lambda step: 0.5**step)
    assert [fixed.current(step) for step in (0, 7)] == [0.5, 0.5]
    assert [scheduled.try_current(step) for step in (0, 2)] == [1.0, 0.25]
    assert "fixed" in repr(fixed)
    assert "0.5" in repr(fixed)
    assert "schedule" in repr(scheduled)
    assert "cosine_decay(init=1.0" in repr(gs.LearningRate(gs.cosine_decay(1.0, 5)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_try_current_refuses_what_is_not_finite_and_current_does_not(value: float) -> None:
    for rate in (gs.LearningRate(value), gs.LearningRate(lambda step: value)):
        assert rate.current(3) == value or math.isnan(value)
        with pytest.raises(gs.NonFiniteScalarError, match="step 3"):
            rate.try_current(3)


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_a_learning_rate_is_a_number(value: Any) -> None:
    with pytest.raises(gs.ArgumentTypeError, match="number"):
        gs.LearningRate(value)
    with pytest.raises(gs.ArgumentTypeError, match="step 2"):
        gs.LearningRate(lambda step: value).current(2)


def test_every_family_has_defaults_in_the_table() -> None:
    assert set(DEFAULTS) == set(FAMILIES) == {cls.__name__ for cls in public_optimizers()}
