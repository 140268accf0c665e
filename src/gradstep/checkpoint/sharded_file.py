"""A checkpoint in several files: an index, which has no tensors, and shards with pieces of them.

Each shard is a safetensors file of its own. The index says which elements of which tensor lie in which shard, with the
SHA-256 of every piece: a set of files is one checkpoint from the moment on at which its index has its name.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from gradstep.arrays.region import Region, Runs, Span, Where, copy, make_up, overlap, regions_of
from gradstep.arrays.stored import Bits, empty_bits
from gradstep.checkpoint.container import CODES, DTYPES, Container
from gradstep.checkpoint.nodes import Entry, read_all, read_text
from gradstep.checkpoint.tensors import Shape
from gradstep.errors import CheckpointError

DOCUMENT, INDEX, DIGEST = "gradstep", "gradstep.index", "gradstep.digest"
PART = "gradstep.shard"
OPEN_AT_ONCE = 256  # shards
SHARD_NAME = re.compile(r"[0-9a-f]{12}-\d{5,}-of-\d{5,}\.safetensors")


class Piece(NamedTuple):
    """Elements of a tensor, which lie in a shard under the tensor's key."""

    shard: int
    where: Where
    sha256: str


class Spread(NamedTuple):
    """A tensor in pieces; in their order, where all are spans."""

    shape: Shape
    pieces: Sequence[Piece]


class Shard(NamedTuple):
    """A file: its path from the index's folder on, with `/`, and its size in bytes."""

    path: str
    size: int


class Index(NamedTuple):
    """The shards, and the tensors by key."""

    shards: Sequence[Shard]
    tensors: Mapping[str, Spread]

    def checked(self) -> Self:
        """This, if it can be read again."""
        index_from_json(json.loads(self.to_json()))
        return self

    def to_json(self) -> str:
        """Text that `index_from_json` reads."""
        tensors = {
            key: [CODES[shape.dtype], list(shape.shape), [_row_of(piece) for piece in pieces]]
            for key, (shape, pieces) in self.tensors.items()
        }
        shards = [list(shard) for shard in self.shards]
        return json.dumps({"shards": shards, "tensors": tensors}, separators=(",", ":"))


def _row_of(piece: Piece) -> list[Any]:
    """`[shard, start, stop, hash]`; or `[shard, ends along each axis, hash]` of a region."""
    where = plain(piece.where)
    return [piece.shard, *(where if isinstance(piece.where, Span) else [where]), piece.sha256]


def plain(where: Where) -> list[Any]:
    """Elements as plain data: start and stop; of a region for each axis a list, the ends of its runs."""
    return list(where) if isinstance(where, Span) else [[end for run in runs for end in run] for runs in where.axes]


def where_of(data: Sequence[Any], shape: tuple[int, ...]) -> Where:
    """The reverse of `plain`."""
    if not isinstance(data[0], list):
        return Span(*data)
    axes = cast("Sequence[list[int]]", data)
    return Region(shape, tuple(tuple(zip(ends[::2], ends[1::2], strict=True)) for ends in axes))


def digest_of(metadata: Mapping[str, str]) -> str:
    """The SHA-256 of all that an index says."""
    content = [metadata.get(DOCUMENT), metadata.get(INDEX)]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def shards_named_by(path: Path) -> list[str]:
    """The paths of the shards that a file names; none if it is no index.

    Raises:
        CheckpointError, OSError: it cannot be read.
    """
    with path.open("rb") as file:  # an index is a header alone
        if int.from_bytes(file.read(8), "little") + 8 != os.fstat(file.fileno()).st_size:
            return []
    with Container(path) as container:
        return [shard.path for shard in _index_in(container).shards] if INDEX in container.metadata else []


def _index_in(container: Container) -> Index:
    return index_from_json(container.parsed(container.metadata[INDEX], "its index"))


