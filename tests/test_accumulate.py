"""`Accumulate`: micro-batches make the step of the big batch, and every call happens wholly or not at all."""

import copy
import math
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
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
from test_atomic import (
    LIBRARIES,
    Training,
    bits,
    chosen_sites,
    ctrl_c,  # pyright: ignore[reportUnusedImport]  # noqa: F401
    elsewhere,
    ends,
    inject,
    interrupt,
    nested,
    struck,
)

Make = Callable[[Any], Any]


def made(make: Make, tree: dict[str, Any]) -> dict[str, Any]:
    return {name: make(array) for name, array in tree.items()}


def host(array: Any) -> Any:
    """A copy as a NumPy array."""
    return array.numpy().copy() if isinstance(array, torch.Tensor) else np.array(array)


def as_numpy(tree: Any) -> dict[str, Any]:
    return {name: host(array) for name, array in tree.items()}


def vector(*values: float, dtype: str = "float32") -> Any:
    return np.array(values, dtype)


def summed(micros: list[dict[str, Any]]) -> dict[str, Any]:
    """((g1 + g2) + …) + gk, in the dtype of the arrays."""
    total = dict(micros[0])
    for micro in micros[1:]:
        total = {name: np.asarray(array + micro[name]) for name, array in total.items()}
    return total


def everything(opt: Any, params: Any) -> Any:
    """All that a call may change, bit for bit."""
    slots = {name: {slot: bits(host(a)) for slot, a in slots.items()} for name, slots in opt.state.items()}
    sums = {name: bits(host(array)) for name, array in opt.sums.items()}
    held = {name: bits(host(array)) for name, array in params.items()}
    return opt.micro_step, sums, opt.step, opt.steps, opt.learning_rate, repr(opt.report), slots, held


# The same as the big batch


@in_place
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations()))
def test_a_round_gives_the_bits_of_a_step_with_the_sum(cls: Any, kwargs: Any, dtype: str, make: Make) -> None:
    every = 3
    opt, plain = gs.Accumulate(cls(**kwargs), every=every), cls(**kwargs)
    params, expected = made(make, arrays(0, dtype)), made(make, arrays(0, dtype))
    for start in (1, 11, 21):
        micros = [arrays(start + i, dtype) for i in range(every)]
        for micro in micros:
            opt.apply_gradients(made(make, micro), params)
        plain.apply_gradients(made(make, summed(micros)), expected, grad_scale=1 / every)
        for name in SHAPES:
            assert_same_bits(host(params[name]), host(expected[name]), name)
            for slot, array in plain.state[name].items():
                assert_same_bits(host(opt.state[name][slot]), host(array), slot)
    assert (opt.step, opt.steps) == (plain.step, plain.steps) == (3, dict.fromkeys(SHAPES, 3))


@functional
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations(*ELEMENTWISE_FAMILIES)))
def test_it_is_within_tolerance_on_arrays_that_never_change(cls: Any, kwargs: Any, dtype: str, make: Make) -> None:
    opt, plain = gs.Accumulate(cls(**kwargs), every=2), cls(**kwargs)
    params, expected = made(make, arrays(0, dtype)), arrays(0, dtype)
    for start in (1, 11):
        micros = [arrays(start + i, dtype) for i in range(2)]
        for micro in micros:
            opt.apply_gradients(made(make, micro), params)
        plain.apply_gradients(summed(micros), expected, grad_scale=0.5)
    for name in SHAPES:
        tolerance = 1e-5 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(host(params[name]), expected[name], rtol=tolerance, atol=tolerance)


@on_all
def test_the_gradient_of_a_big_batch_is_the_mean_of_its_parts(make: Make) -> None:
    """Independently: least squares in float64, big batch and plain gradient descent by hand."""
    rng = np.random.default_rng(0)
    x, y, w = rng.standard_normal((24, 5)), rng.standard_normal(24), np.zeros(5)
    opt, params = gs.Accumulate(gs.SGD(0.1, momentum=0.9, weight_decay=0.01), every=4), {"w": make(np.zeros(5))}
    v = np.zeros(5)
    for _ in range(5):
        for part in range(4):
            rows = slice(6 * part, 6 * part + 6)
            g = 2 * x[rows].T @ (x[rows] @ host(params["w"]) - y[rows]) / 6
            opt.apply_gradients({"w": make(g)}, params)
        g = 2 * x.T @ (x @ w - y) / 24 + 0.01 * w
        v = 0.9 * v + g
        w = w - 0.1 * v
        np.testing.assert_allclose(host(params["w"]), w, rtol=1e-12)


