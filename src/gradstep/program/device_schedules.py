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
        return schedule.init * schedule.decay_rate**step
    if isinstance(schedule, step_decay):
        return schedule.init * schedule.decay_rate ** (step // schedule.step_size)
    if isinstance(schedule, cosine_decay):
        part = functions.minimum(step, schedule.decay_steps) / schedule.decay_steps
        value = schedule.end + (schedule.init - schedule.end) * 0.5 * (1.0 + functions.cos(math.pi * part))
        return functions.where(step >= schedule.decay_steps, schedule.end, value)
    if isinstance(schedule, linear_schedule):
        part = functions.minimum(step, schedule.steps) / schedule.steps
        value = schedule.init + (schedule.end - schedule.init) * part
        return functions.where(step >= schedule.steps, schedule.end, value)
    if isinstance(schedule, join_schedules):
        value = schedule_on_device(functions, schedule.schedules[0], step)
        for boundary, following in zip(schedule.boundaries, schedule.schedules[1:], strict=True):
            later = schedule_on_device(functions, following, functions.maximum(step - boundary, 0))
            value = functions.where(step >= boundary, later, value)
        return value
    return schedule(step)
