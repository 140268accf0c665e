"""The options that every optimizer has: clipping within the step, what to do about non-finite gradients, donation."""

import math
from typing import Any, Literal, Protocol, TypeAlias, overload

from gradstep.errors import ConfigurationError, OutOfRangeError
from gradstep.learning_rate import to_float

Policy: TypeAlias = Literal["allow", "raise", "skip"]
POLICIES = ("allow", "raise", "skip")
DEFAULTS: dict[str, Any] = {"clip_norm": None, "nonfinite": "allow", "donate": False}


class Holder(Protocol):
    """An optimizer, as its options see it."""

    _clip_norm: float | None
    _nonfinite: Policy
    _donate: bool


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


def clip_norm_option(*, default: float | None) -> Any:
    """Declare the option for the signature of a family."""
    return ClipNorm()


def nonfinite_option(*, default: Policy) -> Any:
    """Declare the option for the signature of a family."""
    return NonFinite()


def donate_option(*, default: bool) -> Any:
    """Declare the option for the signature of a family."""
    return Donate()
