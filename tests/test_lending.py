"""Donated arrays of JAX and MLX on the CPU: the step of NumPy in their memory, and nobody sees it being written."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

import gradstep as gs
from everywhere import double_precision, functional  # noqa: F401
from families import MATRIX_FAMILIES, assert_same_bits, configurations, in_both_dtypes, last_of_each
from gradstep.arrays import jax_lending, mlx_lending

SHAPES = {"scalar": (), "empty": (0, 3), "vector": (7,), "wide": (12, 33), "tall": (33, 12), "deep": (3, 4, 5)}


LONG = 70_000  # elements, which MLX does not copy


def arrays(seed: int, dtype: str = "float32", shapes: Any = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def on_jax(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in tree.items()}


def on_mlx(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: mx.array(array, getattr(mx, str(array.dtype))) for name, array in tree.items()}


def to_numpy(array: Any) -> Any:
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


both = pytest.mark.parametrize("on_library", [on_jax, on_mlx], ids=["JAX", "MLX"])


def lent(opt: gs.Optimizer) -> bool:
    return opt._plan.plan.lent


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lent, as on other devices."""
    for lender in (jax_lending.JaxLender, mlx_lending.MlxLender):
        monkeypatch.setattr(lender, "can_lend", lambda *_: False)


def test_these_versions_of_the_libraries_lend() -> None:
    assert jax_lending.works()
    assert mlx_lending.works()


OPTIONS = [{}, {"clip_norm": 0.5}, {"nonfinite": "skip"}, {"clip_norm": 0.5, "nonfinite": "raise"}]


@both
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations()))
def test_the_bits_are_those_of_numpy(cls: Any, kwargs: Any, dtype: str, on_library: Any) -> None:
    for options in OPTIONS if dtype == "float64" else OPTIONS[:1]:
        shapes = SHAPES if cls in MATRIX_FAMILIES else {"scalar": (), "empty": (0,), "wide": (12, 33)}
        ours, numpys = cls(**kwargs, **options, donate=True), cls(**kwargs, **options)
        expected, params = arrays(0, dtype, shapes), on_library(arrays(0, dtype, shapes))
        for step in range(3):
            ours.apply_gradients(on_library(arrays(step + 1, dtype, shapes)), params)
            numpys.apply_gradients(arrays(step + 1, dtype, shapes), expected)
        assert lent(ours)
        assert ours.report == numpys.report
        assert_same_trees(ours, params, numpys, expected)


def assert_same_trees(ours: gs.Optimizer, params: Any, numpys: gs.Optimizer, expected: Any) -> None:
    for name, array in expected.items():
        assert_same_bits(to_numpy(params[name]), array)
        for slot, value in numpys.state[name].items():
            assert_same_bits(to_numpy(ours.state[name][slot]), value)


STORED = [{}, {"slot_dtype": "int8"}, {"slot_dtype": "bfloat16", "rounding": "stochastic"}, {"master_weights": True}]


@both
@pytest.mark.parametrize("kwargs", STORED, ids=lambda kwargs: "-".join(map(str, kwargs.values())) or "plain")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_stored_in_a_few_bits_is_lent_too(kwargs: Any, dtype: str, on_library: Any) -> None:
    shapes = {"scalar": (), "short": (12, 33), "long": (200, 700)}
    ours, numpys = gs.Adam(0.1, **kwargs, donate=True), gs.Adam(0.1, **kwargs)
    expected, params = arrays(0, dtype, shapes), on_library(arrays(0, dtype, shapes))
    for step in range(3):
        ours.apply_gradients(on_library(arrays(step + 1, dtype, shapes)), params)
        numpys.apply_gradients(arrays(step + 1, dtype, shapes), expected)
    assert lent(ours)
    assert_same_trees(ours, params, numpys, expected)


@both
def test_groups_and_nested_trees_are_lent_too(on_library: Any) -> None:
    def opt(**options: Any) -> Any:
        return gs.MultiOptimizer([gs.Muon(0.1), gs.AdamW({"*": 0.1, "b.*": 0.01})], ["*.wide"], **options)

    def tree(make: Any, seed: int) -> Any:
        return {layer: make(arrays(seed + i)) for i, layer in enumerate("ab")}

    ours, numpys = opt(donate=True, clip_norm=1.0), opt(clip_norm=1.0)
    params, expected = tree(on_library, 0), tree(dict, 0)
    for step in range(3):
        ours.apply_gradients(tree(on_library, step + 5), params)
        numpys.apply_gradients(tree(dict, step + 5), expected)
    assert lent(ours)
    jax.tree.map(lambda x, y: assert_same_bits(np.array(x), y), params, expected)


