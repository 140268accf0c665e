"""`gradstep inspect`: what it says is what was saved, damage is found, and any name can be printed."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from racing import MAIN, environment
from rich.cells import cell_len
from rich.console import Console

import gradstep as gs
from gradstep.checkpoint.checkpoint_file import opened
from gradstep.checkpoint.container import Container
from gradstep.cli.checkpoint.contents import contents_of
from gradstep.cli.checkpoint.inspection_screen import show
from gradstep.cli.checkpoint.schedules import Curve, schedules_of
from gradstep.cli.checkpoint.sparkline import sparkline
from gradstep.cli.checkpoint.spelling import printable, spelled

Run = Callable[..., Any]

SHAPES = {"layers.0.weight": (6, 4), "layers.0.bias": (6,)}


def train(optimizer: Any, params: dict[str, Any], steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        grads = {name: rng.normal(size=array.shape).astype(array.dtype) for name, array in params.items()}
        optimizer.apply_gradients(grads, params)


def parameters(shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in (shapes or SHAPES).items()}


def saved(path: Path, optimizer: Any, params: dict[str, Any], steps: int, *, with_params: bool = True) -> Path:
    train(optimizer, params, steps)
    optimizer.save(path, params if with_params else None)
    return path


def rows(text: str) -> list[list[str]]:
    """Lines as their cells."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def printed(path: Path, width: int, *, everything: bool = False, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    with opened(path) as file:
        contents = contents_of(file)
    show(contents, Console(file=stream, width=width, highlight=False), everything=everything, repeated=False)
    stream.flush()
    return raw.getvalue().decode(encoding)


def flip(path: Path, *keys: str) -> None:
    """Flip a bit in the data of these tensors."""
    with Container(path) as container:
        extents = [container.tensors[key] for key in keys]
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for extent in extents:
        content[start + extent.end - 1] ^= 1
    path.write_bytes(content)


# What was saved


def test_everything_about_adamw_with_a_schedule(command: Run, tmp_path: Path):
    schedule = gs.cosine_decay(1e-3, 100)
    optimizer = gs.AdamW(schedule, weight_decay=0.25, clip_norm=2.0, slot_dtype={"v": "float16"}, seed=7)
    path = saved(tmp_path / "run.safetensors", optimizer, parameters(), 30)
    ended = command("inspect", path)
    assert (ended.code, ended.errors) == (0, "")
    found = rows(ended.output)
    size = path.stat().st_size
    assert found[0] == [str(path)]
    assert f"({size:,} bytes), written by gradstep {gs.__version__}, format 1" in ended.output
    for row in (
        ["AdamW", "step 30"],
        ["learning_rate", "cosine_decay(init=0.001, decay_steps=100, end=0.0)"],
        [f"steps 0 to 100; last {schedule(29):.4g} at step 29, next {schedule(30):.4g}"],
        ["betas", "(0.9, 0.999)"],
        ["weight_decay", "0.25"],
        ["clip_norm", "2.0"],
        ["slot_dtype", "{'v': 'float16'}"],
        ["seed", "7"],
        ["layers.0.weight", "30", "parameter", "float32", "(6, 4)", "96 B"],
        ["layers.0.weight", "30", "m", "float32", "(6, 4)", "96 B"],
        ["layers.0.weight", "30", "v", "float16", "(6, 4)", "48 B"],
        ["layers.0.bias", "30", "v", "float16", "(6,)", "12 B"],
        ["parameter", "2", "120", "120 B"],
        ["m", "2", "120", "120 B"],
        ["v", "2", "60", "60 B"],
        ["all", "6", "300", "300 B"],
    ):
        assert row in found, row
    for default in ("nonfinite", "donate", "frozen", "rounding", "master_weights"):
        assert default not in ended.output


