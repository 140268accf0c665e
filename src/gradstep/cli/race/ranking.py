"""From runs to places: the best rate of each entrant, and who comes before whom."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from gradstep.cli.race.contest import Run
from gradstep.cli.race.entrants import Entrant


@dataclass(frozen=True)
class AtRate:
    """The runs of one entrant at one rate, over the seeds."""

    rate: float
    runs: tuple[Run, ...]

    @property
    def diverged(self) -> int:
        """How many of the runs diverged."""
        return sum(run.diverged_at is not None for run in self.runs)

    @property
    def final_loss(self) -> float:
        """The median over the seeds."""
        return median(run.final_loss for run in self.runs)

    @property
    def merit(self) -> tuple[float, ...]:
        """Less is better: first few diverged runs, then a low final loss, then a long life."""
        longest = max(run.diverged_at or 0 for run in self.runs)
        return (self.diverged, self.final_loss, -longest)


@dataclass(frozen=True)
class Place:
    """One entrant's line in the ranking."""

    entrant: Entrant
    grid: tuple[float, ...]  # ascending; a race that was cut short may not have tried all
    tried: tuple[AtRate, ...]

    @property
    def best(self) -> AtRate:
        """The rate with the fewest diverged runs and, among those, the lowest final loss."""
        return min(self.tried, key=lambda at: at.merit)

    @property
    def edge(self) -> str | None:
        """Which end of the grid the best rate is, "lowest" or "highest": a better one may lie beyond."""
        if len(self.grid) == 1 or self.final_loss is None:
            return None
        return {self.grid[0]: "lowest", self.grid[-1]: "highest"}.get(self.best.rate)

    @property
    def finished(self) -> list[Run]:
        """The runs at the best rate that did not diverge."""
        return [run for run in self.best.runs if run.diverged_at is None]

    @property
    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest final loss at the best rate; none when every run diverged."""
        losses = [run.final_loss for run in self.finished]
        return (min(losses), max(losses)) if losses else None

    @property
    def final_loss(self) -> float | None:
        """The median final loss at the best rate; none when every run diverged."""
        losses = [run.final_loss for run in self.finished]
        return median(losses) if losses else None

    @property
    def metrics(self) -> dict[str, float]:
        """The task's metrics at the best rate, medians over the seeds; NaN where any is NaN."""
        names = dict.fromkeys(name for run in self.finished for name in run.metrics)
        return {name: _median([run.metrics[name] for run in self.finished if name in run.metrics]) for name in names}

    @property
    def diverged_at(self) -> int | None:
        """The step up to which the longest run lived; none unless every run diverged."""
        if self.final_loss is not None:
            return None
        return max(run.diverged_at or 0 for run in self.best.runs)

    @property
    def runs(self) -> list[Run]:
        """All runs of this entrant."""
        return [run for at in self.tried for run in at.runs]

    @property
    def diverged(self) -> int:
        """How many of all runs diverged."""
        return sum(at.diverged for at in self.tried)

    @property
    def step_us(self) -> float | None:
        """The duration of an optimizer step in microseconds: the median over all runs that did not diverge, if any."""
        whole = [run for run in self.runs if run.diverged_at is None]
        times = [run.step_us for run in whole or self.runs if run.step_us is not None]
        return median(times) if times else None

    @property
    def state_bytes(self) -> int:
        """The bytes of all slots."""
        return max(run.state_bytes for run in self.runs)


def rank(runs: Sequence[Run], entrants: Sequence[Entrant], rates: Sequence[float] | None) -> list[Place]:
    """The entrants that have a run, best first; those that always diverged come last."""
    places: list[Place] = []
    for entrant in entrants:
        grid = tuple(entrant.rates(rates))
        own = [run for run in runs if run.entrant == entrant.name]
        at_rates = (AtRate(rate, tuple(run for run in own if run.rate == rate)) for rate in grid)
        if tried := tuple(at for at in at_rates if at.runs):
            places.append(Place(entrant, grid, tried))
    return sorted(places, key=_order)


def close_to_the_winner(places: Sequence[Place]) -> list[Place]:
    """Those behind the winner whose range of final losses overlaps the winner's."""
    if not places or places[0].range is None:
        return []
    worst = places[0].range[1]
    return [place for place in places[1:] if place.range is not None and place.range[0] <= worst]


def _order(place: Place) -> tuple[bool, float]:
    if place.final_loss is None:
        return True, -(place.diverged_at or 0)
    return False, place.final_loss


def _median(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else median(values)
