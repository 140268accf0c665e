"""Every error that gradstep raises: one base, and the built-in exception that fits each case."""


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
