"""A learning rate, or any other scalar, that is fixed or follows a schedule."""

import math
from collections.abc import Callable
from typing import Any, SupportsFloat, cast

import numpy as np

from gradstep.errors import ArgumentTypeError, NonFiniteScalarError

Schedule = Callable[[int], SupportsFloat]


class LearningRate:
    """A float, or a schedule `step -> float`.

    Args:
        value: the rate itself, another `LearningRate`, or a function of the steps already taken (0 at the first).

    Raises:
        ArgumentTypeError: the value is neither a number nor a function.

    Example:
        >>> from gradstep import LearningRate
        >>> LearningRate(0.1).current(7)
        0.1
        >>> LearningRate(lambda step: 1 / (1 + step)).try_current(3)
        0.25
    """

    __slots__ = ("value",)

    value: float | Schedule

    def __init__(self, value: "SupportsFloat | Schedule | LearningRate") -> None:
        if isinstance(value, LearningRate):
            value = value.value
        self.value = value if callable(value) else to_float(value, "a learning rate")

    @property
    def is_schedule(self) -> bool:
        """Whether the rate depends on the step."""
        return callable(self.value)

    def current(self, step: int) -> float:
        """The rate at `step`, whatever it is; a schedule is called."""
        if not callable(self.value):
            return self.value
        return to_float(self.value(step), f"the result of {self.value!r} at step {step}")

    def try_current(self, step: int) -> float:
        """The rate at `step`; `NonFiniteScalarError` when it is NaN or infinite."""
        rate = self.current(step)
        if not math.isfinite(rate):
            origin = f"the schedule {self.value!r} gave {rate}" if self.is_schedule else f"the value is {rate}"
            raise NonFiniteScalarError(f"at step {step} {origin}; expected a finite number")
        return rate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearningRate) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        kind = "schedule" if self.is_schedule else "fixed"
        return f"LearningRate({kind} {self.value!r})"


def to_float(value: Any, what: str) -> float:
    """`float(value)`, refusing text and booleans, with an error that says what came."""
    if not isinstance(value, (str, bytes, bool, np.bool_)) and isinstance(value, SupportsFloat):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError):
            pass
    came = type(cast("object", value)).__name__
    raise ArgumentTypeError(f"{what} must be a number, got {value!r} ({came})")
