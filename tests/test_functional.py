"""The core on arrays that never change: JAX and MLX."""

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradstep as gs
from everywhere import double_precision  # noqa: F401
from families import MATRIX_FAMILIES, assert_same_bits, configurations, in_both_dtypes

SHAPES = {"scalar": (), "empty": (0,), "vector": (7,), "wide": (12, 33), "tall": (33, 12), "deep": (3, 4, 5)}


def on_jax(array: Any) -> Any:
    return jnp.asarray(array)


def on_mlx(array: Any) -> Any:
    return mx.array(array, getattr(mx, str(array.dtype)))


MAKERS: dict[str, Callable[[Any], Any]] = {"JAX": on_jax, "MLX": on_mlx}
on_both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def arrays(seed: int, dtype: str = "float32", names: Iterable[str] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(SHAPES[name]), dtype) for name in names}


def numpy_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.array(array) for name, array in tree.items()}


# How far a step may be from plain NumPy, in units of the last place of max(|w|, 1). MLX's elementwise operations are
# NumPy's; XLA contracts products and sums. Sums and matrix products are added up in other orders.
LIMITS = {("JAX", False): 4, ("MLX", False): 0, ("JAX", True): 60, ("MLX", True): 60}


@pytest.mark.parametrize("library", MAKERS)
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations()))
def test_every_family_is_within_a_few_ulp_of_numpy(cls: Any, kwargs: Any, dtype: str, library: str) -> None:
    make, names = MAKERS[library], SHAPES if cls in MATRIX_FAMILIES else ("scalar", "empty", "wide")
    ours, reference = cls(**kwargs), cls(**kwargs)
    expected, params = arrays(0, dtype, names), {n: make(array) for n, array in arrays(0, dtype, names).items()}
    for step in range(4):
        grads = arrays(step + 1, dtype, names)
        reference.apply_gradients(grads, expected)
        assert ours.apply_gradients({name: make(array) for name, array in grads.items()}, params) is params
    limit = LIMITS[library, cls in MATRIX_FAMILIES] * np.finfo(dtype).eps
    for name, array in numpy_of(params).items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        scale = np.maximum(np.abs(expected[name]), 1)
        assert (np.abs(array - expected[name]) <= limit * scale).all(), name
        for slot, value in ours.state[name].items():
            np.testing.assert_allclose(np.array(value), reference.state[name][slot], rtol=max(limit, 1e-14), atol=limit)
    assert (ours.step, ours.steps, ours.learning_rate) == (reference.step, reference.steps, reference.learning_rate)


@on_both
def test_entries_are_replaced_where_they_stand(make: Any) -> None:
    params: Any = {"layers": [{"w": make(np.ones(2, np.float32))}], 3: make(np.ones(1, np.float32))}
    old, layers = params[3], params["layers"]
    gs.SGD(0.5).apply_gradients({"layers.0.w": make(np.ones(2, np.float32))}, params)
    assert params["layers"] is layers
    assert np.array(layers[0]["w"]).tolist() == [0.5, 0.5]
    assert params[3] is old


@on_both
@pytest.mark.parametrize("wrap", [lambda d: tuple(d.values()), MappingProxyType], ids=["tuple", "read-only mapping"])
def test_an_entry_that_cannot_be_replaced_is_refused_before_anything_happens(make: Any, wrap: Any) -> None:
    inner, opt = {"0": make(np.ones(2, np.float32))}, gs.SGD(gs.exponential_decay(0.1, 0.5), momentum=0.9)
    params, grads = {"x": wrap(inner), "y": make(np.ones(1, np.float32))}, {"x": [inner["0"]], "y": make(np.ones(1))}
    grads["y"] = make(np.ones(1, np.float32))
    with pytest.raises(gs.ReadOnlyError, match="cannot be replaced"):
        opt.apply_gradients(grads, params)
    assert (opt.step, dict(opt.state), np.array(params["y"]).tolist()) == (0, {}, [1.0])