def test_routes_mapped_rates_and_frozen_parameters(command: Run, tmp_path: Path):
    sgd = gs.SGD({"*.bias": gs.linear_schedule(0.0, 0.1, 10), "*": 0.5}, momentum=0.9)
    optimizer = gs.MultiOptimizer([sgd, gs.Muon(0.02)], ["*bias"], frozen=["still*"])
    shapes = {**SHAPES, "still.weight": (2, 3)}
    ended = command("inspect", saved(tmp_path / "run.safetensors", optimizer, parameters(shapes), 4))
    for line in (
        "MultiOptimizer  step 4",
        "'*bias': SGD  step 4",
        "'*.bias': linear_schedule(init=0.0, end=0.1, steps=10)",
        "steps 0 to 10; last 0.03 at step 3, next 0.04",
        "'*': 0.5",
        "the rest: Muon  step 4",
        "opt['*bias']: SGD",
        "opt[the rest]: Muon",
        "no optimizer has state for these",
    ):
        assert line in ended.output, line
    found = rows(ended.output)
    assert ["frozen", "['still*']"] in found
    assert ["still.weight", "-", "parameter", "float32", "(2, 3)", "24 B"] in found
    sections = re.split(r"opt\[", ended.output)
    assert "layers.0.bias" in sections[1] and "layers.0.weight" not in sections[1]
    assert "layers.0.weight" in sections[2]


def test_a_round_under_way(command: Run, tmp_path: Path):
    optimizer = gs.Accumulate(gs.Adam(0.1), every=4)
    ended = command("inspect", saved(tmp_path / "run.safetensors", optimizer, parameters(), 7))
    assert "Accumulate  micro_step 3 of 4, sums of 2 parameters" in ended.output
    assert "Adam  step 1" in ended.output
    assert ["layers.0.bias", "1", "g.sum", "float32", "(6,)", "24 B"] in rows(ended.output)
    assert ["g.sum", "2", "120", "120 B"] in rows(ended.output)


def test_codes_and_scales(command: Run, tmp_path: Path):
    path = saved(tmp_path / "run.safetensors", gs.Adam(0.1, slot_dtype="int8"), parameters(), 2)
    found = rows(command("inspect", path).output)
    assert ["slot_dtype", "'int8'"] in found
    assert ["layers.0.weight", "2", "v.codes", "uint8", "(6, 4)", "24 B"] in found
    assert ["layers.0.weight", "2", "v.scales", "float32", "(1,)", "4 B"] in found


def test_slots_may_be_called_like_the_kinds_of_values(command: Run, tmp_path: Path):
    @gs.rule
    def Mine(w: Any, g: Any, globs: Any, *, learning_rate: Any) -> Any:
        globs = 0.9 * globs + g
        return w - learning_rate * globs, globs

    path = saved(tmp_path / "run", Mine(0.1, slot_dtype={"globs": "bfloat16"}), parameters(), 1)
    ended = command("inspect", path)
    assert ["slot_dtype", "{'globs': 'bfloat16'}"] in rows(ended.output)
    assert ["layers.0.bias", "1", "globs", "bfloat16", "(6,)", "12 B"] in rows(ended.output)


def test_functions_are_named_with_what_they_gave_last(command: Run, tmp_path: Path):
    @gs.rule
    def Mine(w: Any, g: Any, *, learning_rate: Any, beta: Any = 0.9) -> Any:
        return w - learning_rate * beta * g

    optimizer = Mine(lambda step: 1 / (step + 2), beta={"a*": gs.join_schedules([abs, abs], [2]), "*": 0.5})
    ended = command("inspect", saved(tmp_path / "run.safetensors", optimizer, parameters(), 3))
    assert ended.code == 0
    assert "Mine (a rule of your own)" in ended.output
    assert "<lambda>" in ended.output
    assert "last 0.25 at step 2" in ended.output
    assert "'a*': join_schedules(schedules=[abs, abs], boundaries=[2])" in ended.output
    assert "last 0 at step 2" in ended.output
    assert "steps 0 to" not in ended.output


def test_nothing_yet(command: Run, tmp_path: Path):
    gs.SGD(0.1).save(tmp_path / "none")
    assert "No parameters yet." in command("inspect", tmp_path / "none").output
    known = gs.SGD(0.1)
    known.init(parameters())
    known.save(tmp_path / "known")
    ended = command("inspect", tmp_path / "known", "--verify")
    assert ended.code == 0
    assert ["layers.0.bias", "0", "none"] in rows(ended.output)
    assert "No tensors." in ended.output
    assert "the header and 0 tensors" in ended.output


# Schedules


