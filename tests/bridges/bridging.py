"""What the tests of bridges share: parameters, gradients, and steps of gradstep's optimizers from a state dict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import gradstep as gs

Named = dict[str, Any]

SHAPES = {"layers.0.weight": (4, 3), "layers.0.bias": (4,), "layers.1.weight": (2, 4), "scale": ()}
BEFORE, AFTER = 4, 3
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}


def params(seed: int = 0, shapes: Mapping[str, Sequence[int]] = SHAPES) -> Named:
    """Parameters of NumPy, the same for everybody."""
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


def grads(step: int, shapes: Mapping[str, Sequence[int]] = SHAPES) -> Named:
    """The gradients of a step, which do not depend on the parameters."""
    return params(100 + step, shapes)


def continued(
    opt: gs.Optimizer, weights: Named, first: int, last: int, array: Callable[[Any], Any] = np.array
) -> Named:
    """Take the steps from `first` to `last` on copies of the weights, in arrays of some library."""
    held = {name: array(weight) for name, weight in weights.items()}
    for step in range(first, last):
        opt.apply_gradients({name: array(g) for name, g in grads(step).items() if name in held}, held)
    return {name: np.asarray(weight).copy() for name, weight in held.items()}


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], **tolerance: float) -> None:
    """The same names, and nearly the same numbers."""
    assert list(found) == list(expected)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], **{**CLOSE, **tolerance}, err_msg=name)
