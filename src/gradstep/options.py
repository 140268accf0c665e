"""The options that every optimizer has: clipping in the step, non-finite gradients, donation, what is left alone."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, overload

from gradstep.errors import ArgumentTypeError, ConfigurationError, OutOfRangeError
from gradstep.learning_rate import to_float

Policy: TypeAlias = Literal["allow", "raise", "skip"]
POLICIES = ("allow", "raise", "skip")
DEFAULTS: dict[str, Any] = {"clip_norm": None, "nonfinite": "allow", "donate": False, "frozen": ()}

Value = TypeVar("Value")


class Holder(Protocol):
    """An optimizer, as its options see it."""

    _clip_norm: float | None
    _nonfinite: Policy
    _donate: bool
    _frozen: tuple[str, ...]


class ClipNorm:
    """The global norm to which gradients are clipped within the step; None for not at all."""

    @overload
    def __get__(self, instance: None, owner: type) -> "ClipNorm": ...
    @overload
    def __get__(self, instance: Holder, owner: type) -> float | None: ...
    def __get__(self, instance: Holder | None, owner: type) -> "ClipNorm | float | None":
        return self if instance is None else instance._clip_norm  # pyright: ignore[reportPrivateUsage]

    def __set__(self, instance: Holder, value: float | None) -> None:
        if value is not None:
            value = to_float(value, "clip_norm")
            if not 0 <= value < math.inf:
                raise OutOfRangeError(f"clip_norm must be None or a finite number >= 0, got {value}")
        instance._clip_norm = value  # pyright: ignore[reportPrivateUsage]


class NonFinite:
    """What happens when a gradient holds NaN or infinity: "allow", "raise" or "skip"."""

    @overload
    def __get__(self, instance: None, owner: type) -> "NonFinite": ...
    @overload
    def __get__(self, instance: Holder, owner: type) -> Policy: ...
    def __get__(self, instance: Holder | None, owner: type) -> "NonFinite | Policy":
        return self if instance is None else instance._nonfinite  # pyright: ignore[reportPrivateUsage]

    def __set__(self, instance: Holder, value: Policy) -> None:
        if not isinstance(value, str) or value not in POLICIES:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"nonfinite must be one of {', '.join(map(repr, POLICIES))}, got {value!r}")
        instance._nonfinite = value  # pyright: ignore[reportPrivateUsage]


class Donate:
    """Whether JAX may reuse the memory of the old parameters and slots, which invalidates them."""

    @overload
    def __get__(self, instance: None, owner: type) -> "Donate": ...
    @overload
    def __get__(self, instance: Holder, owner: type) -> bool: ...
    def __get__(self, instance: Holder | None, owner: type) -> "Donate | bool":
        return self if instance is None else instance._donate  # pyright: ignore[reportPrivateUsage]

    def __set__(self, instance: Holder, value: bool) -> None:
        if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"donate must be True or False, got {value!r}")
        instance._donate = value  # pyright: ignore[reportPrivateUsage]


class Frozen:
    """The globs of parameters that are left alone: they get no slots and take part in no step."""

    @overload
    def __get__(self, instance: None, owner: type) -> "Frozen": ...
    @overload
    def __get__(self, instance: Holder, owner: type) -> tuple[str, ...]: ...
    def __get__(self, instance: Holder | None, owner: type) -> "Frozen | tuple[str, ...]":
        return self if instance is None else instance._frozen  # pyright: ignore[reportPrivateUsage]

    def __set__(self, instance: Holder, value: Sequence[str]) -> None:
        if isinstance(value, str):
            raise ArgumentTypeError(f"frozen must be a list of globs, got the text {value!r}: write [{value!r}]")
        if not isinstance(value, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"frozen must be a list of globs such as ['embed.*'], got {value!r}")
        for glob in value:
            if not isinstance(glob, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ArgumentTypeError(f"frozen must hold globs such as 'embed.*', got {glob!r}")
        instance._frozen = tuple(value)  # pyright: ignore[reportPrivateUsage]


class Options:
    """The options, checked when they are set: of an optimizer, or on their own."""

    clip_norm: ClipNorm = ClipNorm()
    nonfinite: NonFinite = NonFinite()
    donate: Donate = Donate()
    frozen: Frozen = Frozen()
    _clip_norm: float | None
    _nonfinite: Policy
    _donate: bool
    _frozen: tuple[str, ...]

    def __init__(self, given: Mapping[str, Any]) -> None:
        for name in given.keys() - DEFAULTS.keys():
            raise ConfigurationError(f"there is no option {name!r}; the options are {', '.join(DEFAULTS)}")
        for name, default in DEFAULTS.items():
            setattr(self, name, given.get(name, default))


def thawed(named: Mapping[str, Value], frozen: Sequence[str]) -> Mapping[str, Value]:
    """The entries whose names match none of the globs."""
    if not frozen:
        return named
    return {name: value for name, value in named.items() if not any(fnmatchcase(name, glob) for glob in frozen)}


def clip_norm_option(*, default: float | None) -> Any:
    """Declare the option for the signature of a family."""
    return ClipNorm()


def nonfinite_option(*, default: Policy) -> Any:
    """Declare the option for the signature of a family."""
    return NonFinite()


def donate_option(*, default: bool) -> Any:
    """Declare the option for the signature of a family."""
    return Donate()


def frozen_option(*, default: Sequence[str]) -> Any:
    """Declare the option for the signature of a family."""
    return Frozen()
