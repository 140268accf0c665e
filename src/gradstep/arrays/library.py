"""What the optimizer asks of an array library: one small interface, and how a library is recognised."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from gradstep.arrays.memory import Integers, Memory
from gradstep.errors import ArgumentTypeError

Found: TypeAlias = Literal[0, 1, 2]
OTHER: Found = 0  # something else than addresses differs
STAYED: Found = 1  # every array lies where one lay at the last look
MOVED: Found = 2


class Watch(Protocol):
    """The types and layouts of the arrays of a plan."""

    addresses: Integers
    """Where the arrays lay at the last look; worthless after `OTHER`."""

    def locate(self, arrays: list[Any]) -> Found:
        """Compare arrays with those of the plan, and note their addresses."""
        ...


def found(watch: Watch, addresses: Sequence[int]) -> Found:
    """Note these addresses, for watches that find them in Python."""
    now = np.array(addresses, np.int64)
    stayed = np.array_equal(now, watch.addresses)
    watch.addresses = now
    return STAYED if stayed else MOVED


class ArrayLibrary(Protocol):
    """One array library. Arrays of the library are opaque to everybody else."""

    name: str

    def describe(self, array: Any, what: str) -> Memory:
        """Where the array lies; an error that begins with `what` for one that cannot take part."""
        ...

    def watch(self, arrays: list[Any]) -> Watch:
        """Remember the layouts of arrays that have been described."""
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


def recognise(**trees: Mapping[str, object]) -> ArrayLibrary:
    """The one library that owns all arrays of the trees; no library is imported that the caller has not.

    Raises:
        ArgumentTypeError: the arrays belong to different libraries, or an entry is no array.
    """
    found: dict[type, ArrayLibrary] = {}
    first: tuple[str, ArrayLibrary] | None = None
    for tree, named in trees.items():
        for name, value in named.items():
            if type(value) in found:
                continue
            what = f"{tree}[{name!r}]"
            library = found[type(value)] = _library_of(value, what)
            first = first or (what, library)
            if library is not first[1]:
                raise ArgumentTypeError(
                    f"{first[0]} belongs to {first[1].name}, but {what} to {library.name}; "
                    "one call takes arrays of one library"
                )
    return first[1] if first else _numpy()


def _library_of(value: object, what: str) -> ArrayLibrary:
    if isinstance(value, np.ndarray):
        return _numpy()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        from gradstep.arrays.torch import TORCH

        return TORCH
    raise ArgumentTypeError(f"{what} is {_came(value)}; expected a NumPy array or a PyTorch tensor")


def _came(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    remedy = ""
    if isinstance(value, (bool, int, float, complex, np.generic)):
        remedy = ", a plain number, not an array: wrap it in np.array(..., dtype=np.float32)"
    return f"a {kind}{remedy}"


def _numpy() -> ArrayLibrary:
    from gradstep.arrays.numpy import NUMPY

    return NUMPY
