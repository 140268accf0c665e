"""Saving what is spread over ranks: each writes the parts that it has, and then rank 0 the index of all.

What is agreed on, in this order: what is to be saved; what each rank has of it; that all shards lie on the disk; that
the index can be read. Until the last of these an error on one rank is one on all, and every rank removes its shard.
"""
# pyright: reportPrivateUsage=false

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from gradstep.arrays.region import Region, Span, Where
from gradstep.arrays.stored import Bits, bits_of, dtype_of
from gradstep.checkpoint.checkpoint_file import checked_keep, save_index
from gradstep.checkpoint.container import Tensor
from gradstep.checkpoint.nodes import Document, node_to_json
from gradstep.checkpoint.sharded_file import Index, Piece, Shard, Spread, plain, shards_named_by, where_of
from gradstep.checkpoint.shards import check_there, writing
from gradstep.checkpoint.snapshot import Snapshot, State, checked_arrays, round_of, snapshot, without_state
from gradstep.checkpoint.tensors import Shape
from gradstep.distributed.census import Census
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.dtensors import Placed, is_dtensor, part_of
from gradstep.distributed.group import Group, MeshGroup
from gradstep.distributed.partition import Partition
from gradstep.distributed.placed_step import mesh_group, places_of
from gradstep.errors import CommunicationError, ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.program.formats import QUANTUM, scales_of
from gradstep.step.leaf import Leaf

Wheres = dict[int, Where]
"""Elements by the rank that writes them."""


class Owned(NamedTuple):
    """Who has what of the state: as `Sharded` has shared it out, or as placements say."""

    partition: Partition
    census: Census | None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        if name in self.partition or self.census is None:
            return self.partition.shape(name)
        return self.census.shape(name)

    def wheres(self, name: str) -> Wheres:
        """The elements of a parameter whose state each rank writes, each element once."""
        if name in self.partition or self.census is None:
            return {rank: Span(start, stop) for rank, start, stop in self.partition[name]}
        return self.census.wheres(name)


class Part(NamedTuple):
    """Some elements of an array of this dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    where: Where

    def told(self) -> list[Any]:
        """The same as plain data."""
        return [self.dtype, self.shape, plain(self.where)]


class Parts(NamedTuple):
    """An array in parts, and this rank's elements, if it has any."""

    dtype: str
    shape: tuple[int, ...]
    wheres: Wheres
    own: Callable[[], Bits]

    def tensor(self, key: str, rank: int) -> Tensor:
        """What a rank writes: a region in its shape; else flat, or in the array's shape where that is all of it."""
        where = self.wheres[rank]
        if isinstance(where, Region):
            return Tensor(key, self.dtype, where.lengths, self.own)
        whole = where.size == Shape(self.dtype, self.shape).size
        return Tensor(key, self.dtype, self.shape if whole else (where.size,), self.own)

    def spread(self, key: str, hashes: Sequence[Mapping[str, str]]) -> Spread:
        """What the index says of it, given the hashes of every rank."""
        pieces = [Piece(rank, where, hashes[rank][key]) for rank, where in self.wheres.items()]
        return Spread(Shape(self.dtype, self.shape), sorted(pieces, key=lambda piece: piece.where.start or 0))


class Inventory(NamedTuple):
    """What a rank has: parameters, and for each optimizer with a rule steps, and the arrays that it has parts of."""

    path: Path
    keep: int
    params: Mapping[str, Any]
    group: MeshGroup | None
    """Where any parameter is a DTensor; `places` are theirs."""
    places: Mapping[str, Placed]
    steps: list[dict[str, int]]
    arrays: list[dict[str, dict[str, tuple[Part, Any]]]]
    facts: Facts

    def told(self) -> bytes:
        """What other ranks must know of it."""
        parts = [
            {name: {slot: part.told() for slot, (part, _) in some.items()} for name, some in arrays.items()}
            for arrays in self.arrays
        ]
        return json.dumps([self.steps, parts]).encode()


