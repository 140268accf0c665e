"""The runs of a race: which there are, in which order, and what is measured in each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gradstep as gs
from gradstep.cli.race.entrants import Entrant, Optimizer
from gradstep.cli.race.task import Problem, TaskError, all_finite

CURVE_POINTS = 200
FINAL_SHARE = 0.1  # the final loss is the mean over the last tenth of the steps
SETTLING_STEPS = 5  # not timed: memory is allocated, kernels are compiled
LOST = 1000.0  # a loss this many times the first one counts as diverged

Tick = Callable[["Heat", int], None]


@dataclass(frozen=True)
class Heat:
    """One run before it is run."""

    entrant: Entrant
    rate: float
    seed: int


@dataclass(frozen=True)
class Curve:
    """The losses of a run; each point is the mean over `window` steps."""

    window: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What one run showed."""

    entrant: str
    rate: float
    seed: int
    configuration: str
    curve: Curve
    first_loss: float
    final_loss: float  # infinite when diverged
    metrics: dict[str, float]
    step_us: float | None
    state_bytes: int
    diverged_at: int | None
    diverged_how: str | None


def plan(entrants: Sequence[Entrant], rates: Sequence[float] | None, seeds: int) -> list[Heat]:
    """All runs, ordered so that a race which is cut short has something of everyone: one seed after the
    other, and within a seed the rates from the middle of each grid outwards."""
    grids = {entrant.name: _from_the_middle(entrant.rates(rates)) for entrant in entrants}
    return [
        Heat(entrant, grids[entrant.name][place], seed)
        for seed in range(seeds)
        for place in range(max(map(len, grids.values())))
        for entrant in entrants
        if place < len(grids[entrant.name])
    ]


def run(problem: Problem, heat: Heat, steps: int, tick: Tick) -> Run:
    """Train once. The same seed gives everyone the same first parameters and the same random numbers."""
    optimizer = heat.entrant.build(heat.rate)
    with np.errstate(all="ignore"):
        params = problem.init(heat.seed)
        training = _Training(problem, optimizer, params, np.random.default_rng((heat.seed, 1)))
        diverged_how = training.train(steps, lambda step: tick(heat, step))
        metrics = {} if diverged_how else _evaluate(problem, params)
    losses = training.losses
    tail = losses[-math.ceil(FINAL_SHARE * steps) :]
    return Run(
        entrant=heat.entrant.name,
        rate=heat.rate,
        seed=heat.seed,
        configuration=repr(optimizer),
        curve=_thin(losses, steps),
        first_loss=losses[0],
        final_loss=math.inf if diverged_how else sum(tail) / len(tail),
        metrics=metrics,
        step_us=training.step_us(),
        state_bytes=sum(slot.nbytes for slots in optimizer.state.values() for slot in slots.values()),
        diverged_at=len(training.durations) if diverged_how else None,
        diverged_how=diverged_how,
    )


class _Training:
    """The loop over steps, and what it has seen so far."""

    def __init__(self, problem: Problem, optimizer: Optimizer, params: Any, rng: np.random.Generator) -> None:
        self.problem, self.optimizer, self.params, self.rng = problem, optimizer, params, rng
        self.losses: list[float] = []
        self.durations: list[int] = []

    def train(self, steps: int, tick: Callable[[int], None]) -> str | None:
        """Take the steps; returns how it diverged, if it did."""
        for step in range(steps):
            try:
                loss, grads = self.problem.loss_and_grads(self.params, step, self.rng)
            except TaskError as error:
                if step == 0 or not _is_divergence(error, self.params):
                    raise
                return f"the task raised {type(error.__cause__).__name__}"
            self.losses.append(loss)
            if not math.isfinite(loss):
                return f"the loss is {loss}"
            if loss > LOST * max(1.0, abs(self.losses[0])):
                return f"the loss is {loss:.3g}, the first was {self.losses[0]:.3g}"
            start = perf_counter_ns()
            try:
                self.optimizer.apply_gradients(grads, self.params)
            except (gs.NonFiniteGradientError, gs.NonFiniteScalarError) as error:
                return str(error)
            except gs.GradstepError as error:
                raise self.problem.complain(f"step {step} of {self.optimizer!r}: {error}") from None
            self.durations.append(perf_counter_ns() - start)
            tick(step + 1)
        return None

    def step_us(self) -> float | None:
        """The median duration of an optimizer step in microseconds."""
        timed = self.durations[SETTLING_STEPS:] or self.durations
        return median(timed) / 1000 if timed else None


def _from_the_middle(rates: list[float]) -> list[float]:
    middle = (len(rates) - 1) / 2
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - middle))


def _evaluate(problem: Problem, params: Any) -> dict[str, float]:
    try:
        return problem.evaluate(params)
    except TaskError as error:
        if _is_divergence(error, params):
            return {}
        raise


def _is_divergence(error: TaskError, params: Any) -> bool:
    """Whether the task failed over numbers that training had ruined, rather than by a mistake of its own."""
    return isinstance(error.__cause__, ArithmeticError) or not all_finite(params)


def _thin(losses: Sequence[float], steps: int) -> Curve:
    window = math.ceil(steps / CURVE_POINTS)
    values: NDArray[np.float64] = np.array(losses)
    with np.errstate(all="ignore"):
        means = [float(values[start : start + window].mean()) for start in range(0, len(values), window)]
    return Curve(window, tuple(means))
