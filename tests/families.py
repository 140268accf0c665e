"""The table of the families: one row of test hyperparameters for each public optimizer.

A new optimizer gets a row here; `test_families.py` fails until it has one.
"""

import inspect
from typing import Any

import numpy as np
import pytest

import gradstep as gs

Kwargs = dict[str, Any]

FAMILIES: dict[str, list[Kwargs]] = {
    "SGD": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "weight_decay": 0.2},
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2},
        {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    ],
    "RMSprop": [{"learning_rate": 0.01}, {"learning_rate": 0.01, "alpha": 0.8, "eps": 1e-3}],
    "Adagrad": [{"learning_rate": 0.1}, {"learning_rate": 0.1, "eps": 1e-3}],
    "AdaDelta": [{"learning_rate": 1.0}, {"learning_rate": 0.7, "rho": 0.8, "eps": 1e-3}],
    "Adam": [
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "betas": (0.8, 0.95), "eps": 1e-3},
        {"learning_rate": 0.01, "bias_correction": True},
    ],
    "AdamW": [
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "weight_decay": 0, "eps": 0},
        {"learning_rate": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3, "bias_correction": True},
    ],
    "Adamax": [{"learning_rate": 0.01}, {"learning_rate": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}],
    "Lion": [{"learning_rate": 0.01}, {"learning_rate": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3}],
    "Adafactor": [
        {},
        {"relative_step": True, "warmup_init": True},
        {"scale_parameter": False},
        {"beta_1": 0.9, "weight_decay": 0.1},
        {"learning_rate": 0.05, "relative_step": False, "decay_rate": -0.5, "clip_threshold": 0.5},
        {"learning_rate": 0.05, "eps": (1e-3, 0.1), "scale_parameter": False, "weight_decay": 0.1},
        {"learning_rate": 0.05, "eps": (1e-3, 2.0), "beta_1": 0.5},
    ],
    "Muon": [
        {"learning_rate": 0.02},
        {"learning_rate": 0.02, "momentum": 0.8, "weight_decay": 0, "nesterov": False},
        {"learning_rate": 0.02, "weight_decay": 0.2, "ns_steps": 2, "ns_dtype": None},
    ],
}

OPTIONS = set(inspect.signature(gs.Lion).parameters) - set(gs.Lion(1.0).hyperparameters)  # of every family

MATRIX_FAMILIES = (gs.Adafactor, gs.Muon)  # their rules look at more than one element at a time


def public_optimizers() -> list[type[gs.Optimizer]]:
    """Every optimizer class with a rule in gradstep's public list."""
    public = [getattr(gs, name) for name in gs.__all__]
    return [cls for cls in public if isinstance(cls, type) and issubclass(cls, gs.Optimizer) and hasattr(cls, "rule")]


def configurations(*families: type[gs.Optimizer]) -> list[Any]:
    """Every row as `(class, arguments)`, or those of some families, with readable ids for pytest."""
    return [
        pytest.param(cls, kwargs, id=f"{cls.__name__}({', '.join(f'{k}={v}' for k, v in kwargs.items())})")
        for cls in public_optimizers()
        for kwargs in FAMILIES.get(cls.__name__, [])
        if cls in families or not families
    ]


def in_both_dtypes(rows: list[Any]) -> list[Any]:
    """Rows of `configurations` with a dtype: all in float32, and the last of each family in float64 too."""
    pairs = [(row, "float32") for row in rows] + [(row, "float64") for row in last_of_each(rows)]
    return [pytest.param(*row.values, dtype, id=f"{row.id}-{dtype}") for row, dtype in pairs]


def last_of_each(rows: list[Any]) -> list[Any]:
    """Of rows of `configurations`, the last one of each family."""
    return list({row.values[0]: row for row in rows}.values())


ELEMENTWISE_FAMILIES = [cls for cls in public_optimizers() if cls not in MATRIX_FAMILIES]


def slot_names(cls: Any) -> list[str]:
    """The slots that a rule may keep: its positional arguments after `w` and `g`."""
    parameters = inspect.signature(cls.rule).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][2:]


class Reference:
    """The definition of what is right: the rule called on one parameter as plain NumPy arrays of its dtype."""

    def __init__(self, opt: Any, w: Any) -> None:
        self.opt, self.t = opt, 0
        self.w = np.array(w)
        self.slots: dict[str, Any] = {slot: np.zeros_like(self.w) for slot in slot_names(opt)}

    def step(self, g: Any) -> None:
        """One step with the hyperparameters that the optimizer has now."""
        self.t += 1
        arguments = {name: getattr(self.opt, name) for name in self.opt.hyperparameters}
        if "t" in inspect.signature(self.opt.rule).parameters:
            arguments["t"] = self.t
        with np.errstate(all="ignore"):
            gradient = np.asarray(g).astype(self.w.dtype)
            result = type(self.opt).rule(self.w, gradient, *self.slots.values(), **arguments)
        self.w, *slots = result if isinstance(result, tuple) else (result,)
        self.slots = dict(zip(self.slots, slots, strict=True))


def assert_same_bits(found: Any, expected: Any, what: str = "") -> None:
    """Equal shape, dtype and bits; every NaN is like every other."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    same = (found == expected) & (np.signbit(found) == np.signbit(expected)) | np.isnan(found) & np.isnan(expected)
    if not same.all():
        wrong = np.argwhere(~np.atleast_1d(same))
        at = tuple(wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {found.size} elements differ, the first at {at}: "
            f"{np.atleast_1d(found)[at]!r} instead of {np.atleast_1d(expected)[at]!r}"
        )
