"""Steps, a file, and more steps in a new process give the bits of all those steps in one."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from checkpoints import (
    COMPILED,
    FUNCTIONS,
    IN_PLACE,
    LIBRARIES,
    RULES,
    Case,
    Counting,
    answer,
    bits_of,
    cases,
    everything,
    halves,
    held_tree,
    nested,
    outcome,
    take_steps,
    tree,
)
from everywhere import double_precision  # noqa: F401

RESUME = """
import json, sys
import gradstep as gs
from checkpoints import FUNCTIONS, IN_PLACE, RULES, cases, held_tree, outcome, ready

library, folder = sys.argv[1:]
ready(library)
found = {}
for number, (name, case) in enumerate(cases(library).items()):
    path = f"{folder}/{number}.safetensors"

    def made(params):
        return gs.load(path, params, rules=RULES, functions=FUNCTIONS)

    def loaded(params):
        opt = case.make()
        assert opt.load(path, params) == []
        return opt

    def landed_late(params):
        gs.load(path, params, rules=RULES, functions=FUNCTIONS)
        opt = case.make()
        opt.load(path)
        return opt

    def landed_early(params):
        gs.load(path, params, rules=RULES, functions=FUNCTIONS)
        return gs.load(path, like=params, rules=RULES, functions=FUNCTIONS)

    ways = [made, loaded, landed_late, landed_early]
    for way in ways[number % 2 :: 2] if library in IN_PLACE else [ways[number % 4]]:
        params = held_tree(library, case.params(99))
        opt = way(params)
        found[f"{name}, {way.__name__}"] = outcome(case, library, opt, params)
