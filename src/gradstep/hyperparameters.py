"""Hyperparameters: what a family declares, and each scalar's value, resolved once per step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, SupportsFloat, TypeAlias, TypeVar, cast, overload

import numpy as np

from gradstep.errors import ArgumentTypeError, ConfigurationError, NonFiniteScalarError, OutOfRangeError
from gradstep.learning_rate import LearningRate, Schedule
from gradstep.program.graph import Trace

ScalarLike: TypeAlias = SupportsFloat | Schedule
PairLike: TypeAlias = Sequence[ScalarLike]
# What attributes read as: the value last resolved, or one for each glob of a mapping.
Number: TypeAlias = float | dict[str, float]
OptionalNumber: TypeAlias = float | dict[str, float | None] | None
Numbers: TypeAlias = tuple[float, float] | dict[str, tuple[float, float]]


class Check(NamedTuple):
    """A range: how it reads, and whether a number lies in it."""

    text: str
    holds: Callable[[float], bool]


def _non_negative(x: float) -> bool:
    return x >= 0


def _positive(x: float) -> bool:
    return x > 0


def _non_positive(x: float) -> bool:
    return x <= 0


def _decay(x: float) -> bool:
    return 0 <= x < 1


FINITE = Check("finite", math.isfinite)
NON_NEGATIVE = Check(">= 0", _non_negative)
POSITIVE = Check("> 0", _positive)
NON_POSITIVE = Check("<= 0", _non_positive)
DECAY = Check("in [0, 1)", _decay)


class Resolved(NamedTuple):
    """What a schedule gave: its value for the step `stamp`, and the one that a coming step has waiting, if any."""

    stamp: int
    value: float
    pending: tuple[int, float] | None


class Cell:
    """One scalar of one optimizer: fixed, or a schedule with the value of the step that it was last resolved for.

    A resolved value is *pending* until the step succeeds, so that a failed step changes nothing and its retry
    does not call the schedule again.
    """

    def __init__(self, label: str, symbol: str, check: Check, value: object) -> None:
        self.label, self.symbol, self.check = label, symbol, check
        if callable(getattr(value, "named_parameters", None)) or callable(getattr(value, "trainable_parameters", None)):
            raise ArgumentTypeError(
                f"{label} must be a number or a schedule, got a module ({type(value).__name__}); parameters are passed "
                "to apply_gradients, or to the optimizers of gradstep.torch"
            )
        try:
            self.source = LearningRate(cast("ScalarLike", value))
        except ArgumentTypeError:
            raise ArgumentTypeError(
                f"{label} must be a number or a schedule step -> float, got {value!r} ({type(value).__name__})"
            ) from None
        self._stamp = -1
        self._value = math.nan
        self._pending: tuple[int, float] | None = None
        if not self.source.is_schedule:
            self._value = self._checked(0)

    @property
    def value(self) -> float:
        """The value of the last step that succeeded, or of the last explicit preflight."""
        return self._value

    def upcoming(self, step: int) -> float:
        """The value for `step`, resolved before."""
        return self._pending[1] if self._pending is not None and self._pending[0] == step else self._value

    def resolve(self, step: int) -> None:
        """Call the schedule for `step`, unless that has been done."""
        if self.source.is_schedule and self._stamp != step and (self._pending is None or self._pending[0] != step):
            self._pending = (step, self._checked(step))

    def publish(self) -> None:
        """Make the pending value the current one."""
        if self._pending is not None:
            (self._stamp, self._value), self._pending = self._pending, None

    @property
    def resolved(self) -> Resolved:
        """What the schedule gave last, and what waits for the coming step."""
        return Resolved(self._stamp, self._value, self._pending)

    @resolved.setter
    def resolved(self, resolved: Resolved) -> None:
        for value in (resolved.value, *([resolved.pending[1]] if resolved.pending else ())):
            if not (math.isfinite(value) and self.check.holds(value)):
                raise OutOfRangeError(f"{self.label} must be {self.check.text}, got {value!r}")
        self._stamp, self._value, self._pending = resolved

    def check_rounded(self, step: int, dtype: str) -> None:
        """Repeat the check on the value as the compute dtype holds it."""
        exact = self.upcoming(step)
        with np.errstate(all="ignore"):
            rounded = float(np.dtype(dtype).type(exact))
        if not (math.isfinite(rounded) and self.check.holds(rounded)):
            raise OutOfRangeError(
                f"{self.label} = {exact!r} becomes {rounded!r} in {dtype}, the dtype of the computation; "
                f"it must be {self.check.text} there too"
            )

    def _checked(self, step: int) -> float:
        origin = f" (step {step} of {self.source.value!r})" if self.source.is_schedule else ""
        try:
            value = self.source.try_current(step)
        except NonFiniteScalarError as error:
            raise NonFiniteScalarError(f"{self.label}: {error}") from None
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{self.label}: {error}") from None
        except Exception as error:
            error.add_note(f"raised by the schedule of {self.label} at step {step}: {self.source.value!r}")
            raise
        if not self.check.holds(value):
            raise OutOfRangeError(f"{self.label} must be {self.check.text}, got {value!r}{origin}")
        return value


class Owner(Protocol):
    """An optimizer, as its hyperparameters see it."""

    def get_hyperparameter(self, name: str) -> Any:
        """The value last resolved."""
        ...

    def set_hyperparameters(self, values: Mapping[str, object]) -> None:
        """Check the values together with the others and adopt them."""
        ...


class Field:
    """A declared hyperparameter; reads and writes it on the optimizer."""

    by_name: ClassVar[bool] = False  # whether parameters may differ in it: a mapping from glob to value

    def __init__(self, *, default: object, kw_only: bool) -> None:
        self.default, self.kw_only = default, kw_only
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def cells(self, label: str, value: object) -> list[Cell]:
        """The scalars that the value is made of; none for configuration. Errors name it by the label."""
        return []

    def configuration(self, label: str, value: object) -> Any:
        """The value of configuration, checked."""
        return value

    def argument(self, trace: Trace, value: object) -> Any:
        """What the rule receives while it is traced."""
        return value

    @property
    def removable(self) -> Iterable[str]:
        """The symbols whose truth a rule may ask: a fixed 0 is false and removes a term."""
        return ()


REQUIRED: Any = object()


class _ScalarField(Field):
    by_name = True

    def __init__(self, default: object, check: Check, *, kw_only: bool, removable: bool) -> None:
        super().__init__(default=default, kw_only=kw_only)
        self._check, self._removable = check, removable

    def cells(self, label: str, value: object) -> list[Cell]:
        return [Cell(label, self.name, self._check, value)]

    def argument(self, trace: Trace, value: object) -> Any:
        if self._removable and not callable(value) and value == 0:
            return 0.0
        return trace.hyperparameter(self.name)

    @property
    def removable(self) -> Iterable[str]:
        return (self.name,) if self._removable else ()


class Scalar(_ScalarField):
    """A number, or a schedule of numbers, or a mapping of them by glob. Reads as the value last resolved."""

    @overload
    def __get__(self, instance: None, owner: type) -> "Scalar": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> Number: ...
    def __get__(self, instance: Owner | None, owner: type) -> "Scalar | Number":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: ScalarLike | Mapping[str, ScalarLike]) -> None:
        instance.set_hyperparameters({self.name: value})


class OptionalScalar(_ScalarField):
    """A scalar that may be absent: None."""

    @overload
    def __get__(self, instance: None, owner: type) -> "OptionalScalar": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> OptionalNumber: ...
    def __get__(self, instance: Owner | None, owner: type) -> "OptionalScalar | OptionalNumber":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: ScalarLike | Mapping[str, ScalarLike | None] | None) -> None:
        instance.set_hyperparameters({self.name: value})

    def cells(self, label: str, value: object) -> list[Cell]:
        return [] if value is None else super().cells(label, value)

    def argument(self, trace: Trace, value: object) -> Any:
        return None if value is None else super().argument(trace, value)


class Pair(Field):
    """Two numbers, each fixed or a schedule, or a mapping of such pairs by glob. Reads as the values last resolved."""

    by_name = True

    def __init__(self, default: object, symbols: tuple[str, str], checks: tuple[Check, Check]) -> None:
        super().__init__(default=default, kw_only=True)
        self.symbols, self.checks = symbols, checks

    @overload
    def __get__(self, instance: None, owner: type) -> "Pair": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> Numbers: ...
    def __get__(self, instance: Owner | None, owner: type) -> "Pair | Numbers":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: PairLike | Mapping[str, PairLike]) -> None:
        instance.set_hyperparameters({self.name: value})

    def cells(self, label: str, value: object) -> list[Cell]:
        both = list(cast("PairLike", value)) if _is_sequence(value) else []
        if len(both) != 2:
            raise ArgumentTypeError(f"{label} must be two numbers or schedules, got {value!r}")
        return [
            Cell(f"{label}[{i}]", symbol, check, part)
            for i, (symbol, check, part) in enumerate(zip(self.symbols, self.checks, both, strict=True))
        ]

    def argument(self, trace: Trace, value: object) -> Any:
        return tuple(trace.hyperparameter(symbol) for symbol in self.symbols)


class Flag(Field):
    """Configuration that is True or False."""

    def __init__(self, default: bool) -> None:
        super().__init__(default=default, kw_only=True)

    @overload
    def __get__(self, instance: None, owner: type) -> "Flag": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> bool: ...
    def __get__(self, instance: Owner | None, owner: type) -> "Flag | bool":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: bool) -> None:
        instance.set_hyperparameters({self.name: value})

    def configuration(self, label: str, value: object) -> bool:
        return _truth(label, value, "True or False")


class OptionalFlag(Field):
    """Configuration that is True, False, or left open: None."""

    def __init__(self, default: bool | None) -> None:
        super().__init__(default=default, kw_only=True)

    @overload
    def __get__(self, instance: None, owner: type) -> "OptionalFlag": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> bool | None: ...
    def __get__(self, instance: Owner | None, owner: type) -> "OptionalFlag | bool | None":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: bool | None) -> None:
        instance.set_hyperparameters({self.name: value})

    def configuration(self, label: str, value: object) -> bool | None:
        return None if value is None else _truth(label, value, "True, False or None")


def _truth(label: str, value: object, expected: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(cast("bool", value))
    raise ArgumentTypeError(f"{label} must be {expected}, got {value!r}")


class Count(Field):
    """Configuration that is a whole number of at least 1."""

    def __init__(self, default: int) -> None:
        super().__init__(default=default, kw_only=True)

    @overload
    def __get__(self, instance: None, owner: type) -> "Count": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> int: ...
    def __get__(self, instance: Owner | None, owner: type) -> "Count | int":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: int) -> None:
        instance.set_hyperparameters({self.name: value})

    def configuration(self, label: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ArgumentTypeError(f"{label} must be a whole number, got {value!r}")
        if value < 1:
            raise OutOfRangeError(f"{label} must be >= 1, got {value}")
        return int(cast("int", value))


class OneOf(Field):
    """Configuration that is None or one of a few names."""

    def __init__(self, default: object, choices: Sequence[str | None]) -> None:
        super().__init__(default=default, kw_only=True)
        self._choices = choices

    @overload
    def __get__(self, instance: None, owner: type) -> "OneOf": ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> str | None: ...
    def __get__(self, instance: Owner | None, owner: type) -> "OneOf | str | None":
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: str | None) -> None:
        instance.set_hyperparameters({self.name: value})

    def configuration(self, label: str, value: object) -> str | None:
        return check_choice(label, value, self._choices)


Option = TypeVar("Option")


def check_choice(label: str, value: object, choices: Sequence[Option]) -> Option:
    """The value, which must be one of these."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise ConfigurationError(f"{label} must be one of {', '.join(map(repr, choices))}, got {value!r}")


