"""`gradstep diff`: what it says is what float64 says, and its exit code is that of diff."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from test_inspect import STRANGE, flip, parameters, rows, saved, train

import gradstep as gs
from gradstep.arrays.stored import Stored, bits_of
from gradstep.checkpoint.checkpoint_file import opened
from gradstep.checkpoint.tensors import FileTensors, read
from gradstep.cli.checkpoint import measuring
from gradstep.cli.checkpoint.changes import Change, Difference, Pair, compare
from gradstep.cli.checkpoint.contents import Array, contents_of
from gradstep.cli.checkpoint.diff_screen import show
from gradstep.cli.checkpoint.measuring import Measure, measure

Run = Callable[..., Any]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and another of the next step."""
    optimizer, params = gs.AdamW(gs.cosine_decay(1e-2, 100)), parameters()
    first = saved(tmp_path / "a", optimizer, params, 3)
    return first, saved(tmp_path / "b", optimizer, params, 1)


def changes(command: Run, a: Path, b: Path) -> dict[str, tuple[str | None, str | None]]:
    """What changed by name, from the JSON."""
    found = json.loads(command("diff", a, b, "--json").output)
    return {change["where"]: (change["a"], change["b"]) for change in found["changes"]}


def in_float64(a: Any, b: Any) -> tuple[float, float, int]:
    """The largest difference, the relative one and their number: an independent way to them."""
    a, b = np.asarray(a).astype(np.float64).ravel(), np.asarray(b).astype(np.float64).ravel()
    rms = np.sqrt(np.mean((b - a) ** 2)) / np.sqrt(np.mean(a**2))
    return float(np.abs(b - a).max()), float(rms), int(np.sum(a != b))


# Equal


