"""Proves every family against an independent float64 computation of its formulas, written from the specification."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from families import FAMILIES, OPTIONS, Kwargs, configurations, public_optimizers

Array = np.ndarray[Any, Any]
Slots = dict[str, Array]

SHAPES = [(), (1,), (7,), (5, 3), (3, 5), (1, 4), (2, 4, 3), (2, 2, 3, 5)]
STEPS = 4


def sgd(w: Array, g: Array, s: Slots, t: int, lr: float, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False):
    g = g + weight_decay * w
    if momentum == 0:
        return w - lr * g
    s["v"] = momentum * s.get("v", 0.0) + (1 - dampening) * g
    return w - lr * (g + momentum * s["v"] if nesterov else s["v"])


def rmsprop(w: Array, g: Array, s: Slots, t: int, lr: float, alpha=0.99, eps=1e-8):
    s["v"] = alpha * s.get("v", 0.0) + (1 - alpha) * g**2
    return w - lr * g / (np.sqrt(s["v"]) + eps)


def adagrad(w: Array, g: Array, s: Slots, t: int, lr: float, eps=1e-8):
    s["v"] = s.get("v", 0.0) + g**2
    return w - lr * g / (np.sqrt(s["v"]) + eps)


def adadelta(w: Array, g: Array, s: Slots, t: int, lr: float, rho=0.9, eps=1e-6):
    old_u = s.get("u", np.zeros_like(w))
    s["v"] = rho * s.get("v", 0.0) + (1 - rho) * g**2
    d = np.sqrt((old_u + eps) / (s["v"] + eps)) * g
    s["u"] = rho * old_u + (1 - rho) * d**2
    return w - lr * d


def adam(w: Array, g: Array, s: Slots, t: int, lr: float, betas=(0.9, 0.999), eps=1e-8, bias_correction=False):
    s["m"] = betas[0] * s.get("m", 0.0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0.0) + (1 - betas[1]) * g**2
    m, v = s["m"], s["v"]
    if bias_correction:
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w - lr * m / (np.sqrt(v) + eps)


def adamw(w: Array, g: Array, s: Slots, t: int, lr: float, weight_decay=0.01, **rest: Any):
    return adam(w - lr * weight_decay * w, g, s, t, lr, **rest)


def adamax(w: Array, g: Array, s: Slots, t: int, lr: float, betas=(0.9, 0.999), eps=1e-8):
    s["m"] = betas[0] * s.get("m", 0.0) + (1 - betas[0]) * g
    s["v"] = np.maximum(betas[1] * s.get("v", 0.0), np.abs(g))
    return w - lr * s["m"] / (s["v"] + eps)


def lion(w: Array, g: Array, s: Slots, t: int, lr: float, betas=(0.9, 0.99), weight_decay=0.0):
    old = s.get("m", 0.0)
    s["m"] = betas[1] * old + (1 - betas[1]) * g
    return w - lr * weight_decay * w - lr * np.sign(betas[0] * old + (1 - betas[0]) * g)


def root_mean_square(x: Array) -> float:
    return math.sqrt(np.mean(x**2))


def adafactor(
    w: Array, g: Array, s: Slots, t: int, lr: float | None = None, eps=(1e-30, 1e-3), clip_threshold=1.0,
    decay_rate=-0.8, beta_1=None, weight_decay=0.0, scale_parameter=True, relative_step=None, warmup_init=False,
):  # fmt: skip
    rho = lr if lr is not None else min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
    rho *= max(eps[1], root_mean_square(w)) if scale_parameter else 1.0
    beta2 = 1 - t**decay_rate
    squares = g**2 + eps[0]
    if w.ndim >= 2:
        s["row"] = beta2 * s.get("row", 0.0) + (1 - beta2) * squares.mean(axis=-1)
        s["col"] = beta2 * s.get("col", 0.0) + (1 - beta2) * squares.mean(axis=-2)
        of_row = s["row"] / s["row"].mean(axis=-1, keepdims=True)
        update = g / np.sqrt(of_row[..., :, None] * s["col"][..., None, :])
    else:
        s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * squares
        update = g / np.sqrt(s["v"])
    update = rho * update / max(1.0, root_mean_square(update) / clip_threshold)
    if beta_1 is not None:
        s["m"] = beta_1 * s.get("m", 0.0) + (1 - beta_1) * update
        update = s["m"]
    return w - weight_decay * rho * w - update


def orthogonalized(x: Array, steps: int) -> Array:
    """Newton-Schulz as its author gives it: on the wide orientation, with X X'."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def muon(
    w: Array, g: Array, s: Slots, t: int, lr: float, momentum=0.95, weight_decay=0.01, nesterov=True, ns_steps=5,
    ns_dtype=None,
):  # fmt: skip
    assert ns_dtype is None
    g = g + weight_decay * w
    s["v"] = momentum * s.get("v", 0.0) + (1 - momentum) * g
    update = (1 - momentum) * g + momentum * s["v"] if nesterov else s["v"]
    if w.ndim < 2:
        return w - lr * update
    update = orthogonalized(update.reshape(w.shape[0], -1), ns_steps).reshape(w.shape)
    return w - lr * math.sqrt(max(1.0, w.shape[-2] / w.shape[-1])) * update


