"""Schedules of a step count that is an array, inside a compiled training step."""

import math
from collections.abc import Callable
from typing import Any

from gradstep.schedules import cosine_decay, exponential_decay, join_schedules, linear_schedule, step_decay


def schedule_on_device(functions: Any, schedule: Callable[[Any], Any], step: Any) -> Any:
    """The value at `step`, an array without dimensions; a schedule that is not ours is called with it.

    Args:
        functions: the library's module with `where`, `cos` and `minimum`: `jax.numpy` or `mlx.core`.
    """
    if isinstance(schedule, exponential_decay):
        return schedule.init * _power(functions, schedule.decay_rate, step)
    if isinstance(schedule, step_decay):
        return schedule.init * _power(functions, schedule.decay_rate, step // schedule.step_size)
    if isinstance(schedule, cosine_decay):
        left = _part_left(functions, step, schedule.decay_steps)
        sine = functions.sin(0.5 * math.pi * left)  # 1 + cos(x) loses its digits near the end
        return schedule.end + (schedule.init - schedule.end) * (sine * sine)
    if isinstance(schedule, linear_schedule):
        return schedule.end + (schedule.init - schedule.end) * _part_left(functions, step, schedule.steps)
    if isinstance(schedule, join_schedules):
        value = schedule_on_device(functions, schedule.schedules[0], step)
        for boundary, following in zip(schedule.boundaries, schedule.schedules[1:], strict=True):
            later = schedule_on_device(functions, following, functions.maximum(step, boundary) - boundary)
            value = functions.where(step >= boundary, later, value)
        return value
    return schedule(step)


def _part_left(functions: Any, step: Any, steps: int) -> Any:
    return (steps - functions.minimum(step, steps)) / steps


def _power(functions: Any, base: float, exponent: Any) -> Any:
    """`base**exponent`, with the logarithm in float64."""
    return functions.exp(exponent * math.log(base)) if base > 0 else base**exponent