def test_a_file_and_itself(command: Run, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("equal hashes are not read")

    monkeypatch.setattr(FileTensors, "fetch", refuse)
    ended = command("diff", two[0], two[0])
    assert (ended.code, ended.errors) == (0, "")
    assert "Nothing differs: 6 tensors" in ended.output
    found = json.loads(command("diff", two[0], two[0], "--json").output)
    assert found["equal"] is True
    assert (found["changes"], found["tensors"], found["equal_tensors"]) == ([], [], 6)


def test_other_bits_of_the_same_numbers_are_no_difference(command: Run, tmp_path: Path):
    optimizer = gs.SGD(0.1)
    optimizer.init({"w": np.zeros(3, np.float32)})
    optimizer.save(tmp_path / "a", {"w": np.array([0.0, np.nan, 1.0], np.float32)})
    optimizer.save(tmp_path / "b", {"w": np.array([-0.0, -np.nan, 1.0], np.float32)})
    ended = command("diff", tmp_path / "a", tmp_path / "b")
    assert ended.code == 0
    assert "1 of the equal ones have other bits" in ended.output
    assert json.loads(command("diff", tmp_path / "a", tmp_path / "b", "--json").output)["equal"] is True


# Consecutive steps


def test_consecutive_steps_against_float64(command: Run, two: tuple[Path, Path]):
    ended = command("diff", *two)
    assert (ended.code, ended.errors) == (1, "")
    assert ["opt.step", "3", "4"] in rows(ended.output)
    assert ["own step of 2 parameters", "3", "4"] in rows(ended.output)
    assert "6 of the 6 tensors of both differ." in ended.output
    found = json.loads(command("diff", *two, "--json").output)
    assert found["equal"] is False
    schedule = gs.cosine_decay(1e-2, 100)
    assert {c["where"]: (c["a"], c["b"]) for c in found["changes"]} == {
        "opt.step": ("3", "4"),
        "opt.learning_rate, last value": (f"{schedule(2)!r} for step 2", f"{schedule(3)!r} for step 3"),
        "own step of 2 parameters": ("3", "4"),
    }
    with opened(two[0]) as a, opened(two[1]) as b:
        keys = list(a.tensors.all_keys())
        arrays = {key: (read(a.tensors, key).bits, read(b.tensors, key).bits) for key in keys}
    measured = {
        one["parameter"] + ("" if one["role"] == "parameter" else "." + one["array"]): one for one in found["tensors"]
    }
    assert measured.keys() == arrays.keys()
    for key, both in arrays.items():
        one = measured[key]
        largest, relative, differing = in_float64(*both)
        assert (one["largest"], one["differing"], one["elements"]) == (largest, differing, both[0].size)
        assert one["relative"] == pytest.approx(relative, rel=1e-12)
        assert [f"{relative:.3g}", f"{largest:.3g}", f"{differing} of {both[0].size}"] in [
            row[2:] for row in rows(ended.output)
        ]
    relatives = [one["relative"] for one in found["tensors"]]
    assert relatives == sorted(relatives, reverse=True)


def test_only_what_changed_is_listed(command: Run, tmp_path: Path):
    optimizer, params = gs.SGD(0.1), parameters()
    first = saved(tmp_path / "a", optimizer, params, 1)
    params["layers.0.bias"][2] += 0.5
    optimizer.clip_norm = 2.0
    optimizer.learning_rate = 0.25
    optimizer.save(tmp_path / "b", params)
    found = json.loads(command("diff", first, tmp_path / "b", "--json").output)
    assert [(c["where"], c["a"], c["b"]) for c in found["changes"]] == [
        ("opt.learning_rate", "0.1", "0.25"),
        ("opt.clip_norm", "None", "2.0"),
    ]
    (one,) = found["tensors"]
    assert (one["parameter"], one["differing"], one["elements"]) == ("layers.0.bias", 1, 6)
    assert one["largest"] == pytest.approx(0.5, rel=1e-6)
    assert found["equal_tensors"] == 1


def test_other_parameters_alone_are_a_difference(command: Run, tmp_path: Path):
    optimizer = gs.SGD(0.1)
    optimizer.init({"w": np.zeros(1, np.float32)})
    for name, value in (("a", 1), ("b", 2)):
        optimizer.save(tmp_path / name, {"w": np.array([value], np.float32)})
    ended = command("diff", tmp_path / "a", tmp_path / "b")
    assert ended.code == 1
    assert ["w", "parameter", "1", "1", "1 of 1"] in rows(ended.output)


def test_the_same_bytes_of_another_dtype_are_other_numbers(command: Run, tmp_path: Path):
    optimizer, array = gs.SGD(0.1), np.array([1.0, 2.0], np.float16)
    optimizer.init({"w": array})
    optimizer.save(tmp_path / "a", {"w": array})
    optimizer.save(tmp_path / "b", {"w": array.view(ml_dtypes.bfloat16)})
    assert changes(command, tmp_path / "a", tmp_path / "b") == {"parameter of 'w'": ("float16 (2,)", "bfloat16 (2,)")}
    (one,) = json.loads(command("diff", tmp_path / "a", tmp_path / "b", "--json").output)["tensors"]
    assert (one["differing"], one["largest"]) == (1, 1 - 2**-7)


def test_infinite_differences_are_json_too(command: Run, tmp_path: Path):
    optimizer = gs.SGD(0.1)
    optimizer.init({"w": np.zeros(1, np.float32)})
    for name, value in (("a", np.nan), ("b", 2)):
        optimizer.save(tmp_path / name, {"w": np.array([value, 1], np.float32)})
    ended = command("diff", tmp_path / "a", tmp_path / "b", "--json")
    (one,) = json.loads(ended.output)["tensors"]
    assert (ended.code, one["largest"], one["relative"], one["differing"]) == (1, "inf", "inf", 1)
    assert ["w", "parameter", "inf", "inf", "1 of 2"] in rows(command("diff", tmp_path / "a", tmp_path / "b").output)


def test_codes_are_compared_as_codes(command: Run, tmp_path: Path):
    optimizer, params = gs.Adam(0.1, slot_dtype="int8"), parameters({"w": (600,)})
    first, second = saved(tmp_path / "a", optimizer, params, 2), saved(tmp_path / "b", optimizer, params, 1)
    with opened(first) as a, opened(second) as b:
        codes = [read(file.tensors, "w.v.codes").bits for file in (a, b)]
    largest, relative, differing = in_float64(*codes)
    ended = command("diff", first, second)
    assert ["w", "v.codes", f"{relative:.3g}", f"{largest:.0f} of 255", f"{differing} of 600"] in rows(ended.output)
    assert "codes are compared as they are" in ended.output
    by_array = {one["array"]: one for one in json.loads(command("diff", first, second, "--json").output)["tensors"]}
    assert by_array["v.codes"]["codes"] is True
    assert by_array["v.scales"]["codes"] is False


# Other trees


def test_another_family(command: Run, tmp_path: Path):
    a = saved(tmp_path / "a", gs.SGD(0.1, momentum=0.9), parameters(), 1)
    b = saved(tmp_path / "b", gs.Adam(0.2), parameters(), 1)
    assert command("diff", a, b).code == 1
    assert changes(command, a, b) == {
        "opt": ("SGD", "Adam"),
        "opt.learning_rate": ("0.1", "0.2"),
        "opt's slots": ("v", "m, v"),
        "slots m": (None, "2 tensors"),
    }


def test_another_tree(command: Run, tmp_path: Path):
    a = saved(tmp_path / "a", gs.SGD(0.1, momentum=0.9), parameters(), 1)
    multi = gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), gs.Adam(0.1)], ["*bias"], clip_norm=1.0)
    b = saved(tmp_path / "b", gs.Accumulate(multi, every=2), parameters(), 3)
    assert changes(command, a, b) == {
        "opt": ("SGD", "MultiOptimizer"),
        "opt.clip_norm": ("None", "1.0"),
        "opt['*bias']": (None, "SGD"),
        "opt[the rest]": (None, "Adam"),
        "optimizer of 'layers.0.bias'": ("opt", "opt['*bias']"),
        "optimizer of 'layers.0.weight'": ("opt", "opt[the rest]"),
        "slots m": (None, "1 tensor"),
        "sums of a round": (None, "2 tensors"),
        "opt's rounds": (None, "Accumulate(every=2)"),
    }


