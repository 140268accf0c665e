"""`grad_scale` of `apply_gradients`: gradients multiplied as they are read, on every array library."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from everywhere import (
    MAKERS,
    SHAPES,
    arrays,
    both_dtypes,
    double_precision,  # noqa: F401
    functional,
    in_place,
    on_all,
)
from families import ELEMENTWISE_FAMILIES, assert_same_bits, configurations, in_both_dtypes


def made(make: Callable[[Any], Any], tree: dict[str, Any]) -> dict[str, Any]:
    return {name: make(array) for name, array in tree.items()}


def host(array: Any) -> Any:
    """A copy as a NumPy array."""
    return array.numpy().copy() if isinstance(array, torch.Tensor) else np.array(array)


def as_numpy(tree: Any) -> dict[str, Any]:
    return {name: host(array) for name, array in tree.items()}


def norm_of(tree: dict[str, Any]) -> float:
    return math.sqrt(math.fsum(x * x for array in tree.values() for x in array.ravel().tolist()))


def trained(opt: Any, make: Callable[[Any], Any], dtype: str, scales: list[float], *, before: bool) -> dict[str, Any]:
    """Steps with these factors, or with gradients that NumPy has multiplied with them before."""
    params = made(make, arrays(0, dtype))
    for seed, scale in enumerate(scales, start=1):
        grads = arrays(seed, dtype)
        if before:
            scaled = {name: array * array.dtype.type(scale) for name, array in grads.items()}
            opt.apply_gradients(made(make, scaled), params)
        else:
            opt.apply_gradients(made(make, grads), params, grad_scale=scale)
    return as_numpy(params)


@in_place
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations()))
def test_every_family_gives_the_bits_of_gradients_scaled_before(cls: Any, kwargs: Any, dtype: str, make: Any) -> None:
    scales = [0.3, 1.0, -7.0, 1 / 1024, 0.0]
    ours, expected = (trained(cls(**kwargs), make, dtype, scales, before=before) for before in (False, True))
    for name in SHAPES:
        assert_same_bits(ours[name], expected[name], name)


@functional
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations(*ELEMENTWISE_FAMILIES)))
def test_it_is_within_tolerance_on_arrays_that_never_change(cls: Any, kwargs: Any, dtype: str, make: Any) -> None:
    scales = [0.3, 1.0, -7.0]
    ours = trained(cls(**kwargs), make, dtype, scales, before=False)
    expected = trained(cls(**kwargs), MAKERS["NumPy"], dtype, scales, before=True)
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5 if dtype == "float32" else 1e-13, atol=1e-6)


@on_all
@both_dtypes
@pytest.mark.parametrize("scale", [0.25, -3.0])
def test_clipping_goes_by_the_scaled_norm(make: Any, dtype: str, scale: float) -> None:
    opt, grads, params = gs.SGD(1.0, clip_norm=2.0), arrays(1, dtype), made(make, arrays(0, dtype))
    opt.apply_gradients(made(make, grads), params, grad_scale=scale)
    norm = norm_of(grads) * abs(scale)
    assert norm > 2.0  # else nothing is clipped
    assert opt.report.grad_norm == pytest.approx(norm, rel=1e-6)
    for name, w in arrays(0, dtype).items():
        expected = w - (scale * 2.0 / (norm + 1e-6)) * grads[name].astype(np.float64)
        np.testing.assert_allclose(host(params[name]), expected, rtol=2e-6, atol=2e-6)


@on_all
def test_a_norm_within_the_limit_only_once_scaled_is_not_clipped(make: Any) -> None:
    opt, params = gs.SGD(1.0, clip_norm=2.0), {"w": make(np.zeros(1, np.float32))}
    opt.apply_gradients({"w": make(np.array([1024.0], np.float32))}, params, grad_scale=1 / 1024)
    assert (opt.report.grad_norm, host(params["w"]).tolist()) == (1.0, [-1.0])


@in_place
def test_the_factors_are_one_in_float64(make: Any) -> None:
    opt, grads = gs.SGD(1.0, clip_norm=0.7), arrays(1)
    params, expected = made(make, arrays(0)), arrays(0)
    opt.apply_gradients(made(make, grads), params, grad_scale=1 / 3)
    factor = 1 / 3 * (0.7 / (opt.report.grad_norm + 1e-6))
    for name, w in expected.items():
        assert_same_bits(host(params[name]), w - grads[name] * np.float32(factor), name)


@on_all
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_looks_at_the_gradients_themselves(make: Any, bad: float) -> None:
    opt = gs.SGD(1.0, nonfinite="skip")
    params, grads = {"w": make(np.ones(2, np.float32))}, {"w": make(np.array([1, bad], np.float32))}
    opt.apply_gradients(grads, params, grad_scale=0.0)
    assert not opt.report.applied
    assert opt.report.culprits == ("w",)
    opt.nonfinite = "raise"
    with pytest.raises(gs.NonFiniteGradientError, match="w"):
        opt.apply_gradients(grads, params, grad_scale=0.5)
    assert host(params["w"]).tolist() == [1.0, 1.0]


@on_all
def test_a_multi_optimizer_scales_for_all_children(make: Any) -> None:
    def opt() -> gs.MultiOptimizer:
        return gs.MultiOptimizer([gs.SGD(0.5), gs.SGD(0.25, momentum=0.5)], ["vector"])

    ours = trained(opt(), make, "float32", [0.5, 2.0], before=False)
    expected = trained(opt(), MAKERS["NumPy"], "float32", [0.5, 2.0], before=True)
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-6, atol=1e-6)


@on_all
def test_scaling_may_start_and_stop(make: Any) -> None:
    opt, params = gs.SGD(1.0), {"w": make(np.zeros(1, np.float32))}
    for scale, expected in ((1.0, -1.0), (0.5, -1.5), (1, -2.5), (0.25, -2.75), (0.25, -3.0)):
        opt.apply_gradients({"w": make(np.ones(1, np.float32))}, params, grad_scale=scale)
        assert host(params["w"]).tolist() == [expected]


@functional
def test_a_new_factor_never_compiles_anew(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstep.step import evaluate

    made_anew: list[int] = []
    outputs = evaluate.Evaluation.outputs

    def counted(self: Any) -> Any:
        made_anew.append(1)
        return outputs(self)

    monkeypatch.setattr(evaluate.Evaluation, "outputs", counted)
    for options in ({}, {"clip_norm": 1.0}):
        opt, params = gs.AdamW(0.1, **options), {"w": make(np.ones(31, np.float32))}
        grads = {"w": make(np.ones(31, np.float32))}
        opt.apply_gradients(grads, params, grad_scale=0.5)
        compiled = len(made_anew)
        assert compiled > 0
        for scale in (0.25, 3.0, -1.0, 0):
            opt.apply_gradients(grads, params, grad_scale=scale)
        assert len(made_anew) == compiled


def test_the_program_without_scaling_is_the_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    opt = gs.AdamW(0.1)
    gs.explain(opt)
    plain = capsys.readouterr().out
    params = {"w": np.ones(3, np.float32)}
    opt.apply_gradients({"w": np.ones(3, np.float32)}, params, grad_scale=1)
    assert opt._plan.plan.batches[0].program is opt._leaf.program("w", 1)  # pyright: ignore
    opt.apply_gradients({"w": np.ones(3, np.float32)}, params, grad_scale=2)
    assert "grad_scale" in repr(opt._plan.plan.batches[0].program.scalars.spelled)  # pyright: ignore
    gs.explain(opt)
    assert capsys.readouterr().out == plain
    assert "grad_scale" not in plain


@on_all
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}], ids=["plain", "clipped"])
def test_a_factor_that_cannot_be_used_changes_nothing(make: Any, options: Any) -> None:
    opt, params = gs.SGD(gs.exponential_decay(1.0, 0.5), **options), {"w": make(np.ones(2, np.float32))}
    grads = {"w": make(np.ones(2, np.float32))}
    cases: list[tuple[Any, Any, str]] = [
        (math.nan, gs.NonFiniteScalarError, "grad_scale must be a finite number, got nan; .* pass 1 / s"),
        (math.inf, gs.NonFiniteScalarError, "grad_scale must be a finite number, got inf"),
        (10**400, gs.NonFiniteScalarError, "grad_scale must be a finite number"),
        ("1", gs.ArgumentTypeError, r"grad_scale must be a number, got '1' \(str\)"),
        (True, gs.ArgumentTypeError, "grad_scale must be a number, got True"),
        (None, gs.ArgumentTypeError, "grad_scale must be a number, got None"),
        (1e39, gs.OutOfRangeError, "grad_scale must be finite in float32"),
    ]
    for value, error, message in cases:
        with pytest.raises(error, match=message):
            opt.apply_gradients(grads, params, grad_scale=value)
    assert (opt.step, opt.report, host(params["w"]).tolist()) == (0, None, [1.0, 1.0])
    opt.apply_gradients(grads, params, grad_scale=np.float32(0.0))
    assert (opt.step, host(params["w"]).tolist()) == (1, [1.0, 1.0])


def test_a_factor_beyond_float32_serves_float64() -> None:
    params = {"w": np.zeros(1)}
    gs.SGD(1.0).apply_gradients({"w": np.array([1e-39])}, params, grad_scale=1e39)
    assert params["w"].tolist() == pytest.approx([-1.0])


def test_gradients_are_not_written_and_not_copied() -> None:
    import tracemalloc

    opt, params, grads = gs.SGD(1.0), {"w": np.zeros(1 << 20, np.float32)}, {"w": np.ones(1 << 20, np.float32)}
    opt.apply_gradients(grads, params, grad_scale=0.5)
    tracemalloc.start()
    opt.apply_gradients(grads, params, grad_scale=0.25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18
    assert (grads["w"] == 1).all()
    assert (params["w"] == -0.75).all()


def test_grad_scale_is_a_reserved_name() -> None:
    with pytest.raises(gs.RuleError, match="grad_scale is a reserved name"):

        @gs.rule
        def Mine(w, g, *, grad_scale):  # pyright: ignore
            return w - grad_scale * g