print(json.dumps(found))
"""


def first_part(case: Case, library: str) -> tuple[Any, Any]:
    opt, params = case.make(), held_tree(library, case.params(0))
    take_steps(case, library, opt, params, range(case.before))
    return opt, params


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_new_process_goes_on_bit_for_bit(library: str, tmp_path: Path) -> None:
    expected: dict[str, Any] = {}
    for number, (name, case) in enumerate(cases(library).items()):
        opt, params = first_part(case, library)
        opt.save(tmp_path / f"{number}.safetensors", params)
        expected[name] = json.loads(json.dumps(outcome(case, library, opt, params)))
    found = answer(RESUME, library, tmp_path)
    assert len(found) == len(expected) * (2 if library in IN_PLACE else 1)
    wrong = [label for label, ends in found.items() if ends != expected[label.rpartition(", ")[0]]]
    assert not wrong


@pytest.mark.parametrize("library", IN_PLACE)
@pytest.mark.parametrize("name", ["nested, clipped", "in a nested round", "everything of bfloat16", "groups"])
def test_saving_changes_nothing(library: str, name: str, tmp_path: Path) -> None:
    case = cases(library)[name]
    opt, params = first_part(case, library)
    before = everything(opt, report=True), bits_of(params)
    twin, others = copy.deepcopy(opt), copy.deepcopy(params)
    opt.save(tmp_path / "a.safetensors", params)
    opt.state_dict()
    assert (everything(opt, report=True), bits_of(params)) == before
    assert outcome(case, library, twin, others) == outcome(case, library, opt, params)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["nested, clipped", "in a round of bfloat16", "everything of bfloat16"])
def test_what_was_loaded_and_not_used_yet_is_saved_and_copied_alike(library: str, name: str, tmp_path: Path) -> None:
    case = cases(library)[name]
    opt, params = first_part(case, library)
    first, second, third = (tmp_path / f"{n}.safetensors" for n in "abc")
    opt.save(first, params)
    late = gs.load(first, rules=RULES, functions=FUNCTIONS)
    assert everything(late) == everything(opt)
    late.save(second, params)
    assert second.read_bytes() == first.read_bytes()
    copy.deepcopy(late).save(third, params)
    assert third.read_bytes() == first.read_bytes()
    other = case.make()
    other.load_state_dict(late.state_dict())
    other.save(third, params)
    assert third.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["nested, clipped", "in a round of bfloat16", "everything of bfloat16"])
def test_state_dicts_go_on_too(library: str, name: str) -> None:
    case = cases(library)[name]
    opt, params = first_part(case, library)
    saved = copy.deepcopy(opt.state_dict())
    json.dumps(saved["gradstep"], allow_nan=False)
    twin, others = case.make(), copy.deepcopy(params)
    assert twin.load_state_dict(saved) == []
    assert outcome(case, library, twin, others) == outcome(case, library, opt, params)


def test_a_state_dict_holds_live_arrays_and_loading_copies_them() -> None:
    opt, params = gs.Adam(0.1), tree(0)
    opt.apply_gradients(tree(1), params)
    saved = opt.state_dict()
    before = bits_of(saved["tensors"])
    twin = gs.Adam(0.2)
    twin.load_state_dict(saved)
    state = everything(twin)
    opt.apply_gradients(tree(2), params)
    assert bits_of(saved["tensors"]) != before
    assert everything(twin) == state


# Functions of one's own


def test_a_stateful_function_is_called_once_per_step_over_save_and_load(tmp_path: Path) -> None:
    schedule, path = Counting(), tmp_path / "a.safetensors"
    opt, params = gs.SGD(schedule), {"w": np.zeros(1)}
    grads = {"w": np.ones(1)}
    opt.apply_gradients(grads, params)
    opt.apply_gradients(grads, params)
    opt.save(path, params)
    assert schedule.calls == 2
    going_on = Counting(schedule.calls)
    opt = gs.load(path, params, functions={"Counting()": going_on})
    assert (going_on.calls, opt.learning_rate) == (2, 0.01 * 2 + 0.001)
    opt.apply_gradients(grads, params)
    assert (going_on.calls, opt.learning_rate) == (3, 0.01 * 3 + 0.001 * 2)


@pytest.mark.parametrize("how", ["made", "loaded"])
@pytest.mark.parametrize("stop", ["preflight", "failed"])
def test_what_a_function_gave_for_the_coming_step_is_kept(how: str, stop: str, tmp_path: Path) -> None:
    schedule, path = Counting(), tmp_path / "a.safetensors"
    opt, params, grads = gs.Adam(0.1, eps=schedule), tree(0), tree(1)
    opt.apply_gradients(grads, params)
    if stop == "preflight":
        opt.preflight()
    else:
        with pytest.raises(gs.ShapeError):
            opt.apply_gradients({**grads, "b": np.ones(3, np.float32)}, params)
    assert schedule.calls == 2
    shown = opt.eps
    opt.save(path, params)
    going_on = Counting(2)
    if how == "made":
        twin = gs.load(path, functions={"Counting()": going_on})
    else:
        twin = gs.Adam(0.1, eps=going_on)
        going_on.calls = 2  # making it has called it
        twin.load(path)
    assert twin.eps == shown
    others = copy.deepcopy(params)
    for number in (2, 3):
        opt.apply_gradients(tree(number), params)
        twin.apply_gradients(tree(number), others)
    assert (schedule.calls, going_on.calls) == (3, 3)
    assert bits_of(others) == bits_of(params)
    assert everything(twin) == everything(opt)


def test_a_function_under_several_globs_is_called_once_after_loading(tmp_path: Path) -> None:
    schedule, path = Counting(), tmp_path / "a.safetensors"
    opt, params = gs.SGD({"a": schedule, "b": 0.1, "*": schedule}), {n: np.ones(1) for n in "abc"}
    opt.apply_gradients(params, {n: np.ones(1) for n in "abc"})
    opt.save(path)
    going_on = Counting(1)
    twin = gs.load(path, functions={"Counting()": going_on})
    twin.apply_gradients(params, {n: np.ones(1) for n in "abc"})
    assert going_on.calls == 2
    assert set(twin.learning_rate.values()) == {0.1, 0.021}


def test_a_shared_schedule_of_several_hyperparameters_keeps_its_places(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first, second = (lambda step: 0.1 + step), (lambda step: 0.2 / (step + 1))
    opt = gs.SGD(first, momentum=second, weight_decay=second)
    opt.save(path)
    names = json.dumps(opt.state_dict()["gradstep"])
    assert "lambda" in names
    with pytest.raises(gs.ConfigurationError) as caught:
        gs.load(path)
    assert "learning_rate" in str(caught.value) and "weight_decay" in str(caught.value)
    twin = gs.SGD(first, momentum=second, weight_decay=second)
    twin.load(path)
    assert (twin.hyperparameters["learning_rate"], twin.hyperparameters["momentum"]) == (first, second)
    assert (twin.learning_rate, twin.momentum) == (0.1, 0.2)


def test_functions_are_asked_for_by_name_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = nested(), tree(0)
    opt.apply_gradients(tree(1), params)
    opt.save(path)
    with pytest.raises(gs.ConfigurationError, match=r"'halves'.*'short'|'short'.*'halves'"):
        gs.load(path)
    other = gs.SGD(0.1)
    gs.SGD(halves).save(path)
    before = everything(other)
    with pytest.raises(gs.ConfigurationError, match="'halves'"):
        other.load(path)
    assert everything(other) == before
    other.load(path, functions={"halves": halves})
    assert other.hyperparameters["learning_rate"] is halves
    mine = lambda step: 0.3  # noqa: E731
    other = gs.SGD(halves)
    other.load(path, functions={"halves": mine})
    assert other.hyperparameters["learning_rate"] is mine


def test_the_rate_of_the_last_step_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt = gs.SGD(gs.linear_schedule(1.0, 0.0, 10))
    for _ in range(3):
        opt.apply_gradients({}, {"w": np.ones(1)})
    opt.save(path)
    twin = gs.load(path)
    assert twin.learning_rate == opt.learning_rate == 0.8
    twin.apply_gradients({}, {"w": np.ones(1)})
    assert twin.learning_rate == 0.7


def test_rules_of_ones_own_are_asked_for(tmp_path: Path) -> None:
    from checkpoints import Signum

    path = tmp_path / "a.safetensors"
    Signum(0.1).save(path)
    with pytest.raises(gs.ConfigurationError, match="Signum"):
        gs.load(path)
    assert type(gs.load(path, rules=RULES)) is Signum


# Parameters that come and go


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("early", [True, False])
def test_a_parameter_without_state_gets_its_first_gradient_after_loading(
    library: str, early: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = gs.Adam(0.1, bias_correction=True), held_tree(library, tree(0))
    grads = held_tree(library, tree(1))
    opt.apply_gradients({"b": grads["b"]}, params)
    opt.save(path)
    twin, others = gs.Adam(0.1, bias_correction=True), dict(held_tree(library, tree(0)))
    twin.load(path, like=params if early else None)
    for name in others:
        others[name] = copy.deepcopy(params[name])
    twin.apply_gradients(grads, others)
    opt.apply_gradients(grads, params)
    assert everything(twin) == everything(opt)
    assert bits_of(others) == bits_of(params)


def test_slots_of_frozen_parameters_go_on_when_they_thaw(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", tree(0)
    opt = gs.Adam(0.1)
    opt.apply_gradients(tree(1), params)
    opt.frozen = ["w"]
    opt.apply_gradients(tree(2), params)
    opt.save(path)
    twin, others = gs.load(path, like=params), copy.deepcopy(params)
    assert everything(twin) == everything(opt)
    for optimizer, arrays in ((opt, params), (twin, others)):
        optimizer.frozen = []
        optimizer.apply_gradients(tree(3), arrays)
    assert everything(twin) == everything(opt)
    assert bits_of(others) == bits_of(params)


def test_sums_of_parameters_that_were_frozen_in_the_round_do_not_stop_loading(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", tree(0)
    opt = gs.Accumulate(gs.Adam(0.1), every=3)
    opt.apply_gradients(tree(1), params)
    opt.frozen = ["w"]
    opt.save(path, params)
    twin, others = gs.load(path, params), copy.deepcopy(params)
    assert everything(twin) == everything(opt)
    for number in (2, 3):
        opt.apply_gradients(tree(number), params)
        twin.apply_gradients(tree(number), others)
    assert everything(twin) == everything(opt)
    assert bits_of(others) == bits_of(params)


# The same optimizer, back to where it was


@pytest.mark.parametrize("library", LIBRARIES)
def test_going_back_forgets_what_came_after(library: str, tmp_path: Path) -> None:
    path, wrong = tmp_path / "a.safetensors", []
    chosen = COMPILED if library in IN_PLACE else ("nested, clipped", "in a round of bfloat16", "frozen")
    for number, name in enumerate(chosen):
        case = cases(library)[name]
        opt, params = first_part(case, library)
        opt.save(path, params)
        expected = outcome(case, library, opt, params)
        assert opt.load(path, None if number % 2 else params) == []
        if number % 2:
            case.make().load(path, params)
        if outcome(case, library, opt, params) != expected:
            wrong.append(name)
    assert not wrong


def test_a_round_under_way_is_replaced(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", tree(0)
    opt = gs.Accumulate(gs.Adam(0.1), every=3)
    opt.save(path, params)
    before = everything(opt)
    opt.apply_gradients(tree(1), params)
    opt.load(path)
    assert everything(opt) == before


# Other threads, and Ctrl-C


def test_a_file_saved_while_another_thread_steps_is_of_one_moment(tmp_path: Path) -> None:
    import threading

    path, params = tmp_path / "a.safetensors", {name: np.zeros(5000) for name in "abcd"}
    opt, stop = gs.SGD(1.0), threading.Event()
    grads = {name: np.full(5000, -1.0) for name in params}

    def run() -> None:
        while not stop.is_set():
            opt.apply_gradients(grads, params)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(20):
            opt.save(path, params)
            others = {name: np.zeros(5000) for name in params}
            twin = gs.load(path, others)
            assert {value for array in others.values() for value in array.tolist()} == {float(twin.step)}
            assert set(twin.steps.values()) <= {twin.step}
    finally:
        stop.set()
        thread.join()


INTERRUPTED = """
import json, signal, sys
import numpy as np
import gradstep as gs