def test_other_routes(command: Run, tmp_path: Path):
    def multi(*filters: str) -> Any:
        return gs.MultiOptimizer([gs.SGD(0.1) for _ in range(len(filters) + 1)], filters)

    a, b = multi("*bias", "*x"), multi("*x", "*bias")
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    multi("*bias").save(tmp_path / "c")
    assert changes(command, tmp_path / "a", tmp_path / "b") == {
        "opt's order of filters": (
            "opt['*bias'], opt['*x'], opt[the rest]",
            "opt['*x'], opt['*bias'], opt[the rest]",
        )
    }
    assert changes(command, tmp_path / "a", tmp_path / "c") == {"opt['*x']": ("SGD", None)}


def test_a_glob_and_a_function_of_one_name_are_different(command: Run, tmp_path: Path):
    def bias(name: str, _: object) -> bool:
        return name == "bias"

    bias.__qualname__ = "bias"
    for file, accepts in (("a", "bias"), ("b", bias)):
        gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.2)], [accepts]).save(tmp_path / file)
    found = changes(command, tmp_path / "a", tmp_path / "b")
    assert found == {"opt['bias']": ("SGD", None), "opt[bias]": (None, "SGD")}


def test_rounds(command: Run, tmp_path: Path):
    optimizer, params = gs.Accumulate(gs.SGD(0.1), every=4), parameters()
    a = saved(tmp_path / "a", optimizer, params, 1)
    b = saved(tmp_path / "b", optimizer, params, 1, with_params=False)
    assert changes(command, a, b) == {"opt.micro_step": ("1", "2"), "saved parameters": ("2 tensors", None)}
    found = json.loads(command("diff", a, b, "--json").output)
    assert [one["role"] for one in found["tensors"]] == ["sum", "sum"]


def test_other_parameters_shapes_and_dtypes(command: Run, tmp_path: Path):
    a = saved(tmp_path / "a", gs.Adam(0.1), parameters({"w": (2,), "x": (3,), "old": (1,)}), 1)
    b = saved(tmp_path / "b", gs.Adam(0.1, slot_dtype={"v": "bfloat16"}), parameters({"w": (2,), "x": (4,)}), 1)
    found = changes(command, a, b)
    assert found["all of 'old'"] == ("parameter float32 (1,), m float32 (1,), v float32 (1,)", None)
    assert found["parameter of 'x'"] == ("float32 (3,)", "float32 (4,)")
    assert found["v of 'w'"] == ("float32 (2,)", "bfloat16 (2,)")
    assert found["opt.slot_dtype"] == ("None", "{'v': 'bfloat16'}")
    measured = {
        (one["parameter"], one["array"]): one for one in json.loads(command("diff", a, b, "--json").output)["tensors"]
    }
    assert ("w", "v") in measured and ("x", "v") not in measured
    assert 0 < measured["w", "v"]["relative"] < 2**-8
    assert ("w", "parameter") not in measured  # equal


def test_a_waiting_value_is_a_difference(command: Run, tmp_path: Path):
    optimizer, params = gs.SGD({"*": gs.linear_schedule(1.0, 0.0, 4)}, nonfinite="raise"), parameters()
    a = saved(tmp_path / "a", optimizer, params, 1)
    with pytest.raises(gs.NonFiniteGradientError):
        optimizer.apply_gradients({name: array * np.nan for name, array in params.items()}, params)
    optimizer.save(tmp_path / "b", params)
    found = changes(command, a, tmp_path / "b")
    assert found["opt.learning_rate['*'], last value"] == ("1.0 for step 0", "1.0 for step 0, 0.75 waits for step 1")
    assert len(found) == 1
    assert "last 1 at step 0, 0.75 waits for step 1, next 0.75" in command("inspect", tmp_path / "b").output


