"""What a person reads: numbers, the ranking at several widths, advice, and progress without a terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_ranking import ONE, RATES, TWO, a_run, seeds

from gradstep.cli.numbers import bytes_text, decimals, duration_text, rate_text, short, with_spread
from gradstep.cli.race.contest import Run
from gradstep.cli.race.ranking import Place, rank
from gradstep.cli.race.screen import show_findings, show_ranking

Race = Callable[..., tuple[int, dict[str, Any]]]


def printed(width: int, show: Callable[..., None], *arguments: Any) -> str:
    stream = io.StringIO()
    show(*arguments, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def places_with(metrics: dict[str, float]) -> list[Place]:
    runs: list[Run] = []
    for entrant, loss in ((ONE, 0.0123), (TWO, 0.234)):
        runs += [run for rate in RATES for run in seeds(rate, [loss * rate**0.1, loss * rate**0.1 + 0.001], entrant)]
    for run in runs:
        run.metrics.clear()
        run.metrics.update(metrics)
    return rank(runs, [ONE, TWO], RATES)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "0.0123"),
        (2.3456, "2.35"),
        (123.4, "123"),
        (0.0, "0.000"),
        (-0.5, "-0.500"),
        (1e-7, "1.00e-07"),
        (1e9, "1.00e+09"),
        (float("nan"), "-"),
    ],
)
def test_losses_have_three_digits(value: float, text: str):
    assert short(value) == text


def test_spreads_have_the_decimals_of_their_loss():
    assert with_spread(0.0123, 0.0004, decimals(0.0123)) == "0.0123 ±0.0004"
    assert with_spread(0.1234, 0.0123, decimals(0.0123)) == "0.1234 ±0.0123"
    assert with_spread(1e-9, 2e-10, decimals(0.0123)) == "1.00e-09 ±2e-10"
    assert with_spread(0.5, None, 2) == "0.50"


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-3, "1e-3"), (3e-4, "3e-4"), (0.03, "0.03"), (1.0, "1"), (10.0, "10"), (2.5e-5, "2.5e-5")]
)
def test_rates_read_as_they_are_typed(rate: float, text: str):
    assert rate_text(rate) == text
    assert float(text) == rate


def test_bytes_and_durations_have_units():
    texts = [bytes_text(count) for count in (0, 999, 1000, 38440, 10**6, 3 * 2**30)]
    assert texts == ["0 B", "999 B", "1.0 KiB", "38 KiB", "977 KiB", "3.0 GiB"]
    assert [duration_text(seconds) for seconds in (0.4, 59.4, 67, 3600)] == ["0 s", "59 s", "1 min 07 s", "60 min 00 s"]


def test_the_ranking_fits_eighty_columns_with_its_metrics():
    text = printed(80, show_ranking, places_with({"test accuracy": 0.97, "test loss": 0.1}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert text.count("One") == 1
    (line,) = (line for line in lines if "One" in line)
    assert line.split()[:2] == ["1", "One"]
    for cell in ("0.0103", "±0.0005", "<0.1", "0.970", "0.100", "64 B", "0/6"):
        assert cell in line


@pytest.mark.parametrize("width", [60, 80])
def test_metrics_that_do_not_fit_get_a_table_of_their_own(width: int):
    metrics = {f"metric {letter}": 0.5 for letter in "abcdef"}
    text = printed(width, show_ranking, places_with(metrics))
    assert max(map(len, text.splitlines())) <= width
    assert text.count("One") == 2
    assert text.count("0.500") == 2 * len(metrics)


def test_the_winner_is_given_as_code_and_narrow_grids_come_with_a_command():
    text = printed(200, show_findings, places_with({}), "gradstep race my_task.py --steps 50", 2)
    assert "Winner: One(0.1)\n" in text
    assert "  gradstep race my_task.py --steps 50 --optimizers one --rates 0.01,0.033,0.1\n" in text
    assert "Too close to call" not in text


def test_nothing_is_advised_when_the_best_rate_lies_inside():
    runs = [a_run(rate, 0.1 if rate == 1.0 else 0.2) for rate in RATES]
    text = printed(200, show_findings, rank(runs, [ONE], RATES), "gradstep race", 1)
    assert "edge" not in text
    assert "Widen" not in text


def test_one_seed_decides_nothing_and_says_so():
    runs = [a_run(1.0, 0.1), a_run(1.0, 0.2, TWO)]
    assert "One seed only" in printed(200, show_findings, rank(runs, [ONE, TWO], [1.0]), "", 1)


def test_lower_rates_are_advised_when_every_run_diverged():
    text = printed(200, show_findings, rank([a_run(0.1, 0, diverged_at=3)], [ONE], RATES), "gradstep race", 1)
    assert "try lower rates: gradstep race --optimizers one --rates 1e-4,1e-3,0.01\n" in text


def test_ties_are_named():
    runs = [*seeds(1.0, [0.1, 0.3]), *seeds(1.0, [0.2, 0.4], TWO)]
    assert "Too close to call (more --seeds tell): Two" in printed(
        200, show_findings, rank(runs, [ONE, TWO], [1.0]), "", 2
    )


def test_without_a_terminal_progress_is_a_few_plain_lines(
    race: Race, task_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    from test_race_files import TASK

    race(str(task_file(TASK)), optimizers="sgd,lion,muon", seeds=2, steps=5)
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert "\r" not in output.err
    lines = output.err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("3/30 runs, best so far ")
    assert lines[-1].startswith("30/30 runs")
    assert "Muon at this rate for matrices, AdamW at 1/20 of it" in output.out
