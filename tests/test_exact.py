"""Proves that kernels give the bits of the rule on plain NumPy, for any threads, chunks, addresses and layouts."""

import copy
import math
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

import gradstep as gs
from families import ELEMENTWISE_FAMILIES, MATRIX_FAMILIES, Reference, assert_same_bits, configurations

Array = np.ndarray[Any, Any]

BLOCK = 1 << 15  # elements per chunk
POOLED = 1 << 19  # elements from which a step uses several threads here


@pytest.fixture(autouse=True, scope="module")
def sooner_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradstep.program.threads.WORTH_THREADS", POOLED)
        yield


DTYPES = ("float32", "float64")
INTEGERS = {"float32": np.uint32, "float64": np.uint64}

ROWS = configurations(*ELEMENTWISE_FAMILIES)
every_row = pytest.mark.parametrize(("cls", "kwargs"), ROWS)
both_libraries = pytest.mark.parametrize("library", ["numpy", "torch"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)

sizes = st.integers(0, 70) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 17, 2 * BLOCK, 2 * BLOCK + 71])
characters = st.sampled_from(["normal", "bits", "special"])
seeds = st.integers(0, 2**32 - 1)


def values(seed: int, shape: Any, dtype: str, character: str = "normal") -> Array:
    """Ordinary numbers, any bit patterns, or the edges of the format."""
    rng = np.random.default_rng(seed)
    if character == "bits":
        word = INTEGERS[dtype]
        return np.array(rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True)).view(dtype)
    if character == "special":
        limits = np.finfo(dtype)
        edges = [0, 1, limits.eps, limits.max, limits.tiny, limits.tiny / 2, limits.smallest_subnormal, np.inf, np.nan]
        return np.array(rng.choice([*edges, *(-edge for edge in edges)], shape)).astype(dtype)
    return np.array(rng.standard_normal(shape)).astype(dtype)


def held(library: str, array: Array) -> Any:
    """A copy as an array of the library."""
    copy = np.array(array)
    return torch.from_numpy(copy) if library == "torch" else copy


def assert_steps_are_exact(opt: Any, library: str, starts: dict[str, Array], steps: list[dict[str, Array]]) -> None:
    """Take the steps and compare parameters and slots with the reference after each."""
    params = {name: held(library, w) for name, w in starts.items()}
    references = {name: Reference(opt, w) for name, w in starts.items()}
    for grads in steps:
        opt.apply_gradients({name: held(library, g) for name, g in grads.items()}, params)
        for name, g in grads.items():
            references[name].step(g)
            assert_matches(opt, name, params[name], references[name])


def assert_matches(opt: Any, name: str, parameter: Any, reference: Reference) -> None:
    assert_same_bits(parameter, reference.w, f"params[{name!r}]")
    kept = {slot: value for slot, value in reference.slots.items() if value is not None}
    assert opt.state[name].keys() == kept.keys()
    for slot, value in kept.items():
        assert_same_bits(opt.state[name][slot], value, f"state[{name!r}][{slot!r}]")