@on_all
def test_sums_are_float32_and_float64_for_gradients_of_either(make: Make) -> None:
    opt = gs.Accumulate(gs.SGD(1.0), every=3)
    params = {"narrow": make(np.zeros(1, np.float32)), "wide": make(np.zeros(1))}
    opt.apply_gradients({"narrow": make(np.array([0.1])), "wide": make(np.array([0.1], np.float32))}, params)
    sums = as_numpy(opt.sums)
    assert_same_bits(sums["narrow"], np.array([0.1], np.float32))
    assert_same_bits(sums["wide"], np.array([np.float32(0.1)], np.float64))


@on_all
def test_nothing_but_the_sums_moves_between_steps(make: Make) -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.5

    opt = gs.Accumulate(gs.AdamW(rate, weight_decay=0.1, bias_correction=True), every=3)
    params = {"w": make(vector(1, 2))}
    kept = params["w"]
    for count in (1, 2):
        opt.apply_gradients({"w": make(vector(1, 1))}, params)
        assert params["w"] is kept
        assert host(kept).tolist() == [1, 2]
        assert (opt.micro_step, opt.step, opt.steps, dict(opt.state), opt.report) == (count, 0, {}, {}, None)
        assert host(opt.sums["w"]).tolist() == [count, count]
        assert asked == [0]
    for _ in range(4):
        opt.apply_gradients({"w": make(vector(1, 1))}, params)
    assert asked == [0, 1]
    assert (opt.micro_step, opt.step, opt.steps, dict(opt.sums)) == (0, 2, {"w": 2}, {})
    assert opt.report == gs.Report(True, 2, 0.5, None, ())


@on_all
def test_absent_gradients_count_as_zero(make: Make) -> None:
    opt = gs.Accumulate(gs.SGD(1.0), every=3)
    names = ("first", "middle", "last", "all", "never")
    params = {name: make(vector(0)) for name in names}
    rounds = [("first", "all"), ("middle", "all"), ("last", "all")]
    for _ in range(2):
        for present in rounds:
            grads = {name: make(vector(3)) if name in present else None for name in names}
            opt.apply_gradients(grads, params)
    found = {name: host(array).tolist() for name, array in params.items()}
    assert found == {"first": [-2], "middle": [-2], "last": [-2], "all": [-6], "never": [0]}
    assert opt.steps == {"first": 2, "middle": 2, "last": 2, "all": 2}


@on_all
def test_micro_batches_without_any_gradient_count(make: Make) -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=3), {"w": make(vector(0))}
    for grads in ({}, {"w": make(vector(3))}, {}):
        opt.apply_gradients(grads, params)
    assert (opt.step, host(params["w"]).tolist()) == (1, [-1])
    for _ in range(3):
        opt.apply_gradients({}, params)
    assert (opt.step, opt.steps, host(params["w"]).tolist()) == (2, {"w": 1}, [-1])


@on_all
def test_each_micro_batch_has_its_own_grad_scale(make: Make) -> None:
    opt = gs.Accumulate(gs.SGD(1.0), every=4)
    params = {name: make(vector(0)) for name in ("w", "early", "late")}
    for scale, also in ((0.5, "early"), (2.0, "w"), (-1.0, "w"), (0.25, "late")):
        opt.apply_gradients({name: make(vector(8)) for name in {"w", also}}, params, grad_scale=scale)
    found = {name: host(array).tolist() for name, array in params.items()}
    assert found == {"w": [-(4 + 16 - 8 + 2) / 4], "early": [-1], "late": [-0.5]}


def test_every_one_is_the_optimizer_itself() -> None:
    opt, plain = gs.Accumulate(gs.AdamW(0.1, clip_norm=1.0), every=1), gs.AdamW(0.1, clip_norm=1.0)
    params, expected = arrays(0), arrays(0)
    for seed in (1, 2):
        opt.apply_gradients(arrays(seed), params, grad_scale=0.3)
        plain.apply_gradients(arrays(seed), expected, grad_scale=0.3)
        assert everything(opt, params) == (0, {}, *everything(gs.Accumulate(plain, every=1), expected)[2:])


