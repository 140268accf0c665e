"""gradstep.optax against optax itself, inside of what optax and JAX do with transformations."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradstep as gs
import gradstep.optax
from families import MATRIX_FAMILIES, assert_same_bits, configurations
from gradstep.program.device_schedules import schedule_on_device

SHAPES = {"w": (4, 3), "b": (3,), "s": (), "t": (2, 3, 4)}


def tree(seed: int, names: Iterable[str] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(SHAPES[name]), "float32") for name in names}


def trained(tx: Any, steps: int = 6, *, names: Iterable[str] = SHAPES, jit: bool = True) -> Any:
    """Parameters and state after some steps with gradients that depend on the parameters."""
    params = tree(0, names)
    state = tx.init(params)

    def step(params: Any, state: Any, noise: Any) -> Any:
        grads = jax.tree.map(lambda w, n: 0.3 * w + n, params, noise)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for i in range(steps):
        params, state = step(params, state, tree(i + 1, names))
    return params, state


def assert_close(found: Any, expected: Any, tolerance: float = 3e-6) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


PAIRS: dict[str, tuple[Any, Any]] = {
    "sgd": (lambda m: m.sgd(0.1), {}),
    "sgd momentum": (lambda m: m.sgd(0.1, momentum=0.9), {}),
    "sgd nesterov": (lambda m: m.sgd(0.1, 0.9, nesterov=True), {}),
    "rmsprop": (lambda m: m.rmsprop(0.01), {}),
    "rmsprop eps outside": (lambda m: m.rmsprop(0.01, 0.8, eps=1e-3, eps_in_sqrt=False), {}),
    "adagrad": (lambda m: m.adagrad(0.1), {}),
    "adagrad from zero": (lambda m: m.adagrad(0.1, initial_accumulator_value=0.0, eps=1e-4), {}),
    "adadelta": (lambda m: m.adadelta(1.0, rho=0.8), {}),
    "adam": (lambda m: m.adam(0.01), {}),
    "adam with others": (lambda m: m.adam(0.01, 0.8, 0.95, 1e-3), {}),
    "adamw": (lambda m: m.adamw(0.01), {}),
    "adamw decaying": (lambda m: m.adamw(0.01, weight_decay=0.3), {}),
    "adamax": (lambda m: m.adamax(0.01), {}),
    "lion": (lambda m: m.lion(0.01), {}),
    "lion decaying": (lambda m: m.lion(0.01, b1=0.8, weight_decay=0.3), {}),
    "a schedule of optax": (lambda m: m.adamw(optax.cosine_decay_schedule(0.1, 5)), {}),
}
in_pairs = pytest.mark.parametrize("make", [make for make, _ in PAIRS.values()], ids=PAIRS)


@in_pairs
def test_each_name_does_what_it_does_in_optax(make: Any) -> None:
    assert_close(trained(make(gradstep.optax), names="ws")[0], trained(make(optax), names="ws")[0])


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_from_optimizer_makes_the_optimizer_s_steps(cls: Any, kwargs: Any) -> None:
    names = SHAPES if cls in MATRIX_FAMILIES else "ws"  # XLA compiles each shape anew
    found, state = trained(gradstep.optax.from_optimizer(cls(**kwargs)), names=names)
    opt, params = cls(**kwargs), {name: np.array(array) for name, array in tree(0, names).items()}
    for i in range(6):
        noise = tree(i + 1, names)
        grads = {name: np.asarray(np.float32(0.3) * w + np.asarray(noise[name])) for name, w in params.items()}
        opt.apply_gradients(grads, params)
    tolerance = 2e-4 if cls is gs.Muon else 1e-5
    assert_close(found, {name: jnp.asarray(array) for name, array in params.items()}, tolerance)
    assert int(state.count) == 6
    for name, slots in opt.state.items():
        for slot, array in slots.items():
            np.testing.assert_allclose(np.asarray(state.slots[slot][name]), array, rtol=tolerance, atol=tolerance)


def test_bias_correction_is_accurate_at_the_first_steps() -> None:
    for steps in (1, 2, 3, 10, 1000):
        tx = gradstep.optax.adam(1.0, eps=0.0)
        state = tx.init(jnp.zeros(1))._replace(count=jnp.int32(steps - 1))
        update = jax.jit(tx.update)(jnp.ones(1), state)[0]
        correction = math.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
        assert float(update[0]) == pytest.approx(-correction * 0.1 / math.sqrt(0.001), rel=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        gs.cosine_decay(0.1, 4, 0.01),
        gs.linear_schedule(0.1, 0.01, 4),
        gs.exponential_decay(0.1, 0.7),
        gs.step_decay(0.1, 0.5, 2),
        gs.join_schedules([gs.linear_schedule(0.0, 0.1, 2), gs.cosine_decay(0.1, 3)], [2]),
    ],
    ids=repr,
)
def test_schedules_of_gradstep_run_under_jit(schedule: Any) -> None:
    tx = gradstep.optax.sgd(schedule)
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for step in range(8):
        updates, state = update(jnp.ones(1), state)
        assert float(updates[0]) == pytest.approx(-schedule(step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (gs.exponential_decay(0.1, 0.9999), (1, 1000, 99_990)),
        (gs.cosine_decay(0.1, 1000), (1, 500, 998, 999)),
        (gs.linear_schedule(0.1, 0.0, 1000), (1, 500, 998, 999)),
    ],
    ids=repr,
)
def test_schedules_keep_their_digits_in_float32(schedule: Any, steps: tuple[int, ...]) -> None:
    for step in steps:
        found = schedule_on_device(jnp, schedule, jnp.int32(step))
        assert float(found) == pytest.approx(schedule(step), rel=2e-6)


def adamw(module: Any) -> Any:
    return module.adamw(0.05, weight_decay=0.1)


WRAPPERS: dict[str, Any] = {
    "chain": lambda m: optax.chain(optax.clip_by_global_norm(0.5), adamw(m), optax.scale(0.5)),
    "masked": lambda m: optax.masked(adamw(m), {"w": True, "b": False, "s": True, "t": False}),
    "multi_transform": lambda m: optax.multi_transform(
        {"a": adamw(m), "b": m.sgd(0.1, 0.9)}, {"w": "a", "b": "b", "s": "b", "t": "a"}
    ),
    "inject_hyperparams": lambda m: optax.inject_hyperparams(m.adamw)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 5), b1=0.8, weight_decay=0.2
    ),
    "inject a momentum": lambda m: optax.inject_hyperparams(m.sgd, static_args="nesterov")(0.1, momentum=0.8),
    "MultiSteps": lambda m: optax.MultiSteps(adamw(m), 2),
    "apply_if_finite": lambda m: optax.apply_if_finite(adamw(m), 3),
    "lookahead by hand": lambda m: optax.chain(adamw(m), optax.add_decayed_weights(0.01)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_optax_wraps_around_transformations(wrap: Any) -> None:
    assert_close(trained(wrap(gradstep.optax))[0], trained(wrap(optax))[0])


def test_the_rate_of_injected_hyperparameters_can_be_set_from_outside() -> None:
    tx = optax.inject_hyperparams(gradstep.optax.sgd)(learning_rate=0.1)
    state = tx.init(jnp.zeros(1))
    state.hyperparams["learning_rate"] = jnp.float32(0.75)
    assert jax.jit(tx.update)(jnp.ones(1), state)[0].tolist() == [-0.75]


def test_jit_and_no_jit_agree() -> None:
    tx = gradstep.optax.adamw(0.05)
    assert_close(trained(tx), trained(tx, jit=False))


def test_state_is_made_of_trees_like_the_parameters() -> None:
    tx, params = gradstep.optax.adam(0.1), tree(0)
    state = tx.init(params)
    assert jax.tree.structure(state.slots["m"]) == jax.tree.structure(params)
    doubled = optax.tree_map_params(tx, lambda array: array + 2, state)
    assert float(doubled.slots["v"]["b"][0]) == 2.0
    assert int(doubled.count) == 0


def test_a_multi_optimizer_routes_by_path() -> None:
    opt = gs.MultiOptimizer([gs.SGD(0.5), gs.Lion(0.25)], ["*.bias"])
    tx = gradstep.optax.from_optimizer(opt)
    params = {"layers": [{"bias": jnp.zeros(1), "weight": jnp.zeros(1)}]}
    grads = {"layers": [{"bias": jnp.full(1, 3.0), "weight": jnp.full(1, 3.0)}]}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates == {"layers": [{"bias": jnp.array([-1.5]), "weight": jnp.array([-0.25])}]}
    assert set(state.slots) == {"m"}


def test_clipping_and_skipping_inside() -> None:
    tx = gradstep.optax.from_optimizer(gs.SGD(1.0, momentum=0.5, clip_norm=1.0, nonfinite="skip"))
    params, update = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, jax.jit(tx.update)
    updates, state = update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, tx.init(params), params)
    np.testing.assert_allclose([float(updates["a"][0]), float(updates["b"][0])], [-0.6, -0.8], rtol=1e-5)
    skipped, after = update({"a": jnp.full(1, jnp.nan), "b": jnp.ones(1)}, state, params)
    assert float(skipped["b"][0]) == 0.0
    assert int(after.count) == int(state.count) == 1
    assert_close(after.slots, state.slots, 0)


def test_the_optimizer_is_neither_used_nor_changed() -> None:
    opt = gs.AdamW(gs.cosine_decay(0.1, 10), bias_correction=True)
    before = copy.deepcopy(opt)
    trained(gradstep.optax.from_optimizer(opt))
    assert (opt.step, dict(opt.state), opt.learning_rate) == (before.step, {}, before.learning_rate)


def test_bfloat16_parameters_are_computed_in_float32() -> None:
    tx = gradstep.optax.adam(0.1)
    params = jnp.ones(3, "bfloat16")
    updates, state = jax.jit(tx.update)(jnp.full(3, 0.3, "bfloat16"), tx.init(params), params)
    assert updates.dtype == "bfloat16"
    assert state.slots["m"].dtype == "float32"


def test_a_rule_of_one_s_own() -> None:
    @gs.rule
    def Signum(w: Any, g: Any, m: Any, *, learning_rate: Any, momentum: Any = 0.9) -> Any:
        m = momentum * m + (1 - momentum) * g
        return w - learning_rate * gs.sign(m), m

    tx = gradstep.optax.from_optimizer(Signum(0.5))
    assert_same_bits(tx.update(jnp.array([3.0, -4.0]), tx.init(jnp.zeros(2)))[0], np.array([-0.5, 0.5], np.float32))


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("rate", [1e-3, 1e-4, optax.constant_schedule(1e-4)])
def test_weight_decay_is_not_rounded_away(name: str, rate: Any) -> None:
    tx = getattr(gradstep.optax, name)(rate, weight_decay=1e-4)
    params = jnp.full(1, 3.0)
    update = jax.jit(tx.update)(jnp.zeros(1), tx.init(params), params)[0]
    assert float(update[0]) == pytest.approx(-3e-4 * (1e-4 if callable(rate) else rate), rel=1e-5)


def test_hyperparameters_of_muon_and_adafactor_can_be_injected() -> None:
    for factory, arguments in (
        (optax.inject_hyperparams(gradstep.optax.muon, static_args=("ns_steps", "nesterov")), {"learning_rate": 0.1}),
        (optax.inject_hyperparams(gradstep.optax.adafactor), {"learning_rate": 0.1, "decay_rate": -0.5}),
    ):
        tx, params = factory(**arguments), {"w": jnp.ones((3, 2))}
        updates, _ = jax.jit(tx.update)({"w": jnp.ones((3, 2))}, tx.init(params), params)
        assert updates["w"].shape == (3, 2)
    with pytest.raises(gs.ArgumentTypeError, match="static_args"):
        optax.inject_hyperparams(gradstep.optax.muon)(0.1).init({"w": jnp.ones((3, 2))})


def test_a_slot_for_vectors_alone() -> None:
    @gs.rule
    def Momentum(w: Any, g: Any, m: Any, *, learning_rate: Any) -> Any:
        m = 0.5 * m + g if w.ndim == 1 else None
        return w - learning_rate * (g if m is None else m), m

    tx, params = gradstep.optax.from_optimizer(Momentum(0.5)), {"v": jnp.zeros(2), "m": jnp.zeros((2, 2))}
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert updates["v"].tolist() == [-0.5, -0.5]
    assert state.slots["m"]["m"] is None


def test_errors() -> None:
    with pytest.raises(gs.ArgumentTypeError, match="takes an optimizer of gradstep"):
        gradstep.optax.from_optimizer(optax.adam(0.1))  # type: ignore[arg-type]
    with pytest.raises(gs.ConfigurationError, match='use "skip"'):
        gradstep.optax.from_optimizer(gs.SGD(0.1, nonfinite="raise"))
    tx = gradstep.optax.adamw(0.1)
    with pytest.raises(ValueError, match=r"AdamW needs the parameters: call update\(grads, state, params\)"):
        tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    with pytest.raises(gs.OutOfRangeError):
        gradstep.optax.adamw(0.1, b1=1.5)


def test_a_training_loop_of_equinox_ends_with_optax_s_loss() -> None:
    equinox = pytest.importorskip("equinox")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 4)), "float32")
    y = jnp.sin(x.sum(axis=1, keepdims=True))

    def final_loss(tx: Any) -> float:
        model = equinox.nn.MLP(4, 1, 16, 2, key=jax.random.key(0))
        state = tx.init(equinox.filter(model, equinox.is_array))

        @equinox.filter_jit
        def step(model: Any, state: Any) -> Any:
            loss, grads = equinox.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(x) - y) ** 2))(model)
            updates, state = tx.update(grads, state, equinox.filter(model, equinox.is_array))
            return equinox.apply_updates(model, updates), state, loss

        losses: list[float] = []
        for _ in range(60):
            model, state, loss = step(model, state)
            losses.append(float(loss))
        assert losses[-1] < 0.3 * losses[0]
        return losses[-1]

    ours, theirs = (
        final_loss(module.adamw(optax.cosine_decay_schedule(0.02, 60))) for module in (gradstep.optax, optax)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_narrow_storage_is_refused() -> None:
    for options in ({"slot_dtype": "int8"}, {"rounding": "stochastic"}, {"master_weights": True}):
        with pytest.raises(gs.ConfigurationError, match="keeps slots in float32"):
            gradstep.optax.from_optimizer(gs.Adam(0.1, **options))
