"""Where the tensors of a checkpoint come from: a file, or a state dict. `sharded_file` has those of several files."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gradstep.arrays.region import Region
from gradstep.arrays.stored import Bits, Stored, bits_of, dtype_of, empty_bits
from gradstep.checkpoint.container import Container, itemsize
from gradstep.errors import CheckpointError


class Shape(NamedTuple):
    """The dtype and shape of a tensor; reads like `float32 (3, 4)`."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def size(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return self.size * itemsize(self.dtype)


class Tensors(Protocol):
    """The tensors of a checkpoint, by key."""

    name: str

    def shape(self, key: str) -> Shape:
        """What a tensor is like."""
        ...

    def fetch(self, key: str, room: Bits, first: int = 0) -> None:
        """Fill `room` with elements from number `first` on, in C order.

        Raises:
            CheckpointError: they are not what was saved, or others in the same file and tensor are not.
        """
        ...

    def fetch_region(self, key: str, room: Bits, region: Region) -> None:
        """The same with the elements of a region, each part of a file being read once."""
        ...

    def verify(self, key: str) -> None:
        """Raise `CheckpointError` if its elements are not what was saved."""
        ...


class SavedTensors(Tensors, Protocol):
    """The same in one file or several, of `size` bytes together."""

    path: Path
    size: int
    shards: int
    """How many files there are beside the one that was named."""

    def all_keys(self) -> Collection[str]:
        """All keys."""
        ...

    def digests(self, key: str) -> object:
        """What is equal only where a tensor's bytes are."""
        ...

    def is_whole(self, key: str) -> bool:
        """Whether a tensor's bytes are those that were saved."""
        ...


def read(tensors: Tensors, key: str) -> Stored:
    """A tensor as a new array."""
    dtype, shape = tensors.shape(key)
    bits = empty_bits(shape, dtype)
    tensors.fetch(key, bits)
    return Stored(bits, dtype)


def read_part(tensors: Tensors, key: str, first: int, stop: int) -> Stored:
    """Elements `first` to `stop` of a tensor in C order, as a new flat array."""
    dtype = tensors.shape(key).dtype
    bits = empty_bits((stop - first,), dtype)
    tensors.fetch(key, bits, first)
    return Stored(bits, dtype)


def read_region(tensors: Tensors, key: str, region: Region) -> Stored:
    """The elements of a region of a tensor, as a new array of the region's lengths."""
    dtype = tensors.shape(key).dtype
    bits, start = empty_bits(region.lengths, dtype), region.start
    if start is None:
        tensors.fetch_region(key, bits, region)
    elif bits.size:
        tensors.fetch(key, bits, start)
    return Stored(bits, dtype)


class FileTensors:
    """The tensors of a file, verified by their hashes whenever they are read."""

    shards = 0

    def __init__(self, container: Container, hashes: Mapping[str, str]) -> None:
        self.path, self.size, self.name = container.path, container.size, str(container.path)
        self._container, self._hashes = container, hashes

    def all_keys(self) -> Collection[str]:
        """See `SavedTensors.all_keys`."""
        return self._hashes.keys()

    def digests(self, key: str) -> object:
        """See `SavedTensors.digests`."""
        return self._hashes[key]

    def shape(self, key: str) -> Shape:
        """See `Tensors.shape`."""
        extent = self._container.tensors[key]
        return Shape(extent.dtype, extent.shape)

    def fetch(self, key: str, room: Bits, first: int = 0) -> None:
        """See `Tensors.fetch`."""
        if self._container.fetch(key, room, first) != self._hashes[key]:
            raise self._container.damaged(f"the bytes of tensor {key!r} are not those that were saved")

    def fetch_region(self, key: str, room: Bits, region: Region) -> None:
        """See `Tensors.fetch_region`."""
        room[...] = read(self, key).bits[region.picked]

    def is_whole(self, key: str) -> bool:
        """See `SavedTensors.is_whole`."""
        return self._container.fetch(key, empty_bits((0,), self.shape(key).dtype)) == self._hashes[key]

    def verify(self, key: str) -> None:
        """See `Tensors.verify`."""
        self.fetch(key, empty_bits((0,), self.shape(key).dtype))


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

    def fetch(self, key: str, room: Bits, first: int = 0) -> None:
        """See `Tensors.fetch`."""
        bits = bits_of(self._arrays[key], f"the state dict's {key!r}")
        room.reshape(-1)[...] = bits.reshape(-1)[first : first + room.size].view(room.dtype)

    def fetch_region(self, key: str, room: Bits, region: Region) -> None:
        """See `Tensors.fetch_region`."""
        room[...] = bits_of(self._arrays[key], f"the state dict's {key!r}")[region.picked].view(room.dtype)

    def verify(self, key: str) -> None:
        """See `Tensors.verify`."""
