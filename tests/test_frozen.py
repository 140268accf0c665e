"""Frozen parameters: left alone by every step, and free of slots."""

import copy
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradstep as gs
import gradstep.optax

LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.array,
    "torch": torch.tensor,
    "jax": jnp.array,
    "mlx": mx.array,
}
NAMES = ("embed.weight", "layer.weight", "layer.bias")

every_library = pytest.mark.parametrize("library", LIBRARIES)


def tree(library: str = "numpy", seed: int = 0, names: Any = NAMES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(3).astype(np.float32) for name in NAMES}
    return {name: LIBRARIES[library](arrays[name]) for name in names}


def bits(tree: dict[str, Any]) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in tree.items()}


def makers() -> list[Any]:
    """Optimizers of every kind, made with options."""
    return [
        pytest.param(lambda **options: gs.AdamW(0.1, **options), id="plain"),
        pytest.param(lambda **options: gs.AdamW({"layer.bias": 0.2, "*": 0.1}, **options), id="grouped"),
        pytest.param(
            lambda **options: gs.MultiOptimizer([gs.SGD(0.1), gs.AdamW(0.1)], ["*bias"], **options), id="multi"
        ),
        pytest.param(
            lambda **options: gs.MultiOptimizer(
                [gs.MultiOptimizer([gs.SGD(0.1)]), gs.Lion(0.1)], ["embed*"], **options
            ),
            id="nested",
        ),
    ]


every_maker = pytest.mark.parametrize("make", makers())


@every_library
@every_maker
def test_a_frozen_parameter_is_left_alone_and_the_others_step_as_without_it(make: Any, library: str) -> None:
    opt, free = make(frozen=["embed*"]), make()
    params, others = tree(library), tree(library)
    for seed in range(1, 4):
        opt.apply_gradients(tree(library, seed), params)
        free.apply_gradients(tree(library, seed, NAMES[1:]), others)
    assert bits(params) == bits(others)
    assert opt.steps == dict.fromkeys(NAMES[1:], 3)
    assert list(opt.state) == list(free.state)
    assert "embed.weight" not in opt.state
    opt.init(params)
    assert sorted(opt.state) == sorted(NAMES[1:])


@every_library
def test_the_gradient_of_a_frozen_parameter_is_not_looked_at(library: str) -> None:
    opt, free = (gs.SGD(0.1, clip_norm=1.0, nonfinite="raise", frozen=frozen) for frozen in (["embed*"], []))
    for strange in (np.array([np.nan] * 3, np.float32), np.ones((2, 2), np.float32), np.array([1, 2])):
        grads = {**tree(library, 1), "embed.weight": LIBRARIES[library](strange)}
        params, others = tree(library), tree(library)
        for _ in range(2):
            opt.apply_gradients(grads, params)
            free.apply_gradients(tree(library, 1, NAMES[1:]), others)
        assert bits(params) == bits(others)
        assert opt.report.grad_norm == free.report.grad_norm
        assert math.isfinite(opt.report.grad_norm)
        assert opt.report.culprits == ()


def test_a_frozen_parameter_may_be_of_any_sort() -> None:
    opt = gs.AdamW(0.1, frozen=["table", "lut"])
    locked = np.ones(3, np.float16)
    locked.setflags(write=False)
    params = {"table": np.arange(4), "lut": locked, "w": np.ones(3, np.float32)}
    opt.init(params)
    opt.describe(params)
    opt.apply_gradients({"w": np.ones(3, np.float32), "table": np.ones(9)}, params)
    assert (params["table"] == np.arange(4)).all()
    assert opt.steps == {"w": 1}


def test_memory_that_a_frozen_parameter_shares_is_not_written() -> None:
    memory = np.ones(4, np.float32)
    opt = gs.SGD(0.1, frozen=["embed"])
    params = {"embed": memory, "head": memory[2:]}
    for grads in {"head": np.ones(2, np.float32)}, {"head": np.ones(2, np.float32), "embed": np.ones(4, np.float32)}:
        with pytest.raises(gs.AliasedParametersError, match=r"params\['embed'\] and params\['head'\]"):
            opt.apply_gradients(grads, params)
    with pytest.raises(gs.AliasedParametersError):
        opt.init(params)
    assert (memory == 1).all()
    shared = jnp.ones(2)
    opt.frozen = ["embed", "copy"]  # both of them frozen: nothing parts them
    arrays = {"embed": shared, "copy": shared, "head": jnp.ones(2)}
    for _ in range(2):
        opt.apply_gradients({name: jnp.ones(2) for name in arrays}, arrays)
    assert arrays["embed"] is arrays["copy"] is shared
    with pytest.raises(gs.AliasedParametersError):
        opt.apply_gradients({"head": jnp.ones(2)}, {**arrays, "head": shared})


@every_library
def test_everything_may_be_frozen(library: str) -> None:
    opt = gs.AdamW(0.1, frozen=["*"], clip_norm=1.0)
    params = tree(library)
    plans = []
    for seed in range(3):
        opt.apply_gradients(tree(library, seed), params)
        plans.append(opt._plan)
    assert bits(params) == bits(tree(library))
    assert plans[0] is plans[1] is plans[2], "a step that changes nothing is planned anew"
    assert (opt.step, opt.steps, opt.report.grad_norm) == (3, {}, 0.0)


