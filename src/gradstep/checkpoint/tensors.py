"""Where the tensors of a checkpoint come from: a file, or a state dict."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from gradstep.arrays.stored import Stored, copy_of, dtype_of
from gradstep.checkpoint.container import Container
from gradstep.errors import CheckpointError


class Shape(NamedTuple):
    """The dtype and shape of a tensor; reads like `float32 (3, 4)`."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Tensors(Protocol):
    """The tensors of a checkpoint, by key."""

    name: str

    def shape(self, key: str) -> Shape:
        """What a tensor is like."""
        ...

    def read(self, key: str) -> Stored:
        """A new array with its elements; `CheckpointError` if they are not what was saved."""
        ...

    def verify(self, key: str) -> None:
        """Raise `CheckpointError` if its elements are not what was saved."""
        ...


class FileTensors:
    """The tensors of a file, verified by their hashes whenever they are read."""

    def __init__(self, container: Container, hashes: Mapping[str, str]) -> None:
        self.name = str(container.path)
        self._container, self._hashes = container, hashes

    def shape(self, key: str) -> Shape:
        """See `Tensors.shape`."""
        extent = self._container.tensors[key]
        return Shape(extent.dtype, extent.shape)

    def read(self, key: str) -> Stored:
        """See `Tensors.read`."""
        bits, digest = self._container.read(key)
        self._check(key, digest)
        return Stored(bits, self.shape(key).dtype)

    def verify(self, key: str) -> None:
        """See `Tensors.verify`."""
        self._check(key, self._container.digest(key))

    def _check(self, key: str, digest: str) -> None:
        if digest != self._hashes[key]:
            raise self._container.damaged(f"the bytes of tensor {key!r} are not those that were saved")


class HeldTensors:
    """The arrays of a state dict, of any library; what is read is a copy."""

    name = "the state dict"

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def shape(self, key: str) -> Shape:
        """See `Tensors.shape`."""
        array = self._arrays[key]
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise CheckpointError(f"the state dict's {key!r} is no array, but a {type(array).__name__}")
        return Shape(dtype_of(array), tuple(array.shape))

    def read(self, key: str) -> Stored:
        """See `Tensors.read`."""
        return copy_of(self._arrays[key], f"the state dict's {key!r}")

    def verify(self, key: str) -> None:
        """See `Tensors.verify`."""
