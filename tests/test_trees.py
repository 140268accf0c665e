"""Trees of arrays: every leaf gets one dotted name, MLX's where MLX has one, or an error that prints both paths."""

from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.utils
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradstep as gs


def leaf(value: float = 0.0) -> Any:
    return np.full(1, value, np.float32)


def stepped(params: Any, grads: Any) -> dict[str, int]:
    """The names that a step counted, each with its count."""
    opt = gs.SGD(1.0)
    opt.apply_gradients(grads, params)
    return opt.steps


def names(tree: Any) -> list[str]:
    opt = gs.SGD(1.0)
    opt.init(tree)
    return list(opt.steps)


NAMED: dict[str, tuple[Any, list[str]]] = {
    "flat": ({"a": leaf(), "b": leaf()}, ["a", "b"]),
    "nested": ({"a": {"b": {"c": leaf()}}, "d": leaf()}, ["a.b.c", "d"]),
    "lists": ([leaf(), [leaf(), leaf()]], ["0", "1.0", "1.1"]),
    "tuples": ((leaf(), {"a": (leaf(),)}), ["0", "1.a.0"]),
    "integer keys": ({0: leaf(), -1: {10: leaf()}}, ["0", "-1.10"]),
    "dotted names": ({"a.b": leaf(), "a": {"c.d": leaf()}}, ["a.b", "a.c.d"]),
    "empty containers": ({"a": {}, "b": [], "c": (), "d": {"e": [{}]}, "f": leaf()}, ["f"]),
    "None": ({"a": None, "b": [None, leaf()]}, ["b.1"]),
    "an empty key": ({"": leaf(), "a": {"": leaf()}}, ["", "a."]),
    "other mappings": (MappingProxyType({"a": OrderedDict(b=leaf())}), ["a.b"]),
    "text beyond ASCII": ({"größe": [leaf()]}, ["größe.0"]),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_join_the_path_with_dots(case: str) -> None:
    tree, expected = NAMED[case]
    assert names(tree) == expected


@pytest.mark.parametrize("case", NAMED)
def test_a_tree_of_gradients_meets_its_parameters_by_name(case: str) -> None:
    tree, expected = NAMED[case]
    params = {name: leaf() for name in expected}
    assert stepped(params, tree) == dict.fromkeys(expected, 1)
    assert stepped(tree, params) == dict.fromkeys(expected, 1)


def test_flat_and_nested_trees_mix() -> None:
    params = {"layers": [{"weight": leaf()}, {"weight": leaf()}]}
    gs.SGD(1.0).apply_gradients({"layers.1.weight": leaf(2.0)}, params)
    assert [layer["weight"][0] for layer in params["layers"]] == [0.0, -2.0]


DUPLICATES: dict[str, tuple[Any, str, str]] = {
    "dotted and nested": ({"a.b": leaf(), "a": {"b": leaf()}}, "['a.b']", "['a']['b']"),
    "number and text": ({"a": {1: leaf(), "1": leaf()}}, "['a'][1]", "['a']['1']"),
    "list and text": ({"a.0": leaf(), "a": [leaf()]}, "['a.0']", "['a'][0]"),
    "dots in the middle": ({"a": {"b.c": leaf()}, "a.b": {"c": leaf()}}, "['a']['b.c']", "['a.b']['c']"),
}


@pytest.mark.parametrize("case", DUPLICATES)
@pytest.mark.parametrize("side", ["params", "grads"])
def test_two_paths_of_one_name_are_both_printed(case: str, side: str) -> None:
    tree, one, other = DUPLICATES[case]
    trees = {"params": {}, "grads": {}, side: tree}
    with pytest.raises(gs.DuplicateNameError) as caught:
        gs.SGD(0.1).apply_gradients(trees["grads"], trees["params"])
    assert f"{side}{one}" in str(caught.value)
    assert f"{side}{other}" in str(caught.value)


def test_a_duplicate_that_is_none_is_none() -> None:
    assert names({"a.b": leaf(), "a": {"b": None}}) == ["a.b"]


@pytest.mark.parametrize("key", [None, 1.5, True, ("a", "b"), b"a", np.int64(1)], ids=repr)
@pytest.mark.parametrize("depth", [0, 2])
def test_a_key_is_a_string_or_an_integer(key: Any, depth: int) -> None:
    tree: Any = {key: leaf()}
    for _ in range(depth):
        tree = {"a": tree}
    with pytest.raises(gs.ArgumentTypeError, match="keys must be strings or integers, got") as caught:
        gs.SGD(0.1).apply_gradients({}, tree)
    assert repr(key) in str(caught.value)
    assert ("['a']['a']" in str(caught.value)) == bool(depth)


def test_the_structure_handed_in_stays_as_it_was() -> None:
    inner, array = [None, leaf()], leaf()
    params = {"a": inner, "b": (array,)}
    assert gs.SGD(1.0).apply_gradients({"a": [None, leaf(1.0)]}, params) is params
    assert params["a"] is inner
    assert params["b"][0] is array
    assert inner[0] is None
    assert inner[1][0] == -1.0


# Names against MLX's

KEYS = st.text(st.characters(codec="ascii", exclude_characters="."), min_size=1, max_size=3)
TREES = st.recursive(
    st.none() | st.just("leaf"),
    lambda tree: (
        st.dictionaries(KEYS, tree, max_size=3) | st.lists(tree, max_size=3) | st.lists(tree, max_size=3).map(tuple)
    ),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, (dict, list, tuple)))


def planted(tree: Any, make: Any) -> Any:
    """The tree with an array at each leaf."""
    if isinstance(tree, dict):
        return {key: planted(value, make) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(planted(value, make) for value in tree)
    return None if tree is None else make()


@given(TREES)
def test_names_are_those_of_mlx(tree: Any) -> None:
    flat = mlx.utils.tree_flatten(planted(tree, lambda: mx.zeros(1)))
    expected = [name for name, array in flat if isinstance(array, mx.array)]
    assert names(planted(tree, leaf)) == expected


@given(TREES)
def test_a_tree_steps_like_its_flat_form(tree: Any) -> None:
    params = planted(tree, leaf)
    flat = {name: leaf() for name in names(params)}
    grads = planted(tree, lambda: leaf(0.5))
    gs.SGD(1.0).apply_gradients(grads, params)
    gs.SGD(1.0).apply_gradients(grads, flat)
    assert all(array[0] == -0.5 for array in flat.values())
    clipped, norm = gs.clip_grad_norm(params, 10.0)
    assert norm == pytest.approx(0.5 * len(flat) ** 0.5)
    assert repr(clipped) == repr(params)
