"""Proves that optax's transformations go on in the core and back where formulas are shared, and no others do."""

from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("optax")

import jax
import jax.numpy as jnp
import optax
from bridging import AFTER, BEFORE, Named, assert_close, continued
from bridging import grads as grads_of
from bridging import params as params_of

import gradstep as gs
import gradstep.optax

SHAPES = {"layers.0.weight": (4, 3), "layers.0.bias": (4,)}

ADAM = {"bias_correction": True}
MOMENTUM = {"momentum": 0.9}
SHARED: dict[str, tuple[Any, Any]] = {
    "adam": (optax.adam(0.01, b1=0.8, eps=1e-3), lambda: gs.Adam(0.01, betas=(0.8, 0.999), eps=1e-3, **ADAM)),
    "adamw": (optax.adamw(0.01, weight_decay=0.3), lambda: gs.AdamW(0.01, weight_decay=0.3, **ADAM)),
    "scheduled": (
        optax.adamw(optax.linear_schedule(0.01, 0.0, 10), weight_decay=0.3),
        lambda: gs.AdamW(gs.linear_schedule(0.01, 0.0, 10), weight_decay=0.3, **ADAM),
    ),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
        lambda: gs.Adam(0.01, clip_norm=1.0, **ADAM),
    ),
    "injected": (optax.inject_hyperparams(optax.adam)(learning_rate=0.01), lambda: gs.Adam(0.01, **ADAM)),
    "lion": (optax.lion(0.01, b1=0.8, weight_decay=0.1), lambda: gs.Lion(0.01, betas=(0.8, 0.99), weight_decay=0.1)),
    "sgd": (optax.sgd(0.1, momentum=0.9), lambda: gs.SGD(0.1, **MOMENTUM)),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), lambda: gs.SGD(0.1, nesterov=True, **MOMENTUM)),
    "sgd, scheduled": (
        optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9),
        lambda: gs.SGD(gs.linear_schedule(0.1, 0.0, 10), **MOMENTUM),
    ),
    "rmsprop": (
        optax.rmsprop(0.01, decay=0.8, eps=1e-3, eps_in_sqrt=False),
        lambda: gs.RMSprop(0.01, alpha=0.8, eps=1e-3),
    ),
    "adagrad": (optax.adagrad(0.1, eps=1e-30), lambda: gs.Adagrad(0.1, eps=1e-30)),
    "adadelta": (optax.adadelta(0.7, rho=0.8, eps=1e-3), lambda: gs.AdaDelta(0.7, rho=0.8, eps=1e-3)),
    "gradstep adamw": (gradstep.optax.adamw(0.01, weight_decay=0.3), lambda: gs.AdamW(0.01, weight_decay=0.3, **ADAM)),
    "gradstep adafactor": (gradstep.optax.adafactor(beta_1=0.9), lambda: gs.Adafactor(beta_1=0.9)),
    "gradstep muon": (gradstep.optax.muon(0.02), lambda: gs.Muon(0.02)),
    "gradstep chain": (
        optax.chain(optax.clip_by_global_norm(1.0), gradstep.optax.from_optimizer(gs.Adamax(0.01))),
        lambda: gs.Adamax(0.01, clip_norm=1.0),
    ),
}  # fmt: skip
CORRECTED = {
    "atol": 1e-6
}  # optax computes 1 - 0.999**t in float32, which is off by 3e-5: of a rate of 0.01, over 7 steps
LOOSE = {
    "adam": CORRECTED, "adamw": CORRECTED, "scheduled": CORRECTED, "clipped": CORRECTED, "injected": CORRECTED,
    "sgd, scheduled": {"atol": 1e-6},  # the rate is float32 in optax
    "gradstep adafactor": {"rtol": 1e-5}, "gradstep muon": {"rtol": 1e-4, "atol": 1e-5},  # sums and products
}  # fmt: skip
every_shared_family = pytest.mark.parametrize("what", SHARED)


def params(seed: int = 0, shapes: Any = SHAPES) -> Named:
    return params_of(seed, shapes)


def grads(step: int, shapes: Any = SHAPES) -> Named:
    return grads_of(step, shapes)


