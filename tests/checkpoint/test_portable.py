"""State saved from one array library goes on in every other."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from checkpoints import (
    FUNCTIONS,
    IN_PLACE,
    LIBRARIES,
    RULES,
    Case,
    bits_of,
    everything,
    few,
    held_tree,
    library_of,
    nested,
    seen,
    take_steps,
    tree,
)
from everywhere import double_precision  # noqa: F401

CASES: dict[str, Case] = {
    "AdamW": Case(lambda: gs.AdamW(0.01, bias_correction=True), few, few, 2, 2),
    "float64": Case(lambda: gs.Adam(0.01), lambda s: tree(s, "float64"), lambda s: tree(s, "float64"), 2, 2),
    "a round of a nested one": Case(lambda: gs.Accumulate(nested(clip_norm=0.5), every=3), before=4, after=3),
    "narrow": Case(
        lambda: gs.Adam(0.01, slot_dtype={"m": "int8", "v": "bfloat16"}, rounding="stochastic", master_weights=True),
        lambda s: tree(s, "bfloat16"), lambda s: tree(s, "bfloat16"), 2, 2,
    ),
    "int8": Case(lambda: gs.Lion(0.01, slot_dtype="int8"), few, few, 2, 2),
    "float16": Case(
        lambda: gs.SGD(0.1, momentum=0.9, slot_dtype="float16"),
        lambda s: tree(s, "float16"), lambda s: tree(s, "float16"), 2, 2,
    ),
}  # fmt: skip
ROUNDED = ("narrow", "int8", "float16")  # where one unit in the last place may become a whole code

PRODUCTS = ("a round of a nested one",)  # each library has its own: they agree up to rounding

# In units of the last place of max(|w|, 1), as in test_functional.py; the nested one has matrix products.
LIMITS = {("jax", "AdamW"): 4, ("jax", "float64"): 4, ("mlx", "AdamW"): 0, ("mlx", "float64"): 0}


@pytest.fixture(params=CASES)
def name(request: Any) -> str:
    return request.param


def landed(opt: Any) -> set[str]:
    arrays = [array for slots in opt.state.values() for array in slots.values()]
    return {library_of(array) for array in [*arrays, *getattr(opt, "sums", {}).values()]}


@pytest.mark.parametrize("source", LIBRARIES)
def test_state_goes_on_in_every_library(source: str, name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "a.safetensors"
    opt, params = case.make(), held_tree(source, case.params(0))
    take_steps(case, source, opt, params, range(case.before))
    opt.save(path, params)
    saved, arrays = everything(opt), bits_of(params)
    reference: Any = None
    for library in LIBRARIES:
        others = held_tree(library, case.params(5))
        twin = gs.load(path, others, rules=RULES, functions=FUNCTIONS)
        assert (everything(twin), bits_of(others)) == (saved, arrays)
        assert landed(twin) == {library}
        assert {library_of(array) for array in others.values()} == {library}
        late = gs.load(path, rules=RULES, functions=FUNCTIONS)
        assert everything(late) == saved
        if library not in IN_PLACE and source != "numpy":
            continue  # compiling is slow, and the arrays are the same as those from NumPy
        numbers = range(case.before, case.before + case.after)
        if library in IN_PLACE:
            again = {n: copy.deepcopy(array) for n, array in others.items()}
            take_steps(case, library, late, again, numbers)
        take_steps(case, library, twin, others, numbers)
        if library in IN_PLACE:
            assert (everything(late), bits_of(again)) == (everything(twin), bits_of(others))
            assert landed(late) == {library}
            reference = reference or (everything(twin), bits_of(others), others, twin)
            if name in PRODUCTS:
                assert_all_near(twin, others, reference[3], reference[2], 60)
            else:
                assert (everything(twin), bits_of(others)) == reference[:2]
            continue
        assert (twin.step, twin.steps, landed(twin)) == (reference[3].step, reference[3].steps, {library})
        assert everything(twin).get("micro_step") == reference[0].get("micro_step")
        if name not in ROUNDED:
            assert_all_near(twin, others, reference[3], reference[2], LIMITS.get((library, name), 60))


def assert_all_near(opt: Any, params: Any, reference: Any, expected: Any, limit: int) -> None:
    assert_near(params, expected, limit)
    for parameter, slots in opt.state.items():
        assert_near(slots, reference.state[parameter], limit)


def assert_near(found: Any, expected: Any, limit: int) -> None:
    for part, array in expected.items():
        wanted, got = seen(array), seen(found[part])
        eps = np.finfo(wanted.dtype).eps
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert (np.abs(got - wanted) <= limit * eps * np.maximum(np.abs(wanted), 1)).all(), part


@pytest.mark.parametrize("library", ["jax", "mlx"])
def test_loaded_state_lands_in_the_library_of_the_next_step(library: str, tmp_path: Path) -> None:
    path, case = tmp_path / "a.safetensors", CASES["a round of a nested one"]
    opt, params = gs.Accumulate(gs.Adam(0.1), every=2), case.params(0)
    for number in range(1, 4):
        opt.apply_gradients(few(number), params)
    opt.save(path, params)
    twin, others = gs.load(path), held_tree(library, params)
    assert landed(twin) == {"numpy"}
    twin.apply_gradients(held_tree(library, few(4)), others)
    opt.apply_gradients(few(4), params)
    assert landed(twin) == {library}
    assert_near(others, params, 4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_state_dict_is_as_portable(library: str) -> None:
    opt, params = gs.Adam(0.1), tree(0)
    opt.apply_gradients(tree(1), params)
    twin = gs.Adam(0.1)
    twin.load_state_dict(opt.state_dict(), like=held_tree(library, params))
    assert landed(twin) == {library}
    back = gs.Adam(0.1)
    back.load_state_dict(twin.state_dict(), like=params)
    assert everything(back) == everything(twin) == everything(opt)


def test_params_of_one_library_and_like_of_another_are_each_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    opt, params = gs.Adam(0.1), tree(0)
    opt.apply_gradients(tree(1), params)
    opt.save(path, params)
    others = tree(9)
    twin = gs.load(path, others, like=held_tree("torch", tree(9)))
    assert landed(twin) == {"torch"}
    assert bits_of(others) == bits_of(params)
