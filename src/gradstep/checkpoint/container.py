"""The safetensors container: the length of a header, the header in JSON, and the bytes of every tensor.

Format: https://github.com/huggingface/safetensors. Written and read one tensor at a time, hashed on the way, and
distrusted: a file is taken for what its header says only when everything about it fits.
"""

import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, cast

import numpy as np

from gradstep.arrays.memory import bits_dtype
from gradstep.arrays.stored import Bits
from gradstep.errors import ArgumentTypeError, CheckpointError, DtypeError

CODES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
METADATA = "__metadata__"
LARGEST_HEADER = 100_000_000  # as in the format's own readers
LARGEST = 1 << 59  # elements of a tensor
MOST_DIMENSIONS = 64  # as in NumPy
CHUNK = 1 << 22  # bytes that are hashed at a time


class Tensor(NamedTuple):
    """A tensor to be written; `bits` is asked for its elements when their turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    bits: Callable[[], Bits]


class Extent(NamedTuple):
    """A tensor in a file: bytes `begin` to `end`, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write(
    file: BinaryIO, tensors: Sequence[Tensor], metadata_for: Callable[[Mapping[str, str]], Mapping[str, str]]
) -> None:
    """Write a container, one tensor after another.

    Args:
        file: a new file.
        tensors: what it is to hold, under different keys.
        metadata_for: gives the metadata for the SHA-256 of each tensor's bytes, by key. It must be of one length
            whatever the digits: the header is written last, before the tensors.
    """
    _refuse_big_endian()
    # Each is to lie at a multiple of its elements' size.
    ordered = sorted(tensors, key=lambda tensor: -_checked_itemsize(tensor))
    unknown = "0" * 64
    blank = _header(ordered, metadata_for({tensor.key: unknown for tensor in ordered}))
    file.seek(8 + len(blank))
    header = _header(ordered, metadata_for({tensor.key: _write_tensor(file, tensor) for tensor in ordered}))
    if len(header) != len(blank):
        raise AssertionError("metadata of another length")
    file.seek(0)
    file.write(len(header).to_bytes(8, "little") + header)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> str:
    """Write a tensor's bytes; gives their SHA-256."""
    content, digest = tensor.bits().reshape(-1).view(np.uint8).data, hashlib.sha256()
    for at in range(0, len(content), CHUNK):
        digest.update(content[at : at + CHUNK])
        file.write(content[at : at + CHUNK])
    return digest.hexdigest()


def _checked_itemsize(tensor: Tensor) -> int:
    if tensor.dtype not in CODES:
        raise DtypeError(f"{tensor.key!r} has dtype {tensor.dtype}, which a checkpoint cannot hold")
    return itemsize(tensor.dtype)


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return np.dtype(bits_dtype(dtype)).itemsize


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {METADATA: dict(metadata)}
    begin = 0
    for tensor in tensors:
        end = begin + math.prod(tensor.shape) * _checked_itemsize(tensor)
        entries[tensor.key] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LARGEST_HEADER:
        raise CheckpointError(
            f"names, hyperparameters and hashes make a header of {len(header):,} bytes; the format allows "
            f"{LARGEST_HEADER:,}"
        )
    return header


