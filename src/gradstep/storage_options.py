"""The options of how an optimizer keeps parameters and slots; fixed when it is made."""

from typing import Any, Generic, NoReturn, Protocol, TypeVar, overload

from gradstep.errors import ConfigurationError
from gradstep.step.storage import Rounding, SlotDtypes, Storage, StorageOptions

Value = TypeVar("Value")

STORAGE_DEFAULTS: dict[str, Any] = StorageOptions()._asdict()


class HasStorage(Protocol):
    """What an optimizer keeps, as its storage options see it."""

    storage: Storage


class Holder(Protocol):
    """An optimizer with a rule."""

    _leaf: HasStorage


class Fixed(Generic[Value]):
    """An option that is given once."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "Fixed[Value]": ...
    @overload
    def __get__(self, instance: Holder, owner: type) -> Value: ...
    def __get__(self, instance: Holder | None, owner: type) -> "Fixed[Value] | Value":
        if instance is None:
            return self
        return getattr(instance._leaf.storage.options, self._name)  # pyright: ignore[reportPrivateUsage]

    def __set__(self, instance: Holder, value: Value) -> NoReturn:
        raise ConfigurationError(
            f"{self._name} is fixed when an optimizer is made, because its state is laid out and rounded by it; make a "
            "new one, whose state begins anew"
        )


def slot_dtype_option(*, default: SlotDtypes) -> Any:
    """Declare the option for the signature of a family."""
    return Fixed[SlotDtypes]()


def rounding_option(*, default: Rounding) -> Any:
    """Declare the option for the signature of a family."""
    return Fixed[Rounding]()


def master_weights_option(*, default: bool) -> Any:
    """Declare the option for the signature of a family."""
    return Fixed[bool]()


def seed_option(*, default: int) -> Any:
    """Declare the option for the signature of a family."""
    return Fixed[int]()