def taken(tx: Any, state: Any, weights: Named, first: int, last: int) -> tuple[Named, Any]:
    update, apply = jax.jit(tx.update), jax.jit(optax.apply_updates)
    held = {name: jnp.array(weight) for name, weight in weights.items()}
    for step in range(first, last):
        updates, state = update({name: jnp.array(g) for name, g in grads(step).items() if name in held}, state, held)
        held = apply(held, updates)
    return {name: np.asarray(weight).copy() for name, weight in held.items()}, state


def begun(tx: Any, last: int = BEFORE, weights: Named | None = None) -> tuple[Named, Any]:
    weights = params() if weights is None else weights
    return taken(tx, tx.init({name: jnp.array(weight) for name, weight in weights.items()}), weights, 0, last)


def assert_same_tree(found: Any, expected: Any):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert isinstance(one, jax.Array) and np.array_equal(one, other)


@pytest.mark.parametrize("array", [np.array, jnp.array], ids=["numpy", "jax"])
@every_shared_family
def test_the_core_goes_on_where_optax_left_off(what: str, array: Any):
    tx, make = SHARED[what]
    middle, state = begun(tx)
    expected, _ = taken(tx, state, middle, BEFORE, BEFORE + AFTER)
    opt = make()
    like = {name: array(weight) for name, weight in middle.items()}
    assert opt.load_state_dict(gs.from_optax(state), like=like) == []
    assert_close(continued(opt, middle, BEFORE, BEFORE + AFTER, array), expected, **LOOSE.get(what, {}))


@pytest.mark.parametrize("array", [np.array, jnp.array], ids=["numpy", "jax"])
@every_shared_family
def test_optax_goes_on_where_the_core_left_off(what: str, array: Any):
    tx, make = SHARED[what]
    start, state = begun(tx, 1)
    expected, _ = taken(tx, state, start, 1, BEFORE + AFTER)
    opt = make()
    opt.load_state_dict(gs.from_optax(state))
    middle = continued(opt, start, 1, BEFORE, array)
    fresh = tx.init({name: jnp.array(weight) for name, weight in middle.items()})
    found, _ = taken(tx, gs.to_optax(opt, fresh), middle, BEFORE, BEFORE + AFTER)
    assert_close(found, expected, **LOOSE.get(what, {}))


@every_shared_family
def test_there_and_back_changes_no_bit(what: str):
    tx, make = SHARED[what]
    weights, state = begun(tx)
    opt = make()
    opt.load_state_dict(gs.from_optax(state))
    fresh = tx.init({name: jnp.array(weight) for name, weight in weights.items()})
    before = jax.tree.map(np.array, fresh)
    assert_same_tree(gs.to_optax(opt, fresh), state)
    jax.tree.map(np.testing.assert_array_equal, fresh, before)


def test_counts_come_from_the_state_from_a_schedule_or_are_one():
    for what, expected in {"adamw": BEFORE, "sgd": 1, "sgd, scheduled": BEFORE, "injected": BEFORE}.items():
        tx, make = SHARED[what]
        opt = make()
        opt.load_state_dict(gs.from_optax(begun(tx)[1]))
        assert opt.step == expected and set(opt.steps.values()) == {expected}


def test_names_are_the_paths_of_nested_trees():
    class Layer(NamedTuple):
        w: Any
        b: Any

    tree = {"layers": [Layer(jnp.ones(2), jnp.ones(3))], "scale": jnp.ones(())}
    tx = optax.adam(0.1)
    state = tx.init(tree)
    opt = gs.Adam(0.1, bias_correction=True)
    opt.load_state_dict(gs.from_optax(state))
    assert list(opt.state) == ["layers.0.w", "layers.0.b", "scale"]
    assert_same_tree(gs.to_optax(opt, state), state)


def test_masked_parameters_have_no_state():
    weights = params()
    mask = {name: "bias" not in name for name in weights}
    tx = optax.chain(optax.masked(optax.adam(0.01), mask), optax.add_decayed_weights(0.0))
    middle, state = begun(tx)
    opt = gs.Adam(0.01, bias_correction=True, frozen=["*.bias"])
    opt.load_state_dict(gs.from_optax(state))
    assert list(opt.state) == [name for name in weights if mask[name]]
    moving = {name: weight for name, weight in middle.items() if mask[name]}
    expected, _ = taken(tx, state, middle, BEFORE, BEFORE + AFTER)
    found = continued(opt, moving, BEFORE, BEFORE + AFTER)
    assert_close(found, {n: w for n, w in expected.items() if mask[n]}, **CORRECTED)
    opt.load_state_dict(gs.from_optax(state))
    opt.frozen = ()
    with pytest.raises(gs.MismatchError, match=r"no state for 'layers\.0\.bias'"):
        continued(opt, middle, 0, 1)


