"""Schedules: functions from the number of steps already taken to a scalar.

A step that is an array of JAX or MLX, as these libraries count inside of compiled functions, gives an array.
"""

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, overload

from gradstep.errors import ArgumentTypeError, ConfigurationError, NonFiniteScalarError, OutOfRangeError
from gradstep.learning_rate import to_float

__all__ = ["cosine_decay", "exponential_decay", "join_schedules", "linear_schedule", "step_decay"]


class _Schedule(ABC):
    """What all schedules share: they can be called with numbers and with arrays."""

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Any) -> Any: ...
    def __call__(self, step: Any) -> Any:
        functions = None if type(step) is int else _functions_of(step)
        if functions is None:
            return self._at(step)
        from gradstep.program.device_schedules import schedule_on_device

        return schedule_on_device(functions, self, step)

    @abstractmethod
    def _at(self, step: int) -> float:
        """The value at a step that is a number."""


@dataclass(frozen=True)
class exponential_decay(_Schedule):
    """`init * decay_rate**step`.

    Args:
        init: the value at step 0.
        decay_rate: the factor of each step.

    Raises:
        NonFiniteScalarError: an argument is NaN or infinite.

    Example:
        >>> from gradstep import exponential_decay
        >>> exponential_decay(0.1, 0.5)(2)
        0.025
    """

    init: float
    decay_rate: float

    def __post_init__(self) -> None:
        _check_finite(self, "init", "decay_rate")

    def _at(self, step: int) -> float:
        return self.init * _power(self.decay_rate, step)


@dataclass(frozen=True)
class step_decay(_Schedule):
    """`init * decay_rate**(step // step_size)`.

    Args:
        init: the value at step 0.
        decay_rate: the factor of every `step_size` steps.
        step_size: how many steps share a value, at least 1.

    Raises:
        NonFiniteScalarError: an argument is NaN or infinite.
        OutOfRangeError: `step_size` is below 1.

    Example:
        >>> from gradstep import step_decay
        >>> [step_decay(1.0, 0.5, 10)(step) for step in (9, 10, 20)]
        [1.0, 0.5, 0.25]
    """

    init: float
    decay_rate: float
    step_size: int

    def __post_init__(self) -> None:
        _check_finite(self, "init", "decay_rate")
        _check_count(self, "step_size")

    def _at(self, step: int) -> float:
        return self.init * _power(self.decay_rate, step // self.step_size)


@dataclass(frozen=True)
class cosine_decay(_Schedule):
    """From `init` down to `end` along half a cosine in `decay_steps` steps, then exactly `end`.

    `end + (init - end) * (1 + cos(pi * step / decay_steps)) / 2`

    Args:
        init: the value at step 0.
        decay_steps: how many steps the decay takes, at least 1.
        end: the value from `decay_steps` on.

    Raises:
        NonFiniteScalarError: an argument is NaN or infinite.
        OutOfRangeError: `decay_steps` is below 1.

    Example:
        >>> from gradstep import cosine_decay
        >>> [cosine_decay(1.0, 100)(step) for step in (0, 50, 100, 101)]
        [1.0, 0.5, 0.0, 0.0]

    Source: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983
    """

    init: float
    decay_steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(self, "init", "end")
        _check_count(self, "decay_steps")

    def _at(self, step: int) -> float:
        if step >= self.decay_steps:
            return self.end
        if step == 0:
            return self.init
        return self.end + (self.init - self.end) * 0.5 * (1.0 + math.cos(math.pi * step / self.decay_steps))


@dataclass(frozen=True)
class linear_schedule(_Schedule):
    """From `init` to `end` in equal parts over `steps` steps, then exactly `end`.

    `init + (end - init) * step / steps`

    Args:
        init: the value at step 0.
        end: the value from `steps` on.
        steps: how many steps the way takes, at least 1.

    Raises:
        NonFiniteScalarError: an argument is NaN or infinite.
        OutOfRangeError: `steps` is below 1.

    Example:
        >>> from gradstep import linear_schedule
        >>> [linear_schedule(0.0, 1.0, 4)(step) for step in (0, 1, 4, 5)]
        [0.0, 0.25, 1.0, 1.0]
    """

    init: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_finite(self, "init", "end")
        _check_count(self, "steps")

    def _at(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.init + (self.end - self.init) * (step / self.steps)


@dataclass(frozen=True)
class join_schedules(_Schedule):
    """One schedule after another: schedule `i + 1` takes over at `boundaries[i]` and counts from there.

    Only the active schedule is called, unless the step is an array.

    Args:
        schedules: at least one function `step -> float`.
        boundaries: the steps at which the next one takes over, increasing; one fewer than schedules.

    Raises:
        ConfigurationError: the numbers do not match, or the boundaries do not increase.
        ArgumentTypeError: a schedule is not a function, or a boundary is not an integer.

    Example:
        >>> from gradstep import cosine_decay, join_schedules, linear_schedule
        >>> warmup = join_schedules([linear_schedule(0.0, 1.0, 10), cosine_decay(1.0, 90)], [10])
        >>> [warmup(step) for step in (5, 10, 55, 100)]
        [0.5, 1.0, 0.5, 0.0]
    """

    schedules: Sequence[Callable[[int], SupportsFloat]]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        for schedule in self.schedules:
            if not callable(schedule):
                raise ArgumentTypeError(f"schedules must be functions step -> float, got {schedule!r}")
        object.__setattr__(self, "boundaries", tuple(_integer(boundary, "a boundary") for boundary in self.boundaries))
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ConfigurationError(
                f"{len(self.schedules)} schedules need {max(len(self.schedules) - 1, 0)} boundaries, "
                f"got {len(self.boundaries)}" + ("" if self.schedules else "; pass at least one schedule")
            )
        if any(later <= earlier for earlier, later in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ConfigurationError(f"boundaries must increase, got {list(self.boundaries)}")

    def _at(self, step: int) -> float:
        start, active = 0, self.schedules[0]
        for boundary, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            if step >= boundary:
                start, active = boundary, schedule
        return to_float(active(step - start), f"the result of {active!r}")


def _functions_of(step: object) -> Any:
    """The module with the functions for a step that is an array of JAX or MLX; None for numbers."""
    for library, array, functions in (("mlx.core", "array", "mlx.core"), ("jax", "Array", "jax.numpy")):
        if library in sys.modules and isinstance(step, getattr(sys.modules[library], array)):
            return importlib.import_module(functions)
    return None


def _check_finite(schedule: object, *names: str) -> None:
    for name in names:
        value = to_float(getattr(schedule, name), f"{type(schedule).__name__}'s {name}")
        if not math.isfinite(value):
            raise NonFiniteScalarError(f"{type(schedule).__name__}'s {name} must be finite, got {value}")
        object.__setattr__(schedule, name, value)


def _check_count(schedule: object, name: str) -> None:
    value = _integer(getattr(schedule, name), f"{type(schedule).__name__}'s {name}")
    if value < 1:
        raise OutOfRangeError(f"{type(schedule).__name__}'s {name} must be at least 1, got {value}")
    object.__setattr__(schedule, name, value)


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"{what} must be an integer, got {value!r}")
    return int(value)  # pyright: ignore[reportArgumentType]


def _power(base: float, exponent: int) -> float:
    """`base**exponent`, infinite where Python would raise: the optimizer reports it with its context."""
    try:
        return base**exponent
    except (OverflowError, ZeroDivisionError):
        return math.inf