def index_from_json(data: Mapping[str, Any]) -> Index:
    """The index that plain data describe.

    Raises:
        CheckpointError: they describe none, or pieces do not make up their tensors.
    """
    entry = Entry("the index", data)
    shards = entry.sequence("shards", _shard)
    tensors = entry.mapping("tensors", _spread)
    for key, (_, pieces) in tensors.items():
        if any(piece.shard >= len(shards) for piece in pieces):
            raise CheckpointError(f"the index names {len(shards)} shards, but has pieces of tensor {key!r} in others")
    return Index(shards, tensors)


def _shard(what: str, data: object) -> Shard:
    path, size = _row(what, data, 2)
    return Shard(read_text(what, path), _number(what, size))


def _spread(what: str, data: object) -> Spread:
    code, sizes, pieces = _row(what, data, 3)
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{what} has the unknown dtype {code!r}")
    shape = Shape(DTYPES[code], tuple(read_all(what, sizes, _number)))
    found = read_all(what, pieces, lambda what, data: _piece(what, data, shape.shape))
    if not found or not _make_up(shape, [piece.where for piece in found]):
        raise CheckpointError(f"{what} has pieces that do not make up its {shape.size} elements")
    return Spread(shape, found)


def _make_up(shape: Shape, parts: Sequence[Where]) -> bool:
    spans = [part for part in parts if isinstance(part, Span)]
    if len(spans) < len(parts):
        return all(span.stop <= shape.size for span in spans) and make_up(shape.shape, parts)
    ends = [0, *(span.stop for span in spans)]
    return [span.start for span in spans] == ends[:-1] and ends[-1] == shape.size


def _piece(what: str, data: object, shape: tuple[int, ...]) -> Piece:
    row = read_all(what, data, lambda _, value: value)
    if len(row) == 3:
        shard, axes, digest = row
        pairs = zip(_row(what, axes, len(shape)), shape, strict=True)
        region = Region(shape, tuple(_runs(what, ends, length) for ends, length in pairs))
        return Piece(_number(what, shard), region, read_text(what, digest))
    shard, start, stop, digest = _row(what, row, 4)
    piece = Piece(_number(what, shard), Span(_number(what, start), _number(what, stop)), read_text(what, digest))
    if start > stop:
        raise CheckpointError(f"{what} ends before it begins")
    return piece


def _runs(what: str, data: object, length: int) -> Runs:
    ends = read_all(what, data, _number)
    if not ends or len(ends) % 2 or any(a >= b for a, b in itertools.pairwise(ends)) or ends[-1] > length:
        raise CheckpointError(f"{what} has no ascending ranges of an axis of length {length}: {ends}")
    return tuple(zip(ends[::2], ends[1::2], strict=True))


def _row(what: str, data: object, length: int) -> list[Any]:
    if not isinstance(data, list) or len(cast("list[Any]", data)) != length:
        raise CheckpointError(f"{what} must be a list of {length}")
    return cast("list[Any]", data)


