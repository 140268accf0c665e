"""docs/scale.md: its formulas against what is counted, and its tables against its formulas."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thread_group import ThreadGroup, run_in_threads

import gradstep as gs
from gradstep.distributed import exchange, wire
from gradstep.program import blocks

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
FORMULAS: dict[str, Any] = {}
with contextlib.redirect_stdout(io.StringIO()):
    exec(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0], FORMULAS)

SIZE = 1_000_000


class Counting(ThreadGroup):
    """Counts what is handed to the group for others, and the calls; not what the first step compares."""

    def __init__(self, group: ThreadGroup) -> None:
        super().__init__(group.rank, group._places, group._barrier)
        self.sent = self.calls = 0

    def gather(self, values: np.ndarray) -> np.ndarray:
        self.sent, self.calls = self.sent + values.nbytes * (self.size - 1), self.calls + 1
        return super().gather(values)

    def exchange(self, parts: np.ndarray) -> np.ndarray:
        self.sent, self.calls = self.sent + parts.nbytes // self.size * (self.size - 1), self.calls + 1
        return super().exchange(parts)


def rows(title: str) -> list[list[str]]:
    """The cells of the table whose head begins with a title."""
    (table,) = re.findall(rf"^\| {re.escape(title)}.*?\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def counted(ranks: int, size: int = SIZE) -> list[tuple[int, int]]:
    """Bytes and calls of a later step, for each rank."""

    def body(group: ThreadGroup) -> tuple[int, int]:
        counting = Counting(group)
        opt, params = gs.Sharded(gs.AdamW(1e-3, clip_norm=1.0), counting), {"w": np.zeros(size, np.float32)}
        for _ in range(2):
            counting.sent = counting.calls = 0
            opt.apply_gradients({"w": np.ones(size, np.float32)}, params)
        return counting.sent, counting.calls

    return run_in_threads(ranks, body)


def test_the_constants_are_those_of_the_code() -> None:
    assert (FORMULAS["BLOCK"], FORMULAS["BUCKET"]) == (blocks.BLOCK, exchange.BUCKET)
    for ranks in (1, 2, 64, 65, 4096):
        assert FORMULAS["bucket"](ranks) == exchange.bucket_bytes(ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_costs_what_the_formula_says(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = FORMULAS["sharded_step"](ranks, SIZE)
    assert set(counted(ranks)) == {expected}
    (row,) = [row for row in rows("counted in a step of AdamW") if row[0] == f"N = {ranks}"]
    assert row[1:] == [f"{number:,}" for number in (expected[0], expected[0], expected[1], expected[1])]
    for patched in (FORMULAS, exchange):  # and with several buckets
        monkeypatch.setitem(vars(patched) if patched is exchange else patched, "BUCKET", 1_000_000)
    assert set(counted(ranks)) == {FORMULAS["sharded_step"](ranks, SIZE)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_keeps_what_the_formula_says(ranks: int) -> None:
    state, averaged = FORMULAS["sharded_bytes"](ranks, SIZE)
    block = 8 * blocks.BLOCK

    def body(group: ThreadGroup) -> tuple[int, int]:
        opt, params = gs.Sharded(gs.AdamW(1e-3), group), {"w": np.zeros(SIZE, np.float32)}
        opt.apply_gradients({"w": np.ones(SIZE, np.float32)}, params)
        kept = sum(array.nbytes for slots in opt.state.values() for array in slots.values())
        return kept, sum(each.averaged.nbytes for each in opt._planned_step.plan._averagings.values())

    for kept, mean in run_in_threads(ranks, body):
        assert abs(kept - state) <= block
        assert abs(mean - averaged) <= block


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_outer_step_costs_what_the_formula_says(ranks: int, name: Any) -> None:
    width = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 256}[name]
    assert name in wire.WIRES

    def body(group: ThreadGroup) -> int:
        opt, params = gs.DiLoCo(gs.SGD(0.1), every=1, group=group, wire=name), {"w": np.zeros(SIZE, np.float32)}
        opt.apply_gradients({"w": np.ones(SIZE, np.float32)}, params)
        assert opt.outer_report is not None
        return opt.outer_report.sent

    expected = FORMULAS["outer_step"](ranks, SIZE, width)
    for sent in run_in_threads(ranks, body):
        assert abs(sent - expected) < 5000


def shown(gigabytes: float) -> str:
    number = gigabytes / 1e9
    return f"{number:,.0f}" if number >= 20 else f"{number:,.1f}" if number >= 1 else f"{number:,.2f}"


def test_the_table_of_70_billion_parameters() -> None:
    size, found = 70_000_000_000, rows("N | state")
    assert [row[0] for row in found] == ["8", "64", "512", "4,096"]
    for row in found:
        ranks = int(row[0].replace(",", ""))
        sent, calls = FORMULAS["sharded_step"](ranks, size, width=2)
        state, averaged = FORMULAS["sharded_bytes"](ranks, size, state=12)
        kept = [shown(bytes_) for bytes_ in (state, averaged, 3 * FORMULAS["bucket"](ranks), sent)]
        assert row[1:] == [*kept, f"{calls:,}", f"{sent / 50e9:.1f}", f"{calls * (ranks - 1) * 1e-5:.1f}"]


def test_the_table_of_slow_links() -> None:
    widths = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 256}
    for ranks, name, *cells in rows("N | wire"):
        sent = FORMULAS["outer_step"](int(ranks), 70e9, widths[name])
        assert cells == [f"{sent / 1e9:.0f}", f"{sent * 8 / 1e9:,.0f}", f"{sent * 8 / 1e9 / 500:.1f}"]