def test_a_damaged_tensor_is_a_complaint(command: Run, two: tuple[Path, Path]):
    flip(two[1], "layers.0.weight.m")
    ended = command("diff", *two)
    assert (ended.code, ended.output) == (2, "")
    assert "'layers.0.weight.m' are not those that were saved" in ended.errors


# Numbers


def stored(values: Any, dtype: str) -> Stored:
    array = np.array(values, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return Stored(bits_of(array, "a test"), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_floats_against_float64_in_many_blocks(dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "BLOCK", 7)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 6))
    b[0] = a[0]
    one, other = stored(a, dtype), stored(b, dtype)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    largest, relative, differing = in_float64(a.astype(kind), b.astype(kind))
    found = measure(one, other)
    assert (found.largest, found.differing, found.elements) == (largest, differing, 30)
    assert found.relative == pytest.approx(relative, rel=1e-14)
    assert measure(one, one) == Measure(0.0, 0.0, 0, 30)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_numbers_that_are_not_finite(dtype: str):
    nan, inf = float("nan"), float("inf")
    assert measure(stored([nan, inf, 2.0], dtype), stored([nan, inf, 1.0], dtype)) == Measure(
        1.0, pytest.approx((1 / 3) ** 0.5 / 2), 1, 3
    )
    for a, b in ((nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1.0), (nan, inf)):
        assert measure(stored([a, 2.0], dtype), stored([b, 2.0], dtype)) == Measure(inf, inf, 1, 2)


def test_extremes_of_float64():
    assert measure(stored([3e-200, 4e-200], "float64"), stored([0.0, 0.0], "float64")).relative == pytest.approx(1)
    assert measure(stored([3e200, 4e200], "float64"), stored([0.0, 0.0], "float64")).relative == pytest.approx(1)
    assert measure(stored([0.0], "float32"), stored([1.0], "float32")) == Measure(1.0, float("inf"), 1, 1)
    assert measure(stored([], "float32"), stored([], "float32")) == Measure(0.0, 0.0, 0, 0)


def test_integers_and_complex_numbers():
    assert measure(stored([1 << 60, 5], "int64"), stored([(1 << 60) + 1, 5], "int64")).differing == 1
    assert measure(stored([255, 0], "uint8"), stored([0, 0], "uint8")) == Measure(255.0, pytest.approx(1.0), 1, 2)
    assert measure(stored([3 + 4j], "complex64"), stored([0], "complex64")) == Measure(5.0, pytest.approx(1.0), 1, 1)
    assert measure(stored([True], "bool"), stored([False], "bool")).largest == 1


# Terminals


def test_any_name_is_printed_as_it_is_in_eighty_columns(command: Run, tmp_path: Path):
    optimizer, params = gs.SGD({"*": 0.1, "[blue]x": 1}, momentum=0.9), parameters(STRANGE)
    a = saved(tmp_path / "a", optimizer, params, 1)
    train(optimizer, params, 1)
    optimizer.learning_rate = {"*": 0.1, "[blue]x": 2}
    optimizer.save(tmp_path / "b", params)
    output = command("diff", a, tmp_path / "b").output
    for text in ("[red]bold[/red]", ":smile: [link=x]", "größe.重み", "esc\\x1b[31m\\n\\u202e", "'[blue]x': 2"):
        assert text in output
    assert "\x1b" not in output
    with opened(a) as one, opened(tmp_path / "b") as other:
        both = contents_of(one), contents_of(other)
    found = compare(*both)
    measured = [(pair, Measure(1e-7, 123.456, 1, 10**9)) for pair in found.pairs]
    text = printed(Difference(*both, found.changes, measured, 3, 0), 80)
    assert max(map(cell_len, text.partition("\n\n")[2].splitlines())) <= 80
    assert "[red]bold[/red]" in text


def printed(difference: Difference, width: int, *, everything: bool = False) -> str:
    stream = io.StringIO()
    show(difference, Console(file=stream, width=width, highlight=False), everything)
    return stream.getvalue()


def test_long_lists_are_cut_where_asked(two: tuple[Path, Path]):
    with opened(two[0]) as file:
        contents = contents_of(file)
    array: Array = contents.arrays[0]
    many = [Change(f"thing {number}", "1", None) for number in range(100)]
    measured = [(Pair(f"w{number}", array, array), Measure(1.0, 1.0, 1, 1)) for number in range(200)]
    difference = Difference(contents, contents, many, measured, 0, 0)
    text = printed(difference, 80)
    assert (text.count("thing "), text.count("1 of 1")) == (60, 60)
    assert "and 40 differences; --all shows each" in text
    assert "and 140 smaller changes; --all shows each" in text
    whole = printed(difference, 80, everything=True)
    assert (whole.count("thing "), whole.count("1 of 1")) == (100, 200)
    assert "--all" not in whole