found = []


def make(value):
    opt, params = gs.Adam(0.1, clip_norm=1.0), {f"w{n}": np.full(3000, float(value)) for n in range(12)}
    for _ in range(value):
        opt.apply_gradients({name: np.full(3000, float(value)) for name in params}, params)
    for array in params.values():
        array[:] = value
    return opt, params


def look(opt, params):
    values = {value for array in params.values() for value in array.tolist()}
    arrays = {slots["m"].tobytes() for slots in opt.state.values()}
    assert len(values) == len(arrays) == 1, (values, len(arrays))
    assert values == {float(opt.step)} and set(opt.steps.values()) == {opt.step}
    return opt.step


def interrupted(number):
    \"""Load, with a Ctrl-C at the given call or return of a function; how many there were, and what is loaded then.\"""
    opt, params = make(2)
    seen = 0

    def look_at(frame, event, argument):
        nonlocal seen
        seen += 1
        if seen == number:
            signal.raise_signal(signal.SIGINT)

    try:
        sys.setprofile(look_at)
        opt.load(sys.argv[1], params)
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return seen, look(opt, params)


make(1)[0].save(sys.argv[1], make(1)[1])
usual, _ = interrupted(0)
for number in range(1, usual, usual // 80):
    found.append(interrupted(number)[1])
print(json.dumps(found))
"""