class TestElementwiseRulesEqualPlainNumPy:
    @every_row
    @both_libraries
    @settings(max_examples=12)
    @given(size=sizes, dtype=st.sampled_from(DTYPES), gradient_dtype=st.sampled_from(DTYPES), of_w=characters,
           of_g=characters, seed=seeds)  # fmt: skip
    def test_for_any_size_and_any_values(self, cls, kwargs, library, size, dtype, gradient_dtype, of_w, of_g, seed):
        w = values(seed, size, dtype, of_w)
        steps = [{"w": values(seed + i, size, gradient_dtype, of_g)} for i in (1, 2)]
        assert_steps_are_exact(cls(**kwargs), library, {"w": w}, steps)

    @every_row
    @both_libraries
    def test_for_many_tensors_in_one_call(self, cls, kwargs, library):
        shapes = {"scalar": (), "empty": (0, 4), "row": (1, 17), "matrix": (33, 5), "stack": (2, 3, 4, 5)}
        mixed = {f"{name} {dtype}": (shape, dtype) for name, shape in shapes.items() for dtype in DTYPES}
        starts = {name: values(1, shape, dtype) for name, (shape, dtype) in mixed.items()}
        steps = [{name: values(i, shape, "float32") for name, (shape, _) in mixed.items()} for i in (2, 3, 4)]
        assert_steps_are_exact(cls(**kwargs), library, starts, steps)

    @given(
        learning_rate=st.floats(-1e3, 1e3), beta1=st.floats(0, 0.9375), beta2=st.floats(0, 0.9990234375),
        eps=st.floats(0, 1), weight_decay=st.floats(0, 1e3), seed=seeds,
    )  # fmt: skip
    def test_for_any_hyperparameters(self, learning_rate, beta1, beta2, eps, weight_decay, seed):
        opt = gs.AdamW(
            learning_rate, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, bias_correction=seed % 2 == 0
        )
        steps = [{"w": values(seed + i, 21, "float32", "normal")} for i in range(3)]
        assert_steps_are_exact(opt, "numpy", {"w": values(seed, 21, "float32")}, steps)

    def test_for_scheduled_hyperparameters(self):
        opt = gs.AdamW(
            gs.linear_schedule(0.1, 0.3, 7), betas=(lambda step: 0.9 - 0.1 * step, 0.99),
            eps=gs.exponential_decay(0.1, 0.3), weight_decay=lambda step: 0.3 / (1 + step), bias_correction=True,
        )  # fmt: skip
        steps = [{"w": values(i, 40, "float32")} for i in range(4)]
        assert_steps_are_exact(opt, "numpy", {"w": values(9, 40, "float32")}, steps)

    @both_dtypes
    def test_for_gradients_clipped_within_the_step(self, dtype):
        opt = gs.SGD(0.1, momentum=0.9, clip_norm=0.7)
        w, g = values(1, 1000, dtype), values(2, 1000, dtype)
        params = {"w": w.copy()}
        opt.apply_gradients({"w": g}, params)
        norm = math.sqrt(math.fsum(x * x for x in g.tolist()))
        assert opt.report.grad_norm == pytest.approx(norm, rel=1e-15)
        reference = Reference(opt, w)
        reference.step(g * np.dtype(dtype).type(0.7 / (opt.report.grad_norm + 1e-6)))
        assert_matches(opt, "w", params["w"], reference)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda w, g: w + g,
    "subtract": lambda w, g: w - g,
    "multiply": lambda w, g: w * g,
    "divide": lambda w, g: w / g,
    "negative": lambda w, g: -g,
    "positive": lambda w, g: +g,
    "square": lambda w, g: g * g,
    "self minus self": lambda w, g: g - g,
    "abs": lambda w, g: abs(g),
    "gs.abs": lambda w, g: gs.abs(g),
    "sqrt": lambda w, g: gs.sqrt(g),
    "sign": lambda w, g: gs.sign(g),
    "minimum": lambda w, g: gs.minimum(w, g),
    "maximum": lambda w, g: gs.maximum(w, g),
    "minimum with a number": lambda w, g: gs.minimum(g, 0.5),
    "maximum with a number": lambda w, g: gs.maximum(-0.5, g),
    "number times": lambda w, g: 3 * g,
    "number that float32 rounds": lambda w, g: 0.1 * g + 1e-50,
    "number over": lambda w, g: 1 / g,
    "over number": lambda w, g: g / 3,
    "number minus": lambda w, g: 0.1 - g,
    "no contraction": lambda w, g: w * g + w,
    "no reassociation": lambda w, g: (w + g) + (g + w) - w,
    "no reciprocal": lambda w, g: w / 0.3 / g,
    "less": lambda w, g: gs.where(w < g, w, 2 * g),
    "less or equal": lambda w, g: gs.where(w <= g, w, 2 * g),
    "greater": lambda w, g: gs.where(w > g, w, 2 * g),
    "greater or equal": lambda w, g: gs.where(w >= g, w, 2 * g),
    "equal": lambda w, g: gs.where(w == g, w, 2 * g),
    "not equal": lambda w, g: gs.where(w != g, w, 2 * g),
    "compare with a number": lambda w, g: gs.where(g < 0.5, 1.0, g),
    "constant condition": lambda w, g: gs.where(True, w, g),
    "condition on the whole": lambda w, g: gs.where(gs.mean(w) < 0.125, w, g),
}


