"""Hyperparameters, options and parameters of every type that an optimizer takes come back from a file."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradstep as gs
from checkpoints import LIBRARIES, bits_of, everything, halves, held_tree, library_of, tree
from everywhere import double_precision  # noqa: F401

NUMBERS: dict[str, Any] = {
    "int": 1, "float": 0.1, "True": True, "negative zero": -0.0, "tiny": 5e-324, "large": 1e308,
    "float32": np.float32(0.1), "float64": np.float64(0.1), "float16": np.float16(0.1), "int64": np.int64(1),
    "array": np.array(0.1), "torch": torch.tensor(0.1), "JAX": jnp.asarray(0.1), "Fraction": Fraction(1, 3),
    "Decimal": Decimal("0.1"),
}  # fmt: skip


def reloaded(opt: Any, folder: Path, **kwargs: Any) -> Any:
    path = folder / "a.safetensors"
    opt.save(path)
    found = gs.load(path, **kwargs)
    assert everything(found) == everything(opt)
    assert repr(found) == repr(opt)
    return found


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_every_number_comes_back(number: Any, tmp_path: Path) -> None:
    try:
        opt = gs.SGD(number)
    except gs.GradstepError:
        pytest.skip("is no rate")
    found = reloaded(opt, tmp_path)
    assert np.float64(found.learning_rate).tobytes() == np.float64(opt.learning_rate).tobytes()


@pytest.mark.parametrize(
    "opt",
    [
        gs.Adam(0.1, betas=[np.float32(0.5), 0]), gs.Adam(0.1, betas=np.array([0.5, 0.25])),
        gs.Adam(0.1, bias_correction=np.True_), gs.SGD({"b": np.float32(0.5), "*": 1}, momentum={"*": np.int64(0)}),
        gs.Adafactor({"b": 0.1, "*": None}), gs.Adafactor(None),
        gs.Adafactor(eps={"b": (1e-30, 1e-3), "*": (1, 2)}), gs.Muon(0.1, ns_steps=np.int64(3)),
        gs.SGD(0.1, clip_norm=np.float32(0.1)), gs.SGD(0.1, clip_norm=0), gs.SGD(0.1, clip_norm=1, frozen=("a*", "b")),
        gs.Lion(0.1, seed=5, slot_dtype="int8"), gs.Lion(0.1, seed=2**64 - 1), gs.Lion(0.1, donate=True),
        gs.Adam(0.1, slot_dtype={"v": "float16"}), gs.Adam(0.1, slot_dtype={}),
        gs.SGD({"'\"\\\ud800": 0.1, "*": 0.2}), gs.SGD(0.1, frozen=["\ud800", ""]),
        gs.Accumulate(gs.SGD(0.1), every=np.int64(3)),
        gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.2), gs.SGD(0.3)], ["a", "a"]),
        gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.2)], ["\ud800'\""]), gs.MultiOptimizer([gs.SGD(0.1)], []),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_comes_back(opt: Any, tmp_path: Path) -> None:
    reloaded(opt, tmp_path)


SCHEDULES = [
    gs.cosine_decay(np.float32(0.1), np.int64(10)), gs.cosine_decay(1, 10, end=np.float64(0.5)),
    gs.exponential_decay(np.float32(0.1), np.float32(0.9)), gs.step_decay(0.1, 0.5, np.int64(3)),
    gs.linear_schedule(np.array(0.0), np.array(1.0), 5), gs.linear_schedule(Fraction(1, 3), 1, 5),
    gs.join_schedules([gs.linear_schedule(0, 1, 2), gs.cosine_decay(1.0, 5)], np.array([2])),
    gs.join_schedules(
        [gs.join_schedules([gs.linear_schedule(0, 1, 1), gs.step_decay(1, 0.5, 1)], [1]), gs.cosine_decay(1.0, 5)], (3,)
    ),
    gs.join_schedules([gs.linear_schedule(0, 0.1, 2), halves], [2]),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=range(len(SCHEDULES)))
def test_every_schedule_comes_back_and_goes_on(schedule: Any, tmp_path: Path) -> None:
    opt, params = gs.SGD(schedule, momentum=0.9), {"w": np.ones(3)}
    for _ in range(3):
        opt.apply_gradients({"w": np.ones(3)}, params)
    found = reloaded(opt, tmp_path, functions={"halves": halves})
    assert type(found.hyperparameters["learning_rate"]) is type(schedule)
    others = {"w": params["w"].copy()}
    for _ in range(5):
        opt.apply_gradients({"w": np.ones(3)}, params)
        found.apply_gradients({"w": np.ones(3)}, others)
        assert found.learning_rate == opt.learning_rate
    assert bits_of(others) == bits_of(params)


def test_a_rate_set_between_steps_comes_back(tmp_path: Path) -> None:
    opt = gs.SGD(gs.cosine_decay(0.1, 10), momentum={"b": 0.5, "*": halves})
    for _ in range(3):
        opt.apply_gradients({}, {})
    opt.learning_rate = {"b": gs.linear_schedule(0, 1, 10), "*": 0.25}
    found = reloaded(opt, tmp_path, functions={"halves": halves})
    assert found.learning_rate == opt.learning_rate == {"b": 0.3, "*": 0.25}


@gs.rule(static=["mode"])
def Configured(w: Any, g: Any, *, learning_rate: Any, mode: Any = None, text: str = "") -> Any:
    return w - learning_rate * g


@pytest.mark.parametrize(
    "mode",
    [None, True, 1, 1.0, -0.0, float("inf"), 10**30, "text", "\ud800", (), (1, (2.5, None)), ("a", True)],
    ids=repr,
)
def test_configuration_of_ones_own_rule_comes_back(mode: Any, tmp_path: Path) -> None:
    opt = Configured(0.1, mode=mode, text="nan")
    opt.save(tmp_path / "a")
    found = gs.load(tmp_path / "a", rules=[Configured])
    assert repr(found.mode) == repr(mode) and type(found.mode) is type(mode) and found.text == "nan"


@pytest.mark.parametrize("mode", [frozenset({1}), b"bytes", 1j, len, int], ids=repr)
def test_configuration_that_plain_data_cannot_hold_is_asked_for(mode: Any, tmp_path: Path) -> None:
    opt = Configured(0.1, mode=mode)
    opt.save(tmp_path / "a")
    with pytest.raises(gs.ConfigurationError, match="mode"):
        gs.load(tmp_path / "a", rules=[Configured])
    twin = Configured(0.2, mode=mode)
    twin.load(tmp_path / "a")
    assert (twin.mode, twin.learning_rate) == (mode, 0.1)


def test_a_number_of_numpy_comes_back_as_one_of_python(tmp_path: Path) -> None:
    Configured(0.1, mode=np.int64(3)).save(tmp_path / "a")
    assert gs.load(tmp_path / "a", rules=[Configured]).mode == 3


# Parameters


@pytest.mark.parametrize("library", LIBRARIES)
def test_parameters_that_are_no_floats_are_saved_and_loaded_with_the_others(library: str, tmp_path: Path) -> None:
    """A model's buffers: counters and masks, which get no gradients."""
    path = tmp_path / "a.safetensors"
    buffers = {"count": np.array(7), "mask": np.array([True, False]), "bytes": np.arange(3, dtype=np.uint8)}
    params = held_tree(library, {"w": np.ones(3, np.float32), **buffers})
    opt = gs.Adam(0.1)
    opt.apply_gradients(held_tree(library, {"w": np.ones(3, np.float32)}), params)
    opt.save(path, params)
    others = held_tree(library, {"w": np.zeros(3, np.float32), **{n: np.zeros_like(a) for n, a in buffers.items()}})
    twin = gs.load(path, others)
    assert bits_of(others) == bits_of(params)
    assert everything(twin) == everything(opt)
    assert gs.load(path).step == 1


