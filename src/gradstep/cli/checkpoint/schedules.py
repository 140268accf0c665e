"""The schedules of a checkpoint: what each gave last and, where the file holds the whole of it, its curve."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from gradstep.checkpoint.nodes import RuleNode
from gradstep.checkpoint.values import Decoder
from gradstep.cli.checkpoint.spelling import by_glob, kind_of
from gradstep.errors import GradstepError
from gradstep.hyperparameters import Resolved
from gradstep.schedules import cosine_decay, exponential_decay, join_schedules, linear_schedule, step_decay

POINTS = 36  # of a curve, at most
STRETCHES = 5  # of a step_decay
FADED = 100  # an exponential decay is shown until it has changed by this factor
UNKNOWN = 100  # steps of a schedule that has no length


@dataclass(frozen=True)
class Curve:
    """A schedule from step 0 to its horizon.

    Attributes:
        steps: the steps at which it was asked, evenly spaced, the first and the last among them.
        values: what it said; NaN where it says nothing.
        coming: its value for the next step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    coming: float


@dataclass(frozen=True)
class Scheduled:
    """A scalar that follows a schedule: of a hyperparameter, for a glob if mapped, at a place if one of a pair."""

    hyperparameter: str
    glob: str | None
    place: int | None
    data: Any
    resolved: Resolved | None

    @property
    def label(self) -> str:
        """Reads like `betas['*.bias'][1]`."""
        indices = [repr(index) for index in (self.glob, self.place) if index is not None]
        return self.hyperparameter + "".join(f"[{index}]" for index in indices)

    def curve(self, step: int, points: int = POINTS) -> Curve | None:
        """The curve as step number `step` is to come; None where the file only names a function.

        Raises:
            CheckpointError: the file describes no schedule.
        """
        if _holds_function(self.data):
            return None
        schedule = Decoder({}).decode(self.label, self.data)
        horizon = max(_length(schedule), 2 * step)
        count = min(points, horizon + 1)
        steps = tuple(place * horizon // (count - 1) for place in range(count))
        return Curve(steps, tuple(_value(schedule, at) for at in steps), _value(schedule, step))


def schedules_of(node: RuleNode) -> list[Scheduled]:
    """All that follows a schedule, in the order of hyperparameters."""
    found: list[Scheduled] = []
    for name, values in node.resolved.items():
        leaves = list(_leaves(name, node.hyperparameters.get(name)))
        known = values if len(values) == len(leaves) else [None] * len(leaves)
        found += [Scheduled(*leaf, value) for leaf, value in zip(leaves, known, strict=True)]
    return found


Leaf = tuple[str, str | None, int | None, Any]


def _leaves(name: str, data: Any, glob: str | None = None, place: int | None = None) -> Iterator[Leaf]:
    kind = kind_of(data)
    if kind == "globs":
        for key, part in by_glob(data).items():
            yield from _leaves(name, part, key, place)
    elif kind == "tuple":
        for number, part in enumerate(data["values"]):
            yield from _leaves(name, part, glob, number)
    elif kind in ("schedule", "function"):
        yield name, glob, place, data


def _holds_function(data: Any) -> bool:
    if kind_of(data) == "function":
        return True
    parts = data["arguments"].get("schedules") if kind_of(data) == "schedule" else None
    return isinstance(parts, list) and any(map(_holds_function, cast("list[Any]", parts)))


def _length(schedule: Any) -> int:
    """How many steps of a schedule are worth seeing."""
    if isinstance(schedule, cosine_decay):
        return schedule.decay_steps
    if isinstance(schedule, linear_schedule):
        return schedule.steps
    if isinstance(schedule, step_decay):
        return STRETCHES * schedule.step_size
    if isinstance(schedule, join_schedules):
        return max((0, *schedule.boundaries)) + _length(schedule.schedules[-1])
    if isinstance(schedule, exponential_decay) and 0 < schedule.decay_rate != 1:
        return math.ceil(math.log(FADED) / abs(math.log(schedule.decay_rate)))
    return UNKNOWN


def _value(schedule: Any, step: int) -> float:
    try:
        return float(schedule(step))
    except (GradstepError, ArithmeticError):
        return math.nan
