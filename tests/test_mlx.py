"""Proves that families, schedules and clipping are those of `mlx.optimizers`, whose formulas they follow."""

import inspect
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from families import OPTIONS, configurations, public_optimizers

mx = pytest.importorskip("mlx.core")
oracle = pytest.importorskip("mlx.optimizers")

SHAPES = [(), (5,), (4, 3), (3, 4), (2, 4, 3), (2, 3, 2, 3)]
STEPS = 5
ADDED = {"ns_dtype"}  # arguments that MLX does not have
SLOT_NAMES = {"row": "exp_avg_sq_row", "col": "exp_avg_sq_col"}  # where MLX's differ; Adafactor's v and m do too


def oracle_of(cls: type, kwargs: dict[str, Any]) -> Any:
    """MLX's optimizer with the same arguments; its Adafactor ignores a rate unless told not to."""
    if cls is gs.Adafactor and "learning_rate" in kwargs:
        kwargs = {**kwargs, "relative_step": False}
    return getattr(oracle, cls.__name__)(**{name: value for name, value in kwargs.items() if name not in ADDED})


def slot_of_oracle(cls: type, slot: str) -> str:
    if cls is gs.Adafactor:
        return SLOT_NAMES.get(slot, {"v": "exp_avg_sq", "m": "exp_avg"}.get(slot, slot))
    return slot


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_parameters_and_slots_follow_mlx(cls, kwargs):
    mx.random.seed(1)
    theirs = {f"w{i}": mx.random.normal(shape) for i, shape in enumerate(SHAPES)}
    ours = {name: np.array(w) for name, w in theirs.items()}
    opt, other = cls(**kwargs), oracle_of(cls, kwargs)
    # A few roundings apart: MLX forms scalars, means and reciprocal roots in float32.
    rtol, atol = 3e-6, 1e-6
    for _ in range(STEPS):
        grads = {name: mx.random.normal(w.shape) for name, w in theirs.items()}
        opt.apply_gradients({name: np.array(g) for name, g in grads.items()}, ours)
        theirs = other.apply_gradients(grads, theirs)
        for name, w in ours.items():
            np.testing.assert_allclose(w, np.array(theirs[name]), rtol, atol, err_msg=name)
            for slot, value in opt.state[name].items():
                expected = np.array(other.state[name][slot_of_oracle(cls, slot)])
                np.testing.assert_allclose(value, expected, rtol, atol, err_msg=f"{name} {slot}")


@pytest.mark.parametrize("cls", public_optimizers())
def test_arguments_and_defaults_are_those_of_mlx(cls):
    def arguments(owner: type) -> dict[str, Any]:
        parameters = inspect.signature(owner).parameters
        defaults = {name: p.default for name, p in parameters.items() if name not in OPTIONS | ADDED}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}

    ours, theirs = arguments(cls), arguments(getattr(oracle, cls.__name__))
    if cls is gs.Adafactor:
        assert (ours.pop("relative_step"), theirs.pop("relative_step")) == (None, True)  # None: when no rate is given
    assert ours == theirs
    assert list(ours) == list(theirs)


SCHEDULES = {
    "exponential": lambda library: library.exponential_decay(0.1, 0.9),
    "steps": lambda library: library.step_decay(0.1, 0.5, 4),
    "cosine": lambda library: library.cosine_decay(0.1, 10),
    "cosine to an end": lambda library: library.cosine_decay(0.1, 7, 0.01),
    "linear": lambda library: library.linear_schedule(0.0, 0.1, 10),
    "joined": lambda library: library.join_schedules(
        [
            library.linear_schedule(0.0, 0.1, 5),
            library.cosine_decay(0.1, 9, 0.02),
            library.exponential_decay(0.02, 0.9),
        ],
        [5, 14],
    ),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_follow_mlx(make):
    ours, theirs = make(gs), make(oracle)
    for step in range(25):
        assert ours(step) == pytest.approx(float(theirs(mx.array(step))), rel=1e-5, abs=1e-8), step


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_scheduled_rate_takes_effect_at_the_same_steps(make):
    ours, theirs = {"w": np.ones(3, np.float32)}, {"w": mx.ones(3)}
    opt, other = gs.SGD(make(gs)), oracle.SGD(make(oracle))
    for _ in range(16):
        opt.apply_gradients({"w": np.ones(3, np.float32)}, ours)
        theirs = other.apply_gradients({"w": mx.ones(3)}, theirs)
        np.testing.assert_allclose(ours["w"], np.array(theirs["w"]), 1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 3.0, 100.0])
def test_clipping_follows_mlx(max_norm):
    mx.random.seed(2)
    grads = {"a": mx.random.normal((4, 3)), "b": {"c": mx.random.normal((5,)), "d": mx.random.normal(())}}
    theirs, their_norm = oracle.clip_grad_norm(grads, max_norm)
    ours = {"a": np.array(grads["a"]), "b": {name: np.array(g) for name, g in grads["b"].items()}}
    clipped, norm = gs.clip_grad_norm(ours, max_norm)
    assert norm == pytest.approx(float(their_norm), rel=1e-6)
    np.testing.assert_allclose(clipped["a"], np.array(theirs["a"]), 1e-6)
    for name in ("c", "d"):
        np.testing.assert_allclose(clipped["b"][name], np.array(theirs["b"][name]), 1e-6)


class TestDeliberateDifferences:
    def test_a_given_rate_of_adafactor_is_never_ignored(self):
        w, g = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
        theirs = oracle.Adafactor(0.5).apply_gradients({"w": mx.array(g)}, {"w": mx.array(w)})["w"]
        ours = gs.Adafactor(0.5).apply_gradients({"w": g}, {"w": w})["w"]
        np.testing.assert_allclose(np.array(theirs), 0.99, 1e-6)
        np.testing.assert_allclose(ours, 0.5, 1e-6)

    def test_a_late_parameter_starts_at_its_own_first_step(self):
        opt, other = (library.Adam(0.25, eps=0.0, bias_correction=True) for library in (gs, oracle))
        ours, theirs = {name: np.zeros(1, np.float32) for name in "ab"}, {name: mx.zeros(1) for name in "ab"}
        other.init(theirs)
        for names in ("a", "a", "ab"):
            opt.apply_gradients({name: np.ones(1, np.float32) for name in names}, ours)
            theirs |= other.apply_gradients({name: mx.ones(1) for name in names}, theirs)
        assert ours["b"] == pytest.approx(-0.25, rel=1e-6)
        assert abs(float(theirs["b"][0])) < 0.2

    def test_norms_accumulate_in_float64(self):
        grads = {"w": np.full(4, 1e30, np.float32)}
        assert gs.clip_grad_norm(grads, 1.0)[1] == pytest.approx(2e30, rel=1e-7)
        assert float(oracle.clip_grad_norm({"w": mx.array(grads["w"])}, 1.0)[1]) == np.inf

    def test_a_rate_is_rounded_once_after_float64_arithmetic(self):
        opt, w = gs.Adam(0.1, betas=(0.9, 0.0), eps=0.0, bias_correction=True), np.zeros(1, np.float32)
        opt.apply_gradients({"w": np.ones(1, np.float32)}, {"w": w})
        assert w[0] == -np.float32(0.1 / (1 - 0.9)) * np.float32(1 - 0.9)
