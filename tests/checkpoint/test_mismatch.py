"""What does not fit is told as a whole, and changes nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from checkpoints import LIBRARIES, Counting, Signum, Timed, bits_of, everything, held_tree, short, tree
from everywhere import double_precision  # noqa: F401


def arrays(seed: int = 0, dtype: str = "float32", **shapes: Any) -> Any:
    rng = np.random.default_rng(seed)
    shapes = shapes or {"w": (3, 4), "b": (4,)}
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def stepped(opt: Any, params: Any, steps: int = 2) -> Any:
    for seed in range(1, steps + 1):
        opt.apply_gradients({name: np.full_like(array, 0.1 * seed) for name, array in params.items()}, params)
    return opt


def look_alike(slots: str) -> Any:
    if slots == "m":

        def Mine(w: Any, g: Any, m: Any, *, learning_rate: Any) -> Any:
            return w - learning_rate * g, m + g
    else:

        def Mine(w: Any, g: Any, m: Any, v: Any, *, learning_rate: Any) -> Any:
            return w - learning_rate * g, m + g, v + g * g

    return gs.rule(Mine)(0.1)


def own_adam() -> Any:
    def Adam(w: Any, g: Any, m: Any, v: Any, *, learning_rate: Any) -> Any:
        return w - learning_rate * g, m + g, v + g * g

    return gs.rule(Adam)(0.1)


def multi(*children: Any, filters: Any = ("b",)) -> Any:
    return gs.MultiOptimizer(list(children) or [gs.SGD(0.1, momentum=0.9), gs.Adam(0.1)], list(filters))


def more(**shapes: Any) -> Any:
    return arrays(w=(3, 4), b=(4,), **shapes)


Wanted = set[tuple[str, str]]

# The optimizer of the file and its parameters, those here, and what differs.
UNLIKE: dict[str, tuple[Callable[[], Any], Any, Callable[[], Any], Any, Wanted]] = {
    "family": (lambda: gs.Adam(0.1), arrays(), lambda: gs.AdamW(0.1), arrays(), {("different", "opt")}),
    "rule": (lambda: Signum(0.1), arrays(), lambda: Timed(0.1), arrays(), {("different", "opt")}),
    "whose": (own_adam, arrays(), lambda: gs.Adam(0.1), arrays(), {("different", "opt")}),
    "slots": (lambda: look_alike("m"), arrays(), lambda: look_alike("mv"), arrays(), {("different", "opt's slots")}),
    "shape": (
        lambda: gs.SGD(0.1, momentum=0.9), arrays(), lambda: gs.SGD(0.1), arrays(w=(4, 3), b=(4,)),
        {("different", "state['w']['v']"), ("different", "params['w']")},
    ),
    "no dimensions": (
        lambda: gs.SGD(0.1, momentum=0.9), arrays(w=()), lambda: gs.SGD(0.1), arrays(w=(1,)),
        {("different", "state['w']['v']"), ("different", "params['w']")},
    ),
    "dtype": (
        lambda: gs.SGD(0.1, momentum=0.9), arrays(), lambda: gs.SGD(0.1), arrays(dtype="float64"),
        {("different", f"state['{n}']['v']") for n in "wb"} | {("different", f"params['{n}']") for n in "wb"},
    ),
    "dtype of parameters alone": (
        lambda: gs.SGD(0.1, momentum=0.9), arrays(), lambda: gs.SGD(0.1), arrays(dtype="float16"),
        {("different", "params['w']"), ("different", "params['b']")},
    ),
    "name": (
        lambda: gs.SGD(0.1, momentum=0.9), arrays(w=(3,)), lambda: gs.SGD(0.1), arrays(x=(3,)),
        {("missing", "state['x']"), ("unexpected", "state['w']"), ("missing", "params['x']"),
         ("unexpected", "params['w']")},
    ),
    "more here": (
        lambda: gs.SGD(0.1), arrays(), lambda: gs.SGD(0.1), more(c=2),
        {("missing", "state['c']"), ("missing", "params['c']")},
    ),
    "more there": (
        lambda: gs.SGD(0.1), more(c=2), lambda: gs.SGD(0.1), arrays(),
        {("unexpected", "state['c']"), ("unexpected", "params['c']")},
    ),
    "storage": (
        lambda: gs.Adam(0.1, slot_dtype="bfloat16", rounding="stochastic", seed=3, master_weights=True), arrays(w=()),
        lambda: gs.Adam(0.1), arrays(w=()),
        {("different", f"opt.{n}") for n in ("slot_dtype", "rounding", "seed", "master_weights")}
        | {("different", f"state['w']['{slot}']") for slot in "mv"},
    ),
    "int8": (
        lambda: gs.Lion(0.1, slot_dtype="int8"), arrays(w=(3,)), lambda: gs.Lion(0.1), arrays(w=(3,)),
        {("different", "opt.slot_dtype"), ("missing", "state['w']['m']"), ("unexpected", "state['w']['m.codes']"),
         ("unexpected", "state['w']['m.scales']")},
    ),
    "a tree or none": (multi, arrays(), lambda: gs.Adam(0.1), arrays(), {("different", "opt")}),
    "none or a tree": (lambda: gs.Adam(0.1), arrays(), multi, arrays(), {("different", "opt")}),
    "other children": (
        multi, arrays(), lambda: multi(gs.Lion(0.1), gs.Adam(0.1)), arrays(), {("different", "opt['b']")},
    ),
    "other routes": (
        multi, arrays(w=(2, 2), b=(2,)), lambda: multi(filters=["w"]), arrays(w=(2, 2), b=(2,)),
        {("missing", "opt['w']"), ("unexpected", "opt['b']")},
    ),
    "rounds or none": (
        lambda: gs.Accumulate(gs.Lion(0.1), every=4), arrays(), lambda: gs.Lion(0.1), arrays(), {("different", "opt")},
    ),
    "none or rounds": (
        lambda: gs.Lion(0.1), arrays(), lambda: gs.Accumulate(gs.Lion(0.1), every=4), arrays(), {("different", "opt")},
    ),
    "other rounds": (
        lambda: gs.Accumulate(gs.Lion(0.1), every=4), arrays(), lambda: gs.Accumulate(gs.Lion(0.1), every=8), arrays(),
        {("different", "opt")},
    ),
    "a shape in a round": (
        lambda: gs.Accumulate(gs.SGD(0.1), every=4), arrays(w=(3,)), lambda: gs.Accumulate(gs.SGD(0.1), every=4),
        arrays(w=(4,)), {("different", "sums['w']"), ("different", "params['w']")},
    ),
}  # fmt: skip
PARTLY = ("other routes", "rounds or none")  # where more may follow from what differs first


@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
@pytest.mark.parametrize("name", UNLIKE)
def test_everything_that_differs_is_listed_and_nothing_changed(name: str, steps: int, tmp_path: Path) -> None:
    make, theirs, make_mine, mine, wanted = UNLIKE[name]
    theirs, mine = copy.deepcopy(theirs), copy.deepcopy(mine)
    path = tmp_path / "a.safetensors"
    stepped(make(), theirs).save(path, theirs)
    opt = stepped(make_mine(), mine, steps)
    before, twin = (everything(opt, report=True), bits_of(mine)), copy.deepcopy((opt, mine))
    with pytest.raises(gs.MismatchError) as caught:
        opt.load(path, mine)
    differences = caught.value.differences
    assert (everything(opt, report=True), bits_of(mine)) == before
    assert all(isinstance(difference, gs.Difference) for difference in differences)
    found = {(difference.kind, difference.where) for difference in differences}
    assert found >= wanted if name in PARTLY else found == wanted
    assert len(differences) == len({(d.kind, d.where) for d in differences})
    for difference in differences:
        assert str(difference) in str(caught.value)
        assert (difference.file is None) == (difference.kind == "missing")
        assert (difference.here is None) == (difference.kind == "unexpected")
        assert difference.kind != "different" or difference.file != difference.here
    assert path.name in str(caught.value)
    stepped(opt, mine)  # and it goes on as if nothing had happened
    stepped(*twin)
    assert (everything(opt), bits_of(mine)) == (everything(twin[0]), bits_of(twin[1]))


@pytest.mark.parametrize("name", UNLIKE)
def test_what_fits_can_be_loaded_and_the_list_is_the_same(name: str, tmp_path: Path) -> None:
    make, theirs, make_mine, mine, _ = UNLIKE[name]
    theirs, mine = copy.deepcopy(theirs), copy.deepcopy(mine)
    path = tmp_path / "a.safetensors"
    stepped(make(), theirs).save(path, theirs)
    opt = stepped(make_mine(), mine, 3)
    untouched = copy.deepcopy(mine)
    with pytest.raises(gs.MismatchError) as caught:
        opt.load(path, mine)
    assert opt.load(path, mine, strict=False) == caught.value.differences
    for parameter, array in mine.items():
        other = theirs.get(parameter)
        fits = other is not None and (other.shape, other.dtype) == (array.shape, array.dtype)
        assert bits_of({"": array}) == bits_of({"": other if fits else untouched[parameter]})
    stepped(opt, mine)
    assert set(mine) <= {*opt.steps, *getattr(opt, "sums", {})}


def test_both_sides_are_shown() -> None:
    opt, params = gs.SGD(0.1, momentum=0.9), arrays(w=(3, 4))
    stepped(opt, params)
    with pytest.raises(gs.MismatchError) as caught:
        gs.SGD(0.1).load_state_dict(opt.state_dict(), like=arrays(w=(4, 3), dtype="float64"))
    assert caught.value.differences == [
        gs.Difference("different", "state['w']['v']", "float32 (3, 4)", "float64 (4, 3)")
    ]


def test_a_thousand_differences_are_all_in_the_list(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = gs.Lion(0.1), arrays(**{f"w{n}": (1,) for n in range(500)})
    stepped(opt, params).save(path)
    others = arrays(**{f"v{n}": (1,) for n in range(500)})
    with pytest.raises(gs.MismatchError) as caught:
        gs.Lion(0.1).load(path, like=others)
    assert {d.where for d in caught.value.differences} == {f"state['{c}{n}']" for c in "vw" for n in range(500)}


def test_children_are_matched_by_their_routes(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays(w=(3, 4), b=(4,), c=(2,))
    opt = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), gs.Muon(0.02), gs.Adam(0.1)], ["b", "w"])
    stepped(opt, params).save(path, params)
    twin = gs.MultiOptimizer([gs.Muon(0.5), gs.SGD(0.5, momentum=0.5), gs.Adam(0.5)], ["w", "b"])
    others = arrays(5, w=(3, 4), b=(4,), c=(2,))
    assert twin.load(path, others) == []
    stepped(opt, params)
    stepped(twin, others)
    assert bits_of(others) == bits_of(params)
    assert everything(twin)["state"] == everything(opt)["state"]


def test_children_under_functions_are_matched_by_name(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    opt = multi(gs.SGD(0.1, momentum=0.9), gs.Adam(0.1), filters=[short])
    stepped(opt, params).save(path)
    twin = multi(gs.SGD(0.1, momentum=0.9), gs.Adam(0.1), filters=[short])
    assert twin.load(path, like=params) == []
    with pytest.raises(gs.MismatchError):
        multi(gs.SGD(0.1, momentum=0.9), gs.Adam(0.1), filters=[lambda name, parameter: name == "b"]).load(path)


# Whose hyperparameters


def test_hyperparameters_are_the_files_unless_mine_are_wanted(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    there = gs.Adam(gs.linear_schedule(1.0, 0.0, 10), betas=(0.5, 0.6), clip_norm=3.0, nonfinite="raise", frozen=["x"])
    stepped(there, params).save(path)
    calls = Counting()
    mine = gs.Adam(calls, betas=(0.7, 0.8), clip_norm=1.0)
    calls.calls = 0
    mine.load(path, hyperparameters="mine")
    assert (mine.betas, mine.clip_norm, mine.nonfinite, mine.frozen) == ((0.7, 0.8), 1.0, "allow", ())
    assert (
        mine.step == 2 and calls.calls == 1 and mine.learning_rate == 0.01 + 0.002
    )  # resolved at the step of the file
    other = gs.Adam(0.1)
    other.load(path)
    assert (other.betas, other.clip_norm, other.nonfinite, other.frozen) == ((0.5, 0.6), 3.0, "raise", ("x",))
    assert other.learning_rate == there.learning_rate == 0.9
    with pytest.raises(gs.ConfigurationError, match="hyperparameters"):
        other.load(path, hyperparameters="yours")


def test_mine_with_another_slot_is_a_mismatch(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays(w=(3,))
    stepped(gs.SGD(0.1, momentum=0.9), params).save(path)
    plain = gs.SGD(0.1)
    with pytest.raises(gs.MismatchError) as caught:
        plain.load(path, like=params, hyperparameters="mine")
    assert [(d.kind, d.where) for d in caught.value.differences] == [("unexpected", "state['w']['v']")]
    plain.load(path, like=params)
    assert plain.momentum == 0.9


# The first step


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["one", "multi", "round"])
def test_the_first_step_refuses_parameters_that_the_file_does_not_know(library: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make = {
        "one": lambda: gs.Adam(0.1, clip_norm=1.0), "multi": lambda: multi(filters=["[bc]"]),
        "round": lambda: gs.Accumulate(gs.Adam(0.1), every=2),
    }[kind]  # fmt: skip
    params = {name: array for name, array in tree(0).items() if name in "wb"}
    stepped(make(), params, 3).save(path)
    for strange in ("c", "d"):
        twin = gs.load(path)
        known = held_tree(library, params)
        others = {**known, **held_tree(library, {strange: np.ones(3, np.float32)})}
        grads = held_tree(library, {name: np.ones(array.shape, np.float32) for name, array in others.items()})
        before = everything(twin), bits_of(others)
        for _ in range(2):
            with pytest.raises(gs.MismatchError, match=f"'{strange}'"):
                twin.apply_gradients(grads, others)
            assert (everything(twin), bits_of(others)) == before
        twin.apply_gradients({name: grads[name] for name in known}, known)  # it can still be done right
        others = {**known, strange: others[strange]}
        for _ in range(2):
            twin.apply_gradients(grads, others)
        assert strange in twin.steps


def test_a_round_refuses_them_at_once(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    stepped(gs.Accumulate(gs.Adam(0.1), every=4), params, 5).save(path)
    twin, others = gs.load(path), {**params, "new": np.ones(3, np.float32)}
    before = everything(twin)
    with pytest.raises(gs.MismatchError, match="'new'"):
        twin.apply_gradients({name: np.ones_like(array) for name, array in others.items()}, others)
    assert everything(twin) == before


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("shape", "dtype"), [((4, 3), "float32"), ((3, 4), "float64")])
def test_the_first_step_refuses_other_shapes_and_dtypes(library: str, shape: Any, dtype: str, tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    stepped(gs.Adam(0.1), params).save(path)
    for like in (None, held_tree(library, params)):
        twin = gs.load(path, like=like)
        others = held_tree(library, {"w": np.ones(shape, dtype), "b": np.ones(4, np.float32)})
        before = everything(twin), bits_of(others)
        with pytest.raises(gs.GradstepError):
            twin.apply_gradients(others, dict(others))
        assert (everything(twin), bits_of(others)) == before


@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_the_first_step_of_a_round_refuses_other_shapes(library: str, tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    stepped(gs.Accumulate(gs.SGD(0.1), every=4), params).save(path)
    twin = gs.load(path)
    others = held_tree(library, {"w": np.ones((4, 3), np.float32), "b": np.ones(4, np.float32)})
    before = everything(twin), bits_of(others)
    for _ in range(2):
        with pytest.raises(gs.GradstepError):
            twin.apply_gradients(others, dict(others))
        assert (everything(twin), bits_of(others)) == before
    assert twin.micro_step == 2


def test_without_strict_parameters_that_the_file_does_not_know_begin_anew(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    stepped(gs.Adam(0.1), params).save(path)
    twin = gs.Adam(0.1)
    assert twin.load(path, strict=False) == []
    stepped(twin, {**params, "new": np.ones(2, np.float32)}, 1)
    assert twin.steps == {"w": 3, "b": 3, "new": 1}


def test_without_parameters_the_optimizers_own_state_is_compared(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    stepped(gs.Adam(0.1), params).save(path)
    other = stepped(gs.Adam(0.1), arrays(w=(4, 3), c=(2,)))
    before = everything(other)
    with pytest.raises(gs.MismatchError) as caught:
        other.load(path)
    assert everything(other) == before
    assert {(d.kind, d.where) for d in caught.value.differences} >= {
        ("different", "state['w']['m']"), ("different", "state['w']['v']"), ("missing", "state['c']"),
    }  # fmt: skip


def test_the_parameters_must_have_been_saved(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    stepped(gs.Adam(0.1), params).save(path)
    before = bits_of(params)
    with pytest.raises(gs.MismatchError, match="not saved"):
        gs.load(path, params)
    assert bits_of(params) == before


# Parameters that cannot be written


def test_parameters_that_cannot_be_written_leave_everything_alone(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", arrays()
    opt = stepped(gs.Adam(0.1), params)
    opt.save(path, params)
    stepped(opt, params)
    params["b"].flags.writeable = False
    before = everything(opt, report=True), bits_of(params)
    for like in (None, arrays()):
        with pytest.raises(gs.ReadOnlyError, match="'b'"):
            opt.load(path, params, like=like)
        assert (everything(opt, report=True), bits_of(params)) == before


@pytest.mark.parametrize("library", ["jax", "mlx"])
def test_parameters_that_cannot_be_replaced_leave_everything_alone(library: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    params = {"layers": [held_tree(library, arrays())]}
    opt = gs.Adam(0.1)
    opt.apply_gradients(params, params)
    opt.save(path, params)
    others = {"layers": (held_tree(library, arrays(7)),), "more": []}
    frozen = {"layers": [tuple(others["layers"][0].values())]}
    for bad in (frozen, {"layers.0.w": np.ones(2, np.float32)}):
        fresh = gs.Adam(0.1)
        before = everything(fresh)
        with pytest.raises(gs.GradstepError):
            fresh.load(path, bad)
        assert everything(fresh) == before


def test_an_error_can_be_pickled(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "a.safetensors"
    gs.Adam(0.1).save(path)
    with pytest.raises(gs.MismatchError) as caught:
        gs.SGD(0.1).load(path)
    twin = pickle.loads(pickle.dumps(caught.value))
    assert (str(twin), twin.differences) == (str(caught.value), caught.value.differences)


@pytest.mark.parametrize("bad", [{}, {"gradstep": 1, "tensors": {}}, {"state": {}, "param_groups": []}, [], None, 3])
def test_what_is_no_state_dict_is_refused(bad: Any) -> None:
    opt = gs.Adam(0.1)
    before = everything(opt)
    with pytest.raises(gs.CheckpointError):
        opt.load_state_dict(bad)
    assert everything(opt) == before


@pytest.mark.parametrize("array", [None, 3, "text", [1.0], np.array(["x"]), np.ones((3, 4), complex), np.ones(12)])
def test_a_state_dict_with_other_arrays_is_refused(array: Any) -> None:
    opt, params = gs.Adam(0.1), arrays()
    stepped(opt, params)
    saved = opt.state_dict()
    twin = stepped(gs.Adam(0.1), params)
    before = everything(twin)
    bad = {**saved, "tensors": {**saved["tensors"], "w.m": array}}
    for keywords in ({}, {"like": params}):
        with pytest.raises(gs.GradstepError):
            twin.load_state_dict(bad, **keywords)
        assert everything(twin) == before
    del bad["tensors"]["w.m"]
    with pytest.raises(gs.CheckpointError, match=r"w\.m"):
        twin.load_state_dict(bad)
