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

from gradstep.arrays.stored import Bits, bits_of, dtype_of
from gradstep.checkpoint.checkpoint_file import checked_keep, save_index
from gradstep.checkpoint.container import Tensor
from gradstep.checkpoint.nodes import Document
from gradstep.checkpoint.sharded_file import Index, Piece, Shard, Spread, shards_named_by
from gradstep.checkpoint.shards import check_there, writing
from gradstep.checkpoint.snapshot import Snapshot, State, checked_arrays, round_of, snapshot
from gradstep.checkpoint.tensors import Shape
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.group import Group
from gradstep.distributed.partition import Partition, Portion
from gradstep.errors import CommunicationError, ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.program.formats import QUANTUM, scales_of
from gradstep.step.leaf import Leaf

Ranges = dict[int, tuple[int, int]]
"""Elements from one number to another, in C order, by the rank that has them."""


class Part(NamedTuple):
    """Elements `start` to `stop`, in C order, of an array of this dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Parts(NamedTuple):
    """An array in parts, and this rank's elements, if it has any."""

    dtype: str
    shape: tuple[int, ...]
    ranges: Ranges
    own: Callable[[], Bits]

    def tensor(self, key: str, rank: int) -> Tensor:
        """What a rank writes: flat, or in the array's shape where that is all of it."""
        start, stop = self.ranges[rank]
        whole = stop - start == Shape(self.dtype, self.shape).size
        return Tensor(key, self.dtype, self.shape if whole else (stop - start,), self.own)

    def spread(self, key: str, hashes: Sequence[Mapping[str, str]]) -> Spread:
        """What the index says of it, given the hashes of every rank."""
        pieces = [Piece(rank, *part, hashes[rank][key]) for rank, part in self.ranges.items()]
        return Spread(Shape(self.dtype, self.shape), sorted(pieces, key=lambda piece: piece.start))


class Inventory(NamedTuple):
    """What a rank has: parameters, and for each optimizer with a rule steps, and the arrays that it has parts of."""

    path: Path
    keep: int
    params: Mapping[str, Any]
    steps: list[dict[str, int]]
    arrays: list[dict[str, dict[str, tuple[Part, Any]]]]
    facts: Facts

    def told(self) -> bytes:
        """What other ranks must know of it."""
        parts = [
            {n: {s: part for s, (part, _) in some.items()} for n, some in arrays.items()} for arrays in self.arrays
        ]
        return json.dumps([self.steps, parts]).encode()


def save(
    whole: Optimizer, path: str | os.PathLike[str], params: object, keep: int | None,
    group: Group, council: Council, partition: Partition, begun: int,
) -> None:  # fmt: skip
    """Write a shard on every rank, and then the index that makes them a checkpoint; on all ranks or on none.

    Args:
        whole: the outermost optimizer, whose slots are cut as `partition` says.
        path, params, keep: see `Optimizer.save`.
        group, council: the ranks.
        partition: who has what.
        begun: how often `init` has been called.
    """
    here = council.attempt(
        lambda: _inventory(whole, path, params, keep, partition, begun, group.rank),
        lambda here: Said(word_of(here.facts), lambda: here.facts),
    )
    told = group.gather_messages(here.told())
    document, arrays = council.attempt(lambda: _described(whole, here, told, partition, group.rank))
    mine = [parts.tensor(key, group.rank) for key, parts in arrays.items() if group.rank in parts.ranges]
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
    partition: Partition, begun: int, rank: int,
) -> Inventory:  # fmt: skip
    accumulating = round_of(whole)
    if accumulating and accumulating.micro_step:
        raise ConfigurationError(
            f"{accumulating.micro_step} of {accumulating.every} micro-batches have come, and their sums are each "
            "rank's own: save when opt.micro_step is 0, or drop them with opt.discard()"
        )
    named = dict(sorted(checked_arrays({} if params is None else params, "params").items()))
    leaves = whole._leaves()
    arrays = [_parts_here(leaf, partition, rank) for leaf in leaves]
    index, count = Path(os.fsdecode(path)), checked_keep(keep)
    facts = {
        "the name of the file": repr(index.name), "keep": repr(count), "how often init was called": repr(begun),
        "who has what": f"{word_of(partition.portions):x}", **_told_of(whole), **forms_of(named),
    }  # fmt: skip
    return Inventory(index, count, named, [leaf.steps for leaf in leaves], arrays, facts)