class Container:
    """A file opened for reading. Its header has been checked: tensors cover the rest of the file, without overlap.

    Raises:
        CheckpointError: the file is damaged, or no such file.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _refuse_big_endian()
        if path is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise ArgumentTypeError("expected the path of a checkpoint, got None, as of gs.latest where there is none")
        self.path = Path(os.fsdecode(path))
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _read_header(self) -> tuple[dict[str, str], dict[str, Extent]]:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path} is no regular file")
        self.size = status.st_size
        length = int.from_bytes(self._bytes(0, 8, "the length of the header"), "little")
        if length > min(LARGEST_HEADER, self.size - 8):
            raise self.damaged(
                f"its header is said to have {length:,} bytes; the file has {self.size:,}, and headers have at most "
                f"{LARGEST_HEADER:,}"
            )
        self._start = 8 + length
        header = self.parsed(self._bytes(8, length, "the header"), "the header")
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict):
            raise self.damaged(f"{METADATA} is no mapping")
        texts = cast("dict[str, object]", metadata)
        if not all(isinstance(text, str) for text in texts.values()):
            raise self.damaged(f"{METADATA} is no mapping from text to text")
        return cast("dict[str, str]", texts), self._checked_extents(header)

    def _checked_extents(self, header: Mapping[str, object]) -> dict[str, Extent]:
        extents = {key: self._extent(key, entry) for key, entry in header.items()}
        at = 0
        for key, extent in sorted(extents.items(), key=lambda item: item[1][2:]):
            if extent.begin != at:
                raise self.damaged(f"tensor {key!r} begins at byte {extent.begin:,}, expected {at:,}")
            at = extent.end
        if self._start + at != self.size:
            raise self.damaged(
                f"header and tensors take {self._start + at:,} bytes, but the file has {self.size:,}"
                + ("; its end is missing" if self._start + at > self.size else "")
            )
        return extents

    def _extent(self, key: str, entry: object) -> Extent:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.damaged(f"the header's entry for tensor {key!r} is malformed")
        fields = cast("dict[str, Any]", entry)
        code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise self.damaged(f"tensor {key!r} has the unknown dtype {code!r}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self.damaged(f"tensor {key!r} has a malformed shape or malformed offsets")
        dtype, (begin, end) = DTYPES[code], offsets
        if math.prod(size for size in shape if size) >= LARGEST:
            raise self.damaged(f"tensor {key!r} of shape {tuple(shape)} has more elements than any memory")
        if end - begin != math.prod(shape) * itemsize(dtype):
            raise self.damaged(
                f"tensor {key!r} of dtype {dtype} and shape {tuple(shape)} cannot have {end - begin} bytes"
            )
        return Extent(dtype, tuple(shape), begin, end)

    def parsed(self, text: bytes | str, what: str) -> dict[str, Any]:
        """A mapping in JSON, in which no key comes twice.

        Raises:
            CheckpointError: it is something else.
        """
        brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
        if brackets > len(text) / 8 + 100:  # each becomes an object many times its size
            raise self.damaged(f"{what} has more lists and mappings than any checkpoint")
        try:
            found = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise self.damaged(f"{what} is not JSON that can be read: {reason}") from None
        if not isinstance(found, dict):
            raise self.damaged(f"{what} is no mapping")
        return cast("dict[str, Any]", found)

    def damaged(self, reason: str) -> CheckpointError:
        """The error that says what is wrong with the file."""
        return CheckpointError(f"{self.path} is damaged, or no safetensors file: {reason}; nothing was loaded from it")

    def fetch(self, key: str, room: Bits, first: int = 0) -> str:
        """Fill `room` with a tensor's elements from number `first` on, in C order; gives the SHA-256 of all its bytes.

        The others are read through a small buffer.
        """
        extent, content = self.tensors[key], room.reshape(-1).view(np.uint8).data
        begin = first * itemsize(extent.dtype)
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        os.lseek(self._file, self._start + extent.begin, os.SEEK_SET)
        self._read_on(key, begin, digest, lambda done: buffer[: begin - done])
        self._read_on(key, len(content), digest, lambda done: content[done : done + CHUNK])
        rest = extent.end - extent.begin - begin - len(content)
        self._read_on(key, rest, digest, lambda done: buffer[: rest - done])
        return digest.hexdigest()

    def _read_on(self, key: str, count: int, digest: Any, room: Callable[[int], memoryview]) -> None:
        """Read the next `count` bytes to where `room` says, given how many have been read."""
        done = 0
        while done < count:
            piece = self._read_some(key, room(done))
            digest.update(piece)
            done += len(piece)

    def _read_some(self, key: str, room: memoryview) -> memoryview:
        """As many of the next bytes as there are at once, at least one."""
        if hasattr(os, "readv"):
            count = os.readv(self._file, [room])
        else:
            part = os.read(self._file, len(room))
            count = len(part)
            room[:count] = part
        if count == 0:
            raise self.damaged(f"it ends within tensor {key!r}: it was cut while it was being read")
        return room[:count]

    def _bytes(self, at: int, length: int, what: str) -> bytes:
        os.lseek(self._file, at, os.SEEK_SET)
        parts: list[bytes] = []
        while length:
            part = os.read(self._file, length)
            if not part:
                raise self.damaged(f"it ends within {what}")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def _are_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(cast("list[object]", value)) > MOST_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in cast("list[int]", value))


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} comes twice")
        found[name] = value
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are little-endian, and this machine is not")