def test_old_arrays_are_gone_and_views_of_them_stay() -> None:
    opt, w = gs.SGD(0.5, momentum=0.5, donate=True), jnp.ones(1000, "float32")
    params = {"w": w}
    opt.apply_gradients({"w": jnp.ones(1000)}, params)
    assert w.is_deleted()
    for held in (np.asarray(params["w"]), np.asarray(opt.state["w"]["v"])):
        before = held.copy()
        opt.apply_gradients({"w": jnp.ones(1000)}, params)
        assert (held == before).all()
    expected, numpys = {"w": np.ones(1000, "float32")}, gs.SGD(0.5, momentum=0.5)
    for _ in range(3):
        numpys.apply_gradients({"w": np.ones(1000, "float32")}, expected)
    assert_same_bits(np.array(params["w"]), expected["w"])
    assert_same_bits(np.array(opt.state["w"]["v"]), numpys.state["w"]["v"])


@both
@pytest.mark.parametrize("factored", [False, True])
def test_row_statistics_that_somebody_views_move_elsewhere(factored: bool, on_library: Any) -> None:
    shape = (8, 6) if factored else (48,)
    opt, numpys = gs.Adafactor(donate=True), gs.Adafactor()
    expected = {"w": np.ones(shape, np.float32)}
    params, held = on_library(expected), []
    for step in range(4):
        g = arrays(step, shapes={"w": shape})
        opt.apply_gradients(on_library(g), params)
        numpys.apply_gradients(g, expected)
        held += [(view, view.copy()) for view in map(np.asarray, opt.state["w"].values())]
    for view, before in held:
        assert (view == before).all()
    assert_same_trees(opt, params, numpys, expected)


def test_whoever_still_reads_gets_the_old_values() -> None:
    @jax.jit
    def slow(w: Any) -> Any:
        return functools.reduce(lambda product, _: product @ w, range(60), w)

    opt, params, g = gs.SGD(1.0, donate=True), {"w": jnp.eye(500, dtype="float32")}, jnp.ones((500, 500), "float32")
    opt.apply_gradients({"w": 0 * g}, params)
    jax.block_until_ready(slow(params["w"]))
    result = slow(params["w"])
    assert not result.is_ready()
    opt.apply_gradients({"w": g}, params)
    assert lent(opt)
    assert (np.asarray(result) == np.eye(500)).all()
    assert (np.asarray(params["w"]) == np.eye(500) - 1).all()


@both
@pytest.mark.parametrize("policy", ["allow", "raise"])
def test_parameters_may_be_other_arrays_in_every_step(policy: Any, on_library: Any) -> None:
    opt, numpys = gs.Adam(0.1, nonfinite=policy, donate=True), gs.Adam(0.1)
    for step in range(3):
        params, expected = on_library(arrays(step)), arrays(step)
        opt.apply_gradients(on_library(arrays(step + 9)), params)
        numpys.apply_gradients(arrays(step + 9), expected)
        assert lent(opt)
        for name, array in expected.items():
            assert_same_bits(np.array(params[name]), array)


@functional
def test_a_gradient_may_lie_where_a_former_parameter_lay(make: Any) -> None:
    opt, first = gs.SGD(1.0, nonfinite="raise", donate=True), {"w": make(np.ones(LONG, np.float32))}
    opt.apply_gradients({"w": make(np.ones(LONG, np.float32))}, first)
    second = {"w": make(np.full(LONG, 5, np.float32))}
    opt.apply_gradients({"w": first["w"] + 1}, second)
    opt.apply_gradients({"w": first["w"]}, second)
    assert (np.asarray(second["w"]) == 4).all()


def test_a_gradient_in_the_memory_of_its_parameter_stays_as_it_is() -> None:
    opt, params = gs.SGD(1.0, donate=True), {"w": jnp.full(64, 5.0)}
    opt.apply_gradients({"w": jnp.zeros(64)}, params)
    gradient = jax.dlpack.from_dlpack(params["w"])
    opt.apply_gradients({"w": gradient}, params)
    assert (np.asarray(params["w"]) == 0).all()
    assert (np.asarray(gradient) == 5).all()


def test_arrays_that_a_transformation_has_caught_are_refused() -> None:
    opt, params = gs.SGD(1.0, donate=True), {"w": jnp.ones(3)}
    for _ in range(2):
        before, step = params["w"], opt.step
        with pytest.raises(gs.TracingError, match=r"gradstep\.optax"):
            jax.jit(lambda: opt.apply_gradients({"w": jnp.ones(3)}, params)["w"])()
        assert params["w"] is before
        assert opt.step == step
        assert not before.is_deleted()
        opt.apply_gradients({"w": jnp.ones(3)}, params)
        assert lent(opt)
    caught = {"w": jnp.ones(3)}
    with pytest.raises(gs.TracingError):
        jax.jit(lambda: opt.apply_gradients(caught, params)["w"])()