def _told_of(whole: Optimizer) -> Facts:
    """What must be equal on all ranks of an optimizer, apart from its state."""
    empty: list[State] = [{} for _ in whole._leaves()]
    return dict(_flat("opt", snapshot(whole, {}, empty).document.to_json()["optimizer"]))


def _flat(where: str, data: object) -> Iterator[tuple[str, str]]:
    """The leaves of nested data by their paths."""
    if isinstance(data, (dict, list)):
        below = cast("Any", data.items() if isinstance(data, dict) else enumerate(cast("list[Any]", data)))
        for name, value in below:
            yield from _flat(f"{where}.{name}", value)
    else:
        yield where, repr(data)


def forms_of(named: Mapping[str, Any]) -> Facts:
    """The dtypes and shapes of parameters."""
    return {f"params[{name!r}]": f"{dtype_of(array)} of shape {tuple(array.shape)}" for name, array in named.items()}


def _parts_here(leaf: Leaf, partition: Partition, rank: int) -> dict[str, dict[str, tuple[Part, Any]]]:
    """What this rank has of the arrays of an optimizer with a rule."""
    portions, shape = partition.of_rank(rank, leaf.entries), partition.shape
    return {
        name: {slot: (_part(array, slot, shape(name), portions[name]), array) for slot, array in arrays.items()}
        for name, arrays in leaf.entries.items()
    }


def _part(array: Any, slot: str, shape: tuple[int, ...], portion: Portion) -> Part:
    dtype, size = dtype_of(array), math.prod(shape)
    _, start, stop = portion
    if (start, stop) == (0, size):
        return Part(dtype, tuple(array.shape), 0, math.prod(array.shape))
    if slot.endswith(scales_of("")):
        return Part(dtype, (-(-size // QUANTUM),), start // QUANTUM, -(-stop // QUANTUM))
    return Part(dtype, shape, start, stop)


def _described(
    whole: Optimizer, here: Inventory, told: Sequence[bytes], partition: Partition, rank: int
) -> Snapshot:  # fmt: skip
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
    document, arrays = snapshot(whole, _shared_out(here.params, partition, rank), states)
    parts = {key: array if isinstance(array, Parts) else _whole(key, array) for key, array in arrays.items()}
    return Snapshot(document, parts)


def _whole(key: str, array: Any) -> Parts:
    """What all ranks have of an optimizer around the sharded one; rank 0 writes it."""
    ranges = {0: (0, math.prod(array.shape))}
    return Parts(dtype_of(array), tuple(array.shape), ranges, partial(bits_of, array, repr(key)))


def _joined(
    everybody: Sequence[Mapping[str, Any]], own: Mapping[str, Mapping[str, tuple[Part, Any]]]
) -> dict[str, dict[str, Parts]]:
    """The arrays of one optimizer, whose parts all ranks have told."""
    joined: dict[str, dict[str, Parts]] = {}
    for rank, told in enumerate(everybody):
        for name, arrays in told.items():
            for slot, (dtype, shape, start, stop) in arrays.items():
                _, array = own.get(name, {}).get(slot, (None, None))
                bits = partial(bits_of, array, f"state[{name!r}][{slot!r}]")
                parts = joined.setdefault(name, {}).setdefault(slot, Parts(dtype, tuple(shape), {}, bits))
                parts.ranges[rank] = (start, stop)
    return joined


def _shared_out(params: Mapping[str, Any], partition: Partition, rank: int) -> dict[str, Parts]:
    """Each rank writes what it steps of the parameters, and rank 0 what nobody does: the ranks may differ in that."""
    shared: dict[str, Parts] = {}
    for name, array in params.items():
        ranges = {0: (0, math.prod(array.shape))}
        if name in partition and partition.shape(name) == tuple(array.shape):
            ranges = {owner: (start, stop) for owner, start, stop in partition[name]}
        start, stop = ranges.get(rank, (0, 0))
        shared[name] = Parts(dtype_of(array), tuple(array.shape), ranges, partial(_elements, name, array, start, stop))
    return shared


def _elements(name: str, array: Any, start: int, stop: int) -> Bits:
    return bits_of(array, f"params[{name!r}]").reshape(-1)[start:stop]


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