def bad_steps(make: Any) -> dict[str, tuple[type[Exception], Callable[[dict[str, Any], dict[str, Any]], object]]]:
    ones = np.ones(7, np.float32)
    return {
        "another shape": (gs.ShapeError, lambda p, g: g.update(vector=make(ones[:3]))),
        "an integer gradient": (gs.DtypeError, lambda p, g: g.update(vector=make(ones.astype(np.int32)))),
        "an integer parameter": (gs.DtypeError, lambda p, g: p.update(vector=make(ones.astype(np.int32)))),
        "another library": (gs.ArgumentTypeError, lambda p, g: g.update(vector=torch.ones(7))),
        "a plain number": (gs.ArgumentTypeError, lambda p, g: g.update(vector=1.0)),
        "an unknown name": (gs.UnknownParameterError, lambda p, g: g.update(other=make(ones))),
        "one array twice": (gs.AliasedParametersError, lambda p, g: p.update(again=p["vector"])),
    }


@on_both
@pytest.mark.parametrize("case", bad_steps(on_jax))
@pytest.mark.parametrize("before", [0, 2])
def test_what_is_wrong_changes_nothing(make: Any, case: str, before: int) -> None:
    opt = gs.AdamW(gs.exponential_decay(0.1, 0.5), bias_correction=True)
    params = {name: make(array) for name, array in arrays(0).items()}
    for step in range(before):
        opt.apply_gradients({name: make(array) for name, array in arrays(step + 1).items()}, params)
    kept, slots = dict(params), {name: dict(slots) for name, slots in opt.state.items()}
    error, spoil = bad_steps(make)[case]
    spoilt, grads = dict(params), {name: make(array) for name, array in arrays(9).items()}
    spoil(spoilt, grads)
    wrong = dict(spoilt)
    with pytest.raises(error):
        opt.apply_gradients(grads, spoilt)
    assert all(spoilt[name] is array for name, array in wrong.items())
    assert (opt.step, set(opt.state)) == (before, set(slots))
    assert all(opt.state[name][slot] is array for name in slots for slot, array in slots[name].items())
    opt.apply_gradients({name: make(array) for name, array in arrays(9).items()}, params)
    assert opt.step == before + 1
    assert all(params[name] is not kept[name] for name in kept)


@on_both
def test_clipping_is_that_of_numpy(make: Any) -> None:
    expected, params = arrays(0), {name: make(array) for name, array in arrays(0).items()}
    ours, reference = gs.SGD(0.1, clip_norm=0.5), gs.SGD(0.1, clip_norm=0.5)
    for step in range(2):
        reference.apply_gradients(arrays(step + 1), expected)
        ours.apply_gradients({name: make(array) for name, array in arrays(step + 1).items()}, params)
    for name, array in numpy_of(params).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
    assert ours.report is not None
    assert reference.report is not None
    assert ours.report.grad_norm == pytest.approx(reference.report.grad_norm, rel=1e-6)
    clipped, norm = gs.clip_grad_norm({name: make(array) for name, array in arrays(1).items()}, 0.5)
    wanted, wanted_norm = gs.clip_grad_norm(arrays(1), 0.5)
    assert norm == pytest.approx(wanted_norm, rel=1e-6)
    np.testing.assert_allclose(np.array(clipped["wide"]), wanted["wide"], rtol=1e-5)


@on_both
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_over_nor_underflow(make: Any, scale: float) -> None:
    _, norm = gs.clip_grad_norm({"g": make(np.full(4, scale, np.float32))}, 1.0)
    assert norm == pytest.approx(2 * scale, rel=1e-6)