def one_operation(operation: Callable[[Any, Any], Any]) -> Any:
    @gs.rule
    def One(w, g, s, *, learning_rate):
        return w - learning_rate * g, operation(w, g)

    return One(0.5)


class TestOperations:
    @pytest.mark.parametrize("name", OPERATIONS)
    @settings(max_examples=12)
    @given(size=st.integers(1, 70), dtype=st.sampled_from(DTYPES), of_w=characters, of_g=characters, seed=seeds)
    def test_each_equals_numpys(self, name, size, dtype, of_w, of_g, seed):
        w, g = values(seed, size, dtype, of_w), values(seed + 1, size, dtype, of_g)
        opt = one_operation(OPERATIONS[name])
        opt.apply_gradients({"w": g}, {"w": w.copy()})
        with np.errstate(all="ignore"):
            found, expected = opt.state["w"]["s"], OPERATIONS[name](w, g)
            if "imum" in name:  # the sign of max(+0, -0) is free
                found, expected = found + found.dtype.type(0), expected + expected.dtype.type(0)
        assert_same_bits(found, expected, name)

    def test_sign_and_extremes_treat_zero_and_nan_as_promised(self):
        g = np.array([0.0, -0.0, np.nan, 2.0], np.float32)
        for name, expected in {
            "sign": [0.0, 0.0, np.nan, 1.0],
            "minimum": [0.0, 0.0, np.nan, 1.0],
            "maximum": [1.0, 1.0, np.nan, 2.0],
        }.items():
            opt = one_operation(OPERATIONS[name])
            opt.apply_gradients({"w": g}, {"w": np.ones(4, np.float32)})
            np.testing.assert_array_equal(opt.state["w"]["s"], expected)
            if name == "sign":
                assert not np.signbit(opt.state["w"]["s"]).any()

    @both_dtypes
    @pytest.mark.parametrize("function", [gs.exp, gs.log])
    def test_exponential_and_logarithm_agree_within_a_few_ulp(self, function, dtype):
        g = np.abs(values(1, 1000, dtype)) * 5 + 1e-3
        opt = one_operation(lambda w, g: function(g))
        opt.apply_gradients({"w": g}, {"w": np.zeros_like(g)})
        np.testing.assert_array_max_ulp(opt.state["w"]["s"], function(g), maxulp=4)


# Every row in NumPy; in float64 and in PyTorch, which take the same kernels' other paths, the last of each family.
LAST = {row.values[0]: row for row in ROWS}.values()
THREADED = [
    pytest.param(*row.values, library, dtype, id=f"{row.id}-{library}-{dtype}")
    for library, dtype, rows in (("numpy", "float32", ROWS), ("numpy", "float64", LAST), ("torch", "float32", LAST))
    for row in rows
]