@on_all
def test_a_multi_optimizer_inside(make: Make) -> None:
    def several() -> gs.MultiOptimizer:
        inner = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), gs.AdamW(gs.cosine_decay(0.1, 9))], ["scalar"])
        return gs.MultiOptimizer([gs.Lion(0.01), inner], ["vector"], clip_norm=1.0)

    opt, plain = gs.Accumulate(several(), every=2), several()
    params, expected = made(make, arrays(0)), arrays(0)
    for start in (1, 11):
        micros = [arrays(start), arrays(start + 1)]
        for micro in micros:
            opt.apply_gradients(made(make, micro), params)
        plain.apply_gradients(summed(micros), expected, grad_scale=0.5)
    for name in SHAPES:
        np.testing.assert_allclose(host(params[name]), expected[name], rtol=1e-5, atol=1e-6)
    assert [child.step for child in opt.optimizers] == [2, 2]
    assert opt.report.grad_norm == pytest.approx(plain.report.grad_norm, rel=1e-6)


# Clipping, and what is not finite


@on_all
@both_dtypes
def test_clipping_goes_by_the_mean(make: Make, dtype: str) -> None:
    opt = gs.Accumulate(gs.SGD(1.0, clip_norm=1.0), every=2)
    params = {name: make(vector(0, dtype=dtype)) for name in ("both", "early", "late")}
    opt.apply_gradients({"both": make(vector(8, dtype=dtype)), "early": make(vector(16, dtype=dtype))}, params)
    opt.apply_gradients(
        {"both": make(vector(4, dtype=dtype)), "late": make(vector(-32, dtype=dtype))}, params, grad_scale=0.5
    )
    means = {"both": (8 + 2) / 2, "early": 8.0, "late": -8.0}
    norm = math.sqrt(sum(mean * mean for mean in means.values()))
    assert opt.report.grad_norm == pytest.approx(norm, rel=1e-6)
    for name, mean in means.items():
        np.testing.assert_allclose(host(params[name]), [-mean / (norm + 1e-6)], rtol=1e-6)


@in_place
def test_norms_of_float64_neither_over_nor_underflow(make: Make) -> None:
    for size in (1e200, 1e-200):
        opt, params = gs.Accumulate(gs.SGD(1.0, clip_norm=1e300), every=2), {"w": make(np.zeros(2))}
        for factor in (1, 2):
            opt.apply_gradients({"w": make(np.array([size, -size]) * factor)}, params)
        assert opt.report.grad_norm == pytest.approx(1.5 * size * math.sqrt(2), rel=1e-12)


@on_all
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_raise_refuses_the_micro_batch_when_it_comes(make: Make, place: int, bad: float) -> None:
    opt = gs.Accumulate(gs.SGD(1.0, nonfinite="raise"), every=3)
    params = {"w": make(vector(0)), "v": make(vector(0))}
    for call in range(3):
        if call == place:
            before = everything(opt, params)
            with pytest.raises(gs.NonFiniteGradientError, match="infinity: v;"):
                opt.apply_gradients({"w": make(vector(1)), "v": make(vector(bad))}, params)
            assert everything(opt, params) == before
        opt.apply_gradients({"w": make(vector(3)), "v": make(vector(6))}, params)
    assert (opt.step, host(params["w"]).tolist(), host(params["v"]).tolist()) == (1, [-3], [-6])


@on_all
def test_raise_refuses_a_sum_that_overflows_and_not_the_round(make: Make) -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0, nonfinite="raise"), every=4), {"w": make(vector(0))}
    opt.apply_gradients({"w": make(vector(3e38))}, params)
    with pytest.raises(gs.NonFiniteGradientError, match="w"):
        opt.apply_gradients({"w": make(vector(3e38))}, params)
    for value in (-3e38, 4, 4):
        opt.apply_gradients({"w": make(vector(value))}, params)
    assert (opt.step, host(params["w"]).tolist()) == (1, [-2])


@on_all
@pytest.mark.parametrize("place", [0, 1, 2])
def test_skip_leaves_out_the_round(make: Make, place: int) -> None:
    opt = gs.Accumulate(gs.SGD(gs.exponential_decay(1.0, 0.5), nonfinite="skip"), every=3)
    params = {"w": make(vector(0)), "v": make(vector(0))}
    for call in range(3):
        grads = {"w": make(vector(1)), "v": make(vector(math.inf if call == place else 1))}
        if call == 2:
            del grads["w"]  # its sum stands in
        opt.apply_gradients(grads, params)
    assert opt.report == gs.Report(False, 0, 1.0, opt.report.grad_norm, ("v",))
    assert (opt.micro_step, opt.step, dict(opt.sums)) == (0, 0, {})
    assert (host(params["w"]).tolist(), host(params["v"]).tolist()) == ([0], [0])
    for _ in range(3):
        opt.apply_gradients({"w": make(vector(1)), "v": make(vector(2))}, params)
    assert (opt.report.applied, opt.step) == (True, 1)
    assert (host(params["w"]).tolist(), host(params["v"]).tolist()) == ([-1], [-2])


