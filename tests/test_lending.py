"""Donated arrays of JAX on the CPU: the step of NumPy in their memory, and nobody sees it being written."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

import gradstep as gs
from everywhere import double_precision  # noqa: F401
from families import MATRIX_FAMILIES, assert_same_bits, configurations, in_both_dtypes
from gradstep.arrays import jax_lending

SHAPES = {"scalar": (), "empty": (0, 3), "vector": (7,), "wide": (12, 33), "tall": (33, 12), "deep": (3, 4, 5)}


def arrays(seed: int, dtype: str = "float32", shapes: Any = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def on_jax(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in tree.items()}


def lent(opt: gs.Optimizer) -> bool:
    return opt._plan.plan.lent


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lent, as on other devices."""
    monkeypatch.setattr(jax_lending.JaxLender, "can_lend", lambda *_: False)


def test_this_version_of_jax_lends() -> None:
    assert jax_lending.works()


OPTIONS = [{}, {"clip_norm": 0.5}, {"nonfinite": "skip"}, {"clip_norm": 0.5, "nonfinite": "raise"}]


@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations()))
def test_the_bits_are_those_of_numpy(cls: Any, kwargs: Any, dtype: str) -> None:
    for options in OPTIONS:
        shapes = SHAPES if cls in MATRIX_FAMILIES else {"scalar": (), "empty": (0,), "wide": (12, 33)}
        ours, numpys = cls(**kwargs, **options, donate=True), cls(**kwargs, **options)
        expected, params = arrays(0, dtype, shapes), on_jax(arrays(0, dtype, shapes))
        for step in range(3):
            ours.apply_gradients(on_jax(arrays(step + 1, dtype, shapes)), params)
            numpys.apply_gradients(arrays(step + 1, dtype, shapes), expected)
        assert lent(ours)
        assert ours.report == numpys.report
        for name, array in expected.items():
            assert_same_bits(np.array(params[name]), array)
            for slot, value in numpys.state[name].items():
                assert_same_bits(np.array(ours.state[name][slot]), value)


def test_groups_and_nested_trees_are_lent_too() -> None:
    def opt(**options: Any) -> Any:
        return gs.MultiOptimizer([gs.Muon(0.1), gs.AdamW({"*": 0.1, "b.*": 0.01})], ["*.wide"], **options)

    def tree(make: Any, seed: int) -> Any:
        return {layer: make(arrays(seed + i)) for i, layer in enumerate("ab")}

    ours, numpys, params, expected = opt(donate=True, clip_norm=1.0), opt(clip_norm=1.0), tree(on_jax, 0), tree(dict, 0)
    for step in range(3):
        ours.apply_gradients(tree(on_jax, step + 5), params)
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


@pytest.mark.parametrize("factored", [False, True])
def test_row_statistics_that_somebody_views_move_elsewhere(factored: bool) -> None:
    shape = (8, 6) if factored else (48,)
    opt, numpys = gs.Adafactor(donate=True), gs.Adafactor()
    params, expected = {"w": jnp.ones(shape, "float32")}, {"w": np.ones(shape, np.float32)}
    held: list[Any] = []
    for step in range(4):
        g = arrays(step, shapes={"w": shape})
        opt.apply_gradients(on_jax(g), params)
        numpys.apply_gradients(g, expected)
        held += [(view, view.copy()) for view in map(np.asarray, opt.state["w"].values())]
    for view, before in held:
        assert (view == before).all()
    assert_same_bits(np.array(params["w"]), expected["w"])
    for slot, value in numpys.state["w"].items():
        assert_same_bits(np.array(opt.state["w"][slot]), value)


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


@pytest.mark.parametrize("policy", ["allow", "raise"])
def test_parameters_may_be_other_arrays_in_every_step(policy: Any) -> None:
    opt, numpys = gs.Adam(0.1, nonfinite=policy, donate=True), gs.Adam(0.1)
    for step in range(3):
        params, expected = on_jax(arrays(step)), arrays(step)
        opt.apply_gradients(on_jax(arrays(step + 9)), params)
        numpys.apply_gradients(arrays(step + 9), expected)
        assert lent(opt)
        for name, array in expected.items():
            assert_same_bits(np.array(params[name]), array)


def test_a_gradient_may_lie_where_a_former_parameter_lay() -> None:
    opt, first = gs.SGD(1.0, nonfinite="raise", donate=True), {"w": jnp.ones(64)}
    opt.apply_gradients({"w": jnp.ones(64)}, first)
    second = {"w": jnp.full(64, 5.0)}
    opt.apply_gradients({"w": first["w"] + 1}, second)
    opt.apply_gradients({"w": first["w"]}, second)
    assert (np.asarray(second["w"]) == 4).all()


def test_an_error_while_planning_anew_leaves_no_stale_addresses() -> None:
    opt, first, second = gs.SGD(1.0, donate=True), {"w": jnp.full(64, -3.0)}, {"w": jnp.full(64, 5.0)}
    opt.apply_gradients({"w": jnp.ones(64)}, first)
    kept = first["w"]
    with pytest.raises(gs.AliasedParametersError, match=r"grads\['w'\] and params.*or pass donate=False"):
        opt.apply_gradients({"w": jax.dlpack.from_dlpack(second["w"])}, second)
    opt.apply_gradients({"w": jnp.ones(64)}, second)
    assert (np.asarray(second["w"]) == 4).all()
    assert (np.asarray(kept) == -4).all()


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


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_arrays_live_on_when_no_step_is_taken(policy: Any) -> None:
    opt, params = gs.Adam(0.1, nonfinite=policy, donate=True), {"w": jnp.ones(3)}
    opt.apply_gradients({"w": jnp.ones(3)}, params)
    before, slots = params["w"], dict(opt.state["w"])
    bad = {"w": jnp.array([1.0, np.nan, 2.0])}
    if policy == "raise":
        with pytest.raises(gs.NonFiniteGradientError, match="hold NaN or infinity: w;"):
            opt.apply_gradients(bad, params)
    else:
        opt.apply_gradients(bad, params)
        assert (opt.report.applied, opt.report.culprits) == (False, ("w",))
    assert opt.step == 1
    assert params["w"] is before
    assert all(opt.state["w"][slot] is array and not array.is_deleted() for slot, array in slots.items())


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


def test_a_round_of_micro_batches_is_compiled() -> None:
    opt, params = gs.Accumulate(gs.SGD(1.0, donate=True), every=2), {"w": jnp.zeros(3)}
    for value in (1.0, 3.0):
        opt.apply_gradients({"w": jnp.full(3, value)}, params)
    assert np.asarray(params["w"]).tolist() == [-2, -2, -2]


def test_products_that_numpy_lacks_are_compiled() -> None:
    opt, params = gs.Muon(0.1, ns_dtype="bfloat16", donate=True), {"w": jnp.ones((4, 6), "float32")}
    opt.apply_gradients({"w": jnp.ones((4, 6), "float32")}, params)
    assert not lent(opt)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_elsewhere_donated_arrays_go_through_the_compiled_step(cls: Any, kwargs: Any) -> None:
    results: list[Any] = []
    for donate in (False, True):
        opt, params = cls(**kwargs, clip_norm=0.5, donate=donate), on_jax(arrays(0))
        for step in range(2):
            old = params["wide"]
            opt.apply_gradients(on_jax(arrays(step + 1)), params)
            assert old.is_deleted() == donate
        assert not lent(opt)
        results.append({name: np.array(array) for name, array in params.items()})
    for name, array in results[0].items():
        assert_same_bits(results[1][name], array)