@on_both
@pytest.mark.parametrize("policy", ["allow", "skip", "raise"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_a_step_clips_gradients_of_every_size(make: Any, scale: float, policy: Any) -> None:
    opt, params = (
        gs.SGD(1.0, clip_norm=0.25, nonfinite=policy),
        {"w": make(np.zeros(4, np.float32)), "b": make(np.zeros(1, np.float32))},
    )
    opt.apply_gradients({"w": make(np.full(4, scale, np.float32)), "b": make(np.full(1, scale, np.float32))}, params)
    assert opt.report.grad_norm == pytest.approx(np.sqrt(5) * scale, rel=1e-6)
    expected = -scale * min(0.25 / (np.sqrt(5) * scale + 1e-6), 1)
    np.testing.assert_allclose(np.array(params["w"]), expected, rtol=1e-5)


@on_both
@pytest.mark.parametrize("shape", [(3_000_001,), (1_500_001, 2), (60_000, 50), (3, 1_000_000)])
def test_norms_of_millions_keep_their_digits(make: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _, norm = gs.clip_grad_norm({"g": make(values)}, 1.0)
    assert norm == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=3e-6)


@on_both
def test_a_finite_gradient_is_no_culprit_however_large(make: Any) -> None:
    opt, params = gs.SGD(0.1, nonfinite="skip"), {name: make(np.ones(3, np.float32)) for name in "abc"}
    grads = {"a": np.full(3, 3e38), "b": np.array([0, np.inf, 0]), "c": np.full(3, 1e-30)}
    opt.apply_gradients({name: make(g.astype(np.float32)) for name, g in grads.items()}, params)
    assert (opt.report.applied, opt.report.culprits) == (False, ("b",))


@on_both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_raising_on_a_gradient_that_is_not_finite(make: Any, bad: float) -> None:
    opt = gs.SGD(gs.exponential_decay(0.5, 0.5), momentum=0.9, nonfinite="raise")
    params = {"a": make(np.ones(2, np.float32)), "b": make(np.ones(1, np.float32))}
    grads = {"a": make(np.array([1, bad], np.float32)), "b": make(np.ones(1, np.float32))}
    with pytest.raises(gs.NonFiniteGradientError, match="hold NaN or infinity: a;"):
        opt.apply_gradients(grads, params)
    assert (opt.step, dict(opt.state), np.array(params["b"]).tolist()) == (0, {}, [1.0])


@on_both
def test_skipping_selects_on_the_device_and_counts_when_asked(make: Any) -> None:
    def opt(**options: Any) -> Any:
        inner = gs.MultiOptimizer([gs.Adam(0.1, bias_correction=True), gs.Lion(0.1)], ["a"])
        return gs.MultiOptimizer([inner, gs.SGD(gs.exponential_decay(0.1, 0.5), momentum=0.9)], ["[ab]"], **options)

    def grads(value: float) -> Any:
        return {name: make(np.array([1.0, value], np.float32)) for name in "abc"}

    skipping, plain = opt(nonfinite="skip"), opt()
    params, expected = ({name: make(np.ones(2, np.float32)) for name in "abc"} for _ in range(2))
    for value in (0.5, np.nan, 0.25, np.inf, -1.0):
        skipping.apply_gradients(grads(value), params)
        if np.isfinite(value):
            plain.apply_gradients(grads(value), expected)
        else:
            assert skipping.report.applied is False
            assert skipping.report.culprits == ("a", "b", "c")
    assert (skipping.step, skipping.steps) == (3, {"a": 3, "b": 3, "c": 3})
    assert [child.step for child in skipping.optimizers] == [3, 3]
    for name in "abc":  # XLA compiles the two in different ways
        np.testing.assert_allclose(np.array(params[name]), np.array(expected[name]), rtol=1e-6)
        for slot, array in plain.state[name].items():
            np.testing.assert_allclose(np.array(skipping.state[name][slot]), np.array(array), rtol=1e-6)
    assert skipping.optimizers[1].learning_rate == plain.optimizers[1].learning_rate


@on_both
def test_a_skipped_first_step_leaves_zero_slots(make: Any) -> None:
    opt, params = gs.SGD(0.1, momentum=0.9, nonfinite="skip"), {"w": make(np.ones(2, np.float32))}
    opt.apply_gradients({"w": make(np.full(2, np.nan, np.float32))}, params)
    assert (opt.step, opt.steps, np.array(opt.state["w"]["v"]).tolist()) == (0, {"w": 0}, [0.0, 0.0])


def test_a_step_of_mlx_evaluates_nothing() -> None:
    opt = gs.AdamW(0.1, clip_norm=1.0, nonfinite="skip", bias_correction=True)
    params, size = {"w": mx.ones(1_000_000)}, 4_000_000
    before = mx.get_active_memory()
    opt.apply_gradients({"w": mx.ones(1_000_000) * 2}, params)
    assert mx.get_active_memory() - before < size
    assert opt.step == 1  # asks whether the gradient was finite, not for the parameters
    assert mx.get_active_memory() - before < 2 * size
    mx.eval(params["w"], *opt.state["w"].values())
    assert mx.get_active_memory() - before >= 3 * size


def test_a_module_of_mlx_gets_its_arrays_back() -> None:
    import mlx.nn

    model, opt = mlx.nn.Linear(2, 1), gs.SGD(0.5)
    before = np.array(model.weight)
    grads = {"weight": mx.ones((1, 2)), "bias": mx.ones(1)}
    model.update(opt.apply_gradients(grads, model.trainable_parameters()))
    assert_same_bits(np.array(model.weight), before - np.float32(0.5))


def test_no_rate_step_or_schedule_compiles_anew() -> None:
    opt = gs.AdamW(gs.cosine_decay(0.1, 50), bias_correction=True, clip_norm=1.0)
    params, grads = {"w": jnp.ones((3, 4), "float32")}, {"w": jnp.ones((3, 4), "float32")}
    opt.apply_gradients(grads, params)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled: list[Any] = []
        patch.setattr(jax._src.compiler, "compile_or_get_cached", lambda *a, **k: compiled.append(a))
        for step in range(3):
            opt.apply_gradients(grads, params)
            opt.weight_decay = 0.1 * (step + 1)
            opt.clip_norm = 2.0 + step
        again = gs.AdamW(0.5, bias_correction=True, clip_norm=3.0)
        other = {"w": jnp.zeros_like(params["w"])}
        again.apply_gradients(grads, other)
    assert compiled == []


def test_donated_arrays_are_gone_and_others_are_not() -> None:
    for donate in (False, True):
        opt, w = gs.SGD(0.5, momentum=0.5, donate=donate), jnp.ones(1000, "float32")
        params, g = {"w": w}, jnp.ones(1000, "float32")
        opt.apply_gradients({"w": g}, params)
        slot = opt.state["w"]["v"]
        opt.apply_gradients({"w": g}, params)
        assert (w.is_deleted(), slot.is_deleted(), g.is_deleted()) == (donate, donate, False)
        assert float(params["w"][0]) == -0.25


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import gradstep as gs

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
rows = NamedSharding(mesh, PartitionSpec("x", "y"))
for opt in (gs.AdamW(0.1, clip_norm=1.0, nonfinite="skip"), gs.Adafactor(beta_1=0.9), gs.Muon(0.1)):
    params = {"w": jax.device_put(jnp.ones((8, 4), "float32"), rows)}
    grads = {"w": jax.device_put(jnp.arange(32.0, dtype="float32").reshape(8, 4), rows)}
    plain, other = {"w": np.ones((8, 4), np.float32)}, type(opt)(**opt.hyperparameters, clip_norm=opt.clip_norm)
    for _ in range(2):
        opt.apply_gradients(grads, params)
        other.apply_gradients({"w": np.array(grads["w"])}, plain)
    assert params["w"].sharding == rows, params["w"].sharding
    full = [array for array in opt.state["w"].values() if array.shape == (8, 4)]
    assert full and all(array.sharding == rows for array in full)
    np.testing.assert_allclose(np.array(params["w"]), plain["w"], rtol=1e-5)
    try:
        opt.apply_gradients({"w": jax.device_put(jnp.ones((8, 4), "float32"), jax.devices()[0])}, params)
    except gs.DeviceError as error:
        assert "bring them together" in str(error)
    else:
        raise AssertionError("a gradient on other devices was taken")

one, two = (jax.device_put(jnp.ones(2, "float32"), device) for device in jax.devices()[:2])
for params in ({"a": one, "b": two},):
    try:
        gs.SGD(0.1).apply_gradients(dict(params), params)
    except gs.DeviceError as error:
        assert "params['a'] is on" in str(error) and "params['b'] is on" in str(error)
    else:
        raise AssertionError("parameters on two devices were taken")
opt, params = gs.SGD(0.1, momentum=0.9), {"a": one}
opt.apply_gradients({"a": one + 0}, params)
try:
    opt.apply_gradients({"a": two + 0}, {"a": two})
except gs.DeviceError as error:
    assert "state['a']['v'] is on" in str(error)
else:
    raise AssertionError("slots stayed behind, and nobody noticed")
"""


def test_sharded_arrays_keep_their_sharding() -> None:
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inside_of_a_transformation_nothing_is_done() -> None:
    opt = gs.SGD(0.1, momentum=0.9)

    def step(x: Any) -> Any:
        params = {"x": x}
        opt.apply_gradients({"x": x}, params)
        return params["x"].sum()

    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(gs.TracingError, match=r"use gradstep\.optax inside"):
            transform(step)(jnp.ones(3, "float32"))
    for transform in (mx.compile, mx.grad):
        for _ in range(2):
            with pytest.raises(gs.TracingError, match=r"use gradstep\.mlx inside"):
                transform(step)(mx.ones(3))
    assert (opt.step, dict(opt.state)) == (0, {})
    step(mx.ones(3))
    with pytest.raises(gs.TracingError, match=r"use gradstep\.mlx inside"):
        mx.compile(step)(mx.ones(3))  # after an eager step whose plan is kept
    assert opt.step == 1


@on_both
def test_state_of_another_library_is_refused(make: Any) -> None:
    opt, w = gs.SGD(0.1, momentum=0.9), np.ones(2, np.float32)
    opt.apply_gradients({"w": w.copy()}, {"w": w.copy()})
    with pytest.raises(gs.ArgumentTypeError, match=r"opt\.init\(params\) begins anew"):
        opt.apply_gradients({"w": make(w)}, {"w": make(w)})
    opt.init({"w": make(w)})
    opt.apply_gradients({"w": make(w)}, {"w": make(w)})
    with pytest.raises(gs.ArgumentTypeError, match=r"opt\.init\(params\) begins anew"):
        opt.apply_gradients({"w": w.copy()}, {"w": w.copy()})


@on_both
def test_init_makes_zero_slots_and_refuses_tied_parameters(make: Any) -> None:
    opt, w = gs.Adafactor(), make(np.ones((3, 2), np.float32))
    opt.init({"w": w})
    assert {slot: np.array(array).tolist() for slot, array in opt.state["w"].items()} == {
        "row": [0] * 3,
        "col": [0] * 2,
    }
    with pytest.raises(gs.AliasedParametersError, match="are one array"):
        opt.init({"a": w, "b": w})


@on_both
def test_copies_go_on_by_themselves(make: Any) -> None:
    opt, params = gs.Adam(0.1, nonfinite="skip"), {"w": make(np.ones(2, np.float32))}
    opt.apply_gradients({"w": make(np.ones(2, np.float32))}, params)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.report == opt.report
        kept = np.array(opt.state["w"]["m"])
        other.apply_gradients({"w": make(np.ones(2, np.float32))}, dict(params))
        assert (opt.step, other.step) == (1, 2)
        assert_same_bits(np.array(opt.state["w"]["m"]), kept)


@on_both
def test_a_rule_of_one_s_own_and_the_same_rule_on_arrays(make: Any) -> None:
    def body(w: Any, g: Any, m: Any, *, learning_rate: Any, t: Any) -> Any:
        m = gs.maximum(m, gs.abs(g)) + gs.where(g > 0, 0.5 * g, gs.sqrt(gs.abs(g)))
        return w - learning_rate * gs.sign(g) * gs.rms(g) / (m + gs.mean(w) + t), m

    opt, w, g = gs.rule(body)(0.1), np.arange(1, 5, dtype=np.float32), np.array([1, -2, 0, 3], np.float32)
    params = {"w": make(w)}
    opt.apply_gradients({"w": make(g)}, params)
    expected, _ = body(w, g, np.zeros(4, np.float32), learning_rate=0.1, t=1)
    direct, _ = body(make(w), make(g), make(np.zeros(4, np.float32)), learning_rate=0.1, t=1)
    np.testing.assert_allclose(np.array(params["w"]), expected, rtol=1e-6)
    np.testing.assert_allclose(np.array(direct), expected, rtol=1e-6)


@on_both
def test_functions_agree_with_numpy_on_special_values(make: Any) -> None:
    x = np.array([np.nan, -0.0, 0.0, np.inf, -np.inf, 2.5, -3.0], np.float32)
    y = np.array([1.0, 0.0, np.nan, -1.0, 2.0, 2.5, 4.0], np.float32)
    for name in ("sqrt", "abs", "sign"):
        with np.errstate(invalid="ignore"):
            assert_same_bits(np.array(getattr(gs, name)(make(x))), getattr(gs, name)(x), name)
    for name in ("minimum", "maximum"):
        found, expected = np.array(getattr(gs, name)(make(x), make(y))), getattr(gs, name)(x, y)
        np.testing.assert_array_equal(found, expected)
    empty = make(np.zeros((0, 3), np.float32))
    assert [float(np.array(function(empty))) for function in (gs.mean, gs.rms, gs.norm)] == [0, 0, 0]
    assert [np.array(gs.mean(empty, axis=axis)).tolist() for axis in (-1, -2)] == [[], [[0, 0, 0]]]


@on_both
def test_arrays_of_a_plan_are_not_kept_alive(make: Any) -> None:
    opt, params = gs.SGD(0.1), {"w": make(np.ones(10, np.float32))}
    grads = {"w": make(np.ones(10, np.float32))}
    opt.apply_gradients(grads, params)
    w = params["w"]
    count = sys.getrefcount(w)
    opt.apply_gradients(grads, params)
    gc.collect()
    assert sys.getrefcount(w) == count - 1


@on_both
def test_parameters_that_become_tied_are_noticed_at_every_step(make: Any) -> None:
    for with_gradient in (True, False):
        opt = gs.SGD(0.1)
        params = {name: make(np.ones(2, np.float32)) for name in "ab"}
        names = "ab" if with_gradient else "a"
        grads = {name: make(np.ones(2, np.float32)) for name in names}
        opt.apply_gradients(grads, params)
        params["b"] = params["a"]
        with pytest.raises(gs.AliasedParametersError, match="are one array"):
            opt.apply_gradients(grads, params)
        assert opt.step == 1


def test_what_cannot_be_donated_is_refused_in_our_words() -> None:
    opt, w = gs.SGD(0.1, donate=True), jnp.ones(2, "float32")
    params = {"w": w}
    with pytest.raises(gs.AliasedParametersError, match="donate=False"):
        opt.apply_gradients({"w": w}, params)
    assert (opt.step, params["w"] is w, w.is_deleted()) == (0, True, False)


@on_both
def test_outcomes_that_nobody_asks_for_do_not_pile_up(make: Any) -> None:
    opt, params = gs.AdamW(1e-3, nonfinite="skip"), {"w": make(np.ones(2, np.float32))}
    grads = {"w": make(np.ones(2, np.float32))}
    for _ in range(200):
        opt.apply_gradients(grads, params)
    assert len(opt._leaf._awaited._steps) <= 64
    assert opt.step == 200


@on_both
def test_the_rate_is_that_of_the_last_step_taken(make: Any) -> None:
    opt, params = gs.SGD(lambda step: 1 / (step + 1), nonfinite="skip"), {"w": make(np.ones(2, np.float32))}
    for value, expected in ((1.0, 1.0), (1.0, 0.5), (np.nan, 0.5), (1.0, 1 / 3)):
        opt.apply_gradients({"w": make(np.full(2, value, np.float32))}, params)
        assert opt.learning_rate == pytest.approx(expected)


@on_both
def test_entries_are_found_as_they_were_named(make: Any) -> None:
    params: Any = {"0": None, 0: make(np.ones(1, np.float32))}
    gs.SGD(0.5).apply_gradients({0: make(np.ones(1, np.float32))}, params)
    assert params["0"] is None
    assert np.array(params[0]).tolist() == [0.5]


class Picky(UserDict[str, Any]):
    """Refuses to replace one entry."""

    def __setitem__(self, key: str, item: Any) -> None:
        if key == "b" and key in self.data:
            raise KeyError("b stays")
        super().__setitem__(key, item)


@on_both
def test_a_container_that_refuses_one_key_is_refused_whole(make: Any) -> None:
    opt, params = gs.SGD(0.5), Picky({name: make(np.ones(1, np.float32)) for name in "ab"})
    with pytest.raises(gs.ReadOnlyError, match="the entry 'b' of a Picky"):
        opt.apply_gradients({name: make(np.ones(1, np.float32)) for name in "ab"}, params)
    assert (opt.step, np.array(params["a"]).tolist()) == (0, [1.0])


def test_float64_is_clipped_in_float64() -> None:
    opt, params = gs.SGD(1.0, clip_norm=0.1), {"w": jnp.zeros(2, "float64")}
    opt.apply_gradients({"w": jnp.array([3.0, 4.0])}, params)
    np.testing.assert_allclose(np.array(params["w"]), [-0.06 / (1 + 2e-7), -0.08 / (1 + 2e-7)], rtol=1e-12)


def test_init_and_clipping_inside_of_a_transformation_are_refused() -> None:
    for call in (lambda x: gs.SGD(0.1, momentum=0.9).init({"x": x}), lambda x: gs.clip_grad_norm({"x": x}, 1.0)):
        with pytest.raises(gs.TracingError, match=r"gradstep\.optax"):
            jax.jit(call)(jnp.ones(2, "float32"))
        with pytest.raises(gs.TracingError, match=r"gradstep\.mlx"):
            mx.compile(call)(mx.ones(2))


class TestValueAndGrad:
    @pytest.mark.parametrize("make", [torch.from_numpy, on_jax, on_mlx], ids=["PyTorch", "JAX", "MLX"])
    def test_each_library_computes_its_own(self, make: Any) -> None:
        def loss(params: Any, x: Any, *, power: int) -> Any:
            return ((params["layers"][0]["w"] * x + params["b"]) ** power).sum()

        params = {"layers": [{"w": make(np.array([1, 2], np.float32))}], "b": make(np.array([3, 4], np.float32))}
        value, grads = gs.value_and_grad(loss)(params, 2.0, power=2)
        assert float(value) == 25 + 64
        assert grads["layers"][0]["w"].tolist() == [20, 32]
        assert grads["b"].tolist() == [10, 16]
        gs.SGD(0.5).apply_gradients(grads, params)
        assert params["b"].tolist() == [-2, -4]

    def test_gradients_of_torch_parameters_carry_no_graph(self) -> None:
        params = {"w": torch.nn.Parameter(torch.ones(2))}
        value, grads = gs.value_and_grad(lambda params: (params["w"] ** 2).sum())(params)
        assert not value.requires_grad
        assert not grads["w"].requires_grad
        gs.SGD(0.5).apply_gradients(grads, params)
        assert params["w"].tolist() == [0, 0]

    def test_numpy_has_none(self) -> None:
        with pytest.raises(gs.ArgumentTypeError, match=r"NumPy computes no gradients; .* PyTorch, JAX or MLX"):
            gs.value_and_grad(lambda params: params["w"].sum())({"w": np.ones(2)})


def test_no_library_is_imported_that_the_caller_has_not() -> None:
    script = textwrap.dedent("""
        import sys, numpy as np, gradstep as gs
        gs.SGD(0.1).apply_gradients({"w": np.ones(2, np.float32)}, {"w": np.ones(2, np.float32)})
        assert not {"torch", "jax", "mlx", "mlx.core", "optax"} & sys.modules.keys()
        import jax.numpy as jnp
        gs.SGD(0.1).apply_gradients({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
        assert not {"torch", "mlx.core", "optax"} & sys.modules.keys()
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