def _number(what: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise CheckpointError(f"{what} must hold numbers of elements or bytes, got {value!r}")
    return value


class ShardTensors:
    """The tensors of all shards, verified piece by piece whenever they are read. Shards are opened when needed.

    Args:
        file: the index.
    """

    def __init__(self, file: Container) -> None:
        index = self.index = _index_in(file)
        self.path, self.name, self.shards = file.path, str(file.path), len(index.shards)
        self.size = file.size + sum(shard.size for shard in index.shards)
        self.digest = file.metadata[DIGEST]
        self._open: dict[int, Container] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for container in self._open.values():
                stack.enter_context(container)
        self._open.clear()

    def all_keys(self) -> Collection[str]:
        """See `SavedTensors.all_keys`."""
        return self.index.tensors.keys()

    def digests(self, key: str) -> object:
        """See `SavedTensors.digests`. Tensors that were cut at other places differ in theirs, whatever their bytes."""
        pieces = self.index.tensors[key].pieces
        return pieces[0].sha256 if len(pieces) == 1 else [piece[1:] for piece in pieces]

    def shape(self, key: str) -> Shape:
        """See `Tensors.shape`."""
        return self.index.tensors[key].shape

    def fetch(self, key: str, room: Bits, first: int = 0) -> None:
        """See `Tensors.fetch`. Of a piece of which anything is wanted the rest is read too, through a small buffer."""
        flat = room.reshape(-1)
        (_, shape), pieces = self.index.tensors[key]
        for piece in pieces:
            if isinstance(piece.where, Region):
                self._pick(key, piece, flat, regions_of(Span(first, first + flat.size), shape))
                continue
            start, stop = max(piece.where.start, first), min(piece.where.stop, first + flat.size)
            if start < stop:
                self._fetch(key, piece, flat[start - first : stop - first], start - piece.where.start)

    def fetch_region(self, key: str, room: Bits, region: Region) -> None:
        """See `Tensors.fetch_region`. A piece of which anything is wanted is in memory for a while, all of it."""
        for piece in self.index.tensors[key].pieces:
            self._pick(key, piece, room.reshape(-1), [region])

    def _pick(self, key: str, piece: Piece, room: Bits, wanted: Sequence[Region]) -> None:
        """Write what a piece has of the regions that follow on each other in `room`."""
        dtype, shape = self.index.tensors[key].shape
        there = regions_of(piece.where, shape)
        if overlap(there, wanted):
            bits = empty_bits((piece.where.size,), dtype)
            self._fetch(key, piece, bits, 0)
            copy(bits, there, room, wanted)

    def is_whole(self, key: str) -> bool:
        """See `SavedTensors.is_whole`."""
        shape, pieces = self.index.tensors[key]
        return all(self._agrees(key, piece, empty_bits((0,), shape.dtype), 0) for piece in pieces)

    def verify(self, key: str) -> None:
        """See `Tensors.verify`."""
        shape, pieces = self.index.tensors[key]
        for piece in pieces:
            self._fetch(key, piece, empty_bits((0,), shape.dtype), 0)

    def _fetch(self, key: str, piece: Piece, room: Bits, first: int) -> None:
        if not self._agrees(key, piece, room, first):
            what = f"the bytes of its piece of tensor {key!r} are not those that were saved"
            raise self._container(piece.shard).damaged(what)

    def _agrees(self, key: str, piece: Piece, room: Bits, first: int) -> bool:
        """Fill `room`; whether the piece is what was saved."""
        container, dtype = self._container(piece.shard), self.index.tensors[key].shape.dtype
        extent = container.tensors.get(key)
        if extent is None or (extent.dtype, Shape(*extent[:2]).size) != (dtype, piece.where.size):
            raise container.damaged(f"it does not hold the piece of tensor {key!r} that {self.path.name} says")
        return container.fetch(key, room, first) == piece.sha256

    def _container(self, number: int) -> Container:
        if number in self._open:
            return self._open[number]
        shard = self.index.shards[number]
        path = Path(shard_path(self.path, shard.path))
        try:
            container = Container(path)
        except FileNotFoundError:
            raise self._missing(path) from None
        for last in itertools.islice(list(self._open), max(len(self._open) - OPEN_AT_ONCE + 1, 0)):
            self._open.pop(last).__exit__()
        self._open[number] = container
        return container

    def _missing(self, path: Path) -> CheckpointError:
        with contextlib.suppress(OSError, CheckpointError), Container(self.path) as now:
            if now.metadata.get(DIGEST) != self.digest:
                return ReplacedError(f"{self.path} was saved anew while it was being read; read it again")
        return CheckpointError(
            f"{self.path} is the index of a checkpoint of {self.shards} shards, and {path} is missing; an index and "
            f"the folder {path.parent.name} belong together: copy or move both, and leave the folder its name"
        )


class ReplacedError(CheckpointError):
    """Shards were removed while they were being read, because the checkpoint was saved anew."""


def shard_path(index: Path, path: str) -> Path:
    """Where a shard lies; beside the index itself where its name is a link to it."""
    folder, _, name = path.partition("/")
    if not SHARD_NAME.fullmatch(name) or folder in ("", ".", "..") or "\\" in folder or ":" in folder:
        raise CheckpointError(f"{index} names a shard where none can be: {path!r}")
    return index.resolve().parent / folder / name