def save(
    whole: Optimizer, path: str | os.PathLike[str], params: object, keep: int | None,
    group: Group, council: Council, owned: Owned, begun: int,
) -> None:  # fmt: skip
    """Write a shard on every rank, and then the index that makes them a checkpoint; on all ranks or on none.

    Args:
        whole: the outermost optimizer.
        path, params, keep: see `Optimizer.save`.
        group, council: the ranks.
        owned: who has what of the state.
        begun: how often `init` has been called.
    """
    here = council.attempt(
        lambda: _inventory(whole, path, params, keep, owned, begun, group),
        lambda here: Said(word_of(here.facts), lambda: here.facts),
    )
    now = None if here.group is None else Census(here.group)
    if now is not None:
        now.take(here.places, list(here.places))
    told = group.gather_messages(here.told())
    document, arrays = council.attempt(lambda: _described(whole, here, told, owned.partition, now, group.rank))
    mine = [parts.tensor(key, group.rank) for key, parts in arrays.items() if group.rank in parts.wheres]
    with contextlib.ExitStack() as stack:
        written = council.attempt(lambda: stack.enter_context(writing(here.path, group.rank, group.size, mine)))
        said = group.gather_messages(json.dumps([written.shard, written.hashes]).encode())
        written.stays = True  # after this vote rank 0 may name it before another one hears of the vote
        index = council.attempt(lambda: _index(arrays, said))
        try:
            council.attempt(lambda: _commit(here, document, index) if group.rank == 0 else None)
        except CommunicationError:
            raise
        except Exception:
            known = np.array([group.rank != 0 or _is_named(here.path, written.shard)])
            written.stays = bool(group.gather(known.astype(np.int64))[0][0])
            raise


def _inventory(
    whole: Optimizer, path: str | os.PathLike[str], params: object, keep: int | None,
    owned: Owned, begun: int, group: Group,
) -> Inventory:  # fmt: skip
    accumulating = round_of(whole)
    if accumulating and accumulating.micro_step:
        raise ConfigurationError(
            f"{accumulating.micro_step} of {accumulating.every} micro-batches have come, and their sums are each "
            "rank's own: save when opt.micro_step is 0, or drop them with opt.discard()"
        )
    named = dict(sorted(checked_arrays({} if params is None else params, "params").items()))
    placed = {name: array for name, array in named.items() if is_dtensor(array)}
    meshes = mesh_group(group, next(iter(placed))) if placed else None
    places = {} if meshes is None else places_of(placed, meshes)
    leaves = whole._leaves()
    arrays = [_parts_here(leaf, owned, group.rank) for leaf in leaves]
    index, count = Path(os.fsdecode(path)), checked_keep(keep)
    facts = {
        "the name of the file": repr(index.name), "keep": repr(count), "how often init was called": repr(begun),
        "who has what": f"{word_of(owned.partition.portions):x}", **_told_of(whole), **forms_of(named),
    }  # fmt: skip
    return Inventory(index, count, named, meshes, places, [leaf.steps for leaf in leaves], arrays, facts)


def _told_of(whole: Optimizer) -> Facts:
    """What must be equal on all ranks of an optimizer, apart from its state."""
    return dict(_flat("opt", node_to_json(without_state(whole))))


def _flat(where: str, data: object) -> Iterator[tuple[str, str]]:
    """The leaves of nested data by their paths."""
    if isinstance(data, (dict, list)):
        below = cast("Any", data.items() if isinstance(data, dict) else enumerate(cast("list[Any]", data)))
        for name, value in below:
            yield from _flat(f"{where}.{name}", value)
    else:
        yield where, repr(data)


def forms_of(named: Mapping[str, Any]) -> Facts:
    """The dtypes and shapes of parameters, and whether they are DTensors."""
    return {
        f"params[{name!r}]": f"{dtype_of(array)} of shape {tuple(array.shape)}{', a DTensor' * is_dtensor(array)}"
        for name, array in named.items()
    }


def _parts_here(leaf: Leaf, owned: Owned, rank: int) -> dict[str, dict[str, tuple[Part, Any]]]:
    """What this rank writes of the arrays of an optimizer with a rule."""
    found: dict[str, dict[str, tuple[Part, Any]]] = {}
    for name, arrays in leaf.entries.items():
        where = owned.wheres(name).get(rank)
        if where is not None:
            found[name] = {slot: (_part(array, name, slot, owned, where), array) for slot, array in arrays.items()}
    return found