def partitioned() -> Any:
    return optax.multi_transform(
        {"adam": optax.adamw(0.01), "sgd": optax.sgd(0.1, momentum=0.9)},
        {name: "sgd" if "bias" in name else "adam" for name in params()},
    )


def test_partitions_are_converted_one_by_one():
    tx = partitioned()
    middle, state = begun(tx)
    expected, _ = taken(tx, state, middle, BEFORE, BEFORE + AFTER)
    adam = gs.AdamW(0.01, weight_decay=1e-4, bias_correction=True)
    adam.load_state_dict(gs.from_optax(state.inner_states["adam"]))
    sgd = gs.SGD(0.1, momentum=0.9)
    sgd.load_state_dict(gs.from_optax(state.inner_states["sgd"]))
    assert list(sgd.state) == ["layers.0.bias"]
    found: Named = {}
    for opt in adam, sgd:
        found |= continued(opt, {name: middle[name] for name in opt.state}, BEFORE, BEFORE + AFTER)
    assert_close({name: found[name] for name in middle}, expected, **CORRECTED)


def test_the_transformation_of_a_multi_optimizer_is_no_one_rule():
    tx = gradstep.optax.from_optimizer(gs.MultiOptimizer([gs.Lion(0.1), gs.Adam(0.1)], ["*.bias"]))
    _, state = begun(tx)
    slots = gs.from_optax(state)["gradstep"]["optimizer"]["state"]
    assert list(slots["layers.0.bias"]["arrays"]) == ["m"] and list(slots["layers.0.weight"]["arrays"]) == ["m", "v"]


# Refusals


def test_a_state_without_slots_is_refused():
    for state, what in (
        (optax.sgd(0.1).init({"w": jnp.ones(2)}), r"EmptyState"),
        (optax.adan(0.1).init({"w": jnp.ones(2)}), r"ScaleByAdanState"),
        (gradstep.optax.sgd(0.1).init({"w": jnp.ones(2)}), "no slots"),
        (optax.adabelief(0.1).init({"w": jnp.ones(2)}), r"ScaleByBeliefState.*deviation"),
        (optax.novograd(0.1).init({"w": jnp.ones(2)}), r"ScaleByNovogradState"),
        (optax.rmsprop(0.1, centered=True, bias_correction=True).init({"w": jnp.ones(2)}), "centered"),
        ({"w": jnp.ones(2)}, "found no state with slots, but a dict"),
        ((), "found no state with slots, but a tuple"),
        (optax.adam(0.1), "found no state with slots"),
    ):
        with pytest.raises(gs.ConfigurationError, match=what):
            gs.from_optax(state)


def test_several_states_with_slots_are_refused_and_named():
    _, state = begun(partitioned())
    with pytest.raises(
        gs.ConfigurationError, match=r"got 2: state\.inner_states\['adam'\].*ScaleByAdamState.*TraceState"
    ):
        gs.from_optax(state)
    with pytest.raises(gs.ConfigurationError, match="got 2"):
        gs.to_optax(gs.Adam(0.1, bias_correction=True), state)
    rmsprop = optax.rmsprop(0.1, momentum=0.9).init({"w": jnp.ones(2)})
    with pytest.raises(gs.ConfigurationError, match="got 2"):
        gs.from_optax(rmsprop)