@on_all
def test_allow_lets_it_spread(make: Make) -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=2), {"w": make(vector(0)), "v": make(vector(0))}
    opt.apply_gradients({"w": make(vector(math.nan)), "v": make(vector(2))}, params)
    opt.apply_gradients({"w": make(vector(1)), "v": make(vector(2))}, params)
    assert np.isnan(host(params["w"])).all()
    assert host(params["v"]).tolist() == [-2]


# All or nothing


def bad_calls(make: Make) -> dict[str, tuple[type[Exception], str, Callable[[Any, Any], object]]]:
    other = MAKERS["PyTorch"] if make is not MAKERS["PyTorch"] else MAKERS["NumPy"]
    return {
        "another shape": (gs.ShapeError, r"grads\['w'\]", lambda p, g: g.update(w=make(vector(1, 2, 3)))),
        "an unknown name": (gs.UnknownParameterError, "'lost'", lambda p, g: g.update(lost=make(vector(1)))),
        "another library": (gs.ArgumentTypeError, "belongs to", lambda p, g: g.update(w=other(vector(1, 2)))),
        "integers": (gs.DtypeError, r"grads\['w'\]", lambda p, g: g.update(w=make(np.ones(2, np.int32)))),
        "a parameter of another shape": (
            gs.ShapeError,
            r"sums\['w'\] has shape \(2,\), but params\['w'\] "
            r"now has \(3,\); opt\.discard\(\) drops the sums of this round",
            lambda p, g: (p.update(w=make(vector(1, 2, 3))), g.update(w=make(vector(1, 2, 3)))),
        ),
    }


@on_all
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("case", bad_calls(MAKERS["NumPy"]))
@pytest.mark.parametrize("rounds", [0, 1])
def test_what_is_wrong_changes_nothing(make: Make, call: int, case: str, rounds: int) -> None:
    if case == "a parameter of another shape" and call == 0:
        pytest.skip("a round begins with any parameters")
    opt, params = gs.Accumulate(gs.SGD(1.0), every=3), {"w": make(vector(1, 2)), "v": make(vector(0))}
    for _ in range(3 * rounds + call):
        opt.apply_gradients({"w": make(vector(3, 3)), "v": make(vector(1))}, params)
    before = everything(opt, params)
    error, message, spoil = bad_calls(make)[case]
    spoilt, grads = dict(params), {"w": make(vector(3, 3)), "v": make(vector(1))}
    spoil(spoilt, grads)
    with pytest.raises(error, match=message):
        opt.apply_gradients(grads, spoilt)
    assert everything(opt, params) == before
    for _ in range(3 - call):
        opt.apply_gradients({"w": make(vector(3, 3)), "v": make(vector(1))}, params)
    assert (opt.step, opt.micro_step) == (rounds + 1, 0)
    assert host(params["w"]).tolist() == [1 - 3 * (rounds + 1), 2 - 3 * (rounds + 1)]


@on_all
def test_a_schedule_that_fails_at_the_last_call_can_be_retried(make: Make) -> None:
    rates: list[Any] = [0.5, math.nan, math.nan, 0.25]
    opt, params = gs.Accumulate(gs.SGD(lambda step: rates.pop(0)), every=2), {"w": make(vector(0))}
    for _ in range(3):
        opt.apply_gradients({"w": make(vector(1))}, params)
    before = everything(opt, params)
    for _ in range(2):
        with pytest.raises(gs.NonFiniteScalarError):
            opt.apply_gradients({"w": make(vector(3))}, params)
        assert everything(opt, params) == before
    opt.apply_gradients({"w": make(vector(3))}, params)
    assert (opt.step, host(params["w"]).tolist()) == (2, [-1.0])


@on_all
def test_a_sum_without_its_parameter_at_the_last_call_can_be_retried(make: Make) -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=2), {"w": make(vector(0)), "v": make(vector(0))}
    opt.apply_gradients({"v": make(vector(2))}, params)
    before = everything(opt, params)
    with pytest.raises(gs.UnknownParameterError, match="'v'"):
        opt.apply_gradients({"w": make(vector(2))}, {"w": params["w"]})
    assert everything(opt, params) == before
    opt.apply_gradients({"w": make(vector(2))}, params)
    assert (host(params["w"]).tolist(), host(params["v"]).tolist()) == ([-1], [-1])


