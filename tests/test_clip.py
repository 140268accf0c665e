"""Clipping by the global norm, before a step or within one, and what becomes of gradients that are not finite."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradstep as gs
from families import assert_same_bits, configurations


def norm_of(*arrays: Any) -> float:
    """The Euclidean norm by exact summation."""
    return math.sqrt(math.fsum(float(x) ** 2 for array in arrays for x in np.asarray(array).flat))


def tree(seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (40, 33), "vector": (7,), "scalar": (), "empty": (0, 3), "stack": (2, 3, 4)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def as_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def copied(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array.copy() for name, array in arrays.items()}


# clip_grad_norm


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [copied, as_tensors], ids=["NumPy", "PyTorch"])
def test_gradients_are_scaled_by_max_norm_over_norm(make: Any, dtype: Any) -> None:
    plain = tree(dtype=dtype)
    grads = make(plain)
    clipped, norm = gs.clip_grad_norm(grads, 2.0)
    assert type(norm) is float
    assert norm == pytest.approx(norm_of(*plain.values()), rel=1e-15)
    scale = dtype(2.0 / (norm + 1e-6))
    for name, array in plain.items():
        assert type(clipped[name]) is type(grads[name])
        assert np.asarray(clipped[name]).dtype == dtype
        assert clipped[name].shape == grads[name].shape
        assert (np.asarray(clipped[name]) == array * scale).all()
        assert (np.asarray(grads[name]) == array).all()
        assert clipped[name] is not grads[name]
    assert norm_of(*(np.asarray(array) for array in clipped.values())) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("make", [copied, as_tensors], ids=["NumPy", "PyTorch"])
def test_gradients_within_the_bound_are_copied_unchanged(make: Any) -> None:
    grads = make(tree())
    clipped, norm = gs.clip_grad_norm(grads, 1e6)
    for name, array in grads.items():
        assert bool((clipped[name] == array).all())
        clipped[name][...] = 7.0
        assert array.shape == (0, 3) or bool((array != 7.0).any())
    assert gs.clip_grad_norm(grads, 1e6)[1] == norm


def test_a_zero_dimensional_gradient_stays_an_array_that_can_be_stepped() -> None:
    clipped, norm = gs.clip_grad_norm({"w": np.array(3.0, np.float32)}, 1.0)
    assert type(clipped["w"]) is np.ndarray
    assert clipped["w"].shape == ()
    assert norm == 3.0
    params = {"w": np.array(1.0, np.float32)}
    gs.SGD(1.0).apply_gradients(clipped, params)
    assert params["w"] == pytest.approx(0.0, abs=1e-5)


def test_the_norm_accumulates_in_float64() -> None:
    grads = {"large": np.full(1, 1e8, np.float32), "small": np.ones(1_000_000, np.float32)}
    assert gs.clip_grad_norm(grads, 1.0)[1] == math.sqrt(1e16 + 1e6)
    many = np.full(3_000_001, 0.1, np.float32)
    assert gs.clip_grad_norm({"w": many}, 1.0)[1] == pytest.approx(
        math.sqrt(3_000_001) * float(np.float32(0.1)), rel=1e-14
    )


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e300, 5e-324, 1.7e308])
@pytest.mark.parametrize("make", [lambda x: x, torch.from_numpy], ids=["NumPy", "PyTorch"])
def test_squares_of_float64_neither_overflow_nor_vanish(make: Any, size: float) -> None:
    norm = gs.clip_grad_norm({"a": make(np.array([0.0, size])), "b": make(np.array([[-0.0]]))}, 1.0)[1]
    assert norm == pytest.approx(size, rel=1e-15)
    both = gs.clip_grad_norm({"a": make(np.array([3.0]) * (size / 5)), "b": make(np.array([4.0]) * (size / 5))}, 1.0)[1]
    assert both == pytest.approx(size, rel=1e-14) or size == 5e-324


def test_a_norm_beyond_float64_is_infinite() -> None:
    clipped, norm = gs.clip_grad_norm({"w": np.full(4, 1.7e308)}, 1.0)
    assert norm == math.inf
    assert np.isnan(clipped["w"]).all()


def test_denormals_of_float32_count() -> None:
    tiny = np.full(4, 1e-45, np.float32)
    assert gs.clip_grad_norm({"w": tiny}, 1.0)[1] == 2 * float(tiny[0])


@pytest.mark.parametrize("grads", [{}, [], {"w": None}, {"w": np.zeros((0, 2), np.float32)}, {"w": np.zeros(3)}])
def test_the_norm_of_nothing_is_zero(grads: Any) -> None:
    clipped, norm = gs.clip_grad_norm(grads, 0.0)
    assert norm == 0.0
    assert repr(clipped) == repr(grads)


def test_a_bound_of_zero_leaves_zeros() -> None:
    clipped, norm = gs.clip_grad_norm({"w": np.array([3.0, -4.0])}, 0)
    assert norm == 5.0
    assert (clipped["w"] == 0).all()


def test_trees_come_back_in_their_own_shape() -> None:
    grads = {"a": [np.array([3.0]), None, (np.array([4.0]),)], 5: {"b": None, "c": {}}, "d": []}
    clipped, norm = gs.clip_grad_norm(grads, 5.0 + 1e-6)
    assert norm == 5.0
    assert repr(clipped) == repr(grads)
    assert clipped is not grads
    assert clipped["a"] is not grads["a"]
    assert clipped["a"][0] is not grads["a"][0]


def test_names_that_meet_are_an_error_here_too() -> None:
    with pytest.raises(gs.DuplicateNameError):
        gs.clip_grad_norm({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, 1.0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2],
        lambda x: x[::-1, ::3],
        lambda x: np.broadcast_to(x[0], (4, 33)),
        np.asfortranarray,
    ],
)
def test_views_are_measured_as_they_read(view: Any) -> None:
    array = view(tree()["matrix"])
    clipped, norm = gs.clip_grad_norm({"w": array}, 1.0)
    assert norm == pytest.approx(norm_of(array), rel=1e-15)
    assert (clipped["w"] == array * np.float32(1.0 / (norm + 1e-6))).all()
    assert gs.clip_grad_norm({"w": np.ascontiguousarray(array)}, 1.0)[1] == pytest.approx(norm, rel=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_spreads_as_nan(value: float) -> None:
    clipped, norm = gs.clip_grad_norm({"a": np.array([1.0, value]), "b": np.ones(2, np.float32)}, 1.0)
    assert not math.isfinite(norm)
    assert np.isnan(clipped["a"]).all()
    assert np.isnan(clipped["b"]).all()


@pytest.mark.parametrize(
    ("max_norm", "error"),
    [
        (-5e-324, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_the_bound_is_finite_and_not_negative(max_norm: Any, error: Any) -> None:
    with pytest.raises(error, match="max_norm") as caught:
        gs.clip_grad_norm({"w": np.ones(2)}, max_norm)
    assert isinstance(caught.value, gs.GradstepError)


@pytest.mark.parametrize("value", [np.ones(2, int), np.ones(2, np.uint8), 1.0, "w", torch.ones(2, dtype=torch.int32)])
def test_what_is_no_gradient_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="grads") as caught:
        gs.clip_grad_norm({"w": value}, 1.0)
    assert isinstance(caught.value, gs.GradstepError)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_float32_beside_extreme_float64_does_not_disturb_the_norm(size: float) -> None:
    grads = {"wide": np.array([size]), "narrow": np.zeros(2, np.float32)}
    assert gs.clip_grad_norm(grads, 1.0)[1] == pytest.approx(size, rel=1e-15)


def test_gradients_of_two_dtypes_share_one_norm() -> None:
    clipped, norm = gs.clip_grad_norm({"a": np.array([3.0], np.float32), "b": np.array([4.0])}, 1.0)
    assert norm == 5.0
    assert (clipped["a"].dtype, clipped["b"].dtype) == (np.float32, np.float64)


@given(
    st.lists(
        hnp.arrays(
            st.sampled_from([np.float32, np.float64]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
            elements=st.floats(-(2.0**100), 2.0**100, width=32),
        ),
        max_size=4,
    ),
    st.floats(0, 1e30),
)
def test_the_norm_and_the_scale_are_right_for_any_gradients(arrays: Any, max_norm: float) -> None:
    before = [array.copy() for array in arrays]
    clipped, norm = gs.clip_grad_norm(arrays, max_norm)
    assert norm == pytest.approx(norm_of(*arrays), rel=1e-13, abs=0)
    scale = min(max_norm / (norm + 1e-6), 1.0)
    for array, result, copy in zip(arrays, clipped, before, strict=True):
        assert (result == array * array.dtype.type(scale)).all()
        assert (array == copy).all()


# clip_norm


@pytest.mark.parametrize("max_norm", [0.5, 1e9, 0.0])
@pytest.mark.parametrize("make", [copied, as_tensors], ids=["NumPy", "PyTorch"])
@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_clipping_within_the_step_equals_clipping_before_it(cls: Any, kwargs: Any, make: Any, max_norm: float) -> None:
    inside, before = cls(**kwargs, clip_norm=max_norm), cls(**kwargs)
    params, others = make(tree()), make(tree())
    for seed in (1, 2):
        grads = make(tree(seed))
        clipped, norm = gs.clip_grad_norm(grads, max_norm)
        inside.apply_gradients(grads, params)
        before.apply_gradients(clipped, others)
        assert inside.report.grad_norm == norm
        for name, array in tree(seed).items():
            assert_same_bits(grads[name], array, name)
    for name in params:
        assert_same_bits(params[name], others[name], name)


def test_views_are_clipped_alike() -> None:
    opt, plain = gs.Adam(0.1, clip_norm=1.0), gs.Adam(0.1, clip_norm=1.0)
    g = tree(1)["matrix"]
    params, others = {"w": np.zeros((20, 33), np.float32)}, {"w": np.zeros((20, 33), np.float32)}
    opt.apply_gradients({"w": g[::2]}, params)
    plain.apply_gradients({"w": g[::2].copy()}, others)
    assert opt.report == plain.report
    assert (params["w"] == others["w"]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_clipped_copy_of_the_gradients_is_made(dtype: Any) -> None:
    opt = gs.SGD(0.1, clip_norm=1.0, nonfinite="raise")
    params = {name: np.zeros((1000, 100), dtype) for name in "ab"}
    grads = {name: np.ones((1000, 100), dtype) for name in "ab"}
    opt.apply_gradients(grads, params)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        opt.apply_gradients(grads, params)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < grads["a"].nbytes / 10
    assert all((gradient == 1).all() for gradient in grads.values())


# nonfinite


BAD = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [copied, as_tensors], ids=["NumPy", "PyTorch"])
def test_raise_names_the_culprits_and_changes_nothing(kind: str, clip_norm: Any, dtype: Any, make: Any) -> None:
    opt = gs.Adam(0.1, nonfinite="raise", clip_norm=clip_norm)
    plain = tree(1, dtype)
    plain["vector"][6] = plain["stack"][1, 2, 3] = BAD[kind]
    params = make(tree(0, dtype))
    with pytest.raises(gs.NonFiniteGradientError) as caught:
        opt.apply_gradients(make(plain), params)
    message = str(caught.value)
    assert "vector" in message
    assert "stack" in message
    assert "matrix" not in message
    assert 'nonfinite="skip"' in message
    assert opt.step == 0
    assert opt.report is None
    assert all(bool((params[name] == make(tree(0, dtype))[name]).all()) for name in params)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_skip_leaves_the_step_out_and_goes_on(clip_norm: Any) -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.1 / (step + 1)

    opt, plain = (
        gs.Adam(rate, nonfinite="skip", clip_norm=clip_norm),
        gs.Adam(lambda s: 0.1 / (s + 1), clip_norm=clip_norm),
    )
    params, others = tree(), tree()
    for seed in (1, 2, 3):
        grads = tree(seed)
        opt.apply_gradients(grads, params)
        plain.apply_gradients(grads, others)
        assert opt.report.applied
        assert opt.report.culprits == ()
        opt.apply_gradients({**grads, "vector": np.full(7, np.nan, np.float32)}, params)
        assert not opt.report.applied
        assert opt.report.culprits == ("vector",)
        assert opt.report.step == opt.step == seed
    assert all((params[name] == others[name]).all() for name in params)
    assert asked == [0, 1, 2, 3]
    assert opt.steps == plain.steps


def test_allow_lets_a_bad_gradient_through() -> None:
    opt = gs.SGD(1.0)
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    opt.apply_gradients({"a": np.array([1.0, np.nan]), "b": np.ones(2)}, params)
    assert params["a"][0] == -1
    assert np.isnan(params["a"][1])
    assert (params["b"] == -1).all()
    assert opt.report == gs.Report(True, 1, 1.0, None, ())


def test_allow_with_clipping_spreads_nan_and_says_whose_it_was() -> None:
    opt = gs.SGD(1.0, clip_norm=1.0)
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    opt.apply_gradients({"a": np.array([1.0, np.inf]), "b": np.ones(2)}, params)
    assert np.isnan(params["a"]).all()
    assert np.isnan(params["b"]).all()
    assert opt.report.applied
    assert opt.report.grad_norm == math.inf
    assert opt.report.culprits == ("a",)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_large_finite_gradients_are_no_culprits(policy: str) -> None:
    opt = gs.SGD(1e-300, nonfinite=policy, clip_norm=1.0)
    params = {"a": np.zeros(2), "b": np.zeros(2, np.float32)}
    opt.apply_gradients({"a": np.full(2, 1e300), "b": np.full(2, 3e38, np.float32)}, params)
    assert opt.step == 1
    assert opt.report.culprits == ()
    assert opt.report.grad_norm == pytest.approx(math.sqrt(2) * 1e300)


def test_the_norm_is_reported_only_when_something_asks_for_it() -> None:
    grads, params = {"w": np.array([3.0, 4.0])}, {"w": np.zeros(2)}
    for kwargs, norm in (
        ({}, None),
        ({"clip_norm": 1e9}, 5.0),
        ({"nonfinite": "skip"}, 5.0),
        ({"nonfinite": "raise"}, 5.0),
    ):
        opt = gs.SGD(0.1, **kwargs)
        opt.apply_gradients(grads, params)
        assert opt.report.grad_norm == norm


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("default_threads")
def test_the_norm_does_not_depend_on_threads(threads: int) -> None:
    rng = np.random.default_rng(0)
    grads = {"a": rng.standard_normal((1500, 500), np.float32), "b": rng.standard_normal(77, np.float32)}
    expected = gs.clip_grad_norm(grads, 1.0)[1]
    gs.set_num_threads(threads)
    assert gs.clip_grad_norm(grads, 1.0)[1] == expected
    assert gs.clip_grad_norm(as_tensors(grads), 1.0)[1] == expected
