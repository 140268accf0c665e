"""What a call of `apply_gradients` did."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

Rate: TypeAlias = float | dict[str, float | None] | None
"""The learning rate of a step: by glob where it is mapped, None where there is none."""


class Report(NamedTuple):
    """The outcome of the last `apply_gradients`.

    Attributes:
        applied: whether the step was taken; False when `nonfinite="skip"` skipped it.
        step: the number of steps taken, this one included.
        learning_rate: the rate of this step, by glob where it is mapped; None for a family that has none.
        grad_norm: the Euclidean norm of all gradients before clipping; None when nothing asked for it.
        culprits: the names of gradients that hold NaN or infinity; empty when nothing asked for them.
    """

    applied: bool
    step: int
    learning_rate: Rate
    grad_norm: float | None
    culprits: tuple[str, ...]


class AwaitedReport(NamedTuple):
    """A report that only a device can complete; read when somebody asks for it."""

    read: Callable[[], Report]