FORMULAS: dict[str, Callable[..., Array]] = {
    "SGD": sgd, "RMSprop": rmsprop, "Adagrad": adagrad, "AdaDelta": adadelta, "Adam": adam, "AdamW": adamw,
    "Adamax": adamax, "Lion": lion, "Adafactor": adafactor, "Muon": muon,
}  # fmt: skip


class Independent:
    """One parameter and its slots in float64, moved by the formulas above."""

    def __init__(self, cls: type, kwargs: Kwargs, w: Array) -> None:
        self.formula, self.t, self.slots = FORMULAS[cls.__name__], 0, {}
        self.kwargs = {"lr" if name == "learning_rate" else name: value for name, value in kwargs.items()}
        self.w = w.astype(np.float64)

    def step(self, g: Array, **changed: Any) -> None:
        self.t += 1
        self.w = self.formula(self.w, g.astype(np.float64), self.slots, self.t, **self.kwargs | changed)


def assert_follows(cls: type, kwargs: Kwargs, dtype: str, rtol: float, atol: float) -> None:
    """Parameters and slots of all shapes stay close to the formulas, over several steps."""
    rng = np.random.default_rng(7)
    opt = cls(**kwargs)
    params = {str(shape): rng.standard_normal(shape).astype(dtype) for shape in SHAPES}
    params = {name: np.array(w) for name, w in params.items()}
    expected = {name: Independent(cls, kwargs, w) for name, w in params.items()}
    for _ in range(STEPS):
        grads = {name: np.array(rng.standard_normal(w.shape).astype(dtype)) for name, w in params.items()}
        opt.apply_gradients(grads, params)
        for name, one in expected.items():
            one.step(grads[name])
            np.testing.assert_allclose(params[name], one.w, rtol, atol, err_msg=name)
            assert opt.state[name].keys() == one.slots.keys()
            for slot, value in one.slots.items():
                assert opt.state[name][slot].dtype == dtype
                np.testing.assert_allclose(opt.state[name][slot], value, rtol, atol, err_msg=f"{name} {slot}")


def test_every_public_optimizer_has_a_row_and_a_formula():
    names = {cls.__name__ for cls in public_optimizers()}
    assert names == FAMILIES.keys() == FORMULAS.keys()
    assert all(FAMILIES.values())


def test_the_rows_set_every_hyperparameter_of_every_family():
    for cls in public_optimizers():
        fields = set(inspect.signature(cls).parameters) - OPTIONS
        assert fields == {name for row in FAMILIES[cls.__name__] for name in row}, cls


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_float64_parameters_follow_the_formulas(cls, kwargs):
    assert_follows(cls, kwargs, "float64", rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_float32_parameters_follow_the_formulas_within_rounding(cls, kwargs):
    # Newton-Schulz amplifies the rounding of its matrix products.
    rtol, atol = (1e-5, 1e-5) if cls is gs.Muon else (2e-6, 5e-7)
    assert_follows(cls, kwargs, "float32", rtol, atol)


@pytest.mark.parametrize(("cls", "kwargs"), [row for row in configurations() if "learning_rate" in row.values[1]])
def test_a_schedule_gives_each_step_its_own_rate(cls, kwargs):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((4, 3))
    opt = cls(**kwargs | {"learning_rate": lambda step: kwargs["learning_rate"] / (1 + step)})
    expected, params = Independent(cls, kwargs, w), {"w": w}
    for step in range(STEPS):
        g = rng.standard_normal(w.shape)
        opt.apply_gradients({"w": g}, params)
        expected.step(g, lr=kwargs["learning_rate"] / (1 + step))
        np.testing.assert_allclose(w, expected.w, 1e-12, 1e-13)


@pytest.mark.parametrize(("rows", "columns"), [(128, 32), (32, 128), (200, 70), (65, 1000)])
@pytest.mark.parametrize("cls", [gs.Adafactor, gs.Muon])
def test_matrices_of_several_blocks_follow_the_formulas(cls, rows, columns):
    rng = np.random.default_rng(5)
    w = rng.standard_normal((rows, columns))
    expected, params, opt = Independent(cls, {"learning_rate": 0.1}, w), {"w": w}, cls(0.1)
    for _ in range(2):
        g = rng.standard_normal(w.shape)
        opt.apply_gradients({"w": g}, params)
        expected.step(g)
    np.testing.assert_allclose(w, expected.w, 1e-11, 1e-12)


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty_parameters_are_ordinary(cls, kwargs, shape):
    opt, params = cls(**kwargs), {"empty": np.zeros(shape, np.float32), "w": np.ones(3, np.float32)}
    for _ in range(2):
        opt.apply_gradients({"empty": np.zeros(shape, np.float32), "w": np.ones(3, np.float32)}, params)
    assert params["empty"].shape == shape
    assert (params["w"] < 1).all()
    assert all(np.isfinite(slot).all() for slot in opt.state["empty"].values())
