"""Proves that rounding to 16 bits and to codes is right: to nearest, and at random with the exact value as its mean."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import gradstep as gs
from families import assert_same_bits
from stored import (
    BLOCK,
    DTYPES,
    GRIDS,
    NARROW,
    at_random,
    encode,
    held,
    noise,
    seen,
    to_nearest,
    units_of_codes,
    values,
)

SIGNS = ("signed", "non-negative", "unknown")


@functools.cache
def keeper(sign: str) -> Any:
    @gs.rule(signs={"s": sign})
    def Kept(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
        return w, +g

    return Kept


def keeping(sign: str = "unknown", **options: Any) -> Any:
    """An optimizer whose slot `s` is the gradient, so that a step shows how it is stored."""
    return keeper(sign)(0.0, **options)


def stored(x: Any, dtype: str, sign: str = "unknown", **options: Any) -> dict[str, Any]:
    """What a slot is after the first step, for values of float32."""
    opt = keeping(sign, slot_dtype=dtype, **options)
    opt.apply_gradients({"w": x}, {"w": np.zeros(x.shape, np.float32)})
    return dict(opt.state["w"])


def decoded(parts: Any, sign: str) -> Any:
    """The values of codes, in float64."""
    codes, scales = parts["s.codes"].ravel().astype(np.int64), np.repeat(parts["s.scales"], BLOCK).astype(np.float64)
    table = units_of_codes(sign)
    value = table[codes % len(table)] / table[-1] * scales[: codes.size]
    return value if sign == "non-negative" else np.where(codes > 127, -value, value)


@pytest.fixture(params=[True, False], ids=["with the processor's instructions", "without"])
def conversions(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not request.param:
        monkeypatch.setattr("gradstep.program.processor.converts_float16", lambda: False)
    return request.param


def edges(dtype: str) -> Any:
    """Numbers of the format, all ties between them, and what is just beside the ties, as float32."""
    middle = ((GRIDS[dtype][1:] + GRIDS[dtype][:-1]) / 2).astype(np.float32)
    with np.errstate(over="ignore"):
        ends = GRIDS[dtype].astype(np.float32)
        beside = [np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    x = np.concatenate([ends, middle, *beside, np.float32([np.inf, np.nan, 1e-45, 2.0**-25, 3e38])])
    return np.concatenate([x, -x])


class TestToNearest:
    def test_all_halves_are_read_and_written_as_they_are(self, conversions):
        halves = np.arange(65536, dtype=np.uint16).view(np.float16)
        assert_same_bits(stored(halves, "float32")["s"], halves.astype(np.float32))
        assert_same_bits(stored(halves, "float16")["s"], halves)

    @pytest.mark.parametrize("dtype", NARROW)
    def test_every_tie_goes_to_even_and_its_neighbours_to_theirs(self, dtype, conversions):
        x = edges(dtype)
        assert_same_bits(stored(x, dtype)["s"], to_nearest(x, dtype))

    def test_float16_ends_where_it_should(self, conversions):
        x = np.float32([65519.996, 65520, -65520, 65504, 2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1))])
        found = stored(x, "float16")["s"].astype(np.float64)
        assert found.tolist() == [65504, np.inf, -np.inf, 65504, 0, 2.0**-24]

    @pytest.mark.parametrize("dtype", NARROW)
    @settings(max_examples=5)
    @given(seed=st.integers(0, 2**32))
    def test_any_bits_of_float32(self, dtype, seed):
        x = np.random.default_rng(seed).integers(0, 2**32, 5000, np.uint32).view(np.float32)
        for converts in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not converts:
                    patch.setattr("gradstep.program.processor.converts_float16", lambda: False)
                assert_same_bits(stored(x, dtype)["s"], to_nearest(x, dtype))
                random = stored(x, dtype, rounding="stochastic", seed=seed)["s"]
                assert_same_bits(random, at_random(x, dtype, noise(seed, "w", "s", 0, x.size)))


# Over a Fibonacci number N of steps the multiples of the golden ratio fall into any interval of length p as often as
# N * p says, but for 3: they lie within 1/N of the N-th parts of the circle, one at each.
FIBONACCI = 10946
MISSES = 3 / FIBONACCI

IN_16_BITS = [1.0, 1.001, -1.0001, 0.1, 3.14159, -12345.678, 1e-3, 6.5e4, 2.0**-14 * 1.3, 257.0]
DENORMAL = [2.0**-24 * 0.3, -(2.0**-20) * 1.234, 2.0**-15 * 1.001, 2.0**-24, 2.0**-30]  # in float16


def mean_over_steps(x: Any, count: int, dtype: str, sign: str = "unknown") -> Any:
    """The mean of what a slot holds after each of many steps."""
    opt = keeping(sign, slot_dtype=dtype, rounding="stochastic", seed=3)
    params, total = {"w": np.zeros(x.shape, np.float32)}, np.zeros(x.shape)
    for _ in range(count):
        opt.apply_gradients({"w": x}, params)
        total += decoded(opt.state["w"], sign) if dtype == "int8" else opt.state["w"]["s"].astype(np.float64)
    return total / count


def gaps_of(x: Any, dtype: str) -> Any:
    """How far apart the neighbours of values are; half of it has to be lost."""
    above = np.searchsorted(GRIDS[dtype], np.abs(x), "right")
    return GRIDS[dtype][above] - GRIDS[dtype][above - 1]


def code_gaps(x: Any, scale: float, sign: str) -> Any:
    table = units_of_codes(sign) / units_of_codes(sign)[-1] * scale
    above = np.clip(np.searchsorted(table, np.abs(x), "right"), 1, len(table) - 1)
    return table[above] - table[above - 1]


class TestTheMean:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_over_steps_is_the_value(self, dtype):
        x = np.float32(IN_16_BITS + DENORMAL)
        error = np.abs(mean_over_steps(x, FIBONACCI, dtype) - x) / gaps_of(x, dtype)
        assert error.max() <= MISSES + 2.0**-13
        assert np.abs(to_nearest(x, dtype).astype(np.float64) - x).max() > 0

    @pytest.mark.parametrize("sign", SIGNS)
    def test_over_steps_is_the_value_for_codes(self, sign):
        x = np.float32([2.5, 2.4999, 1.0, 0.37, 0.05, 0.004, 3e-4, 0.0])  # all from code 1 on
        x = x if sign == "non-negative" else np.concatenate([x, -x])
        error = np.abs(mean_over_steps(x, FIBONACCI, "int8", sign) - x) / code_gaps(x, 2.5, sign)
        assert error.max() <= MISSES + 2.0**-13

    # Independent numbers: by Hoeffding, the mean of n numbers in an interval of length 1 is further than
    # sqrt(log(2 / p) / 2n) from its expectation with a probability below p.
    @pytest.mark.parametrize("dtype", [*NARROW, "int8"])
    def test_over_elements_is_the_value(self, dtype):
        count = 10_000
        bound = math.sqrt(math.log(2 / 1e-6) / (2 * count))
        for value in (1.001, -0.1, 2.0**-20 * 1.3 if dtype != "int8" else 3e-4):
            x = np.full(count, value, np.float32)
            if dtype == "int8":
                x[::BLOCK] = 2.0
            parts = stored(x, dtype, "signed", rounding="stochastic")
            found = decoded(parts, "signed") if dtype == "int8" else parts["s"].astype(np.float64)
            gap = code_gaps(x, 2.0, "signed")[1] if dtype == "int8" else gaps_of(x, dtype)[1]
            rest = np.delete(found, np.arange(0, count, BLOCK)) if dtype == "int8" else found
            assert abs(rest.mean() - np.float32(value)) <= bound * gap * 1.01
            assert len(set(rest.tolist())) == 2

    @pytest.mark.parametrize("dtype", [*NARROW, "int8"])
    def test_over_seeds_is_the_value(self, dtype):
        count, x = 400, np.float32([2.0, 1.001, 0.1, 0.777, -0.3])
        found = np.zeros((count, x.size))
        for seed in range(count):
            parts = stored(x, dtype, "signed", rounding="stochastic", seed=seed * 12345678901234567 % 2**64)
            found[seed] = decoded(parts, "signed") if dtype == "int8" else parts["s"]
        gaps = code_gaps(x, 2.0, "signed") if dtype == "int8" else gaps_of(x, dtype)
        error = np.abs(found.mean(axis=0) - x) / gaps
        assert error.max() <= math.sqrt(math.log(2 / 1e-6) / (2 * count))


class TestNoise:
    @pytest.mark.parametrize("dtype", [*NARROW, "int8"])
    def test_an_element_does_not_depend_on_those_after_it(self, dtype):
        x = values(1, 70_000, "float32")
        x[::BLOCK] = 9
        whole = stored(x, dtype, rounding="stochastic")
        for size in (1, 2, 15, 16, 17, 255, 256, 300, 32768, 32771):
            part = stored(x[:size], dtype, rounding="stochastic")
            for name, array in part.items():
                assert_same_bits(array, whole[name][: array.size], name)

    def test_it_differs_between_names_seeds_steps_elements_and_places(self):
        x = {"a": np.full(4096, 1 + 2.0**-8, np.float32), "b": np.full(4096, 1 + 2.0**-8, np.float32)}

        @gs.rule
        def Twice(w: Any, g: Any, s: Any, u: Any, *, learning_rate: Any) -> Any:
            return w, +g, +g

        rounded: dict[Any, Any] = {}
        for seed in (0, 1, 2**32, 2**63):
            opt = Twice(0.0, slot_dtype="bfloat16", rounding="stochastic", seed=seed)
            params = {name: np.zeros(4096, np.float32) for name in x}
            for step in range(3):
                opt.apply_gradients(x, params)
                for name in x:
                    for slot in ("s", "u"):
                        rounded[seed, name, slot, step] = opt.state[name][slot].astype(np.float64) > 1
        for where, up in rounded.items():
            assert 0.45 < up.mean() < 0.55, where
            assert 0.45 < (up[1:] == up[:-1]).mean() < 0.55, where
            assert 0.45 < (up[16:] == up[:-16]).mean() < 0.55, where
        for one, first in rounded.items():
            for other, second in rounded.items():
                if one[:3] != other[:3]:  # of steps, neighbours differ on purpose more often than not
                    assert 0.45 < (first == second).mean() < 0.55, (one, other)
        assert not np.array_equal(rounded[0, "a", "s", 0], rounded[0, "a", "s", 1])

    def test_a_parameter_and_its_slot_are_rounded_apart(self):
        @gs.rule
        def Same(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
            return +g, +g

        opt = Same(0.0, slot_dtype="float16", rounding="stochastic")
        params = {"w": np.zeros(4096, np.float16)}
        opt.apply_gradients({"w": np.full(4096, 1 + 2.0**-11, np.float32)}, params)
        assert 0.45 < (params["w"] == opt.state["w"]["s"]).mean() < 0.55

    def test_a_skipped_step_does_not_move_it(self):
        def make() -> Any:
            return keeping(slot_dtype="bfloat16", rounding="stochastic", nonfinite="skip"), {"w": np.zeros(99)}

        x = values(1, 99, "float32")
        (one, w), (two, u) = make(), make()
        one.apply_gradients({"w": x * np.float32(np.nan)}, w)
        for _ in range(2):
            one.apply_gradients({"w": x}, w)
            two.apply_gradients({"w": x}, u)
            assert_same_bits(one.state["w"]["s"], two.state["w"]["s"])


class TestWhatNeedsNoRounding:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_numbers_of_the_format_never_change(self, dtype):
        numbers = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
        opt = keeping(slot_dtype=dtype, rounding="stochastic")
        for _ in range(8):
            opt.apply_gradients({"w": numbers}, {"w": np.zeros(65536, np.float32)})
            with np.errstate(invalid="ignore"):
                assert_same_bits(opt.state["w"]["s"], numbers)

    def test_infinity_and_nan_stay_in_parameters(self):
        odd = np.float16([np.inf, -np.inf, np.nan, 65504, -65504, 0, -0.0, 2.0**-24])
        for dtype in NARROW:
            params = {"w": odd.astype(DTYPES[dtype])}
            opt = gs.SGD(0.0, rounding="stochastic")
            for _ in range(8):
                opt.apply_gradients({"w": np.zeros(8, np.float16)}, params)
            with np.errstate(over="ignore"):
                expected = odd.astype(DTYPES[dtype])
            assert_same_bits(params["w"], expected)


class TestCodes:
    @pytest.mark.parametrize("sign", SIGNS)
    @settings(max_examples=30)
    @given(
        seed=st.integers(0, 2**32),
        size=st.integers(1, 1000),
        power=st.integers(-145, -120) | st.integers(-120, 126),
        spread=st.integers(0, 30),
    )
    def test_they_are_next_to_the_value(self, sign, seed, size, power, spread):
        """In float64, with a table of all values of the block; the float32 computation may be off by 2**-20."""
        rng = np.random.default_rng(seed)
        x = (rng.uniform(-1, 1, size) * 2.0 ** (power - rng.integers(0, spread + 1, size))).astype(np.float32)
        x = np.abs(x) if sign == "non-negative" else x
        parts, table = stored(x, "int8", sign), units_of_codes(sign) / units_of_codes(sign)[-1]
        for start in range(0, size, BLOCK):
            block = np.abs(x[start : start + BLOCK].astype(np.float64))
            scale = float(parts["s.scales"][start // BLOCK])
            assert scale == (max(block.max(), 2.0**-126) if block.max() else 0)
            if scale == 0:
                continue
            codes = parts["s.codes"][start : start + BLOCK].astype(np.int64) % len(table)
            off = np.abs(table[codes] - block / scale)
            above = np.clip(np.searchsorted(table, block / scale, "right"), 1, len(table) - 1)
            room = table[above] - table[above - 1]
            tolerance = 2.0**-20
            assert (off <= room + tolerance).all()
            if sign == "signed":
                assert (codes[block / scale < (1 - 2.0**-9) * table[1]] == 0).all()
            else:
                assert ((codes > 0) == (block > 0)).all()
        found = decoded(parts, sign)
        assert (found * x >= 0).all()

    @pytest.mark.parametrize("sign", ["non-negative", "unknown"])
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_only_zero_is_zero_where_it_may_be_divided_by(self, sign, rounding):
        x = np.concatenate([2.0 ** np.arange(-149, 128, dtype=np.float64), [0.0, -0.0, 1e-45]]).astype(np.float32)
        x[256] = 1e38  # the second block is large too
        opt = keeping(sign, slot_dtype="int8", rounding=rounding)
        for _ in range(30):
            opt.apply_gradients({"w": x}, {"w": np.zeros(x.shape, np.float32)})
            assert ((opt.state["w"]["s.codes"] != 0) == (x != 0)).all()

    def test_signed_values_far_below_the_largest_become_zero(self):
        parts = stored(np.float32([1, 1e-6, -6e-5, 1 / 127**2, -1 / 127**2]), "int8", "signed")
        assert parts["s.codes"].tolist() == [127, 0, 0, 1, 129]

    def test_what_shrinks_by_a_tenth_comes_to_nothing(self):
        """To nearest, a code below 10 would stay where it is for ever."""

        @gs.rule(signs={"s": "signed"})
        def Mean(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
            return w, 0.9 * s + g

        opt, params = Mean(0.0, slot_dtype="int8"), {"w": np.zeros(512, np.float32)}
        g = np.full(512, 0.005, np.float32)
        g[::BLOCK] = 0.1  # keeps the scale
        opt.apply_gradients({"w": g}, params)
        for _ in range(200):
            opt.apply_gradients({"w": np.where(g == np.float32(0.1), g, 0)}, params)
        assert np.count_nonzero(opt.state["w"]["s.codes"]) == 2

    @pytest.mark.parametrize("sign", SIGNS)
    @pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("at", [256, 300, 511])
    def test_a_value_that_is_no_number_makes_its_block_nan_and_no_other(self, sign, odd, at):
        x = np.abs(values(1, 700, "float32"))
        clean = stored(x, "int8", sign)
        spoilt = x.copy()
        spoilt[at] = odd
        parts = stored(spoilt, "int8", sign)
        assert np.isnan(parts["s.scales"]).tolist() == [False, True, False]
        for keep in (slice(0, 256), slice(512, 700)):
            assert_same_bits(parts["s.codes"][keep], clean["s.codes"][keep])
        assert_same_bits(parts["s.scales"][[0, 2]], clean["s.scales"][[0, 2]])

        @gs.rule(signs={"s": sign})
        def Shown(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
            return +s, s + g

        opt, params = Shown(0.0, slot_dtype="int8"), {"w": np.zeros(700, np.float32)}
        opt.apply_gradients({"w": spoilt}, params)
        opt.apply_gradients({"w": np.zeros(700, np.float32)}, params)
        assert (np.isnan(params["w"]) == ((np.arange(700) >= 256) & (np.arange(700) < 512))).all()

    @pytest.mark.parametrize("power", [-138, -130, -126, -120, 0, 100, 126, 127])
    def test_codes_that_are_decoded_and_encoded_again_stay(self, power):
        @gs.rule(signs={"s": "signed"})
        def Stays(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
            return w, s + g

        x = np.random.default_rng(1).uniform(-1, 1, 2000) ** 3 * 2.0**power
        opt, params = Stays(0.0, slot_dtype="int8"), {"w": np.zeros(2000, np.float32)}
        opt.apply_gradients({"w": x}, params)
        before = {part: array.copy() for part, array in opt.state["w"].items()}
        assert before["s.scales"].min() >= 2.0**-126
        assert len(set(before["s.codes"].tolist())) > (200 if power > -126 else 1)
        for _ in range(3):
            opt.apply_gradients({"w": np.zeros(2000, np.float32)}, params)
            for part, array in opt.state["w"].items():
                assert_same_bits(array, before[part], part)

    @pytest.mark.parametrize("sign", SIGNS)
    def test_codes_at_random_stay_but_for_the_error_of_float32(self, sign):
        """What a code stands for is rounded to float32: once in 2**16 times it may be found to lie below the code."""

        @gs.rule(signs={"s": sign})
        def Stays(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
            return w, s + g

        x = np.random.default_rng(1).uniform(0, 1, 50_000) ** 3
        opt = Stays(0.0, slot_dtype="int8", rounding="stochastic")
        params = {"w": np.zeros(x.shape, np.float32)}
        opt.apply_gradients({"w": x}, params)
        changed = 0
        for _ in range(20):
            before = opt.state["w"]["s.codes"].astype(int)
            opt.apply_gradients({"w": np.zeros(x.shape, np.float32)}, params)
            moved = np.abs(opt.state["w"]["s.codes"].astype(int) - before)
            assert moved.max() <= 1
            changed += np.count_nonzero(moved)
        assert changed <= 20 * x.size * 2.0**-16

    @pytest.mark.parametrize("shape", [(3, 300), (2, 3, 256), (4, 1), (2, 513)])
    def test_blocks_of_adafactors_moment_begin_anew_at_each_row(self, shape):
        wide, narrow = gs.Adafactor(beta_1=0.9), gs.Adafactor(beta_1=0.9, slot_dtype={"m": "int8"})
        w, g = values(1, shape, "float32"), values(2, shape, "float32")
        wide.apply_gradients({"w": g}, {"w": w.copy()})
        narrow.apply_gradients({"w": g}, {"w": w.copy()})
        codes, scales = encode(wide.state["w"]["m"], "signed", noise(0, "w", "m", 0, w.size).reshape(shape), shape[-1])
        assert_same_bits(narrow.state["w"]["m.codes"], codes)
        assert_same_bits(narrow.state["w"]["m.scales"], scales)
        assert scales.size == math.prod(shape[:-1]) * -(-shape[-1] // BLOCK)

    def test_blocks_of_muons_momentum_run_on(self):
        wide, narrow = gs.Muon(0.1), gs.Muon(0.1, slot_dtype="int8")
        w, g = values(1, (30, 50), "float32"), values(2, (30, 50), "float32")
        wide.apply_gradients({"w": g}, {"w": w.copy()})
        narrow.apply_gradients({"w": g}, {"w": w.copy()})
        codes, scales = encode(wide.state["w"]["v"], "signed", noise(0, "w", "v", 0, w.size).reshape(w.shape), w.size)
        assert_same_bits(narrow.state["w"]["v.codes"], codes)
        assert_same_bits(narrow.state["w"]["v.scales"], scales)


class TestSmallSteps:
    """Steps of a 30th of the distance to the next bfloat16 number."""

    def moved(self, library: str, dtype: str, **options: Any) -> float:
        opt, params = gs.SGD(1.0, **options), {"w": held(library, np.ones(1000, DTYPES[dtype]))}
        gap = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
        for _ in range(60):
            opt.apply_gradients({"w": held(library, np.full(1000, gap / 30, np.float32))}, params)
        return (1 - float(seen(params["w"]).astype(np.float64).mean())) / gap

    @pytest.mark.parametrize("library", ["numpy", "torch"])
    @pytest.mark.parametrize("dtype", NARROW)
    def test_move_a_weight_on_average_or_with_a_copy_and_never_without(self, library, dtype):
        assert self.moved(library, dtype) == 0
        assert self.moved(library, dtype, rounding="stochastic") == pytest.approx(2, abs=0.1)
        assert self.moved(library, dtype, master_weights=True) == pytest.approx(2, abs=0.1)
        assert self.moved(library, dtype, master_weights=True, rounding="stochastic") == pytest.approx(2, abs=0.1)
