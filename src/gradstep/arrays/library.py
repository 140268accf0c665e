"""What the optimizer asks of an array library: one small interface, and how a library is recognised."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from gradstep.arrays.memory import Memory
from gradstep.errors import ArgumentTypeError


class ArrayLibrary(Protocol):
    """One array library. Arrays of the library are opaque to everybody else."""

    name: str

    def describe(self, array: Any, what: str) -> Memory:
        """Where the array lies; an error that begins with `what` for one that cannot take part."""
        ...

    def signature(self, arrays: list[Any]) -> tuple[object, ...]:
        """All that a plan relies on except types and addresses: equal signatures, equal layouts."""
        ...

    def addresses(self, arrays: list[Any]) -> list[int]:
        """The address of each array's first element."""
        ...

    def zeros(self, shape: Sequence[int], order: Sequence[int], dtype: str) -> Any:
        """A new array whose axes, from slow to fast, are `order`."""
        ...

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """The same memory as a NumPy array."""
        ...

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        """The same memory as an array of the library."""
        ...

    def wrote(self, arrays: list[Any]) -> None:
        """Take note that these arrays have been written."""
        ...


def recognise(values: Iterable[object], what: str) -> ArrayLibrary:
    """The one library that owns all `values`; no library is imported that the caller has not.

    Raises:
        ArgumentTypeError: the values belong to different libraries, or one is no array.
    """
    found: dict[type, ArrayLibrary] = {}
    first: tuple[str, ArrayLibrary] | None = None
    for value in values:
        if type(value) not in found:
            library = _library_of(value, what)
            found[type(value)] = library
            first = first or (type(value).__name__, library)
            if library is not first[1]:
                raise ArgumentTypeError(
                    f"{what} mixes arrays of {first[1].name} ({first[0]}) and of {library.name} "
                    f"({type(value).__name__}); one call takes arrays of one library"
                )
    return first[1] if first else _numpy()


def _library_of(value: object, what: str) -> ArrayLibrary:
    if isinstance(value, np.ndarray):
        return _numpy()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        from gradstep.arrays.torch import TORCH

        return TORCH
    raise ArgumentTypeError(f"{what} holds {_came(value)}; expected NumPy arrays or PyTorch tensors")


def _came(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    remedy = ""
    if isinstance(value, (bool, int, float, complex, np.generic)):
        remedy = ", a plain number, which cannot be updated in place: wrap it in np.array(..., dtype=np.float32)"
    return f"a {kind}{remedy}"


def _numpy() -> ArrayLibrary:
    from gradstep.arrays.numpy import NUMPY

    return NUMPY
