"""Proves how steps behave with narrow storage: layouts, threads, copies, failures, clipping, JAX and MLX."""

import copy
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradstep as gs
from families import FAMILIES, Reference, assert_same_bits, configurations, public_optimizers
from stored import BLOCK, DTYPES, NARROW, Choice, StoredReference, assert_same_state, held, seen, to_nearest, values

Arrays = dict[str, Any]

NARROWEST = [
    {"slot_dtype": "bfloat16"},
    {"slot_dtype": "bfloat16", "rounding": "stochastic"},
    {"slot_dtype": "float16", "rounding": "stochastic", "master_weights": True},
    {"slot_dtype": "int8"},
    {"slot_dtype": "int8", "rounding": "stochastic", "seed": 5},
    {"slot_dtype": {"m": "int8", "v": "bfloat16"}, "master_weights": True},
]
in_each_storage = pytest.mark.parametrize("options", NARROWEST, ids=str)


@pytest.fixture(autouse=True, scope="module")
def as_in_other_tests() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradstep.program.threads.WORTH_THREADS", 1 << 16)
        yield
    mx.set_default_device(device)


def bits_of(opt: Any, params: Arrays) -> Any:
    """Counters, and the bytes of all parameters and state, in C order."""
    state = {
        (name, part): (seen(array).shape, seen(array).tobytes())
        for name, parts in opt.state.items()
        for part, array in parts.items()
    }
    return opt.step, opt.steps, state, {name: seen(array).tobytes() for name, array in params.items()}


def train(opt: Any, shape: Any, dtype: str, arranged: Callable[[Any], Any] = np.copy, names: str = "w") -> Any:
    params = {name: arranged(values(ord(name), shape, dtype)) for name in names}
    for seed in (2, 3):
        opt.apply_gradients({name: arranged(values(seed, shape, "bfloat16")) for name in names}, params)
    return bits_of(opt, params)


# Where arrays lie, and how many threads there are


def spread(array: Any) -> Any:
    view = np.zeros([2 * n for n in array.shape], array.dtype)[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def unaligned(array: Any) -> Any:
    view = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "Fortran": np.asfortranarray,
    "channels last": lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2),
    "every second element": spread,
    "unaligned": unaligned,
    "backwards": lambda x: np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
}


