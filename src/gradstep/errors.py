"""Every error that gradstep raises: one base, and the built-in exception that fits each case."""

from collections.abc import Sequence
from typing import Any


class GradstepError(Exception):
    """The base of all errors raised by gradstep."""


class NonFiniteScalarError(GradstepError, ValueError):
    """A hyperparameter, a schedule's result or an expression of them is NaN, infinite or undefined."""


class OutOfRangeError(GradstepError, ValueError):
    """A hyperparameter lies outside of its range, or becomes so when rounded to the compute dtype."""


class ConfigurationError(GradstepError, ValueError):
    """Arguments that do not go together, or an option in a place where it has no meaning."""


class ArgumentTypeError(GradstepError, TypeError):
    """An argument, or an entry of `params` or `grads`, is of a type that cannot serve there."""


class ShapeError(GradstepError, ValueError):
    """A gradient or a slot does not have the shape of its parameter."""


class DtypeError(GradstepError, TypeError):
    """An array's dtype cannot be trained or does not fit its parameter."""


class DeviceError(GradstepError, ValueError):
    """An array lies on a device that this executor cannot reach."""


class CheckpointError(GradstepError, ValueError):
    """A file or a state dict is no checkpoint, is damaged, or has a format that this version does not know."""


class MismatchError(GradstepError, ValueError):
    """A checkpoint does not fit the optimizer or the parameters.

    Attributes:
        differences: everything that is missing, unexpected or different, as `Difference`s.
    """

    def __init__(self, message: str, differences: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.differences = list(differences)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.differences)


class UnknownParameterError(GradstepError, KeyError):
    """A gradient or a setting names a parameter that does not exist."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class DuplicateNameError(GradstepError, ValueError):
    """Two paths of a tree of arrays give the same dotted name."""


class AliasedParametersError(GradstepError, ValueError):
    """Memory that the step would write overlaps other memory of the step."""


class ReadOnlyError(GradstepError, ValueError):
    """A parameter cannot be written."""


class NonFiniteGradientError(GradstepError, ValueError):
    """A gradient holds NaN or infinity, and the optimizer was told to raise."""


class RuleError(GradstepError, TypeError):
    """A rule does something that cannot become a program."""


class TracingError(GradstepError, RuntimeError):
    """A step was taken on arrays that have no values yet, inside a transformation of the array library."""


def listing(names: Sequence[str]) -> str:
    """Names as an error lists them."""
    shown = ", ".join(map(repr, names[:8]))
    return (shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


class CommunicationError(GradstepError, RuntimeError):
    """A process of the group is dead, silent, or does something else."""