@every_library
def test_what_is_frozen_later_keeps_its_slots_and_goes_on_from_them(library: str) -> None:
    """A pause: as if no gradient had come meanwhile."""
    opt, free = gs.Adam(0.1, bias_correction=True), gs.Adam(0.1, bias_correction=True)
    params, others = tree(library), tree(library)
    for seed, frozen in enumerate([[], ["layer.*"], ["layer.*"], ["embed*"], []]):
        opt.frozen = frozen
        opt.apply_gradients(tree(library, seed), params)
        names = {(): NAMES, ("layer.*",): NAMES[:1], ("embed*",): NAMES[1:]}[tuple(frozen)]
        free.apply_gradients(tree(library, seed, names), others)
        assert bits(params) == bits(others)
        assert opt.steps == free.steps
    assert opt.steps == {"embed.weight": 4, "layer.weight": 3, "layer.bias": 3}
    opt.frozen = ["embed*"]
    assert set(opt.state["embed.weight"]) == {"m", "v"}


def test_a_gradient_without_parameter_is_an_error_for_frozen_names_too() -> None:
    opt = gs.SGD(0.1, frozen=["*"])
    with pytest.raises(gs.UnknownParameterError, match="there are gradients for 'nobody'"):
        opt.apply_gradients({"nobody": np.ones(2)}, tree())
    assert opt.step == 0


def test_a_frozen_parameter_is_neither_routed_nor_grouped() -> None:
    asked: list[str] = []
    frozen = ["embed*"]
    multi = gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.1)], [lambda name, w: asked.append(name)], frozen=frozen)
    grouped = gs.SGD({"layer.*": 0.1}, frozen=frozen)
    for opt in (multi, grouped):
        opt.init(tree())
        opt.apply_gradients(tree(), tree(seed=1))
    assert "embed.weight" not in asked


def test_a_failed_step_leaves_everything() -> None:
    opt, params = gs.AdamW(0.1, frozen=["embed*"]), tree()
    opt.apply_gradients(tree(seed=1), params)
    before, slots = bits(params), {name: bits(dict(kept)) for name, kept in opt.state.items()}
    with pytest.raises(gs.ShapeError):
        opt.apply_gradients({**tree(seed=2), "layer.bias": np.ones(7, np.float32)}, params)
    assert bits(params) == before
    assert {name: bits(dict(kept)) for name, kept in opt.state.items()} == slots


# The option


def test_it_reads_as_globs_and_is_shown() -> None:
    opt = gs.SGD(0.1, frozen=["a.*", "b"])
    assert opt.frozen == ("a.*", "b")
    assert "frozen=('a.*', 'b')" in repr(opt)
    assert gs.SGD(0.1).frozen == ()
    assert "frozen" not in repr(gs.SGD(0.1))
    assert copy.deepcopy(opt).frozen == opt.frozen


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("embed.*", r"frozen must be a list of globs, got the text 'embed.\*': write \['embed.\*'\]"),
        (3, r"frozen must be a list of globs such as .*got 3"),
        ({"embed.*"}, r"frozen must be a list of globs"),
        ([3], r"frozen must hold globs such as 'embed.\*', got 3"),
    ],
)
def test_what_is_no_list_of_globs_is_refused(value: Any, message: str) -> None:
    opt = gs.SGD(0.1)
    for attempt in (lambda: gs.SGD(0.1, frozen=value), lambda: setattr(opt, "frozen", value)):
        with pytest.raises(gs.ArgumentTypeError, match=message):
            attempt()
    assert opt.frozen == ()


def test_it_belongs_on_the_outermost() -> None:
    child = gs.SGD(0.1)
    opt = gs.MultiOptimizer([child, gs.AdamW(0.1)], ["*bias"])
    child.frozen = ["layer.*"]
    for call in (lambda: opt.apply_gradients({}, {}), lambda: opt.describe({}), lambda: gs.MultiOptimizer([child])):
        with pytest.raises(gs.ConfigurationError, match=r"donate or frozen set.*outermost"):
            call()


def test_an_own_rule_cannot_take_its_name() -> None:
    with pytest.raises(gs.RuleError, match="frozen is a reserved name"):

        @gs.rule
        def Own(w, g, *, learning_rate, frozen=1.0):
            return w - learning_rate * frozen * g


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_optax_updates_nothing_that_is_frozen(options: Any) -> None:
    opt = gs.AdamW(0.1, frozen=["embed*"], **options)
    tx = gradstep.optax.from_optimizer(opt)
    params, others = tree("jax"), tree("jax")
    state = tx.init(params)
    assert state.slots["m"]["embed.weight"] is None
    for seed in range(1, 4):
        grads = {**tree("jax", seed), "embed.weight": jnp.full(3, jnp.nan)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = {name: params[name] + updates[name] for name in params}
        opt.apply_gradients(tree("jax", seed), others)
    assert bits(params)["embed.weight"] == bits(tree("jax"))["embed.weight"]
    for name in NAMES:
        np.testing.assert_allclose(params[name], others[name], rtol=1e-5)
    empty = gradstep.optax.from_optimizer(gs.SGD(0.1, frozen=["*"], **options))
    updates, _ = empty.update(params, empty.init(params), params)
    assert all(not array.any() for array in updates.values())