@in_each_storage
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_layout_changes_a_bit(options: Any, layout: str, dtype: str) -> None:
    shape = (3, 4, 5, 17)
    assert train(gs.Adam(0.1, **options), shape, dtype, LAYOUTS[layout]) == train(gs.Adam(0.1, **options), shape, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_a_bit_of_adafactor(layout: str) -> None:
    options: Any = {"slot_dtype": {"row": "bfloat16", "col": "float16", "m": "int8"}, "rounding": "stochastic"}
    one, two = (gs.Adafactor(beta_1=0.9, **options) for _ in range(2))
    assert train(one, (3, 4, 5, 300), "bfloat16", LAYOUTS[layout]) == train(two, (3, 4, 5, 300), "bfloat16")


@in_each_storage
def test_channels_last_tensors_give_the_same_bits(options: Any) -> None:
    def tensor(array: Any) -> Any:
        return held("torch", array).contiguous(memory_format=torch.channels_last)

    one, two = gs.Adam(0.1, **options), gs.Adam(0.1, **options)
    shape = (2, 3, 5, 17)
    found = train(one, shape, "bfloat16", tensor)
    assert found[2] == train(two, shape, "bfloat16")[2]


@in_each_storage
@pytest.mark.parametrize("cls", [gs.Adam, gs.Adafactor])
def test_no_number_of_threads_changes_a_bit(options: Any, cls: Any, default_threads: None) -> None:
    if cls is gs.Adafactor:
        options = options | {"slot_dtype": {"row": "bfloat16", "m": "int8"}, "beta_1": 0.9}
    results = []
    for threads in (1, 2, 3):
        gs.set_num_threads(threads)
        results.append(train(cls(0.1, **options), (700, 300), "bfloat16"))
    assert results[0] == results[1] == results[2]


@in_each_storage
def test_no_company_changes_a_bit(options: Any) -> None:
    _, _, state, params = train(gs.Adam(0.1, **options), (3, 300), "float16", names="abc")
    for name in "abc":
        _, _, own_state, own_params = train(gs.Adam(0.1, **options), (3, 300), "float16", names=name)
        assert own_params[name] == params[name]
        assert own_state == {key: array for key, array in state.items() if key[0] == name}


# Rules that look at more than one element: the narrow one's arrays are those of a plain optimizer, rounded


@pytest.mark.parametrize(("cls", "kwargs"), configurations(gs.Adafactor, gs.Muon))
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", NARROW)
def test_matrix_rules_are_those_of_float32_rounded(cls: Any, kwargs: Any, rounding: str, dtype: str) -> None:
    from stored import at_random, noise

    narrow = cls(**kwargs, slot_dtype="bfloat16", rounding=rounding, seed=3)
    shape = (2, 70, 33) if cls is gs.Adafactor else (70, 33)
    params, plain = {"w": values(1, shape, dtype)}, cls(**kwargs)
    others = {"w": params["w"].astype(np.float32)}
    plain.init(others)
    for step in range(3):
        others["w"][...] = params["w"]
        for slot, array in narrow.state.get("w", {}).items():
            plain.state["w"][slot][...] = array
        g = values(step + 2, shape, "float16")
        narrow.apply_gradients({"w": g}, params)
        plain.apply_gradients({"w": g}, others)
        arrays = {"w": (params["w"], others["w"], dtype)}
        arrays |= {s: (narrow.state["w"][s], plain.state["w"][s], "bfloat16") for s in plain.state["w"]}
        for place, (found, exact, stored) in arrays.items():
            words = noise(3, "w", place, step, exact.size).reshape(exact.shape)
            expected = at_random(exact, stored, words) if rounding == "stochastic" else to_nearest(exact, stored)
            assert_same_bits(found, expected, place)


# Copies of the weights


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("cls", [gs.AdamW, gs.Adafactor, gs.SGD])
def test_a_copy_is_the_trajectory_of_float32_and_the_parameter_its_rounding(cls: Any, dtype: str, library: str) -> None:
    opt, plain = cls(0.01, master_weights=True), cls(0.01)
    w = values(1, (20, 30), dtype)
    params, exact = {"w": held(library, w)}, {"w": held(library, w.astype(np.float32))}
    for seed in range(10):
        g = values(seed, (20, 30), "float32")
        opt.apply_gradients({"w": held(library, g)}, params)
        plain.apply_gradients({"w": held(library, g)}, exact)
        assert_same_bits(seen(opt.state["w"]["w.master"]), seen(exact["w"]))
        assert_same_bits(seen(params["w"]), to_nearest(seen(exact["w"]), dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_elements_written_from_outside_count_from_then_on(dtype: str) -> None:
    opt, plain = gs.AdamW(0.01, master_weights=True), gs.AdamW(0.01)
    params = {"w": values(1, 300, dtype)}
    exact = {"w": params["w"].astype(np.float32)}
    for seed in range(6):
        if seed in (2, 4):
            written = np.random.default_rng(seed).random(300) < 0.3
            new = values(seed + 50, 300, dtype)
            written &= new != params["w"]  # what is written again has not been written
            params["w"][written] = new[written]
            exact["w"][written] = params["w"][written].astype(np.float32)
        g = values(seed, 300, "float32")
        opt.apply_gradients({"w": g}, params)
        plain.apply_gradients({"w": g}, exact)
        assert_same_bits(opt.state["w"]["w.master"], exact["w"])
        assert_same_bits(params["w"], to_nearest(exact["w"], dtype))


def test_parameters_of_float32_have_no_copy() -> None:
    opt = gs.SGD(0.1, master_weights=True)
    opt.init({"a": np.zeros(3, np.float32), "b": np.zeros(3), "c": np.zeros(3, np.float16)})
    assert {name: list(parts) for name, parts in opt.state.items()}.get("c") == ["w.master"]
    assert not opt.state.get("a")
    assert not opt.state.get("b")


@in_each_storage
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_init_makes_the_arrays_that_the_first_step_would(options: Any, library: str) -> None:
    shapes = {"scalar": (), "empty": (0, 3), "matrix": (20, 30)}

    def params() -> Arrays:
        return {name: held(library, values(1, shape, "float16")) for name, shape in shapes.items()}

    grads = {name: held(library, values(2, shape, "float32")) for name, shape in shapes.items()}
    one, two, first, second = gs.Adam(0.1, **options), gs.Adam(0.1, **options), params(), params()
    one.init(first)
    made = {
        name: {part: (seen(a).shape, seen(a).dtype) for part, a in parts.items()} for name, parts in one.state.items()
    }
    assert all((seen(array) == 0).all() for parts in one.state.values() for array in parts.values())
    one.apply_gradients(grads, first)
    two.apply_gradients(grads, second)
    assert bits_of(one, first) == bits_of(two, second)
    shown = {name: {part: (seen(a).shape, seen(a).dtype) for part, a in p.items()} for name, p in two.state.items()}
    assert made == shown
    if options["slot_dtype"] == "int8":
        assert made["matrix"]["m.codes"] == ((20, 30), np.uint8)
        assert made["matrix"]["m.scales"] == ((-(-600 // BLOCK),), np.float32)
        assert made["empty"]["m.scales"] == ((0,), np.float32)
        assert made["scalar"]["m.scales"] == ((1,), np.float32)


# How far narrow storage is from float64

BOUNDS: list[tuple[Any, str, float]] = [
    ({"slot_dtype": "bfloat16"}, "float32", 2.0**-7),
    ({"slot_dtype": "bfloat16", "rounding": "stochastic"}, "float32", 2.0**-7),
    ({"slot_dtype": "float16"}, "float32", 2.0**-7),
    ({"slot_dtype": "int8"}, "float32", 2.0**-6),
    ({"slot_dtype": "int8", "rounding": "stochastic"}, "float32", 2.0**-6),
    ({"master_weights": True}, "bfloat16", 2.0**-4),
    ({"slot_dtype": "int8", "master_weights": True}, "float16", 2.0**-5),
]


def distance(cls: Any, kwargs: Any, options: Any, dtype: str) -> float:
    """After 20 steps, the error of the whole move in units of the move, against float64."""
    opt, params = cls(**kwargs, **options), {"w": values(0, 600, dtype)}
    start = params["w"].astype(np.float64)
    exact = Reference(opt, start)
    for seed in range(20):
        g = (values(seed + 1, 600, "float32") + 1).astype(np.float32)
        opt.apply_gradients({"w": g}, params)
        exact.step(g)
    return float(np.linalg.norm(params["w"].astype(np.float64) - exact.w) / np.linalg.norm(exact.w - start))


@pytest.mark.parametrize(("options", "dtype", "bound"), BOUNDS)
def test_the_error_of_20_steps_is_bounded(options: Any, dtype: str, bound: float) -> None:
    families = [cls for cls in public_optimizers() if cls is not gs.Adafactor]
    rows = [(cls, FAMILIES[cls.__name__][0]) for cls in families]
    found = {str(row): distance(*row, options, dtype) for row in rows}
    assert {row: error for row, error in found.items() if error > bound} == {}
    assert max(found.values()) > bound / 8, "the bound says too little"


# Copies and failures


@in_each_storage
@pytest.mark.parametrize("how", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_copy_goes_on_bit_for_bit(options: Any, how: Any, library: str) -> None:
    opt, params = gs.Adam(0.1, **options), {"w": held(library, values(1, 700, "bfloat16"))}
    for seed in (2, 3):
        opt.apply_gradients({"w": held(library, values(seed, 700, "float32"))}, params)
    twin, others = how(opt), copy.deepcopy(params)
    assert repr(twin) == repr(opt)
    for seed in (4, 5):
        opt.apply_gradients({"w": held(library, values(seed, 700, "float32"))}, params)
        twin.apply_gradients({"w": held(library, values(seed, 700, "float32"))}, others)
    assert bits_of(twin, others) == bits_of(opt, params)


def spoilt_shape(opt: Any, params: Arrays, grads: Arrays) -> None:
    opt.apply_gradients(grads | {"b": grads["b"][:3]}, params)


def integers(opt: Any, params: Arrays, grads: Arrays) -> None:
    opt.apply_gradients(grads | {"b": grads["b"].astype(np.int8)}, params)


RATE = {"now": 0.1}


def rate(step: int) -> float:
    return RATE["now"]


def nan_schedule(opt: Any, params: Arrays, grads: Arrays) -> None:
    RATE["now"] = float("nan")
    try:
        opt.apply_gradients(grads, params)
    finally:
        RATE["now"] = 0.1


def nan_gradient(opt: Any, params: Arrays, grads: Arrays) -> None:
    opt.nonfinite = "raise"
    try:
        opt.apply_gradients(grads | {"b": grads["b"] * np.float32(np.nan)}, params)
    finally:
        opt.nonfinite = "allow"


@in_each_storage
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("fail", [spoilt_shape, integers, nan_schedule, nan_gradient])
def test_a_step_that_fails_changes_no_bit(options: Any, before: int, fail: Any) -> None:
    def make() -> tuple[Any, Arrays]:
        opt = gs.Adam(rate, **options)
        params = {name: values(ord(name), 300, "float16") for name in "ab"}
        for seed in range(before + (fail is nan_schedule)):  # the constructor has asked for the first rate
            opt.apply_gradients({name: values(seed, 300, "float32") for name in "ab"}, params)
        return opt, params

    (opt, params), (control, others) = make(), make()
    grads = {name: values(9, 300, "float32") for name in "ab"}
    start = bits_of(opt, params)
    with pytest.raises(gs.GradstepError):
        fail(opt, params, grads)
    assert bits_of(opt, params) == start
    opt.apply_gradients(grads, params)
    control.apply_gradients(grads, others)
    assert bits_of(opt, params) == bits_of(control, others)


@in_each_storage
def test_a_step_that_is_interrupted_at_any_line_is_whole_or_has_not_been(options: Any) -> None:
    package = gs.__file__.rsplit("/", 1)[0]

    def make() -> tuple[Any, Arrays, Arrays]:
        opt, params = gs.Adam(0.1, **options), {"w": np.asfortranarray(values(1, (9, 40), "float16"))}
        opt.apply_gradients({"w": values(2, (9, 40), "float32")}, params)
        return opt, params, {"w": values(3, (9, 40), "float32")}

    opt, params, grads = make()
    before = bits_of(opt, params)
    opt.apply_gradients(grads, params)
    after, seen_states = bits_of(opt, params), set()
    for line in itertools.chain(range(1, 60, 3), itertools.count(60, 17)):
        opt, params, grads = make()
        lines = 0

        def trace(frame: Any, event: str, _: Any, stop: int = line) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.startswith(package):
                return None
            if event == "line":
                lines += 1
                if lines == stop:
                    import signal

                    signal.raise_signal(signal.SIGINT)
            return trace

        old = sys.gettrace()
        sys.settrace(trace)
        try:
            opt.apply_gradients(grads, params)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(old)
        found = bits_of(opt, params)
        assert found in (before, after)
        seen_states.add(found == after)
        if lines < line:
            break
    assert seen_states == {True, False}


# Gradients of 16 bits: norms, clipping, what is not finite


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float16"], ["bfloat16", "float16", "float32", "float64"],
                                    ["float64", "bfloat16"], ["float16", "float64"]], ids=str)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 2.0**-22, 2.0**14, 1e-200])
def test_norms_are_those_of_float64(library: str, dtypes: list[str], scale: float) -> None:
    arrays = {str(i): values(i, (7, 300), "float64") * scale for i in range(len(dtypes))}
    arrays = {str(i): arrays[str(i)].astype(DTYPES[dtype]) for i, dtype in enumerate(dtypes)}
    arrays["0"] = np.asfortranarray(arrays["0"])
    wide = np.concatenate([array.astype(np.float64).ravel() for array in arrays.values()])
    largest = np.abs(wide).max()
    norm = float(np.linalg.norm(wide / largest) * largest) if largest else 0.0
    grads = {name: held(library, array) for name, array in arrays.items()}
    clipped, total = gs.clip_grad_norm(grads, norm / 3)
    assert total == pytest.approx(norm, rel=1e-14)
    factor = min(norm / 3 / (total + 1e-6), 1)
    for name, array in arrays.items():
        found = seen(clipped[name])
        assert found.dtype == array.dtype
        exact = array.astype(np.float64) * factor
        eps = float(np.finfo(array.dtype).eps) if array.dtype.name != "bfloat16" else 2.0**-7
        least = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 0}[array.dtype.name]
        single = 0 if array.dtype == np.float64 else 2.0**-23  # the factor and the product are float32's
        assert (np.abs(found.astype(np.float64) - exact) <= (eps / 2 + single) * np.abs(exact) * 1.01 + least).all()
        assert_same_bits(seen(grads[name]), array)
    opt = gs.SGD(0.0, clip_norm=1.0)
    opt.apply_gradients(grads, {name: held(library, array) for name, array in arrays.items()})
    assert opt.report.grad_norm == pytest.approx(norm, rel=1e-14)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_are_found_and_skipped(library: str, dtype: str, odd: float) -> None:
    opt = gs.Adam(0.1, nonfinite="skip", slot_dtype="int8", rounding="stochastic", clip_norm=1.0)
    params = {name: held(library, values(1, 400, dtype)) for name in "ab"}
    good = {name: held(library, values(2, 400, dtype)) for name in "ab"}
    opt.apply_gradients(good, params)
    before = bits_of(opt, params)
    bad = values(3, 400, dtype)
    bad[333] = odd
    opt.apply_gradients(good | {"b": held(library, bad)}, params)
    assert (opt.report.applied, opt.report.culprits) == (False, ("b",))
    assert bits_of(opt, params) == before


@pytest.mark.parametrize("dtype", NARROW)
def test_clipping_within_the_step_does_not_round_the_gradient(dtype: str) -> None:
    opt, w, g = gs.SGD(1.0, clip_norm=0.5), values(1, 300, "float32"), values(2, 300, dtype)
    params = {"w": w.copy()}
    opt.apply_gradients({"w": g}, params)
    factor = np.float32(0.5 / (np.linalg.norm(g.astype(np.float64)) + 1e-6))
    np.testing.assert_allclose(params["w"], w - factor * g.astype(np.float32), rtol=1e-6, atol=1e-7)


# Arrays that never change


def on_jax(array: Any) -> Any:
    return jnp.asarray(array)


def on_mlx(array: Any) -> Any:
    if array.dtype.name == "bfloat16":
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def shown(array: Any) -> Any:
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(DTYPES["bfloat16"])
    return np.array(array)


MAKERS: dict[str, Callable[[Any], Any]] = {"JAX": on_jax, "MLX": on_mlx}
on_both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
FUNCTIONAL = [
    (gs.AdamW, {"learning_rate": 0.01, "bias_correction": True}), (gs.SGD, {"learning_rate": 0.1, "momentum": 0.9}),
    (gs.AdaDelta, {"learning_rate": 1.0}),
]  # fmt: skip
CHOSEN = [
    Choice("bfloat16"), Choice("float16", "stochastic", seed=3), Choice("int8", "stochastic", seed=4), Choice("int8"),
    Choice("bfloat16", "stochastic", master_weights=True), Choice(None, "stochastic"),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOSEN, ids=str)
@pytest.mark.parametrize("dtype", ["float32", *NARROW])
@pytest.mark.parametrize("library", MAKERS)
def test_jax_and_mlx_agree_with_the_reference(library: str, choice: Choice, dtype: str) -> None:
    make = MAKERS[library]
    cls, kwargs = FUNCTIONAL[(CHOSEN.index(choice) + list(DTYPES).index(dtype)) % 3]
    opt = cls(**kwargs, **choice._asdict())
    sizes = (1, 700) if library == "JAX" else (1, 255, 700)  # XLA compiles each anew
    starts = {str(size): values(size, size, dtype) for size in sizes}
    params = {name: make(w) for name, w in starts.items()}
    references = {name: StoredReference(opt, name, w, choice) for name, w in starts.items()}
    for step in range(3):
        grads = {name: values(step + 9, w.size, "bfloat16") for name, w in starts.items()}
        opt.apply_gradients({name: make(g) for name, g in grads.items()}, params)
        for name, reference in references.items():
            reference.step(grads[name], step)
            state = {part: shown(array) for part, array in opt.state.get(name, {}).items()}
            if library == "MLX":
                assert_same_state(state, reference.state, f"{name} after {step + 1}")
                assert_same_bits(shown(params[name]), reference.w, name)
                continue
            assert_close(shown(params[name]), reference.w)
            assert state.keys() == reference.state.keys()
            for part, array in reference.state.items():
                assert_close(state[part], array)


@on_both
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_adafactors_blocks_begin_anew_at_each_row_there_too(make: Any, rounding: Any) -> None:
    options: Any = {"slot_dtype": {"m": "int8", "row": "bfloat16"}, "rounding": rounding, "beta_1": 0.9}
    opt, plain = gs.Adafactor(**options), gs.Adafactor(**options)
    params, expected = {"w": make(values(1, (5, 300), "float32"))}, {"w": values(1, (5, 300), "float32")}
    for seed in (2, 3):
        g = values(seed, (5, 300), "float32")
        opt.apply_gradients({"w": make(g)}, params)
        plain.apply_gradients({"w": g}, expected)
    np.testing.assert_allclose(shown(params["w"]), expected["w"], rtol=1e-5, atol=1e-6)
    state = {part: shown(array) for part, array in opt.state["w"].items()}
    assert {part: array.shape for part, array in state.items()} == {
        "row": (5,), "col": (300,), "m.codes": (5, 300), "m.scales": (10,)
    }  # fmt: skip
    np.testing.assert_allclose(state["m.scales"], plain.state["w"]["m.scales"], rtol=1e-5)
    assert np.count_nonzero(state["m.codes"] != plain.state["w"]["m.codes"]) <= 15
    off = np.abs(state["row"].astype(np.float32) / plain.state["w"]["row"].astype(np.float32) - 1)
    assert off.max() <= 2.0**-7


def assert_close(found: Any, expected: Any) -> None:
    """Nearly all the same, and the others within a few of the units in which they are stored."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dtype == np.uint8:
        off = np.abs(found.astype(int) - expected.astype(int))
        off = np.minimum(off, np.where((found % 128 <= 1) & (expected % 128 <= 1), 1, off))  # 0 and the first below it
        assert off.max(initial=0) <= 1
        assert np.count_nonzero(off) <= 1 + 0.02 * off.size
        return
    eps = 2.0**-7 if found.dtype == DTYPES["bfloat16"] else float(np.finfo(found.dtype).eps)
    off = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    least = 2.0**-24 if found.dtype == np.float16 else 1e-30
    loose = 2e-2 if found.dtype == np.float32 else 0  # a moved code moves the weight by a part of a step
    assert (off <= np.maximum(4 * eps * np.abs(expected.astype(np.float64)), least) + loose * 0.1).all()
    if found.dtype != np.float32:
        assert np.count_nonzero(off) <= 1 + 0.05 * off.size


@on_both
@in_each_storage
def test_a_skip_on_the_device_leaves_all_as_it_is(make: Any, options: Any) -> None:
    opt = gs.Adam(0.1, nonfinite="skip", **options)
    params, g = {"w": make(values(1, 300, "bfloat16"))}, values(2, 300, "float32")
    opt.apply_gradients({"w": make(g)}, params)
    before = {part: shown(array) for part, array in opt.state["w"].items()}, shown(params["w"])
    opt.apply_gradients({"w": make(g * np.float32(np.nan))}, params)
    assert opt.report.applied is False
    for part, array in opt.state["w"].items():
        assert_same_bits(shown(array), before[0][part])
    assert_same_bits(shown(params["w"]), before[1])


@in_each_storage
def test_donated_arrays_give_the_bits_of_numpy(options: Any) -> None:
    results = []
    for make in (np.array, jnp.asarray):
        opt, params = gs.Adam(0.1, donate=True, **options), {"w": make(values(1, 300, "bfloat16"))}
        for seed in (2, 3):
            old = params["w"]
            opt.apply_gradients({"w": make(values(seed, 300, "float32"))}, params)
            assert make is np.array or old.is_deleted()
        results.append({part: shown(array).tobytes() for part, array in (*opt.state["w"].items(), *params.items())})
    assert results[0] == results[1]


def test_no_step_seed_or_name_compiles_anew() -> None:
    def make(seed: int) -> Any:
        return gs.Adam(0.1, slot_dtype="int8", rounding="stochastic", seed=seed), {"w": jnp.ones(300, jnp.bfloat16)}

    grads = {"w": jnp.ones(300, jnp.bfloat16)}
    opt, params = make(0)
    opt.apply_gradients(grads, params)
    with pytest.MonkeyPatch.context() as patch:
        compiled: list[Any] = []
        patch.setattr(jax._src.compiler, "compile_or_get_cached", lambda *a, **k: compiled.append(a))
        for _ in range(3):
            opt.apply_gradients(grads, params)
        other, more = make(7)
        other.apply_gradients(grads, more)
        other.apply_gradients({"u": grads["w"]}, {"u": jnp.zeros(300, jnp.bfloat16)})
    assert compiled == []


def test_mlx_traces_once() -> None:
    traced = 0

    @gs.rule
    def Counted(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
        return w - learning_rate * g, s + g

    opt = Counted(0.1, slot_dtype="int8", rounding="stochastic")
    params = {"w": on_mlx(values(1, 300, "bfloat16"))}
    with pytest.MonkeyPatch.context() as patch:
        from gradstep.step import compiled

        original = compiled.Evaluation

        def evaluation(*args: Any) -> Any:
            nonlocal traced
            traced += 1
            return original(*args)

        patch.setattr(compiled, "Evaluation", evaluation)
        for seed in range(4):
            opt.apply_gradients({"w": on_mlx(values(seed, 300, "float32"))}, params)
            mx.eval(params["w"])
    assert traced == 1


# What cannot be


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "unknown dtype": (lambda: gs.Adam(0.1, slot_dtype="int4"), gs.DtypeError, "float32.*float16.*int8.*'int4'"),
    "float64": (lambda: gs.Adam(0.1, slot_dtype="float64"), gs.DtypeError, "float32.*int8.*'float64'"),
    "unknown in a mapping": (lambda: gs.Adam(0.1, slot_dtype={"m": "half"}), gs.DtypeError, "'m'.*float16.*'half'"),
    "a dtype that is no name": (lambda: gs.Adam(0.1, slot_dtype={"m": np.float16}), gs.DtypeError, "'m'.*float16"),
    "unknown slot": (lambda: gs.Adam(0.1, slot_dtype={"u": "int8"}), gs.ConfigurationError, "'u'.*'m', 'v'"),
    "a slot of a rule without": (lambda: keepless(slot_dtype={"m": "int8"}), gs.ConfigurationError, "none"),
    "a type": (lambda: gs.Adam(0.1, slot_dtype=np.float16), gs.ArgumentTypeError, "slot_dtype.*bfloat16.*mapping"),
    "a number": (lambda: gs.Adam(0.1, slot_dtype=8), gs.ArgumentTypeError, "slot_dtype.*int8.*got 8"),
    "a list": (lambda: gs.Adam(0.1, slot_dtype=["int8"]), gs.ArgumentTypeError, "slot_dtype.*mapping"),
    "codes for rows": (lambda: gs.Adafactor(slot_dtype={"row": "int8"}), gs.ConfigurationError, "'row'.*'v'.*'m'"),
    "codes for all": (lambda: gs.Adafactor(slot_dtype="int8"), gs.ConfigurationError, "'row' and 'col'.*'v'.*'m'"),
    "rounding": (lambda: gs.Adam(0.1, rounding="up"), gs.ConfigurationError, "'nearest', 'stochastic'.*'up'"),
    "rounding of no name": (lambda: gs.Adam(0.1, rounding=True), gs.ConfigurationError, "nearest.*True"),
    "rounding of a list": (lambda: gs.Adam(0.1, rounding=["nearest"]), gs.ConfigurationError, "nearest"),
    "copies": (lambda: gs.Adam(0.1, master_weights=1), gs.ConfigurationError, "True or False.*1"),
    "copies in words": (lambda: gs.Adam(0.1, master_weights="yes"), gs.ConfigurationError, "True or False.*'yes'"),
    "negative seed": (lambda: gs.Adam(0.1, seed=-1), gs.ConfigurationError, r"seed.*2\*\*64.*-1"),
    "large seed": (lambda: gs.Adam(0.1, seed=2**64), gs.ConfigurationError, r"seed.*2\*\*64"),
    "seed with a point": (lambda: gs.Adam(0.1, seed=1.0), gs.ConfigurationError, "seed.*whole.*1.0"),
    "boolean seed": (lambda: gs.Adam(0.1, seed=True), gs.ConfigurationError, "seed.*True"),
    "sign of an unknown slot": (lambda: gs.rule(signs={"x": "signed"})(slotted), gs.RuleError, "'x'.*'s'"),
    "unknown sign": (lambda: gs.rule(signs={"s": "positive"})(slotted), gs.RuleError, "non-negative.*'positive'"),
}  # fmt: skip


def slotted(w: Any, g: Any, s: Any, *, learning_rate: Any) -> Any:
    return w - learning_rate * g, s + g


def keepless(**options: Any) -> Any:
    @gs.rule
    def Keepless(w: Any, g: Any, *, learning_rate: Any) -> Any:
        return w - learning_rate * g

    return Keepless(0.1, **options)


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be_are_refused_with_what_there_is(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("option", "value"), [("slot_dtype", "int8"), ("rounding", "stochastic"), ("master_weights", True), ("seed", 3)]
)
def test_options_cannot_be_changed_later(option: str, value: Any) -> None:
    opt = gs.Adam(0.1)
    before = getattr(opt, option)
    with pytest.raises(gs.ConfigurationError, match=f"{option} is fixed.*make a new one"):
        setattr(opt, option, value)
    assert getattr(opt, option) == before
    assert getattr(gs.Adam(0.1, **{option: value}), option) == value


def test_a_mapping_that_changes_later_changes_nothing() -> None:
    given: Any = {"m": "int8"}
    opt = gs.Adam(0.1, slot_dtype=given)
    given["v"] = "float16"
    assert opt.slot_dtype == {"m": "int8"}
    assert "float16" not in repr(opt)
    read_only = gs.Adam(0.1, slot_dtype=MappingProxyType({"m": "int8"}))
    assert repr(copy.deepcopy(read_only)) == repr(pickle.loads(pickle.dumps(read_only))) == repr(opt)


def test_bfloat16_of_numpy_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, params = gs.Adam(0.1, slot_dtype="bfloat16"), {"w": np.ones(3, np.float32)}
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for call in (lambda: opt.init(params), lambda: opt.apply_gradients({"w": np.ones(3, np.float32)}, params)):
        with pytest.raises(gs.DtypeError, match=r"gradstep\[bfloat16\]"):
            call()
    assert (opt.step, dict(opt.state), params["w"].tolist()) == (0, {}, [1, 1, 1])
    tensors = {"w": torch.ones(3)}
    opt.apply_gradients({"w": torch.ones(3)}, tensors)
    assert opt.state["w"]["m"].dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "bool", "complex64", "uint16"])
@pytest.mark.parametrize("side", [0, 1])
def test_integers_are_no_parameters_and_no_gradients(dtype: str, side: int) -> None:
    for library in (np, torch, jnp, mx):
        if library is mx and dtype == "bool":
            odd = mx.zeros(3).astype(mx.bool_)
        elif library is np or library is jnp:
            odd = library.zeros(3, dtype)
        else:
            odd = library.zeros(3, dtype=getattr(library, dtype))
        fine = library.zeros(3, dtype=library.float32)
        opt = gs.Adam(0.1, slot_dtype="int8")
        with pytest.raises(gs.DtypeError, match="expected float32, float64, bfloat16 or float16"):
            opt.apply_gradients({"w": odd if side else fine}, {"w": fine if side else odd})
        assert (opt.step, dict(opt.state)) == (0, {})


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_state_that_no_longer_fits_is_refused(library: str) -> None:
    opt, w = gs.Adam(0.1), values(1, 300, "float32")
    g = held(library, w)
    opt.apply_gradients({"w": g}, {"w": held(library, w)})
    params = {"w": held(library, w.astype(np.float64))}
    before = bits_of(opt, params)
    with pytest.raises(gs.DtypeError, match=r"state\['w'\]\['m'\] has dtype float32.*float64.*init"):
        opt.apply_gradients({"w": g}, params)
    assert bits_of(opt, params) == before
    opt = gs.Adam(0.1, slot_dtype="int8")
    opt.apply_gradients({"w": g}, {"w": held(library, w)})
    other = {"w": held(library, values(1, 700, "float32"))}
    before = bits_of(opt, other)
    with pytest.raises(gs.ShapeError, match=r"state\['w'\]\['m.codes'\].*\(300,\).*\(700,\)"):
        opt.apply_gradients({"w": held(library, values(1, 700, "float32"))}, other)
    assert bits_of(opt, other) == before


@pytest.mark.parametrize("part", ["m.codes", "m.scales", "v.codes", "v.scales"])
def test_parts_whose_shape_was_changed_are_refused(part: str) -> None:
    opt, params = gs.Adam(0.1, slot_dtype="int8"), {"w": torch.zeros(600)}
    opt.apply_gradients({"w": torch.ones(600)}, params)
    opt.state["w"][part].resize_(2)
    before = params["w"].clone()
    with pytest.raises(gs.ShapeError, match=rf"state\['w'\]\['{part}'\].*\(2,\)"):
        opt.apply_gradients({"w": torch.ones(600)}, params)
    assert torch.equal(params["w"], before)
    assert opt.step == 1


def test_explain_tells_how_arrays_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    gs.explain(gs.AdamW(0.1, slot_dtype="int8"), ir=False)
    head = capsys.readouterr().out.splitlines()[:3]
    assert head[0].endswith("16.06 bytes per element")  # w twice, g, two codes twice, two scales for 256 twice
    assert [line.strip() for line in head[1:]] == ["keeps m in int8, v in int8", "rounds m v at random"]
    gs.explain(gs.SGD(0.1, momentum=0.9, master_weights=True), dtype="bfloat16", ir=False)
    text = capsys.readouterr().out
    assert "22 bytes per element" in text
    assert "computed in float32" in text and "keeps w with a copy in float32" in text
    with pytest.raises(gs.DtypeError, match="dtype must be one of float32, float64, bfloat16, float16, got 'uint8'"):
        gs.explain(gs.SGD(0.1), dtype="uint8")