@pytest.mark.parametrize("bad", ["text", 1.0, object()], ids=["text", "float", "object"])
def test_a_parameter_that_is_no_array_is_an_error_of_gradsteps(bad: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = gs.Adam(0.1), {"w": np.ones(3)}
    opt.save(path, params)
    old = path.read_bytes()
    for use in (
        lambda: opt.load(path, {"w": bad}), lambda: opt.load(path, like={"w": bad}), lambda: opt.save(path, {"w": bad}),
    ):  # fmt: skip
        with pytest.raises(gs.GradstepError):
            use()
    assert path.read_bytes() == old


def test_a_parameter_of_a_module_stays_the_same_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    opt = gs.Adam(0.1)
    model(torch.ones(1, 3)).sum().backward()
    named = dict(model.named_parameters())
    opt.apply_gradients({name: p.grad for name, p in named.items()}, named)
    opt.save(path, named)
    weight, version = other.weight, other.weight._version
    twin = gs.load(path, dict(other.named_parameters()))
    assert other.weight is weight and weight.requires_grad and weight._version > version
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert everything(twin) == everything(opt)
    assert not any(array.requires_grad for slots in twin.state.values() for array in slots.values())


def test_a_list_of_parameters(tmp_path: Path) -> None:
    path, params, others = tmp_path / "a.safetensors", [np.ones(2), [np.ones(3)]], [np.zeros(2), [np.zeros(3)]]
    opt = gs.Adam(0.1)
    opt.apply_gradients([np.ones(2), [np.ones(3)]], params)
    opt.save(path, params)
    assert everything(gs.load(path, others)) == everything(opt)
    assert repr(others) == repr(params)


# State that has not landed


@pytest.mark.parametrize("library", LIBRARIES)
def test_loaded_state_can_be_read_and_written_before_the_next_step(library: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = gs.Adam(0.1), tree(0)
    opt.apply_gradients(tree(1), params)
    opt.save(path)
    late, others = gs.load(path), held_tree(library, params)
    late.state["w"]["m"][...] = 0
    opt.state["w"]["m"][...] = 0
    assert late.memory(others).total > 0
    late.describe(others)
    late.apply_gradients(held_tree(library, tree(2)), others)
    opt.apply_gradients(tree(2), params)
    assert {library_of(array) for array in late.state["w"].values()} == {library}
    np.testing.assert_allclose(np.asarray(others["w"]), params["w"], rtol=1e-6, atol=1e-6)
    assert late.steps == opt.steps


def test_loaded_state_can_be_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = gs.Accumulate(gs.Adam(0.1), every=2), tree(0)
    for seed in range(1, 4):
        opt.apply_gradients(tree(seed), params)
    opt.save(path)
    late = gs.load(path)
    late.init({**params, "new": np.ones(2)})
    opt.init({**params, "new": np.ones(2)})
    assert everything(late) == everything(opt)
    late = gs.load(path)
    late.discard()
    assert (late.micro_step, late.step, dict(late.sums)) == (0, 1, {})
