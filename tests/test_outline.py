"""A tree that is like the last one has its names: compared with the slow way, on trees that are and are not alike."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import gradstep as gs
from gradstep.outline import outline_of
from gradstep.tree import Namer, named_arrays

KEYS = st.one_of(st.text(max_size=3), st.integers(-(2**70), 2**70))
LEAVES = st.one_of(st.none(), st.builds(lambda: np.zeros(2)))
TREES = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        st.dictionaries(KEYS, parts, max_size=3),
        st.lists(parts, max_size=3),
        st.lists(parts, max_size=3).map(tuple),
    ),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, (dict, list, tuple)))


def copied(tree: Any) -> Any:
    """A tree of the same shape with other containers, keys and leaves."""
    if isinstance(tree, dict):
        return {("".join(list(key)) if isinstance(key, str) else int(str(key))): copied(v) for key, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(copied, tree))
    return None if tree is None else tree.copy()


def named_slowly(tree: Any) -> Any:
    try:
        return dict(named_arrays(tree, "params"))
    except gs.DuplicateNameError:
        return None


def same(first: Any, second: Any) -> bool:
    return list(first) == list(second) and all(first[name] is second[name] for name in first)


@given(TREES)
def test_a_tree_of_the_same_shape_has_the_same_names(tree: Any) -> None:
    named = named_slowly(tree)
    if named is None:
        return
    outline, other = outline_of(tree, named), copied(tree)
    assert outline is not None
    for again in (tree, other, tree):
        found = outline.named(again)
        assert found is not None and same(found, named_slowly(again))


@given(TREES, TREES)
def test_a_tree_of_another_shape_is_seen(tree: Any, other: Any) -> None:
    named = named_slowly(tree)
    outline = None if named is None else outline_of(tree, named)
    found = None if outline is None else outline.named(other)
    if found is not None:
        assert same(found, named_slowly(other))


A, B, C = (np.full(2, number, np.float32) for number in range(3))
BASE = {"a": A, "b": [B, {"c": C}], "n": None, "t": (A, None)}


@pytest.mark.parametrize(
    "tree",
    [
        {**BASE, "a": [A]},
        {**BASE, "n": A},
        {**BASE, "t": [A, None]},
        {**BASE, "t": (A,)},
        {**BASE, "t": (A, None, None)},
        {**BASE, "b": [B, {"d": C}]},
        {**BASE, "b": [B, {"c": None}]},
        {**BASE, "b": {0: B, 1: {"c": C}}},
        {**BASE, "x": A},
        {key: BASE[key] for key in ("b", "a", "n", "t")},
        {**BASE, "a": 1.0},
        {**BASE, "a": "text"},
        [BASE],
        None,
        A,
    ],
)
def test_every_difference_counts(tree: Any) -> None:
    outline = outline_of(BASE, named_arrays(BASE, "params"))
    assert outline is not None
    assert outline.named(BASE) is not None
    assert outline.named(tree) is None


def test_keys_are_told_apart_by_type() -> None:
    class Text(str):
        pass

    outline = outline_of({"a": {1: A}}, named_arrays({"a": {1: A}}, "params"))
    assert outline is not None
    assert outline.named({"a": {1: B}}) is not None
    assert outline.named({"a": {True: B}}) is None
    assert outline.named({Text("a"): {1: B}}) is None


def test_containers_of_other_types_are_named_the_slow_way() -> None:
    class Own(dict[str, Any]):
        pass

    assert outline_of({"a": Own(b=A)}, {"a.b": A}) is None
    namer = Namer("params")
    for _ in range(3):
        assert same(namer({"a": Own(b=A)}), {"a.b": A})


def test_errors_are_those_of_the_slow_way() -> None:
    namer = Namer("params")
    assert same(namer({"a": {"b": A}}), {"a.b": A})
    with pytest.raises(gs.ArgumentTypeError, match="plain number"):
        namer({"a": {"b": 1.0}})
    with pytest.raises(gs.DuplicateNameError):
        namer({"a": {"b": A}, "a.b": A})
    assert same(namer({"a": {"b": B}}), {"a.b": B})


def test_steps_of_nested_trees_go_on_when_the_shape_changes() -> None:
    opt, flat = gs.SGD(1.0, momentum=0.5), gs.SGD(1.0, momentum=0.5)
    nested: dict[str, Any] = {"l": [{"w": np.zeros(2, np.float32)}]}
    plain = {"l.0.w": np.zeros(2, np.float32)}
    for round_ in range(6):
        if round_ == 3:
            nested["l"].append({"w": np.zeros(2, np.float32)})
            plain["l.1.w"] = np.zeros(2, np.float32)
        opt.apply_gradients({"l": [{"w": np.ones(2, np.float32)} for _ in nested["l"]]}, nested)
        flat.apply_gradients({name: np.ones(2, np.float32) for name in plain}, plain)
    assert all((nested["l"][i]["w"] == plain[f"l.{i}.w"]).all() for i in range(2))
    assert opt.steps == flat.steps
