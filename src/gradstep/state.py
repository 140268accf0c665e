"""A read-only view of the live slots of one optimizer, or of several as one."""

from collections.abc import Iterator, KeysView, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol


class Holder(Protocol):
    """An optimizer with slots of its own."""

    def show(self, name: str) -> Mapping[str, Any]:
        """The slots that a parameter has so far, for the eyes of a user, who may change them."""
        ...

    def names(self) -> KeysView[str]:
        """The parameters that have been seen."""
        ...


class StateView(Mapping[str, Mapping[str, Any]]):
    """Slots by parameter name and slot name; shows what there is at the time of asking."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        self._holders = holders

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        for holder in self._holders:
            if name in holder.names():
                return MappingProxyType(holder.show(name))
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for holder in self._holders for name in holder.names())

    def __len__(self) -> int:
        return sum(len(holder.names()) for holder in self._holders)

    def __repr__(self) -> str:
        return repr({name: dict(slots) for name, slots in self.items()})