class Rounds(Training):
    """See `Training`; a step is one call here."""

    def everything(self) -> Any:
        sums = {name: bits(array) for name, array in self.opt.sums.items()}
        return self.opt.micro_step, sums, *super().everything()

    def go_to(self, phase: int) -> None:
        while self.opt.micro_step != phase:
            self.step()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("strike", [interrupt, inject])
@pytest.mark.parametrize("phase", [0, 1, 2], ids=["first call", "second call", "last call"])
@pytest.mark.parametrize(
    ("make", "library", "part"),
    [
        ("flat", "NumPy", slice(None)),
        ("flat", "PyTorch", slice(0, None, 2)),
        ("nested", "strided", slice(1, None, 4)),
    ],
)
def test_a_strike_at_any_line(make: str, library: str, part: slice, phase: int, strike: Any) -> None:
    def fresh() -> Rounds:
        inner = nested() if make == "nested" else gs.AdamW(gs.exponential_decay(0.1, 0.999), bias_correction=True)
        training = Rounds(gs.Accumulate(inner, every=3), LIBRARIES[library], 6)
        training.everything()  # whose slots somebody has seen is planned anew, once
        for _ in range(3):
            training.step()
        training.go_to(phase)
        return training

    recorded, training, control = fresh(), fresh(), fresh()
    for site in ends(chosen_sites(recorded, strike))[part]:
        for each in (training, control):
            each.go_to(phase)
        before = training.everything()
        assert before == control.everything()
        raised = struck(site, strike, training.step)
        control.step()
        after, expected = training.everything(), control.everything()
        assert raised or strike is inject, f"an interrupt was lost at {site}"
        assert after in (before, expected), f"neither old nor new after {strike.__name__} at {site}"
        if strike is inject and raised:
            assert after == before, f"an error changed something at {site}"
        if after == before:
            elsewhere(training.retry)
            assert training.everything() == expected, f"the call after {strike.__name__} at {site} is wrong"


# Memory, layouts and threads


@pytest.mark.usefixtures("default_threads")
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstep.program.threads.WORTH_THREADS", 1 << 16)
    rng = np.random.default_rng(0)
    w, *micros = (rng.standard_normal(200_003, np.float32) for _ in range(4))
    results: list[Any] = []
    for threads in (1, 2, 3):
        gs.set_num_threads(threads)
        opt, params = gs.Accumulate(gs.AdamW(0.1, clip_norm=1.0), every=3), {"w": w.copy()}
        for micro in micros:
            opt.apply_gradients({"w": micro}, params)
        results.append((params["w"].tobytes(), opt.report.grad_norm))
    assert results[0] == results[1] == results[2]


def layouts() -> dict[str, Callable[[Any], Any]]:
    return {
        "C": np.ascontiguousarray,
        "Fortran": np.asfortranarray,
        "strided": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
        "reversed": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    }


@pytest.mark.parametrize("cls", [gs.AdamW, gs.Adafactor, gs.Muon])
@pytest.mark.parametrize("first", layouts())
@pytest.mark.parametrize("then", layouts())
@pytest.mark.parametrize("changed", ["params", "grads"])
def test_layouts_may_change_between_calls(cls: Any, first: str, then: str, changed: str) -> None:
    opt, plain = gs.Accumulate(cls(0.1), every=2), cls(0.1)
    w, *micros = (np.random.default_rng(seed).standard_normal((6, 5)).astype(np.float32) for seed in range(5))
    expected, params = {"w": w.copy()}, {"w": layouts()[first](w.copy())}
    for start in (0, 2):
        pair = micros[start : start + 2]
        opt.apply_gradients({"w": layouts()[first](pair[0])}, params)
        if changed == "params":
            params = {"w": layouts()[then](params["w"])}
        opt.apply_gradients({"w": layouts()[then if changed == "grads" else first](pair[1])}, params)
        plain.apply_gradients({"w": pair[0] + pair[1]}, expected, grad_scale=0.5)
        assert_same_bits(params["w"], expected["w"])
        params = {"w": layouts()[first](params["w"])}


@in_place
def test_sums_are_written_where_they_lie_and_used_again(make: Make) -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=3), {"w": make(vector(0, 0))}
    opt.apply_gradients({"w": make(vector(1, 2))}, params)
    sums = opt.sums
    total = sums["w"]
    opt.apply_gradients({"w": make(vector(1, 2))}, params)
    assert opt.sums["w"] is total
    assert host(total).tolist() == [2, 4]
    opt.apply_gradients({"w": make(vector(1, 2))}, params)
    assert dict(sums) == {}  # the view is live
    opt.apply_gradients({"w": make(vector(5, 6))}, params)
    assert sums["w"] is total
    assert host(total).tolist() == [5, 6]
    with pytest.raises(TypeError):
        sums["w"] = total  # pyright: ignore


