"""`gradstep bench`: what is measured, what is written, and what is refused; never how long it took."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from racing import read
from rich.console import Console

import gradstep as gs
from gradstep.cli.bench import case, machine, measuring, peers, table, timing
from gradstep.cli.bench.families import FAMILIES, Family
from gradstep.program.graph import Kind, Reading
from gradstep.program.program import place_of

Bench = Callable[..., Any]

# By hand: four bytes for each array that is read or written, in each pass.
BYTES = {
    "SGD": 4 * (3 + 2),  # w g v, w v
    "RMSprop": 4 * (3 + 2),
    "Adagrad": 4 * (3 + 2),
    "AdaDelta": 4 * (4 + 3),  # w g v u, w v u
    "Adam": 4 * (4 + 3),
    "AdamW": 4 * (4 + 3),
    "Adamax": 4 * (4 + 3),
    "Lion": 4 * (3 + 2),
    "Adafactor": 4 * (2 + 1 + 2 + 1),  # w g; g; w g, w
    "Muon": 4 * (3 + 1 + 4 + 2),  # w g v, scratch; w g v scratch, w v
}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch):
    """No rests, and as many threads afterwards as before."""
    monkeypatch.setattr(timing, "REST", 0.0)
    monkeypatch.setattr("gradstep.cli.bench.command.set_threads", lambda libraries, asked: {"gradstep": "1"})


def streams(opt: gs.Optimizer, ndim: int) -> list[tuple[int, int]]:
    """How many arrays each pass reads and writes."""
    (leaf,) = opt._leaves()
    ((_, program),) = leaf.programs(ndim, Reading.PLAIN)
    return [
        (len({place_of(s) for s in sweep.inputs if s.kind is Kind.FULL}), len(sweep.stores)) for sweep in program.sweeps
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_limit_moves_what_the_family_moves(family: Family):
    ndim = 2 if family.matrices else 1
    assert streams(family.limit(), ndim) == streams(family.build(), ndim)
    assert case.moved(family.build(), ndim, "float32") == BYTES[family.name]
    assert case.moved(family.limit(), ndim, "float32") == BYTES[family.name]


def test_all_ten_families_are_measured():
    assert {family.name for family in FAMILIES} == set(BYTES)


def test_clipping_reads_the_gradients_once_more():
    assert case.moved(gs.Lion(1e-3, clip_norm=1.0), 1, "float32") == BYTES["Lion"] + 4


def test_the_record_says_what_was_measured(command: Bench, tmp_path: Path):
    sizes = ("--sizes", "1e3,2000", "--tensors", "2", "--rounds", "4")
    ended = command("bench", "--library", "numpy", *sizes, "--output", tmp_path)
    assert ended.code == 0, ended.errors
    content = read(tmp_path / "bench.json")
    assert content["complete"] is True
    assert content["options"]["family"] == list(BYTES)
    assert content["made"]["threads"] == {"gradstep": "1"}
    assert len(content["cases"]) == 2 * len(BYTES)
    for one in content["cases"]:
        assert one["size"] in (1000, 2000) and one["tensors"] == 2
        assert one["elements"] == 2 * (22**2 if one["size"] == 1000 else 31**2) or one["elements"] == one["size"]
        assert one["bytes"] == BYTES[one["family"]] * one["elements"]
        assert [side["side"] for side in one["sides"]] == ["gradstep", "limit"] and one["failed"] == []
        for side in one["sides"]:
            assert 0 < side["seconds"]["q1"] <= side["seconds"]["median"] <= side["seconds"]["q3"]
            assert len(side["times"]) == 4
            assert side["gb_per_s"] == pytest.approx(one["bytes"] / side["seconds"]["median"] / 1e9)
        assert one["sides"][1]["fraction_of_limit"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    for word in ("gradients: other arrays in each step", "GB/s", "Adafactor", "bench.png"):
        assert word in ended.output


def test_the_picture_is_a_picture(command: Bench, tmp_path: Path):
    arguments = ("--family", "lion", "--sizes", "1e3", "--library", "numpy", "--rounds", "1")
    assert command("bench", *arguments, "--output", tmp_path).code == 0
    content = (tmp_path / "bench.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 500


@pytest.mark.parametrize("when", ["made", "stepping"])
def test_a_peer_that_raises_is_a_line_and_the_others_go_on(
    when: str, command: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("torch")
    calls = 0

    def make(peer: Any, kind: Any, arguments: Any, stage: Any) -> Any:
        nonlocal calls
        calls += 1
        action = peers._torch(peer, kind, arguments, stage)

        def step() -> None:
            nonlocal calls
            calls += 1
            if calls > 5:
                raise ValueError("no more\nsecond line")

        if when == "made":
            raise ValueError("no more\nsecond line")
        return replace(action, step=step)

    broken = replace(next(p for p in peers.PEERS if p.name == "torch-default"), name="broken", make=make)
    monkeypatch.setattr("gradstep.cli.bench.choosing.PEERS", (broken, *peers.PEERS))
    arguments = ("--family", "adamw", "--sizes", "1e3", "--library", "torch", "--rounds", "2")
    ended = command("bench", *arguments, "--peers", "broken,torch-default,torch-fused", "--output", tmp_path)
    assert ended.code == 0
    assert "broken was not measured at AdamW, 1,000 elements in torch: ValueError: no more\n" in ended.output
    assert "Traceback" not in ended.output + ended.errors
    (one,) = read(tmp_path / "bench.json")["cases"]
    assert [side["side"] for side in one["sides"]] == ["gradstep", "limit", "torch-default", "torch-fused"]
    assert one["failed"] == [{"side": "broken", "error": "ValueError: no more"}]


@pytest.mark.parametrize(("library", "peer"), [("torch", "torch-fused"), ("jax", "optax"), ("mlx", "mlx")])
def test_every_library_has_a_peer(library: str, peer: str, command: Bench, tmp_path: Path):
    pytest.importorskip({"jax": "optax", "mlx": "mlx.core"}.get(library, library))
    arguments = ("--family", "adamw,lion", "--sizes", "1e3", "--clip", "--rounds", "1")
    ended = command("bench", *arguments, "--library", library, "--peers", peer, "--output", tmp_path)
    assert ended.code == 0, ended.errors
    adamw, lion = read(tmp_path / "bench.json")["cases"]
    assert adamw["failed"] == lion["failed"] == []
    assert any(side["kind"] == "peer" for side in adamw["sides"])


def test_peers_without_a_part_are_named(command: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.Peer, "installed", property(lambda peer: peer.name in ("mlx", "torch-compile")))
    ended = command(
        "bench", "--family", "sgd", "--sizes", "1e3", "--rounds", "1", "--library", "numpy", "--output", tmp_path
    )
    assert ended.code == 0, ended.errors
    line = next(line for line in ended.output.splitlines() if line.startswith("not measured: "))
    for words in ("deepspeed (pip install deepspeed)", "mlx (--library mlx)", "torch-compile (--library torch"):
        assert words in line


def test_peers_without_the_families_are_named(command: Bench, tmp_path: Path):
    pytest.importorskip("torch")
    arguments = ("--family", "lion", "--sizes", "1e3", "--rounds", "1", "--library", "torch")
    ended = command("bench", *arguments, "--peers", "torch-default", "--output", tmp_path)
    assert ended.code == 0, ended.errors
    assert "without these families: torch-default" in ended.output


def test_the_help_names_every_peer(command: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "500")
    text = command("bench", "--help").output
    assert [peer.name for peer in peers.PEERS if peer.name not in text] == []


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_table_fits_the_screen(width: int):
    family = FAMILIES[0]
    timed = [measuring.Timed(f"peer-{place}", "peer", [1.0, 2.0]) for place in range(9)]
    ours, limit = (measuring.Timed(kind, kind, [1.0, 1.5]) for kind in ("ours", "limit"))
    of = case.Case(family, "numpy", "float32", 10**8, 1, clip=False)
    screen = Console(file=StringIO(), width=width)
    table.show([measuring.Result(of, [ours, limit, *timed], [])], screen)
    text = screen.file.getvalue()
    assert "…" not in text
    assert [place for place in range(9) if f" {place} " not in text.replace("\n", " ")] == []
    assert all(len(line) <= width for line in text.splitlines() if "100,000,000" in line)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--family", "adamq"), "--family: there is no 'adamq'. Did you mean adam"),
        (("--family", ","), "choose from sgd, rmsprop"),
        (("--sizes", "many"), "write whole numbers of elements from 1 to 1e8"),
        (("--sizes", "2e8"), "from 1 to 1e8"),
        (("--sizes", "10", "--tensors", "11"), "cannot be split in --tensors 11"),
        (("--library", "cupy"), "Choose from numpy, torch, jax, mlx"),
        (("--dtype", "int8"), "Choose from float32, float64, bfloat16, float16"),
        (("--peers", "nobody"), "Choose from torch-fused"),
        (("--peers", "optax", "--library", "numpy"), "add it: --library jax"),
        (("--compile", "--library", "numpy"), "--compile: torch-compile "),
    ],
)
def test_wrong_options_are_complaints(arguments: tuple[str, ...], says: str, command: Bench, tmp_path: Path):
    if "optax" in arguments:
        pytest.importorskip("optax")
    ended = command("bench", *arguments, "--output", tmp_path)
    assert ended.code == 2 and ended.output == ""
    assert says in ended.errors and "Traceback" not in ended.errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (64.0, True)])
def test_a_busy_machine_is_a_warning(load: float, warned: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "available_threads", lambda: 4)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert (machine.busy() is not None) == warned


def test_sizes_beyond_the_memory_are_refused(command: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(case, "available_memory", lambda: 1 << 20)
    arguments = ("--family", "adamw", "--sizes", "1e3,1e6", "--library", "numpy", "--output", tmp_path)
    ended = command("bench", *arguments)
    assert ended.code == 2
    assert "AdamW on 1,000,000 elements needs" in ended.errors and "more than 60% of the 1.0 MiB" in ended.errors


def test_ctrl_c_keeps_what_is_finished(command: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(of: case.Case, *others: Any) -> measuring.Result:
        if of.family.name == "Lion":
            raise KeyboardInterrupt
        return measuring.measure(of, *others)

    monkeypatch.setattr("gradstep.cli.bench.command.measure", measure)
    arguments = ("--family", "sgd,adamw,lion", "--sizes", "1e3", "--library", "numpy", "--rounds", "1")
    ended = command("bench", *arguments, "--output", tmp_path)
    assert ended.code == 130
    assert "Cut short by Ctrl-C: 2 of 3 cases are finished and count." in ended.output
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["complete"] is False and content["planned_cases"] == 3
    assert [one["family"] for one in content["cases"]] == ["SGD", "AdamW"]
    assert (tmp_path / "bench.png").stat().st_size > 0