def test_two_paths_with_one_name_are_refused():
    state = optax.adam(0.1).init({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    with pytest.raises(gs.DuplicateNameError, match=r"'a\.b'"):
        gs.from_optax(state)


def test_a_count_for_each_device_is_refused():
    state = optax.adam(0.1).init({"w": jnp.ones(2)})
    state = (state[0]._replace(count=jnp.array([3, 3])), state[1])
    with pytest.raises(gs.ConfigurationError, match=r"the count of state\[0\].*must be a number of steps"):
        gs.from_optax(state)


def stepped(opt: Any, **shapes: Any) -> Any:
    opt.apply_gradients(grads(0, shapes or {"w": (2,)}), params(0, shapes or {"w": (2,)}))
    return opt


def test_every_difference_is_listed():
    opt = stepped(gs.Adam(0.1, bias_correction=True), a=(2,), b=(2,))
    state = optax.adam(0.1).init({"a": jnp.ones(2), "c": jnp.ones(3)})
    with pytest.raises(gs.MismatchError) as caught:
        gs.to_optax(opt, state)
    assert "state['b']['m']: float32 (2,) in the optimizer, nothing in the state of optax" in str(caught.value)
    assert "state['c']['v']: nothing in the optimizer, float32 (3,) in the state of optax" in str(caught.value)
    for wrong in ({"a": jnp.ones(2), "b": jnp.ones((1, 2))}, {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}):
        with pytest.raises(gs.MismatchError, match=r"state\['b'\]\['m'\]"):
            gs.to_optax(opt, optax.adam(0.1).init(wrong))


def test_optimizers_with_other_formulas_are_refused():
    state = {
        "adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9), "rmsprop": optax.rmsprop(0.1),
        "corrected": optax.rmsprop(0.1, bias_correction=True), "lion": optax.lion(0.1),
    }  # fmt: skip
    state = {name: tx.init({"w": jnp.ones(2)}) for name, tx in state.items()}
    for opt, kind, what in (
        (gs.Adam(0.1), "adam", "always has bias_correction=True, but Adam has bias_correction=False"),
        (gs.AdamW(0.1), "adam", "always has bias_correction=True"),
        (gs.Adamax(0.1), "adam", "is for Adam or AdamW, got Adamax"),
        (gs.RMSprop(0.1), "sgd", "is for SGD, got RMSprop"),
        (gs.RMSprop(0.1), "corrected", "is for no rule of the core, got RMSprop"),
        (gs.SGD(0.1, momentum=0.9), "rmsprop", "is for RMSprop, got SGD"),
        (gs.SGD(0.1, momentum=0.9, dampening=0.5), "sgd", r"always has dampening=0\.0"),
        (gs.Muon(0.1), "sgd", "is for SGD, got Muon"),
        (gs.AdamW(0.1, bias_correction=True), "lion", "is for Lion, got AdamW"),
        (gs.Lion(0.1, slot_dtype="int8"), "lion", r"'m\.codes'"),
        (gs.MultiOptimizer([gs.SGD(0.1)], []), "sgd", r"convert each of opt\.optimizers"),
    ):
        with pytest.raises(gs.ConfigurationError, match=what):
            gs.to_optax(stepped(opt), state[kind])
    with pytest.raises(gs.ArgumentTypeError, match="of gradstep's core"):
        gs.to_optax(optax.adam(0.1), state["adam"])


def test_counts_that_differ_are_refused_where_they_matter():
    for opt, tx in ((gs.Adam(0.1, bias_correction=True), optax.adam(0.1)), (gs.Lion(0.1), optax.lion(0.1))):
        weights = params(0, {"a": (2,), "b": (2,)})
        opt.apply_gradients(weights and grads(0, {"a": (2,)}), weights)
        opt.apply_gradients(grads(1, {"a": (2,), "b": (2,)}), weights)
        state = tx.init({name: jnp.array(weight) for name, weight in weights.items()})
        if isinstance(opt, gs.Lion):
            assert gs.to_optax(opt, state)[0].count == 2
        else:
            with pytest.raises(gs.ConfigurationError, match="1 steps: 'b'; 2 steps: 'a'"):
                gs.to_optax(opt, state)


def test_a_rule_of_your_own_fits_every_state_with_such_slots():
    @gs.rule
    def Mine(w: Any, g: Any, m: Any, v: Any, *, learning_rate: Any):
        m, v = m + g, v + g * g
        return w - learning_rate * m, m, v

    opt = stepped(Mine(0.1))
    state = gs.to_optax(opt, optax.adam(0.1).init({"w": jnp.ones(2)}))
    assert np.array_equal(state[0].nu["w"], opt.state["w"]["v"]) and state[0].count == 1
    twin = Mine(0.1)
    twin.load_state_dict(gs.from_optax(state))
    assert np.array_equal(twin.state["w"]["v"], opt.state["w"]["v"])


def test_the_new_state_is_a_copy():
    opt = stepped(gs.SGD(0.1, momentum=0.9))
    state = gs.to_optax(opt, optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)}))
    before = np.array(state[0].trace["w"])
    stepped(opt)
    assert np.array_equal(state[0].trace["w"], before)