def test_a_sum_that_somebody_has_moved_is_found_where_it_lies() -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=2), {"w": torch.zeros(2)}
    for _ in range(3):
        opt.apply_gradients({"w": torch.ones(2)}, params)
    kept = opt.sums["w"].clone()
    opt.sums["w"].set_(torch.tensor([3.0, 5.0]))
    opt.apply_gradients({"w": torch.ones(2)}, params)
    assert kept.tolist() == [1, 1]
    assert params["w"].tolist() == [-3, -4]


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_call_makes_no_copy_of_anything(phase: int) -> None:
    size = 1 << 20
    opt, params, grads = gs.Accumulate(gs.SGD(1.0), every=3), {"w": np.zeros(size, np.float32)}, {}
    grads["w"] = np.ones(size, np.float32)
    for _ in range(6 + phase):
        opt.apply_gradients(grads, params)
    tracemalloc.start()
    opt.apply_gradients(grads, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size // 8
    assert (grads["w"] == 1).all()


def test_the_step_reads_the_last_micro_batch_in_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstep.step import launch

    runs: list[int] = []
    run = launch.Launch.run

    def counted(self: Any) -> None:
        runs.append(1)
        run(self)

    monkeypatch.setattr(launch.Launch, "run", counted)
    opt, params = gs.Accumulate(gs.AdamW(0.1), every=3), {"w": np.zeros(3, np.float32)}
    for _ in range(6):
        opt.apply_gradients({"w": np.ones(3, np.float32)}, params)
    assert len(runs) == 6


@in_place
def test_a_plan_is_made_once_for_each_kind_of_call(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    anew = gs.Optimizer._plan_anew

    def counted(self: Any, *args: Any) -> Any:
        planned.append(1)
        return anew(self, *args)

    monkeypatch.setattr(gs.Optimizer, "_plan_anew", counted)
    opt, params = gs.Accumulate(gs.AdamW(0.1, clip_norm=1.0), every=4), made(make, arrays(0))
    for call in range(12):
        opt.apply_gradients(made(make, arrays(call)), params, grad_scale=1 + call)
    assert len(planned) == 3


@functional
def test_a_round_compiles_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstep.step import evaluate

    made_anew: list[int] = []
    outputs = evaluate.Evaluation.outputs

    def counted(self: Any) -> Any:
        made_anew.append(1)
        return outputs(self)

    monkeypatch.setattr(evaluate.Evaluation, "outputs", counted)
    opt, params = gs.Accumulate(gs.AdamW(0.1, clip_norm=1.0), every=3), {"w": make(np.ones(37, np.float32))}
    counts: list[int] = []
    for call in range(9):
        opt.apply_gradients({"w": make(np.ones(37, np.float32))}, params, grad_scale=1 + call)
        counts.append(len(made_anew))
    assert counts[2] == counts[8] > 0


def test_overlap_is_refused() -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=3), {"w": np.zeros(2, np.float32)}
    opt.apply_gradients({"w": np.ones(2, np.float32)}, params)
    with pytest.raises(gs.AliasedParametersError):
        opt.apply_gradients({"w": opt.sums["w"]}, params)
    opt.apply_gradients({"w": np.ones(2, np.float32)}, params)
    with pytest.raises(gs.AliasedParametersError, match="sums"):
        opt.apply_gradients({"w": np.ones(2, np.float32)}, {"w": opt.sums["w"][::-1]})
    opt.apply_gradients({"w": np.ones(2, np.float32)}, params)
    assert params["w"].tolist() == [-1, -1]


def test_the_library_may_change_between_rounds_but_not_within() -> None:
    opt = gs.Accumulate(gs.SGD(1.0), every=2)
    for make in (MAKERS["NumPy"], MAKERS["JAX"], MAKERS["PyTorch"]):
        params = {"w": make(vector(0))}
        for value in (1, 3):
            opt.apply_gradients({"w": make(vector(value))}, params)
        assert host(params["w"]).tolist() == [-2]
    opt.apply_gradients({"w": torch.ones(1)}, {"w": torch.zeros(1)})
    with pytest.raises(gs.ArgumentTypeError, match=r"sums\['w'\] is a torch.Tensor, but the parameter now belongs"):
        opt.apply_gradients({"w": vector(1)}, {"w": vector(0)})
    opt.init({"w": vector(0)})
    assert (opt.micro_step, dict(opt.sums)) == (0, {})


def test_inside_of_jit_it_is_refused() -> None:
    opt = gs.Accumulate(gs.SGD(1.0), every=2)

    def step(w: Any) -> Any:
        return opt.apply_gradients({"w": w}, {"w": w})

    with pytest.raises(gs.TracingError):
        jax.jit(step)(jnp.ones(2))
    assert (opt.micro_step, dict(opt.sums)) == (0, {})


# Copies, and the face of the wrapped optimizer


@on_all
@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda opt: pickle.loads(pickle.dumps(opt))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_goes_on_in_the_middle_of_a_round(make: Make, calls: int, copied: Any) -> None:
    opt = gs.Accumulate(gs.AdamW(gs.cosine_decay(0.1, 9), bias_correction=True), every=3)
    params = made(make, arrays(0))
    for seed in range(calls):
        opt.apply_gradients(made(make, arrays(seed)), params)
    other, others = copied(opt), made(make, as_numpy(params))
    before = everything(other, others)
    assert before == everything(opt, params)
    for seed in range(10, 15):
        opt.apply_gradients(made(make, arrays(seed)), params)
    assert everything(other, others) == before
    for seed in range(10, 15):
        other.apply_gradients(made(make, arrays(seed)), others)
    assert everything(other, others) == everything(opt, params)


def test_init_begins_anew() -> None:
    opt, params = gs.Accumulate(gs.Lion(1.0), every=2), {"w": vector(0)}
    for _ in range(3):
        opt.apply_gradients({"w": vector(1)}, params)
    opt.init(params)
    assert (opt.micro_step, dict(opt.sums), opt.step, opt.steps) == (0, {}, 1, {"w": 0})
    assert opt.state["w"]["m"].tolist() == [0]
    with pytest.raises(gs.DtypeError):
        opt.init({"w": np.zeros(2, np.int32)})


def test_it_has_the_face_of_the_wrapped_optimizer() -> None:
    inner = gs.AdamW(gs.linear_schedule(0.5, 1.0, 10), weight_decay=0.1)
    opt: Any = gs.Accumulate(inner, every=2)
    assert repr(opt) == f"Accumulate({inner!r}, every=2)"
    assert (opt.optimizer, opt.every, opt.hyperparameters) == (inner, 2, inner.hyperparameters)
    assert (opt.learning_rate, opt.weight_decay, opt.clip_norm, opt.nonfinite) == (0.5, 0.1, None, "allow")
    opt.learning_rate, opt.weight_decay, opt.clip_norm, opt.nonfinite = 0.25, 0.2, 1.0, "skip"
    assert (inner.learning_rate, inner.weight_decay, inner.clip_norm, inner.nonfinite) == (0.25, 0.2, 1.0, "skip")
    opt.set_hyperparameters({"eps": 1e-3})
    assert inner.eps == 1e-3
    opt.preflight()
    with pytest.raises(AttributeError, match="AdamW has no attribute 'learningrate'"):
        opt.learningrate = 1.0
    with pytest.raises(AttributeError):
        opt.every = 3
    with pytest.raises(AttributeError):
        _ = opt.momentum
    assert isinstance(opt, gs.Optimizer)


def test_preflight_within_a_round_resolves_the_coming_step_once() -> None:
    asked: list[int] = []
    opt = gs.Accumulate(gs.SGD(lambda step: asked.append(step) or 0.5), every=2)  # pyright: ignore
    params = {"w": vector(0)}
    for _ in range(4):
        opt.preflight()
        opt.apply_gradients({"w": vector(1)}, params)
    assert asked == [0, 1]


def test_what_cannot_be_made_says_why() -> None:
    opt = gs.SGD(0.1)
    with pytest.raises(gs.ArgumentTypeError, match="takes an optimizer of gradstep, got 3"):
        gs.Accumulate(3, every=2)  # pyright: ignore
    with pytest.raises(gs.OutOfRangeError, match="every must be at least 1, got 0"):
        gs.Accumulate(opt, every=0)
    for every in (2.0, True, "2"):
        with pytest.raises(gs.ArgumentTypeError, match="every must be an integer"):
            gs.Accumulate(opt, every=every)  # pyright: ignore
    accumulating = gs.Accumulate(opt, every=2)
    with pytest.raises(gs.ConfigurationError, match=r"accumulates already; .*every=2 \* 3"):
        gs.Accumulate(accumulating, every=3)
    with pytest.raises(gs.ConfigurationError, match=r"wrap the MultiOptimizer instead: Accumulate\(MultiOptimizer"):
        gs.MultiOptimizer([accumulating, gs.SGD(0.1)], ["w"])


def test_optax_has_its_own_way() -> None:
    from gradstep.optax import from_optimizer

    with pytest.raises(gs.ConfigurationError, match=r"optax\.MultiSteps"):
        from_optimizer(gs.Accumulate(gs.SGD(0.1), every=2))


def test_explain_shows_the_step_that_ends_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    gs.explain(gs.Accumulate(gs.SGD(0.1), every=2), ir=False)
    assert "w' = w - learning_rate * ((g.sum + g * g.scale) * grad_scale)" in capsys.readouterr().out


def test_grad_scale_is_checked_in_every_call() -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0), every=2), {"w": vector(0)}
    for count in (0, 1):
        with pytest.raises(gs.NonFiniteScalarError, match="grad_scale"):
            opt.apply_gradients({"w": vector(1)}, params, grad_scale=math.nan)
        with pytest.raises(gs.OutOfRangeError, match="grad_scale must be finite in float32"):
            opt.apply_gradients({"w": vector(1)}, params, grad_scale=1e39)
        assert opt.micro_step == count
        opt.apply_gradients({"w": vector(1)}, params)
    assert params["w"].tolist() == [-1]