@pytest.mark.parametrize(
    ("schedule", "horizon"),
    [
        (gs.cosine_decay(1.0, 90), 90),
        (gs.cosine_decay(1.0, 10), 14),
        (gs.linear_schedule(0.0, 1.0, 40), 40),
        (gs.step_decay(1.0, 0.5, 8), 40),
        (gs.exponential_decay(1.0, 0.1), 14),
        (gs.exponential_decay(1.0, 0.5**0.5), 14),
        (gs.exponential_decay(1.0, 1.0), 100),
        (gs.join_schedules([gs.linear_schedule(0, 1.0, 30), gs.cosine_decay(1.0, 70)], [30]), 100),
    ],
)
def test_curves_reach_from_the_first_step_to_their_horizon(schedule: Any, horizon: int, tmp_path: Path):
    path = saved(tmp_path / "run", gs.SGD(schedule), parameters(), 7)
    with opened(path) as file:
        (scheduled,) = schedules_of(file.document.optimizer)  # pyright: ignore[reportArgumentType]
        curve = scheduled.curve(7)
    assert scheduled.label == "learning_rate"
    assert curve is not None
    assert (curve.steps[0], curve.steps[-1], curve.coming) == (0, horizon, schedule(7))
    assert list(curve.steps) == sorted(set(curve.steps))
    assert curve.values == tuple(map(schedule, curve.steps))


def test_pairs_and_shared_schedules_have_their_own_last_values(tmp_path: Path):
    shared, other = gs.linear_schedule(0.1, 0.2, 10), gs.linear_schedule(0.9, 0.8, 10)
    optimizer = gs.Adam({"a": shared, "b*": shared, "*": other}, betas=(0.5, other))
    path = saved(tmp_path / "run", optimizer, parameters(), 3)
    with opened(path) as file:
        found = {one.label: one.resolved for one in schedules_of(file.document.optimizer)}  # pyright: ignore[reportArgumentType]
    assert list(found) == ["learning_rate['a']", "learning_rate['b*']", "learning_rate['*']", "betas[1]"]
    values = [resolved and resolved.value for resolved in found.values()]
    assert values == [shared(2), shared(2), other(2), other(2)]


def test_sparklines_go_from_the_lowest_value_to_the_highest_around_the_mark():
    up = Curve((0, 10, 20, 30, 40, 50, 60, 70), (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), 3.0)
    assert "".join(sparkline(up, 30)) == "▁▂▃┃▄▅▆▇█"
    assert "".join(sparkline(up, 0)) == "┃▁▂▃▄▅▆▇█"
    assert "".join(sparkline(up, 30, ascii_only=True)) == "_.-|~=+*#"
    assert "".join(sparkline(Curve((0, 1), (0.5, 0.5), 0.5), 1)) == "▅┃▅"
    strange = Curve((0, 1, 2), (float("nan"), -1e308, 1e308), 0.0)
    assert "".join(sparkline(strange, 2)) == "?▁┃█"


# Damage


def test_verify_names_every_damaged_tensor(command: Run, tmp_path: Path):
    path = saved(tmp_path / "run.safetensors", gs.Adam(0.1), parameters(), 2)
    whole = command("inspect", path, "--verify")
    assert whole.code == 0
    assert "Verified: the header and 6 tensors, 360 bytes, each by its SHA-256." in whole.output
    flip(path, "layers.0.weight.m", "layers.0.bias")
    assert command("inspect", path).code == 0
    ended = command("inspect", path, "--verify")
    assert ended.code == 1
    assert "2 of 6 tensors, 360 bytes are damaged" in ended.output
    assert {line.strip() for line in ended.output.partition("damaged;")[2].splitlines()[1:]} == {
        "layers.0.weight.m",
        "layers.0.bias",
    }
    as_json = command("inspect", path, "--verify", "--json")
    assert as_json.code == 1
    assert set(json.loads(as_json.output)["verified"]["damaged"]) == {"layers.0.weight.m", "layers.0.bias"}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def header_changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'learning_rate\\":0.1', b'learning_rate\\":0.2'))