def test_ctrl_c_while_loading_leaves_all_or_nothing(tmp_path: Path) -> None:
    assert set(answer(INTERRUPTED, tmp_path / "a.safetensors")) == {1, 2}


# Saved without parameters


def saved_alone(opt: Any, gradients: str, path: Path) -> dict[str, Any]:
    params = {name: np.ones(2) for name in "ab"}
    for _ in range(1 if gradients else 0):
        opt.apply_gradients({name: np.ones(2) for name in gradients}, params)
    opt.save(path)
    return params


def assert_goes_on_alone(opt: Any, params: dict[str, Any], path: Path, *, early: bool) -> None:
    others, grads = copy.deepcopy(params), {name: np.full(2, 0.5) for name in params}
    twin = gs.load(path, like=others if early else None)
    for optimizer, arrays in ((opt, params), (twin, others)):
        for _ in range(3):
            optimizer.apply_gradients(grads, arrays)
    assert everything(twin) == everything(opt)
    assert bits_of(others) == bits_of(params)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("gradients", ["a", "ab"])
@pytest.mark.parametrize("kind", ["one", "multi", "rounds of one"])
def test_parameters_need_not_be_saved(kind: str, gradients: str, early: bool, tmp_path: Path) -> None:
    opt = {
        "one": lambda: gs.Adam(0.1),
        "multi": lambda: gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], ["a"]),
        "rounds of one": lambda: gs.Accumulate(gs.Adam(0.1), every=1),
    }[kind]()
    params = saved_alone(opt, gradients, tmp_path / "a.safetensors")
    assert_goes_on_alone(opt, params, tmp_path / "a.safetensors", early=early)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("gradients", ["a", "ab"])