def test_frozen_parameters_have_no_sums():
    params, grads = ({n: np.full(3, v, np.float32) for n in ("a", "b")} for v in (0, 1))
    opt = gs.Accumulate(gs.SGD(1.0, frozen=["b"]), every=2)
    for _ in range(3):
        opt.apply_gradients(grads, params)
    assert list(opt.sums) == ["a"]
    assert params["a"].tolist() == [-1, -1, -1] and params["b"].tolist() == [0, 0, 0]
    with pytest.raises(gs.UnknownParameterError, match="'b'"):
        opt.apply_gradients(grads, {"a": params["a"]})
    opt.optimizer.frozen = ["a"]  # in the middle of a round: its sum is left alone
    opt.apply_gradients(grads, params)
    assert params["a"].tolist() == [-1, -1, -1] and params["b"].tolist() == [-0.5, -0.5, -0.5]


@pytest.mark.parametrize("options", [{}, {"slot_dtype": "int8"}, {"rounding": "stochastic"}, {"master_weights": True}])
def test_narrow_gradients_are_summed_in_float32(options):
    rng = np.random.default_rng(0)
    start = rng.standard_normal(1000).astype(ml_dtypes.bfloat16)
    parts = [rng.standard_normal(1000).astype(ml_dtypes.bfloat16) for _ in range(3)]
    accumulated, plain = {"w": start.copy()}, {"w": start.copy()}
    opt, once = gs.Accumulate(gs.AdamW(0.1, **options), every=3), gs.AdamW(0.1, **options)
    for g in parts:
        opt.apply_gradients({"w": g}, accumulated)
    total = parts[0].astype(np.float32) + parts[1].astype(np.float32) + parts[2].astype(np.float32)
    once.apply_gradients({"w": total}, plain, grad_scale=1 / 3)
    assert accumulated["w"].tobytes() == plain["w"].tobytes() != start.tobytes()
    for name, array in once.state["w"].items():
        assert opt.state["w"][name].tobytes() == array.tobytes(), name