def _part(array: Any, name: str, slot: str, owned: Owned, where: Where) -> Part:
    dtype, shape, there = dtype_of(array), owned.shape(name), math.prod(array.shape)
    size = math.prod(shape)
    if name in owned.partition and where == Span(0, size):
        return Part(dtype, tuple(array.shape), Span(0, there))
    if slot.endswith(scales_of("")):
        assert isinstance(where, Span), "codes go by the order of elements"
        shape, where = (-(-size // QUANTUM),), Span(where.start // QUANTUM, -(-where.stop // QUANTUM))
    if there != where.size:
        raise ConfigurationError(
            f"state[{name!r}][{slot!r}] has {there} elements on this rank, but {where.size} by the placement with "
            "which the parameter came last; place it as before and take a step, or load a checkpoint"
        )
    return Part(dtype, shape, where)


def _described(
    whole: Optimizer, here: Inventory, told: Sequence[bytes], partition: Partition, now: Census | None, rank: int
) -> Snapshot:
    """The document of all ranks, and their arrays as `Parts`."""
    everybody = [json.loads(message) for message in told]
    states: list[State] = []
    for place, own in enumerate(here.arrays):
        steps: dict[str, int] = {}
        for counts, _ in everybody:
            for name, count in counts[place].items():
                if steps.setdefault(name, count) != count:
                    raise ConfigurationError(
                        f"params[{name!r}] has taken {count} steps on one rank, {steps[name]} on another"
                    )
        arrays = _joined([parts[place] for _, parts in everybody], own)
        states.append({name: (steps[name], arrays.get(name, {})) for name in sorted(steps)})
    document, arrays = snapshot(whole, _shared_out(here.params, partition, now, rank), states)
    parts = {key: array if isinstance(array, Parts) else _whole(key, array) for key, array in arrays.items()}
    return Snapshot(document, parts)


def _whole(key: str, array: Any) -> Parts:
    """What all ranks have of an optimizer around the sharded one; rank 0 writes it."""
    wheres: Wheres = {0: Span(0, math.prod(array.shape))}
    return Parts(dtype_of(array), tuple(array.shape), wheres, partial(bits_of, array, repr(key)))


def _joined(
    everybody: Sequence[Mapping[str, Any]], own: Mapping[str, Mapping[str, tuple[Part, Any]]]
) -> dict[str, dict[str, Parts]]:
    """The arrays of one optimizer, whose parts all ranks have told."""
    joined: dict[str, dict[str, Parts]] = {}
    for rank, told in enumerate(everybody):
        for name, arrays in told.items():
            for slot, (dtype, shape, where) in arrays.items():
                _, array = own.get(name, {}).get(slot, (None, None))
                bits = partial(bits_of, array, f"state[{name!r}][{slot!r}]")
                parts = joined.setdefault(name, {}).setdefault(slot, Parts(dtype, tuple(shape), {}, bits))
                parts.wheres[rank] = where_of(where, tuple(shape))
    return joined


def _shared_out(
    params: Mapping[str, Any], partition: Partition, now: Census | None, rank: int
) -> dict[str, Parts]:  # fmt: skip
    """Each rank writes what it has of DTensors, or what it steps of the other parameters.

    Rank 0 writes what nobody steps: the ranks may differ in that.
    """
    shared: dict[str, Parts] = {}
    for name, array in params.items():
        shape = tuple(map(int, array.shape))
        if now is not None and name in now:
            wheres, own = now.wheres(name), partial(_local_elements, name, array)
        else:
            wheres = {0: Span(0, math.prod(shape))}
            if name in partition and partition.shape(name) == shape:
                wheres = {owner: Span(start, stop) for owner, start, stop in partition[name]}
            own = partial(_elements, name, array, *wheres.get(rank, Span(0, 0)))
        shared[name] = Parts(dtype_of(array), shape, dict(wheres), own)
    return shared


def _elements(name: str, array: Any, start: int, stop: int) -> Bits:
    return bits_of(array, f"params[{name!r}]").reshape(-1)[start:stop]


def _local_elements(name: str, array: Any) -> Bits:
    return bits_of(part_of(array), f"params[{name!r}]")


def _index(arrays: Mapping[str, Parts], said: Sequence[bytes]) -> Index:
    """The index of what all ranks say that they have written, as its readers will check it."""
    everybody = [json.loads(message) for message in said]
    hashes = [found for _, found in everybody]
    spreads = {key: parts.spread(key, hashes) for key, parts in arrays.items()}
    return Index([Shard(*shard) for shard, _ in everybody], spreads).checked()


def _commit(here: Inventory, document: Document, index: Index) -> None:
    check_there(here.path, index.shards)
    save_index(here.path, document, index, here.keep)


def _is_named(path: Path, shard: Shard) -> bool:
    """Whether the index has its place already; if that cannot be told, it may have."""
    try:
        return shard.path in shards_named_by(path)
    except FileNotFoundError:
        return False
    except Exception:
        return True
