"""The life of an optimizer: state by name from init to re-init, steps over any subset, and what can change between."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import configurations, public_optimizers

every_family = pytest.mark.parametrize("cls", public_optimizers(), ids=lambda cls: cls.__name__)

SLOTS = {
    "SGD": {"v"},
    "RMSprop": {"v"},
    "Adagrad": {"v"},
    "AdaDelta": {"v", "u"},
    "Adam": {"m", "v"},
    "AdamW": {"m", "v"},
    "Adamax": {"m", "v"},
    "Lion": {"m"},
    "Muon": {"v"},
}


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def two(dtype: Any = np.float32) -> dict[str, Any]:
    return {"w": ones(2, 3, dtype=dtype), "b": ones(3, dtype=dtype)}


def make(cls: Any, rate: Any = 0.1, **kwargs: Any) -> Any:
    """A family that keeps at least one slot."""
    return cls(rate, **({"momentum": 0.9} if cls is gs.SGD else {}), **kwargs)


def copied(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: array.copy() for name, array in tree.items()}


# State


@every_family
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_init_makes_zero_slots_of_every_parameter(cls: Any, dtype: Any) -> None:
    opt = make(cls)
    opt.init(two(dtype))
    assert opt.steps == {"w": 0, "b": 0}
    assert opt.step == 0
    if cls is gs.Adafactor:
        shapes = {"w": {"row": (2,), "col": (3,)}, "b": {"v": (3,)}}
    else:
        shapes = {name: dict.fromkeys(SLOTS[cls.__name__], array.shape) for name, array in two().items()}
    assert {name: {slot: a.shape for slot, a in slots.items()} for name, slots in opt.state.items()} == shapes
    arrays = [array for slots in opt.state.values() for array in slots.values()]
    assert all(array.dtype == dtype and not array.any() for array in arrays)


def test_adafactor_keeps_rows_and_columns_per_leading_index_and_a_first_moment_when_told_to() -> None:
    opt = gs.Adafactor(beta_1=0.9)
    opt.init({"w": ones(4, 2, 3)})
    assert {slot: array.shape for slot, array in opt.state["w"].items()} == {
        "row": (4, 2),
        "col": (4, 3),
        "m": (4, 2, 3),
    }


def test_sgd_without_momentum_keeps_no_slots_but_counts() -> None:
    opt = gs.SGD(0.1)
    opt.apply_gradients(two(), two())
    assert {name: dict(slots) for name, slots in opt.state.items()} == {"w": {}, "b": {}}
    assert opt.steps == {"w": 1, "b": 1}


@every_family
def test_slots_come_lazily_and_then_equal_those_after_init(cls: Any) -> None:
    lazy, eager = make(cls), make(cls)
    params, others = two(), two()
    eager.init(others)
    assert not lazy.state
    assert lazy.steps == {}
    for _ in range(2):
        lazy.apply_gradients(two(), params)
        eager.apply_gradients(two(), others)
    assert all((params[name] == others[name]).all() for name in params)
    assert lazy.steps == eager.steps == {"w": 2, "b": 2}
    assert all((a == eager.state[n][s]).all() for n, slots in lazy.state.items() for s, a in slots.items())


@every_family
def test_init_again_wipes_slots_and_steps_but_not_step_and_schedules(cls: Any) -> None:
    asked: list[int] = []
    opt = make(cls, lambda step: asked.append(step) or 0.1)
    params = two()
    for _ in range(3):
        opt.apply_gradients(two(), params)
    opt.init({"w": params["w"]})
    assert opt.step == 3
    assert opt.steps == {"w": 0}
    assert set(opt.state) == {"w"}
    assert not any(array.any() for array in opt.state["w"].values())
    opt.apply_gradients({"w": two()["w"]}, params)
    assert asked == [0, 1, 2, 3]
    assert opt.step == 4
    assert opt.steps == {"w": 1}


def test_a_step_after_init_begins_as_the_first_did() -> None:
    opt = gs.Adam(0.1, bias_correction=True)
    fresh = gs.Adam(0.1, bias_correction=True)
    params = two()
    opt.apply_gradients(two(), params)
    opt.init(params)
    other = copied(params)
    opt.apply_gradients(two(), params)
    fresh.apply_gradients(two(), other)
    assert all((params[name] == other[name]).all() for name in params)


def test_a_failed_init_changes_nothing() -> None:
    opt = gs.Adam(0.1)
    opt.apply_gradients(two(), two())
    slots = {name: dict(entry) for name, entry in opt.state.items()}
    with pytest.raises(gs.DtypeError, match=r"params\['z'\]"):
        opt.init({"w": ones(2), "z": np.ones(2, int)})
    assert opt.steps == {"w": 1, "b": 1}
    assert all(opt.state[name][slot] is array for name, entry in slots.items() for slot, array in entry.items())


def test_state_is_flat_live_and_read_only() -> None:
    opt = gs.Adam(0.1)
    view = opt.state
    params = {"layers": [{"weight": ones(2)}, {"weight": ones(2)}]}
    opt.apply_gradients({"layers": [{"weight": ones(2)}, None]}, params)
    assert list(view) == ["layers.0.weight"]
    assert len(view) == 1
    m = view["layers.0.weight"]["m"]
    before = m.copy()
    opt.apply_gradients({"layers": [{"weight": ones(2)}]}, params)
    assert opt.state["layers.0.weight"]["m"] is m
    assert (m != before).all()
    for mapping, key in ((opt.state, "new"), (opt.state["layers.0.weight"], "m")):
        with pytest.raises(TypeError):
            mapping[key] = None
        with pytest.raises(TypeError):
            del mapping[key]


def test_what_is_written_into_a_slot_counts() -> None:
    opt = gs.SGD(1.0, momentum=1.0)
    params = {"w": ones(2)}
    opt.init(params)
    opt.state["w"]["v"][:] = 5.0
    opt.apply_gradients({"w": ones(2)}, params)
    assert (params["w"] == 1 - (5.0 + 1.0)).all()


# One step


@every_family
def test_a_step_returns_the_same_object_and_writes_in_place_but_never_gradients(cls: Any) -> None:
    opt = make(cls)
    params, grads = two(), two()
    arrays, gradients = dict(params), copied(grads)
    for gradient in grads.values():
        gradient.flags.writeable = False
    assert opt.apply_gradients(grads, params) is params
    assert all(params[name] is arrays[name] for name in params)
    assert all((params[name] != 1).all() for name in params)
    assert all((grads[name] == gradients[name]).all() for name in grads)


def test_nested_parameters_come_back_as_the_same_tree() -> None:
    params = {"a": [ones(2), (ones(2),)]}
    leaf = params["a"][1][0]
    assert gs.SGD(0.5).apply_gradients({"a": [ones(2), (ones(2),)]}, params) is params
    assert params["a"][1][0] is leaf
    assert (leaf == 0.5).all()


@every_family
def test_parameters_without_a_gradient_are_left_alone(cls: Any) -> None:
    opt = make(cls)
    params = {"w": ones(2, 3), "b": ones(3), "table": np.arange(3), "flag": ones(2)[::-1]}
    opt.apply_gradients({"w": ones(2, 3), "b": None}, params)
    assert (params["b"] == 1).all()
    assert (params["table"] == [0, 1, 2]).all()
    assert (params["w"] != 1).all()
    assert opt.steps == {"w": 1}
    assert set(opt.state) == {"w"}


def test_a_late_parameter_starts_at_its_own_first_step() -> None:
    opt = gs.Adam(0.1, bias_correction=True)
    params, alone = {"a": ones(3), "b": ones(3)}, {"b": ones(3)}
    for _ in range(4):
        opt.apply_gradients({"a": ones(3)}, params)
    opt.apply_gradients({"a": ones(3), "b": 2 * ones(3)}, params)
    gs.Adam(0.1, bias_correction=True).apply_gradients({"b": 2 * ones(3)}, alone)
    assert opt.steps == {"a": 5, "b": 1}
    assert opt.step == 5
    assert (params["b"] == alone["b"]).all()


@pytest.mark.parametrize("grads", [{}, [], (), {"w": None, "b": None}, {"w": {}}])
@every_family
def test_no_gradients_at_all_is_a_step_that_counts(cls: Any, grads: Any) -> None:
    asked: list[int] = []
    opt = make(cls, lambda step: asked.append(step) or 0.1 / (step + 1))
    params = two()
    for step in (1, 2):
        assert opt.apply_gradients(grads, params) is params
        assert (opt.step, opt.steps, opt.report.applied, opt.report.step) == (step, {}, True, step)
    assert asked == [0, 1]
    assert opt.learning_rate == 0.05
    assert all((array == 1).all() for array in params.values())


def test_no_parameters_at_all_is_a_step_too() -> None:
    opt = gs.Adam(0.1)
    opt.apply_gradients({}, {})
    assert opt.step == 1


# Rates and preflight


def test_learning_rate_is_the_one_last_used() -> None:
    opt = gs.SGD(lambda step: 1.0 / 2**step)
    params = {"w": np.zeros(1)}
    seen = [opt.learning_rate]
    for _ in range(3):
        opt.apply_gradients({"w": np.ones(1)}, params)
        seen.append(opt.learning_rate)
    assert seen == [1.0, 1.0, 0.5, 0.25]
    assert params["w"] == -1.75


def test_adafactor_without_a_rate_has_none() -> None:
    opt = gs.Adafactor()
    opt.apply_gradients(two(), two())
    assert opt.learning_rate is None
    assert opt.report.learning_rate is None
    assert gs.Adafactor(0.1).learning_rate == 0.1


def test_preflight_resolves_once_and_a_step_uses_what_it_found() -> None:
    asked: list[int] = []
    opt = gs.SGD(lambda step: asked.append(step) or float(step + 1))
    params = {"w": np.zeros(1)}
    opt.preflight()
    assert asked == [0]
    opt.apply_gradients({"w": np.ones(1)}, params)
    for _ in range(3):
        opt.preflight()
    assert asked == [0, 1]
    assert opt.learning_rate == 2.0
    assert opt.step == 1
    opt.apply_gradients({"w": np.ones(1)}, params)
    assert asked == [0, 1]
    assert params["w"] == -3.0


def test_preflight_finds_what_a_step_would() -> None:
    rates = [0.1, math.nan, 0.3]
    opt = gs.SGD(lambda step: rates[step])
    opt.apply_gradients({}, {})
    with pytest.raises(gs.NonFiniteScalarError, match="learning_rate"):
        opt.preflight()
    assert opt.learning_rate == 0.1
    rates[1] = 0.2
    opt.preflight()
    assert opt.learning_rate == 0.2


def only_once(calls: list[int]) -> Any:
    """A schedule that gives NaN when it is asked for a step again."""

    def schedule(step: int) -> float:
        calls.append(step)
        return 0.1 if calls.count(step) == 1 else math.nan

    return schedule


def test_a_schedule_whose_second_call_fails_is_never_called_twice() -> None:
    rates, betas = list[int](), list[int]()
    inner = gs.MultiOptimizer([gs.Adam(0.1, betas=(0.9, only_once(betas)))])
    opt = gs.MultiOptimizer([gs.SGD(only_once(rates)), inner], ["w"])
    params = two()
    for _ in range(3):
        opt.preflight()
        opt.apply_gradients(two(), params)
        opt.preflight()
    assert rates == betas == [0, 1, 2, 3]
    assert opt.step == 3


def test_setting_the_rate_takes_effect_at_the_current_step() -> None:
    asked: list[int] = []
    opt = gs.SGD(0.1)
    params = {"w": np.zeros(1)}
    for _ in range(2):
        opt.apply_gradients({"w": np.zeros(1)}, params)
    opt.learning_rate = lambda step: asked.append(step) or 10.0 + step
    assert asked == [2]
    assert opt.learning_rate == 12.0
    opt.apply_gradients({"w": np.ones(1)}, params)
    assert asked == [2]
    assert params["w"] == -12.0
    opt.apply_gradients({}, params)
    assert asked == [2, 3]
    assert opt.learning_rate == 13.0
    opt.learning_rate = 1
    opt.apply_gradients({"w": np.ones(1)}, params)
    assert opt.learning_rate == 1.0
    assert params["w"] == -13.0


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, gs.NonFiniteScalarError),
        (-math.inf, gs.NonFiniteScalarError),
        (lambda step: math.inf, gs.NonFiniteScalarError),
        ("fast", gs.ArgumentTypeError),
        (None, gs.ArgumentTypeError),
        (True, gs.ArgumentTypeError),
    ],
)
def test_a_rate_that_cannot_serve_is_not_taken(value: Any, error: Any) -> None:
    opt = gs.SGD(0.1)
    with pytest.raises(error, match="learning_rate"):
        opt.learning_rate = value
    assert opt.learning_rate == 0.1
    assert opt.hyperparameters["learning_rate"] == 0.1


# Report


def test_the_report_tells_what_was_done() -> None:
    opt = gs.SGD(lambda step: 0.1 + step, nonfinite="skip")
    params = {"w": np.zeros(2), "b": np.zeros(1)}
    assert opt.report is None
    opt.apply_gradients({"w": np.array([3.0, 0.0]), "b": np.array([4.0])}, params)
    assert opt.report == gs.Report(True, 1, 0.1, 5.0, ())
    opt.apply_gradients({"w": np.array([np.nan, 0.0]), "b": np.array([np.inf])}, params)
    report = opt.report
    assert (report.applied, report.step, report.learning_rate, report.culprits) == (False, 1, 1.1, ("w", "b"))
    assert math.isnan(report.grad_norm)
    assert opt.step == 1
    opt.nonfinite = "allow"
    opt.apply_gradients({"w": np.ones(2)}, params)
    assert opt.report == gs.Report(True, 2, 1.1, None, ())


def test_the_report_is_frozen_and_has_no_other_fields() -> None:
    opt = gs.SGD(0.1)
    opt.apply_gradients({}, {})
    assert opt.report._fields == ("applied", "step", "learning_rate", "grad_norm", "culprits")
    for field in opt.report._fields:
        with pytest.raises(AttributeError):
            setattr(opt.report, field, None)


# What changes between steps


@pytest.mark.parametrize("library", [np, torch])
def test_momentum_can_be_switched_on_and_off_later(library: Any) -> None:
    opt = gs.SGD(1.0)
    params, grads = {"w": library.zeros(2)}, {"w": library.ones(2)}
    opt.apply_gradients(grads, params)
    assert dict(opt.state["w"]) == {}
    opt.momentum = 0.5
    for expected in (-2.0, -3.5):  # v = 1, then 1.5
        opt.apply_gradients(grads, params)
        assert bool((params["w"] == expected).all())
    opt.nesterov = True
    opt.apply_gradients(grads, params)  # v = 1.75; 1 + 0.5 * 1.75
    assert bool((params["w"] == -5.375).all())
    opt.nesterov = False
    opt.momentum = 0
    opt.apply_gradients(grads, params)
    assert bool((params["w"] == -6.375).all())
    assert dict(opt.state["w"]) == {}
    assert opt.steps == {"w": 5}


def test_nesterov_needs_momentum_first_and_keeps_it() -> None:
    opt = gs.SGD(1.0)
    with pytest.raises(gs.ConfigurationError, match="nesterov"):
        opt.nesterov = True
    assert opt.nesterov is False
    opt.momentum = 0.9
    opt.nesterov = True
    for name, value in (("momentum", 0.0), ("dampening", 0.1)):
        with pytest.raises(gs.ConfigurationError, match="momentum > 0"):
            setattr(opt, name, value)
    assert (opt.momentum, opt.dampening) == (0.9, 0.0)


def test_adafactor_takes_a_first_moment_later() -> None:
    opt = gs.Adafactor()
    params = two()
    opt.apply_gradients(two(), params)
    row = opt.state["w"]["row"]
    opt.beta_1 = 0.9
    opt.apply_gradients(two(), params)
    assert set(opt.state["w"]) == {"row", "col", "m"}
    assert opt.state["w"]["row"] is row
    assert opt.state["w"]["m"].all()


def test_clipping_can_be_switched_on_later() -> None:
    opt = gs.SGD(1.0)
    params = {"w": np.zeros(2)}
    opt.apply_gradients({"w": np.array([3.0, 4.0])}, params)
    opt.clip_norm = 1.0
    opt.apply_gradients({"w": np.array([3.0, 4.0])}, params)
    np.testing.assert_allclose(params["w"], [-3.6, -4.8], rtol=1e-6)
    opt.clip_norm = None
    opt.apply_gradients({"w": np.array([3.0, 4.0])}, params)
    np.testing.assert_allclose(params["w"], [-6.6, -8.8], rtol=1e-6)


def test_a_new_array_under_the_same_name_is_the_one_written() -> None:
    opt = gs.SGD(1.0)
    params = {"w": ones(4)}
    old = params["w"]
    opt.apply_gradients({"w": ones(4)}, params)
    params["w"] = 10 * ones(4)
    opt.apply_gradients({"w": ones(4)}, params)
    assert (old == 0).all()
    assert (params["w"] == 9).all()


def test_a_tensor_whose_data_was_swapped_is_written_at_its_new_place() -> None:
    opt = gs.SGD(1.0)
    parameter = torch.nn.Parameter(torch.ones(4))
    old = parameter.data
    opt.apply_gradients({"w": torch.ones(4)}, {"w": parameter})
    parameter.data = torch.full((4,), 10.0)
    opt.apply_gradients({"w": torch.ones(4)}, {"w": parameter})
    assert bool((old == 0).all())
    assert bool((parameter == 9).all())


def test_an_array_that_was_resized_in_place_is_noticed() -> None:
    opt, plain = gs.SGD(1.0, momentum=0.9), gs.SGD(1.0)
    w = np.ones(4, np.float32)
    for each in (opt, plain):
        each.apply_gradients({"w": np.zeros(4, np.float32)}, {"w": w})
    w.resize(1 << 20, refcheck=False)  # moves
    with pytest.raises(gs.ShapeError, match=r"grads\['w'\] has shape \(4,\), but params\['w'\] has \(1048576,\)"):
        plain.apply_gradients({"w": ones(4)}, {"w": w})
    with pytest.raises(gs.ShapeError, match=r"state\['w'\]\['v'\] has shape \(4,\).*opt\.init"):
        opt.apply_gradients({"w": ones(1 << 20)}, {"w": w})
    plain.apply_gradients({"w": ones(1 << 20)}, {"w": w})
    assert (w[:4] == 0).all()
    assert (w[4:] == -1).all()


def test_an_array_that_became_read_only_is_noticed() -> None:
    opt = gs.SGD(1.0)
    w = ones(4)
    opt.apply_gradients({"w": ones(4)}, {"w": w})
    w.flags.writeable = False
    with pytest.raises(gs.ReadOnlyError, match=r"params\['w'\] is read-only.*setflags"):
        opt.apply_gradients({"w": ones(4)}, {"w": w})
    assert (w == 0).all()
    w.flags.writeable = True
    opt.apply_gradients({"w": ones(4)}, {"w": w})
    assert (w == -1).all()


def test_a_changed_shape_tells_to_init() -> None:
    opt = gs.Adam(0.1)
    opt.apply_gradients({"w": ones(4)}, {"w": ones(4)})
    with pytest.raises(gs.ShapeError, match=r"state\['w'\]\['m'\].*\(4,\).*\(2, 2\).*opt\.init\(params\)"):
        opt.apply_gradients({"w": ones(2, 2)}, {"w": ones(2, 2)})
    opt.init({"w": ones(2, 2)})
    opt.apply_gradients({"w": ones(2, 2)}, {"w": ones(2, 2)})


def test_a_changed_dtype_tells_to_init() -> None:
    opt = gs.Adam(0.1)
    opt.apply_gradients({"w": ones(4)}, {"w": ones(4)})
    with pytest.raises(gs.DtypeError, match=r"state\['w'\]\['m'\].*float32.*float64.*opt\.init\(params\)"):
        opt.apply_gradients({"w": ones(4)}, {"w": ones(4, dtype=np.float64)})


@pytest.mark.parametrize(("first", "second"), [(np, torch), (torch, np)], ids=["NumPy first", "PyTorch first"])
def test_a_changed_library_tells_to_init(first: Any, second: Any) -> None:
    def tree(library: Any) -> dict[str, Any]:
        return {"w": library.ones(4, dtype=library.float32)}

    opt = gs.Adam(0.1)
    opt.apply_gradients(tree(first), tree(first))
    with pytest.raises(gs.ArgumentTypeError, match=r"state\['w'\]\['m'\] is a .*opt\.init\(params\)"):
        opt.apply_gradients(tree(second), tree(second))
    opt.init(tree(second))
    opt.apply_gradients(tree(second), tree(second))
    assert opt.steps == {"w": 1}
    assert opt.step == 2


def test_a_changed_dtype_of_gradients_is_followed() -> None:
    opt, other = gs.SGD(0.1, momentum=0.9), gs.SGD(0.1, momentum=0.9)
    params, others = {"w": ones(4)}, {"w": ones(4)}
    for dtype in (np.float32, np.float64, np.float32):
        opt.apply_gradients({"w": np.full(4, 0.1, dtype)}, params)
        other.apply_gradients({"w": np.full(4, 0.1, np.float32)}, others)
    assert (params["w"] == others["w"]).all()


@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_the_order_of_names_does_not_matter(cls: Any, kwargs: Any) -> None:
    one, other = cls(**kwargs), cls(**kwargs)
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal((3, 4)) for name in "abc"}
    params, others = copied(start), dict(reversed(copied(start).items()))
    for _ in range(2):
        grads = {name: rng.standard_normal((3, 4)) for name in "abc"}
        one.apply_gradients(grads, params)
        other.apply_gradients({"b": grads["b"], "a": grads["a"], "c": grads["c"]}, others)
    assert all((params[name] == others[name]).all() for name in start)