def test_memory_of_numpy_behind_an_array_is_not_written() -> None:
    block = np.ones(4096 + 16, np.float32)
    memory = block[-block.ctypes.data % 64 // 4 :][:4096]
    opt, params = gs.SGD(0.5, donate=True), {"w": jax.dlpack.from_dlpack(memory)}
    assert params["w"].unsafe_buffer_pointer() == memory.ctypes.data
    opt.apply_gradients({"w": jnp.ones(4096)}, params)
    assert lent(opt)
    assert (memory == 1).all()
    assert (np.asarray(params["w"]) == 0.5).all()


@functional
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_arrays_live_on_when_no_step_is_taken(policy: Any, make: Any) -> None:
    opt, params = gs.Adam(0.1, nonfinite=policy, donate=True), {"w": make(np.ones(3, np.float32))}
    opt.apply_gradients({"w": make(np.ones(3, np.float32))}, params)
    before, slots = params["w"], dict(opt.state["w"])
    bad = {"w": make(np.array([1.0, np.nan, 2.0], np.float32))}
    if policy == "raise":
        with pytest.raises(gs.NonFiniteGradientError, match="hold NaN or infinity: w;"):
            opt.apply_gradients(bad, params)
    else:
        opt.apply_gradients(bad, params)
        assert (opt.report.applied, opt.report.culprits) == (False, ("w",))
    assert opt.step == 1
    assert params["w"] is before
    assert np.isfinite(np.asarray(before)).all()
    for slot, array in slots.items():
        assert opt.state["w"][slot] is array
        assert np.isfinite(np.asarray(array)).all()


def test_gradients_in_another_order_are_read_in_theirs() -> None:
    opt, params = gs.SGD(1.0, donate=True), {"w": jnp.zeros((4, 6))}
    g = jnp.arange(24.0).reshape(4, 6)
    turned = jax.device_put(g, Format(Layout((1, 0)), g.sharding))
    for gradient in (g, turned, g, turned):
        opt.apply_gradients({"w": gradient}, params)
    assert (np.asarray(params["w"]) == -4 * np.arange(24).reshape(4, 6)).all()


@pytest.mark.parametrize("planned", [False, True])
def test_where_nothing_is_compiled_arrays_are_copied(planned: bool) -> None:
    opt, params = gs.SGD(0.5, donate=True), {"w": jnp.ones(3)}
    if planned:
        opt.apply_gradients({"w": jnp.zeros(3)}, params)
    w = params["w"]
    with jax.disable_jit():
        opt.apply_gradients({"w": jnp.ones(3)}, params)
    assert lent(opt) is planned
    assert (np.asarray(w).tolist(), np.asarray(params["w"]).tolist()) == ([1, 1, 1], [0.5, 0.5, 0.5])


@functional
def test_a_round_of_micro_batches_is_compiled(make: Any) -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0, donate=True), every=2), {"w": make(np.zeros(3, np.float32))}
    for value in (1.0, 3.0):
        opt.apply_gradients({"w": make(np.full(3, value, np.float32))}, params)
    assert np.asarray(params["w"]).tolist() == [-2, -2, -2]


@functional
def test_products_that_numpy_lacks_are_compiled(make: Any) -> None:
    ones = np.ones((4, 6), np.float32)
    opt, params = gs.Muon(0.1, ns_dtype="bfloat16", donate=True), {"w": make(ones)}
    opt.apply_gradients({"w": make(ones)}, params)
    assert not lent(opt)


@pytest.mark.usefixtures("compiled")
@both
@pytest.mark.parametrize(("cls", "kwargs"), last_of_each(configurations(gs.AdamW, gs.Adafactor)))
def test_elsewhere_donated_arrays_go_through_the_compiled_step(cls: Any, kwargs: Any, on_library: Any) -> None:
    results: list[Any] = []
    for donate in (False, True):
        opt, params = cls(**kwargs, clip_norm=0.5, donate=donate), on_library(arrays(0))
        for step in range(2):
            old = params["wide"]
            opt.apply_gradients(on_library(arrays(step + 1)), params)
            assert on_library is on_mlx or old.is_deleted() == donate
        assert not lent(opt)
        results.append({name: np.array(array) for name, array in params.items()})
    for name, array in results[0].items():
        assert_same_bits(results[1][name], array)


