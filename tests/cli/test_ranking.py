"""From runs to places: medians, best rates, ties, grid ends, and optimizers that always diverged."""

import math
from collections.abc import Sequence

import pytest

import gradstep as gs
from gradstep.cli.race.contest import Curve, Run
from gradstep.cli.race.entrants import Entrant
from gradstep.cli.race.ranking import close_to_the_winner, rank

ONE = Entrant("One", 1.0, gs.SGD, "one")
TWO = Entrant("Two", 1.0, gs.SGD, "two")
RATES = [0.1, 1.0, 10.0]


def a_run(
    rate: float,
    loss: float,
    entrant: Entrant = ONE,
    seed: int = 0,
    diverged_at: int | None = None,
    step_us: float = 5.0,
) -> Run:
    lost = diverged_at is not None
    return Run(
        entrant=entrant.name,
        rate=rate,
        seed=seed,
        configuration=f"{entrant.name}({rate})",
        curve=Curve(1, (1.0, loss)),
        first_loss=1.0,
        final_loss=math.inf if lost else loss,
        metrics={} if lost else {"accuracy": 1 - loss},
        step_us=step_us,
        state_bytes=64,
        diverged_at=diverged_at,
        diverged_how="the loss is nan" if lost else None,
    )


def seeds(rate: float, losses: Sequence[float], entrant: Entrant = ONE) -> list[Run]:
    return [a_run(rate, loss, entrant, seed) for seed, loss in enumerate(losses)]


def test_a_place_is_the_median_over_seeds_at_the_rate_with_the_lowest_one():
    runs = [*seeds(0.1, [0.5, 0.4, 0.6]), *seeds(1.0, [0.9, 0.2, 0.3]), *seeds(10.0, [0.1, 0.8, 0.7])]
    (place,) = rank(runs, [ONE], RATES)
    assert place.best.rate == 1.0
    assert place.final_loss == 0.3
    assert place.range == (0.2, 0.9)
    assert place.metrics == {"accuracy": pytest.approx(0.7)}
    assert place.edge is None
    assert (len(place.runs), place.diverged, place.state_bytes) == (9, 0, 64)


def test_optimizers_are_ranked_by_final_loss_and_the_diverged_come_last():
    three, four = Entrant("Three", 1.0, gs.SGD, "three"), Entrant("Four", 1.0, gs.SGD, "four")
    runs = [
        a_run(1.0, 0, three, diverged_at=4),
        a_run(10.0, 0, three, diverged_at=2),
        a_run(1.0, 0.5, ONE),
        a_run(10.0, 0, four, diverged_at=9),
        a_run(1.0, 0.2, TWO),
    ]
    places = rank(runs, [three, ONE, four, TWO], RATES)
    assert [place.entrant.name for place in places] == ["Two", "One", "Four", "Three"]
    assert [place.diverged_at for place in places] == [None, None, 9, 4]
    assert [place.final_loss for place in places] == [0.2, 0.5, None, None]
    assert places[3].diverged == 2


def test_a_rate_that_survives_every_seed_beats_a_better_one_that_does_not():
    runs = [*seeds(0.1, [0.5, 0.6, 0.7]), *seeds(1.0, [0.1, 0.1]), a_run(1.0, 0, seed=2, diverged_at=3)]
    (place,) = rank(runs, [ONE], RATES)
    assert (place.best.rate, place.diverged) == (0.1, 1)


@pytest.mark.parametrize(("best", "edge"), [(0.1, "lowest"), (1.0, None), (10.0, "highest")])
def test_the_end_of_the_grid_is_noticed(best: float, edge: str | None):
    (place,) = rank([a_run(rate, 0.1 if rate == best else 0.2) for rate in RATES], [ONE], RATES)
    assert place.edge == edge


def test_a_grid_of_one_rate_or_of_diverged_runs_has_no_end():
    assert rank([a_run(1.0, 0.1)], [ONE], [1.0])[0].edge is None
    assert rank([a_run(0.1, 0, diverged_at=3)], [ONE], RATES)[0].edge is None


def test_the_end_of_what_was_run_is_not_the_end_of_the_grid():
    assert rank([a_run(1.0, 0.1)], [ONE], RATES)[0].edge is None


def test_those_whose_range_reaches_the_winners_are_too_close_to_call():
    runs = [*seeds(1.0, [0.10, 0.20, 0.30]), *seeds(1.0, [0.25, 0.35, 0.45], TWO)]
    far = Entrant("Far", 1.0, gs.SGD, "far")
    runs += seeds(1.0, [0.31, 0.4, 0.5], far)
    places = rank(runs, [ONE, TWO, far], RATES)
    assert [place.entrant.name for place in close_to_the_winner(places)] == ["Two"]


def test_nobody_is_close_to_a_winner_that_diverged():
    assert close_to_the_winner(rank([a_run(1.0, 0, diverged_at=1)], [ONE, TWO], RATES)) == []


def test_entrants_without_a_run_have_no_place():
    assert [place.entrant.name for place in rank([a_run(1.0, 0.1, TWO)], [ONE, TWO], RATES)] == ["Two"]


def test_time_per_step_is_the_median_over_the_runs_that_went_through():
    runs = [a_run(rate, 0.1, step_us=us) for rate, us in zip(RATES, [1.0, 7.0, 100.0], strict=True)]
    lost = [a_run(0.1, 0, seed=seed, diverged_at=1, step_us=900.0) for seed in range(5)]
    assert rank(runs + lost, [ONE], RATES)[0].step_us == 7.0
    assert rank(lost, [ONE], RATES)[0].step_us == 900.0


def test_a_metric_that_is_not_a_number_once_is_not_a_number():
    first, second = a_run(1.0, 0.1, seed=0), a_run(1.0, 0.1, seed=1)
    second.metrics["accuracy"] = math.nan
    assert math.isnan(rank([first, second], [ONE], RATES)[0].metrics["accuracy"])