def not_ours(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "cannot be read: No such file or directory"),
        (replaced_by_folder, "is a folder"),
        (truncated, "its end is missing"),
        (header_changed, "its header is not what was saved"),
        (not_ours, "no checkpoint of gradstep's"),
        (lambda path: path.write_bytes(b""), "it ends within the length of the header"),
    ],
)
def test_what_cannot_be_read_is_a_complaint(
    command: Run, tmp_path: Path, damage: Callable[[Path], object], message: str
):
    path = saved(tmp_path / "run.safetensors", gs.Adam(0.1), parameters(), 2)
    other = saved(tmp_path / "other.safetensors", gs.Adam(0.1), parameters(), 2)
    damage(path)
    for arguments in (["inspect", path], ["inspect", path, "--json"], ["diff", path, other], ["diff", other, path]):
        ended = command(*arguments)
        assert (ended.code, ended.output) == (2, "")
        assert ended.errors.startswith("error: ")
        assert str(path) in ended.errors
        assert message in ended.errors


def test_no_permission_is_a_complaint(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path / "run.safetensors", gs.Adam(0.1), parameters(), 2)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gradstep.checkpoint.container.os.open", refuse)
    assert command("inspect", path) == (2, "", f"error: {path} cannot be read: Permission denied\n")


# JSON


def test_json_has_the_same_facts(command: Run, tmp_path: Path):
    schedule = gs.cosine_decay(1e-3, 100)
    optimizer = gs.MultiOptimizer(
        [gs.SGD(schedule, momentum=0.9), gs.Muon(0.02)], [lambda name, _: "bias" in name], clip_norm=1.0
    )
    params = parameters({**SHAPES, "[red]ü\x1b": (2, 2)})
    path = saved(tmp_path / "run.safetensors", gs.Accumulate(optimizer, every=2), params, 5)
    ended = command("inspect", path, "--json")
    assert (ended.code, ended.errors) == (0, "")
    assert ended.output.isascii()
    found = json.loads(ended.output)
    assert (found["bytes"], found["gradstep"], found["format"]) == (path.stat().st_size, gs.__version__, 1)
    accumulate = found["optimizer"]
    assert (accumulate["family"], accumulate["every"], accumulate["micro_step"]) == ("Accumulate", 2, 1)
    (multi,) = accumulate["optimizers"]
    assert (multi["step"], multi["options"]) == (2, {"clip_norm": 1.0})
    sgd, muon = multi["optimizers"]
    assert sgd["filter"]["name"].endswith("<lambda>")
    assert muon["filter"] is None
    assert sgd["hyperparameters"]["learning_rate"]["arguments"]["decay_steps"] == 100
    rate = sgd["schedules"]["learning_rate"]
    assert rate["last"] == {"step": 1, "value": schedule(1)}
    assert rate["curve"]["coming"] == {"step": 2, "value": schedule(2)}
    assert rate["curve"]["values"] == [schedule(step) for step in rate["curve"]["steps"]]
    by_name = {one["name"]: one for one in found["parameters"]}
    assert by_name.keys() == params.keys()
    bias = by_name["layers.0.bias"]
    assert (bias["optimizer"], bias["steps"]) == (sgd["where"], 2)
    form = {"dtype": "float32", "shape": [6], "bytes": 24}
    assert bias["slots"] == {"v": {"key": "layers.0.bias.v", **form}}
    assert bias["parameter"] == {"key": "layers.0.bias", **form}
    assert bias["sum"] == {"key": "layers.0.bias.g.sum", **form}
    assert found["tensors"] == 3 * 3
    assert found["tensor_bytes"] == 3 * sum(array.nbytes for array in params.values())
    assert sum(total["bytes"] for total in found["totals"]) == found["tensor_bytes"]
    assert "verified" not in found


# Terminals


STRANGE = {
    "[red]bold[/red]": (3,),
    ":smile: [link=x]": (2,),
    "größe.重み": (2,),
    "esc\x1b[31m\n\u202e": (2,),
    "long." * 60 + "end": (2,),
}


def test_any_name_is_printed_as_it_is(command: Run, tmp_path: Path):
    path = saved(tmp_path / "[bold]run[red]", gs.SGD({"*": 0.1, "[blue]x": 1}), parameters(STRANGE), 1)
    output = command("inspect", path).output
    assert str(path) in output
    assert "'[blue]x': 1" in output
    for name in STRANGE:
        assert printable(name) in output
    assert "\x1b" not in output and "\u202e" not in output
    assert "esc\\x1b[31m\\n\\u202e" in output