class TestMlx:
    """What nobody holds is written in place; what somebody holds is his."""

    @pytest.mark.parametrize("size", [48, LONG])
    @pytest.mark.parametrize(
        "hold",
        [lambda w: w, lambda w: w.reshape(2, -1), lambda w: w[1:], np.asarray, lambda w: w * 1, memoryview],
        ids=["the array", "a view", "a part", "NumPy", "what will read it", "its buffer"],
    )
    def test_whoever_holds_an_array_keeps_its_elements(self, hold: Any, size: int) -> None:
        opt, params = gs.Adam(1.0, donate=True), {"w": mx.ones(size)}
        for _ in range(3):
            arrays = params["w"], opt.state.get("w", {}).get("m")
            held = [hold(array) for array in arrays if array is not None]
            before = [np.array(array) for array in arrays if array is not None]
            del arrays
            opt.apply_gradients({"w": mx.ones(size)}, params)
            for one, values in zip(held, before, strict=True):
                assert np.isin(np.asarray(one), values).all()
        assert lent(opt)
        assert not np.isin(np.asarray(params["w"]), before[0]).any()

    def test_long_arrays_that_nobody_holds_stay_where_they_are(self) -> None:
        def places() -> list[int]:
            arrays = [params["w"], params["short"], *opt.state["w"].values()]
            return mlx_lending.MlxLender().locate(arrays).addresses

        opt, shapes = gs.Adam(1.0, donate=True), {"w": (LONG,), "short": (3,)}
        params = on_mlx(arrays(0, shapes=shapes))
        opt.apply_gradients(on_mlx(arrays(1, shapes=shapes)), params)
        before = places()
        opt.apply_gradients(on_mlx(arrays(1, shapes=shapes)), params)
        assert [one == other for one, other in zip(before, places(), strict=True)] == [True, False, True, True]

    def test_what_has_not_been_computed_is(self) -> None:
        opt, params = gs.SGD(1.0, donate=True), {"w": mx.ones(LONG) * 3}
        opt.apply_gradients({"w": params["w"] + 1}, params)
        opt.apply_gradients({"w": params["w"] * 2}, params)
        assert (np.asarray(params["w"]) == 1).all()

    def test_arrays_in_another_order_are_read_and_written_in_theirs(self) -> None:
        opt, params = gs.SGD(1.0, donate=True), {"w": mx.zeros((400, 300)).T}
        g = mx.arange(120_000, dtype=mx.float32).reshape(300, 400)
        for gradient in (g, mx.contiguous(g.T).T, g):
            params["w"] = mx.contiguous(params["w"].T).T
            opt.apply_gradients({"w": gradient}, params)
            assert lent(opt)
        assert (np.asarray(params["w"]) == -3 * np.asarray(g)).all()

    @pytest.mark.parametrize("planned", [False, True])
    def test_transformations_are_refused(self, planned: bool) -> None:
        opt, params, g = gs.SGD(1.0, donate=True), {"w": mx.ones(3)}, {"w": mx.ones(3)}
        if planned:
            opt.apply_gradients(g, params)
        before = np.array(params["w"])

        def step(w: Any) -> Any:
            with pytest.raises(gs.TracingError, match=r"gradstep\.mlx"):
                opt.apply_gradients(g, {"w": w})
            return w.sum()

        for transform in (mx.compile, mx.grad, mx.vmap):
            mx.eval(transform(step)(mx.ones((3, 3)) if transform is mx.vmap else mx.ones(3)))
        assert opt.step == planned
        assert (np.asarray(params["w"]) == before).all()

    @pytest.mark.parametrize("size", [48, LONG])
    def test_where_new_memory_is_not_to_be_had_nothing_has_changed(
        self, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opt, params = gs.Adam(1.0, donate=True), {"w": mx.ones(size)}
        opt.apply_gradients({"w": mx.ones(size)}, params)
        before = [np.array(array) for array in (params["w"], *opt.state["w"].values())]
        locate, calls = mlx_lending.MlxLender.locate, iter(range(9))

        def fail_at_last(lender: Any, arrays: Any) -> Any:
            if next(calls) == 1:
                raise MemoryError
            return locate(lender, arrays)

        monkeypatch.setattr(mlx_lending.MlxLender, "locate", fail_at_last)
        with pytest.raises(MemoryError):
            opt.apply_gradients({"w": mx.ones(size)}, params)
        assert opt.step == 1
        for array, values in zip((params["w"], *opt.state["w"].values()), before, strict=True):
            assert_same_bits(np.array(array), values)
        opt.apply_gradients({"w": mx.ones(size)}, params)
        assert opt.step == 2