def test_the_first_round_can_be_saved_without_parameters(gradients: str, early: bool, tmp_path: Path) -> None:
    opt = gs.Accumulate(gs.Adam(0.1), every=2)
    params = saved_alone(opt, gradients, tmp_path / "a.safetensors")
    assert_goes_on_alone(opt, params, tmp_path / "a.safetensors", early=early)


def test_a_first_gradient_in_a_later_round_can_be_saved_without_parameters(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", {name: np.ones(2) for name in "ab"}
    opt = gs.Accumulate(gs.Adam(0.1), every=2)
    for _ in range(2):
        opt.apply_gradients({"a": np.ones(2)}, {"a": params["a"]})
    opt.apply_gradients({"b": np.ones(2)}, params)
    opt.save(path)
    assert_goes_on_alone(opt, params, path, early=False)


@pytest.mark.parametrize("early", [True, False])
def test_an_optimizer_that_has_seen_no_parameter_yet_can_be_loaded_and_used(early: bool, tmp_path: Path) -> None:
    opt = gs.Adam(0.1)
    params = saved_alone(opt, "", tmp_path / "a.safetensors")
    assert_goes_on_alone(opt, params, tmp_path / "a.safetensors", early=early)


# What the file says replaces what came after


def test_state_that_came_after_the_file_goes(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", tree(0)
    opt = gs.Adam(0.1, bias_correction=True)
    opt.apply_gradients({"w": tree(1)["w"]}, params)
    opt.save(path, params)
    before = everything(opt)
    opt.apply_gradients(tree(2), params)
    opt.load(path, params)
    assert everything(opt) == before
    opt.apply_gradients(tree(2), params)
    opt.load(path)
    assert everything(opt) == before
    assert opt.report is None


def test_parameters_without_state_are_still_known_in_the_next_file(tmp_path: Path) -> None:
    first, second, params = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tree(0)
    opt = gs.Adam(0.1)
    opt.apply_gradients({"w": tree(1)["w"]}, params)
    opt.save(first)
    for like in (None, params):
        twin = gs.load(first, like=like)
        twin.save(second)
        assert second.read_bytes() == first.read_bytes()
        gs.load(second).apply_gradients(tree(2), copy.deepcopy(params))


def test_globs_of_the_file_replace_those_that_have_been_used(tmp_path: Path) -> None:
    path, params = tmp_path / "a.safetensors", tree(0)
    there = gs.SGD({"w": 0.5, "*": 0.25}, momentum={"b": 0, "*": 0.9})
    there.apply_gradients(tree(1), params)
    there.save(path, params)
    here, others = gs.SGD({"[wb]": 0.1, "*": 0.2}, momentum={"w": 0, "*": 0.9}), tree(5)
    here.apply_gradients(tree(6), others)
    here.load(path, others)
    for optimizer, arrays in ((there, params), (here, others)):
        optimizer.apply_gradients(tree(2), arrays)
    assert everything(here) == everything(there)
    assert bits_of(others) == bits_of(params)