def test_a_round_can_be_dropped():
    params = {"w": np.zeros(2, np.float32)}
    opt = gs.Accumulate(gs.Adam(0.1), every=2)
    for g in (1, 1, 9):
        opt.apply_gradients({"w": np.full(2, g, np.float32)}, params)
    assert opt.micro_step == 1
    opt.discard()
    assert (opt.micro_step, dict(opt.sums), opt.step) == (0, {}, 1)
    for _ in range(2):
        opt.apply_gradients({"w": np.ones(2, np.float32)}, params)
    plain, other = gs.Adam(0.1), {"w": np.zeros(2, np.float32)}
    for _ in range(2):
        plain.apply_gradients({"w": np.ones(2, np.float32)}, other)
    assert params["w"].tolist() == other["w"].tolist()


def test_a_parameter_frozen_in_a_round_may_be_left_out():
    params = {n: np.ones(2, np.float32) for n in "ab"}
    opt = gs.Accumulate(gs.SGD(1.0), every=2)
    opt.apply_gradients({n: np.ones(2, np.float32) for n in "ab"}, params)
    opt.frozen = ["b"]
    opt.apply_gradients({"a": np.ones(2, np.float32)}, {"a": params["a"]})
    assert (params["a"].tolist(), params["b"].tolist(), opt.step) == ([0, 0], [1, 1], 1)