class TestThreads:
    @pytest.mark.parametrize(("cls", "kwargs", "library", "dtype"), THREADED)
    def test_no_number_of_threads_changes_a_bit(self, cls, kwargs, library, dtype, default_threads):
        shapes = {"large": (POOLED - 71,), "matrix": (257, 129), "tail": (71,), "scalar": (), "empty": (0,)}
        starts = {name: values(1, shape, dtype) for name, shape in shapes.items()}
        steps = [{name: values(i, shape, dtype) for name, shape in shapes.items()} for i in (2, 3)]
        references = {name: Reference(cls(**kwargs), w) for name, w in starts.items()}
        for grads in steps:
            for name, g in grads.items():
                references[name].step(g)
        for threads in (1, 2, 3, 5):
            gs.set_num_threads(threads)
            opt, params = cls(**kwargs), {name: held(library, w) for name, w in starts.items()}
            for grads in steps:
                opt.apply_gradients({name: held(library, g) for name, g in grads.items()}, params)
            for name, reference in references.items():
                assert_matches(opt, name, params[name], reference)

    @both_dtypes
    @pytest.mark.parametrize("kwargs", [{}, {"learning_rate": 0.05, "beta_1": 0.9, "weight_decay": 0.1}])
    @pytest.mark.parametrize("shape", [(POOLED + 1000,), (1031, 513), (2, 70, 5000)])
    def test_adafactor_has_the_same_bits_on_every_number(self, kwargs, shape, dtype, default_threads):
        results = [self.after_two_steps(gs.Adafactor(**kwargs), shape, dtype, threads) for threads in (1, 2, 3, 5)]
        for params, state in results[1:]:
            assert_same_bits(params["w"], results[0][0]["w"])
            for slot in state:
                assert_same_bits(state[slot], results[0][1][slot], slot)

    @pytest.mark.parametrize("shape", [(POOLED + 1000,), (8193, 65)])
    def test_muons_momentum_has_the_same_bits_on_every_number(self, shape, default_threads):
        results = [self.after_two_steps(gs.Muon(0.1, ns_steps=1), shape, "float32", n) for n in (1, 2, 3, 5)]
        for params, state in results[1:]:
            assert_same_bits(state["v"], results[0][1]["v"])
            if len(shape) == 1:
                assert_same_bits(params["w"], results[0][0]["w"])

    def after_two_steps(self, opt: Any, shape: Any, dtype: str, threads: int) -> tuple[dict[str, Array], ...]:
        gs.set_num_threads(threads)
        params = {"w": values(1, shape, dtype)}
        for i in (2, 3):
            opt.apply_gradients({"w": values(i, shape, dtype)}, params)
        return params, dict(opt.state["w"])


def at_offset(array: Array, offset: int) -> Array:
    """A copy that begins `offset` bytes after an aligned address."""
    space = np.zeros(array.nbytes + 128, np.uint8)
    start = -space.ctypes.data % 64 + offset
    view = space[start : start + array.nbytes].view(array.dtype)
    view[:] = array
    return view


class TestPlacesInMemory:
    @both_dtypes
    @given(offsets=st.tuples(st.integers(0, 63), st.integers(0, 63)), size=st.integers(1, 70), seed=seeds)
    @example(offsets=(1, 3), size=BLOCK + 5, seed=1)
    def test_no_address_changes_a_bit(self, dtype, offsets, size, seed):
        w, g = values(seed, size, dtype), values(seed + 1, size, dtype)
        opt, params = gs.AdamW(0.1), {"w": at_offset(w, offsets[0])}
        assert params["w"].ctypes.data % 64 == offsets[0]
        opt.apply_gradients({"w": at_offset(g, offsets[1])}, params)
        reference = Reference(opt, w)
        reference.step(g)
        assert_matches(opt, "w", params["w"], reference)

    def test_slices_of_a_torch_tensor_are_exact(self):
        w, g = values(1, 300, "float32"), values(2, 300, "float32")
        opt, whole, gradients = gs.AdamW(0.1), held("torch", w), held("torch", g)
        opt.apply_gradients({"w": gradients[7:260]}, {"w": whole[3:256]})
        reference = Reference(opt, w[3:256])
        reference.step(g[7:260])
        assert_matches(opt, "w", whole[3:256], reference)
        assert_same_bits(whole[:3], w[:3])
        assert_same_bits(whole[256:], w[256:])

    @every_row
    @settings(max_examples=10)
    @given(cuts=st.lists(st.integers(0, 3 * BLOCK), max_size=6), seed=seeds)
    def test_no_cut_into_shards_changes_a_bit(self, cls, kwargs, cuts, seed):
        size = 3 * BLOCK
        w, grads = values(seed, size, "float32"), [values(seed + i, size, "float32") for i in (1, 2)]
        whole, sharded, one, many = {"w": w.copy()}, w.copy(), cls(**kwargs), cls(**kwargs)
        edges = [0, *sorted(cuts), size]
        pieces = [slice(a, b) for a, b in pairwise(edges)]
        for g in grads:
            one.apply_gradients({"w": g}, whole)
            many.apply_gradients(
                {str(i): g[piece] for i, piece in enumerate(pieces)},
                {str(i): sharded[piece] for i, piece in enumerate(pieces)},
            )
        assert_same_bits(sharded, whole["w"])
        for slot, value in one.state.get("w", {}).items():
            parts = [many.state[str(i)][slot] for i in range(len(pieces))]
            assert_same_bits(np.concatenate(parts), value, slot)