def test_eighty_columns_hold_everything(tmp_path: Path):
    shapes = {**STRANGE, "plain": (1024, 1024)}
    optimizer = gs.AdamW(gs.join_schedules([gs.linear_schedule(0, 1e-3, 10), gs.cosine_decay(1e-3, 90)], [10]))
    path = saved(tmp_path / "run", gs.Accumulate(optimizer, every=2), parameters(shapes), 3)
    for width in (80, 50):
        text = printed(path, width)
        assert max(map(cell_len, text.split(str(path))[1].splitlines())) <= width
        (curve,) = (line for line in text.splitlines() if "┃" in line)
        assert curve.split()[-1] == "0" and "█" in curve.partition("┃")[2]
    lines = printed(path, 80).splitlines()
    assert "…" not in "\n".join(lines)
    assert "longlong" not in "".join(lines)
    squeezed = re.sub(r"[│├└─\s]", "", printed(path, 80))
    assert "long." * 5 in squeezed


def test_a_terminal_without_unicode_gets_another_curve(tmp_path: Path):
    path = saved(tmp_path / "run", gs.SGD(gs.cosine_decay(1.0, 10)), parameters(), 3)
    text = printed(path, 80, encoding="ascii")
    assert "█" not in text and "?" not in text
    assert re.search(r"1 #+\*?\|[*+=~.-]+_+ 0", text)


BLOCKS = {f"blocks.{number}.{kind}": (4, 2) for number in range(100) for kind in ("a", "b")}


def test_two_hundred_parameters(command: Run, tmp_path: Path):
    path = saved(tmp_path / "run", gs.Adam(0.1), parameters(BLOCKS), 1)
    assert sum(line.startswith("blocks.") for line in command("inspect", path).output.splitlines()) == 600
    short = printed(path, 80)
    assert ["blocks.*.a x 100", "1", "parameter", "float32", "(4, 2)", "3.1 KiB"] in rows(short)
    assert "--all shows each" in short
    assert len(short.splitlines()) < 40
    assert printed(path, 80, everything=True).count("blocks.") == 200


def test_two_hundred_parameters_that_have_nothing_in_common(tmp_path: Path):
    shapes = {f"{first}{second}": (2,) for first in "abcdefghij" for second in "abcdefghijklmnopqrst"}
    path = saved(tmp_path / "run", gs.Adam(0.1), parameters(shapes), 1, with_params=False)
    short = printed(path, 80)
    assert "171 more parameters not shown. --all shows each." in short
    assert sum("float32" in line for line in short.splitlines()) == 58
    assert ["all", "400", "3,200", "3.1 KiB"] in rows(short)


def test_fewer_than_sixty_rows_are_all_shown(tmp_path: Path):
    few = {f"b{number}": (2,) for number in range(19)}
    text = printed(saved(tmp_path / "run", gs.Adam(0.1), parameters(few), 1), 80)
    assert sum("float32" in line for line in text.splitlines()) == 57
    assert "--all" not in text


def test_a_real_terminal_is_obeyed(tmp_path: Path):
    path = saved(tmp_path / "run", gs.Adam(0.1), parameters(BLOCKS), 1)
    pty = pytest.importorskip("pty")
    reader, terminal = pty.openpty()
    variables = {**environment(), "COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", MAIN, "inspect", path], env=variables, stdout=terminal)
    os.close(terminal)
    output = b""
    try:
        while piece := os.read(reader, 4096):
            output += piece
    except OSError:  # the end, on Linux
        pass
    os.close(reader)
    assert process.wait() == 0
    text = output.decode()
    assert "blocks.*.a x 100" in text
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])", text)


# Spelling


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (0.1, "0.1"),
        (None, "None"),
        ("a\n", r"'a\n'"),
        ({"kind": "float", "value": "-inf"}, "-inf"),
        ({"kind": "tuple", "values": [1, {"kind": "function", "name": "f"}]}, "(1, f)"),
        ({"kind": "tuple", "values": [1]}, "(1,)"),
        (
            {"kind": "globs", "globs": ["*.b", "*"], "values": [1, {"kind": "float", "value": "nan"}]},
            "{'*.b': 1, '*': nan}",
        ),
        ({"kind": "glob", "name": "*"}, "'*'"),
        (
            {"kind": "schedule", "name": "cosine_decay", "arguments": {"init": 1.0, "decay_steps": 3}},
            "cosine_decay(init=1.0, decay_steps=3)",
        ),
    ],
)
def test_values_read_as_they_are_written(data: Any, text: str):
    assert spelled(data) == text
