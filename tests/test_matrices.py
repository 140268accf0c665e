"""Proves what rules with statistics of rows, columns and matrices compute, against the same rule on float64 arrays."""

from typing import Any

import numpy as np
import pytest

import gradstep as gs

SHAPES = [
    (1, 1), (5, 7), (1, 300), (300, 1), (65, 16), (64, 33), (129, 4), (131, 100), (70, 513),
    (3, 70, 50), (2, 2, 130, 21), (700, 64), (9, 5000),
]  # fmt: skip
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@gs.rule
def Staged(w, g, *, rate=0.1):
    """Every kind of value between sweeps, each needed by others and by the sweep after it; conditions too."""
    row, col = gs.mean(g * g, axis=-1), gs.mean(gs.abs(g), axis=-2)
    size = gs.rms(w)
    of_rows = gs.mean(row, axis=-2)
    of_columns = gs.mean(gs.maximum(col - 0.5 * of_rows, 0.1), axis=-1)
    highest = gs.where(row > of_rows, row, of_columns)
    again = gs.mean(highest * size, axis=-2)
    u = g * gs.sqrt(highest) + gs.where(col > of_columns, g, w) * again
    u = u + gs.where(of_rows > of_columns, w, 2.0 * w) * gs.where(size > 1.0, size, 0.5)
    u = u + gs.where(row > of_rows, g, 0.0)
    second = gs.mean(u * col, axis=-1)
    beside = gs.mean(gs.sqrt(col) * gs.mean(second, axis=-2), axis=-1)
    scale = 1 / (1 + gs.norm(u) * gs.where(gs.mean(u) > 0.0, 1.5 * size, size))
    return w - rate * scale * u * (1 + gs.abs(second) * col + beside)


def random(shape: tuple[int, ...], seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@both_dtypes
def test_values_between_sweeps(dtype):
    """All shapes in one step, so that each tensor's values must be its own."""
    params = {str(shape): random(shape, i).astype(dtype) for i, shape in enumerate(SHAPES)}
    grads = {str(shape): random(shape, 100 + i).astype(dtype) for i, shape in enumerate(SHAPES)}
    expected = {n: Staged.rule(params[n].astype(np.float64), grads[n].astype(np.float64), rate=0.1) for n in params}
    Staged().apply_gradients(grads, params)
    for name, value in expected.items():
        tolerance = 3e-6 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(params[name], value, tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_is_within_a_few_roundings_of_float64(shape):
    """Everything is summed in float64, and what is left are the roundings on the way of one element."""
    g, w = random(shape, 1), np.zeros(shape, np.float32)
    opt = gs.Adafactor(1.0, scale_parameter=False)
    opt.apply_gradients({"w": g}, {"w": w})
    squares = g.astype(np.float64) ** 2 + 1e-30
    row, col = squares.mean(-1, keepdims=True), squares.mean(-2, keepdims=True)
    update = g / np.sqrt(row / row.mean(-2, keepdims=True) * col)
    update /= max(1.0, np.sqrt(np.mean(update**2)))
    assert (np.abs(w + update) <= 4e-7 * np.abs(update)).all()
    assert np.sqrt(np.mean((w + update) ** 2) / np.mean(update**2)) < 1.2e-7
    for slot, exact in (("row", row), ("col", col)):
        np.testing.assert_allclose(opt.state["w"][slot], exact.reshape(opt.state["w"][slot].shape), 1.2e-7)


@both_dtypes
@pytest.mark.parametrize("scale", [1e-18, 1e5, 1e18])
def test_rows_and_columns_without_gradients_stay(scale, dtype):
    """As of an embedding, whatever the size of the gradients of others: zero times infinity must not come up."""
    g = scale * random((40, 30), 1).astype(dtype)
    g[3], g[:, 7] = 0, 0
    w = np.ones((40, 30), dtype)
    gs.Adafactor(0.1).apply_gradients({"w": g}, {"w": w})
    assert np.isfinite(w).all()
    assert (w[3] == 1).all() and (w[:, 7] == 1).all()
    assert (np.delete(np.delete(w, 3, 0), 7, 1) != 1).all()


def test_squares_beyond_float32_are_summed():
    g = np.array([[3e19, 1.0], [1.0, 1.0]], np.float32)
    opt = gs.Adafactor(0.1)
    opt.apply_gradients({"w": np.array([[1e-24, 1e-24]], np.float32)}, {"w": np.ones((1, 2), np.float32)})
    assert opt.state["w"]["row"][0] == np.float32(1e-30)
    opt = gs.Adafactor(0.1)
    opt.apply_gradients({"w": g[:, :1] / 2}, {"w": np.ones((2, 1), np.float32)})
    np.testing.assert_allclose(opt.state["w"]["col"], [1.125e38], 1e-6)