def in_layout(array: Array, layout: str) -> Array:
    """The same values in other places: dense in another order of axes, or spread out."""
    if layout == "spread":
        space = np.zeros([2 * length for length in array.shape], array.dtype)
        view = space[..., *(slice(None, None, 2) for _ in array.shape)]
    elif layout == "backwards":
        view = np.zeros_like(array)[..., *(slice(None, None, -1) for _ in array.shape)]
    elif layout == "records":
        view = np.zeros(array.shape, [("pad", np.int8), ("value", array.dtype)])["value"]
    else:
        order = [int(axis) for axis in layout]
        view = np.zeros([array.shape[axis] for axis in order], array.dtype).transpose(np.argsort(order))
    view[...] = array
    return view


DENSE = ("0123", "3210", "0231", "1032", "2301")  # axes from slow to fast: C, Fortran, channels-last, others
LAYOUTS = (*DENSE, "spread", "backwards", "records")


class TestLayouts:
    @pytest.mark.parametrize("of_g", LAYOUTS)
    @pytest.mark.parametrize("of_w", LAYOUTS)
    def test_no_layout_changes_a_bit(self, of_w, of_g):
        w, grads = values(1, (3, 4, 5, 7), "float32"), [values(i, (3, 4, 5, 7), "float32") for i in (2, 3)]
        opt, params = gs.AdamW(0.1), {"w": in_layout(w, of_w)}
        reference = Reference(opt, w)
        for g in grads:
            opt.apply_gradients({"w": in_layout(g, of_g)}, params)
            reference.step(g)
            assert_matches(opt, "w", params["w"], reference)

    @pytest.mark.parametrize("layout", DENSE)
    def test_slots_copy_the_order_of_a_dense_parameter(self, layout):
        opt, w = gs.Adam(0.1), in_layout(values(1, (3, 4, 5, 7), "float32"), layout)
        opt.apply_gradients({"w": values(2, (3, 4, 5, 7), "float32")}, {"w": w})
        assert opt.state["w"]["m"].strides == opt.state["w"]["v"].strides == w.strides

    def test_the_space_between_the_elements_of_a_view_stays_untouched(self):
        space = np.full((10, 10), 7, np.float32)
        gs.SGD(1.0).apply_gradients({"w": np.ones((5, 5), np.float32)}, {"w": space[::2, 1::2]})
        assert (space[::2, 1::2] == 6).all()
        assert space.sum() == 7 * 75 + 6 * 25

    def test_a_broadcast_gradient_is_read_element_by_element(self):
        w, row = values(1, (6, 5), "float32"), values(2, (5,), "float32")
        opt, params = gs.RMSprop(0.1), {"w": w.copy()}
        opt.apply_gradients({"w": np.broadcast_to(row, (6, 5))}, params)
        reference = Reference(opt, w)
        reference.step(np.broadcast_to(row, (6, 5)))
        assert_matches(opt, "w", params["w"], reference)

    @pytest.mark.parametrize(
        "arranged",
        [
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: x.transpose(0, 3),
            lambda x: x.permute(2, 0, 3, 1)[::2],
            lambda x: x[:, 1:, :, ::3],
        ],
        ids=["channels last", "transposed", "permuted and sliced", "sliced"],
    )
    def test_torch_tensors_of_any_strides_are_exact(self, arranged):
        w = arranged(held("torch", values(1, (2, 3, 4, 5), "float64")))
        g = arranged(held("torch", values(2, (2, 3, 4, 5), "float64")))
        opt, reference = gs.AdamW(0.1), Reference(gs.AdamW(0.1), w.numpy())
        opt.apply_gradients({"w": g}, {"w": w})
        reference.step(g.numpy())
        assert_matches(opt, "w", w, reference)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_statistics_read_in_c_order_whatever_the_layout(self, layout):
        w, g = (values(i, (3, 40, 30, 20), "float64") for i in (1, 2))  # float64: the order of a sum shows
        opt, params = statistics(), {"w": in_layout(w, layout)}
        opt.apply_gradients({"w": in_layout(g, layout)}, params)
        assert [opt.state["w"][slot].flat[0] for slot in "abc"] == [gs.mean(g), gs.rms(g), gs.norm(g)]