class Static(Field):
    """Any configuration of a user's rule: booleans, strings, None, or what was declared static."""

    def __get__(self, instance: Owner | None, owner: type) -> Any:
        return self if instance is None else instance.get_hyperparameter(self.name)

    def __set__(self, instance: Owner, value: object) -> None:
        instance.set_hyperparameters({self.name: value})

    def configuration(self, label: str, value: object) -> Any:
        try:
            hash(value)
        except TypeError:
            raise ArgumentTypeError(
                f"{label} is configuration and must not change by itself, so it must be hashable; "
                f"got a {type(value).__name__}: use a tuple instead of a list"
            ) from None
        return value


# Type checkers read `default=` and `kw_only=` from the calls: always pass them by name.


def scalar(
    *, default: ScalarLike = REQUIRED, check: Check = FINITE, kw_only: bool = True, removable: bool = False
) -> Any:
    """Declare a scalar hyperparameter; `removable`: a fixed 0 removes its term from the rule."""
    return Scalar(default, check, kw_only=kw_only, removable=removable)


def optional_scalar(*, default: None, check: Check = FINITE, kw_only: bool = True) -> Any:
    """Declare a scalar hyperparameter that may be None."""
    return OptionalScalar(default, check, kw_only=kw_only, removable=False)


def pair(*, default: PairLike, symbols: tuple[str, str], checks: tuple[Check, Check]) -> Any:
    """Declare two scalars under one name."""
    return Pair(default, symbols, checks)


def flag(*, default: bool) -> Any:
    """Declare a configuration switch."""
    return Flag(default)


def optional_flag(*, default: None) -> Any:
    """Declare a configuration switch that may be None."""
    return OptionalFlag(default)


def count(*, default: int) -> Any:
    """Declare a configuration number of at least 1."""
    return Count(default)


def one_of(*, default: None, choices: Sequence[str | None]) -> Any:
    """Declare configuration that is None or one of a few names."""
    return OneOf(default, choices)


def _is_sequence(value: object) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))