def statistics() -> Any:
    """An optimizer that writes each statistic of its gradient into a slot."""

    @gs.rule
    def Statistics(w, g, a, b, c, *, learning_rate):
        spread = [gs.where(g == g, x, x) for x in (gs.mean(g), gs.rms(g), gs.norm(g))]
        return w - learning_rate * g, *spread

    return Statistics(0.1)


class TestStatistics:
    def test_a_mean_of_squares_is_one_of_rounded_products(self):
        @gs.rule
        def Squares(w, g, *, rate):
            return w + rate * gs.mean(g * g) + 0.0 * g

        others = 0
        for seed in range(60):
            g, w = values(seed, 9, "float32"), np.zeros(9, np.float32)
            Squares(rate=1.0).apply_gradients({"w": g}, {"w": w})
            assert (w == gs.mean(g * g)).all()
            others += w[0] != np.float32(np.mean(g.astype(np.float64) ** 2))
        assert others > 0

    @both_libraries
    @settings(max_examples=60)
    @given(size=sizes.filter(bool), dtype=st.sampled_from(DTYPES), of_g=characters, seed=seeds)
    def test_mean_rms_and_norm_equal_those_of_numpy_arrays(self, library, size, dtype, of_g, seed):
        g = values(seed, size, dtype, of_g)
        opt = statistics()
        opt.apply_gradients({"w": held(library, g)}, {"w": held(library, np.zeros_like(g))})
        with np.errstate(all="ignore"):
            expected = {"a": gs.mean(g), "b": gs.rms(g), "c": gs.norm(g)}
        for slot, value in expected.items():
            assert_same_bits(opt.state["w"][slot], np.full(g.shape, value, dtype), slot)

    @both_dtypes
    def test_they_have_the_same_bits_on_every_number_of_threads(self, dtype, default_threads):
        g = values(1, (POOLED + 12345,), dtype)
        for threads in (1, 2, 3, 5):
            gs.set_num_threads(threads)
            opt = statistics()
            opt.apply_gradients({"w": g}, {"w": np.zeros_like(g)})
            found = [opt.state["w"][slot][0] for slot in ("a", "b", "c")]
            assert found == [gs.mean(g), gs.rms(g), gs.norm(g)]

    @both_dtypes
    @pytest.mark.parametrize("size", [1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
    def test_they_are_the_true_values(self, size, dtype):
        g = values(1, size, dtype) + 3
        numbers, eps = g.astype(np.float64).tolist(), float(np.finfo(dtype).eps)
        squares = math.fsum(x * x for x in numbers)
        assert float(gs.mean(g)) == pytest.approx(math.fsum(numbers) / size, rel=2 * eps)
        assert float(gs.rms(g)) == pytest.approx(math.sqrt(squares / size), rel=2 * eps)
        assert float(gs.norm(g)) == pytest.approx(math.sqrt(squares), rel=2 * eps)

    def test_large_float32_numbers_do_not_overflow_their_squares(self):
        g = np.full(100, 3e38, np.float32)
        assert gs.rms(g) == np.float32(3e38)
        opt = statistics()
        opt.apply_gradients({"w": g}, {"w": np.zeros_like(g)})
        assert (opt.state["w"]["b"] == np.float32(3e38)).all()

    @pytest.mark.parametrize(("cls", "kwargs"), configurations(*MATRIX_FAMILIES))
    @both_libraries
    @pytest.mark.parametrize("size", [(), 1, 17, BLOCK + 3])
    def test_adafactor_and_muon_are_exact_below_two_dimensions(self, cls, kwargs, library, size):
        steps = [{"w": values(i, size, "float32")} for i in (2, 3)]
        assert_steps_are_exact(cls(**kwargs), library, {"w": values(1, size, "float32")}, steps)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="torch cannot flush denormals on this machine")
class TestFlushedDenormals:
    def test_the_callers_mode_changes_no_bit_and_stays(self):
        tiny = {dtype: values(1, 1000, dtype, "special") for dtype in DTYPES}
        small = {dtype: values(2, 1000, dtype) * np.finfo(dtype).tiny for dtype in DTYPES}
        for row in ROWS:
            cls, kwargs = row.values
            expected = {dtype: Reference(cls(**kwargs), small[dtype]) for dtype in DTYPES}
            for dtype in DTYPES:
                expected[dtype].step(tiny[dtype])
            opt, params = cls(**kwargs), {dtype: small[dtype].copy() for dtype in DTYPES}
            assert run_flushed(lambda opt=opt, params=params: opt.apply_gradients(tiny, params)) == (True, True)
            for dtype in DTYPES:
                assert_matches(opt, dtype, params[dtype], expected[dtype])

    def test_statistics_of_denormals_survive(self):
        g = np.full(100, 1e-42, np.float32)
        opt, w = statistics(), np.zeros_like(g)
        assert run_flushed(lambda: opt.apply_gradients({"w": g}, {"w": w})) == (True, True)
        assert [opt.state["w"][slot][0] for slot in ("a", "b", "c")] == [gs.mean(g), gs.rms(g), gs.norm(g)]
        assert gs.mean(g) == np.float32(1e-42) > 0

    def test_row_and_column_statistics_of_denormals_survive(self):
        g = np.full((8, 8), 1e-25, np.float32)
        results = []
        for run in (lambda step: step(), run_flushed):
            opt, params = gs.Adafactor(0.1, eps=(1e-42, 0.0)), {"w": np.ones((8, 8), np.float32)}
            run(lambda opt=opt, params=params: opt.apply_gradients({"w": g}, params))
            results.append([params["w"], opt.state["w"]["row"], opt.state["w"]["col"]])
        for found, expected in zip(results[1], results[0], strict=True):
            assert_same_bits(found, expected)
        assert (results[0][1] > 0).all()

    def test_the_pools_threads_keep_denormals_too(self, default_threads):
        gs.set_num_threads(3)
        g = np.full(POOLED, 1e-42, np.float32)
        opt, params = gs.SGD(0.5), {"w": np.zeros_like(g)}
        assert run_flushed(lambda: opt.apply_gradients({"w": g}, params)) == (True, True)
        assert (params["w"] == np.float32(-0.5) * g).all()
        assert (params["w"] < 0).all()


def run_flushed(function: Callable[[], object]) -> tuple[bool, bool]:
    """Call on a thread that flushes denormals; tell whether it did so before, and whether it still does after."""
    flushes: list[bool] = []
    errors: list[Exception] = []
    smallest, one = np.array([1e-42], np.float32), np.ones(1, np.float32)

    def body() -> None:
        torch.set_flush_denormal(True)
        flushes.append(bool((smallest * one).view(np.uint32)[0] == 0))
        try:
            function()
        except Exception as error:
            errors.append(error)
        flushes.append(bool((smallest * one).view(np.uint32)[0] == 0))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return flushes[0], flushes[1]


NAMES = {"a.scalar": (), "a.vector": (19,), "b.matrix": (4, 5), "b.stack": (2, 3, 4)}
every = list(NAMES)
subsets = st.sampled_from([every, every, every, ["a.scalar"], ["a.vector", "b.matrix"], []])  # few: plans get reused
styles = st.sampled_from(["plain", "plain", "plain", "float64", "spread"])
actions = st.one_of(
    st.tuples(st.just("step"), subsets, seeds, styles),
    st.tuples(st.just("step a child"), st.integers(0, 1), subsets, seeds),
    st.tuples(st.just("fail"), subsets, st.sampled_from(["shape", "scalar", "scalar", "skip"])),
    st.tuples(st.just("set"), st.sampled_from(["learning_rate", "weight_decay"]), st.sampled_from([0.0, 0.1, 0.3])),
    st.tuples(st.just("move"), st.sampled_from(["C", "F", "spread"])),
    st.tuples(st.just("init")),
    st.tuples(st.just("copy")),
)


class AnyHistory:
    """A nested optimizer and its parameters, and beside them the references that they must equal."""

    def __init__(self) -> None:
        children = [gs.AdamW(0.1, bias_correction=True), gs.SGD(0.1, momentum=0.9, weight_decay=0.1)]
        self.opt = gs.MultiOptimizer(children, ["a.*"], nonfinite="skip")
        self.params = {name: values(i, shape, "float32") for i, (name, shape) in enumerate(NAMES.items())}
        self.references = {name: Reference(self.child(name), w) for name, w in self.params.items()}

    def child(self, name: str) -> Any:
        return self.opt.optimizers[name[0] == "b"]

    def grads(self, names: list[str], seed: int, style: str = "plain") -> dict[str, Array]:
        dtype = "float64" if style == "float64" else "float32"
        made = {name: values(seed + i, NAMES[name], dtype) for i, name in enumerate(names)}
        return {name: in_layout(g, "spread") if style == "spread" else g for name, g in made.items()}

    def step(self, names: list[str], seed: int, style: str) -> None:
        self.take(self.opt, self.grads(names, seed, style))

    def step_a_child(self, place: int, names: list[str], seed: int) -> None:
        self.take(self.opt.optimizers[place], self.grads([name for name in names if name[0] == "ab"[place]], seed))

    def take(self, opt: Any, grads: dict[str, Array]) -> None:
        opt.apply_gradients(grads, self.params)
        for name, g in grads.items():
            self.references[name].step(g)

    def fail(self, names: list[str], how: str) -> None:
        grads = self.grads(names, 1)
        if how == "skip":
            self.opt.apply_gradients({name: np.full_like(g, np.nan) for name, g in grads.items()}, self.params)
        elif how == "shape" and names:
            with pytest.raises(gs.ShapeError):
                self.opt.apply_gradients(grads | {names[-1]: np.ones((9, 9), np.float32)}, self.params)
        elif how == "scalar" and any(name[0] == "b" for name in names):
            rate = self.opt.optimizers[1].learning_rate
            self.opt.optimizers[1].learning_rate = 1e200  # fails when it is rounded, after the others' scalars
            with pytest.raises(gs.OutOfRangeError):
                self.opt.apply_gradients(grads, self.params)
            self.opt.optimizers[1].learning_rate = rate

    def set(self, name: str, value: float) -> None:
        for child in self.opt.optimizers:
            setattr(child, name, value)

    def move(self, style: str) -> None:
        self.params = {
            name: in_layout(w, style) if style == "spread" else np.array(w, order=style)
            for name, w in self.params.items()
        }

    def init(self) -> None:
        self.opt.init(self.params)
        self.references = {name: Reference(self.child(name), w) for name, w in self.params.items()}

    def copy(self) -> None:
        self.opt = copy.deepcopy(self.opt)
        for name, reference in self.references.items():
            reference.opt = self.child(name)

    def check(self) -> None:
        for name, reference in self.references.items():
            assert_same_bits(self.params[name], reference.w, name)
            for slot, value in self.opt.state.get(name, {}).items():
                assert_same_bits(value, reference.slots[slot], f"{name} {slot}")
        assert {name: reference.t for name, reference in self.references.items() if reference.t} == {
            name: count for name, count in self.opt.steps.items() if count
        }


class TestAnyHistory:
    @settings(max_examples=100)
    @given(history=st.lists(actions, max_size=14))
    def test_whatever_happened_before_every_step_is_exact(self, history):
        one = AnyHistory()
        for action, *arguments in history:
            getattr(one, action.replace(" ", "_"))(*arguments)
            one.check()
