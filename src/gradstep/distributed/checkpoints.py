"""Checkpoints of what is spread over ranks: each writes the parts that it has, and reads those that it will have."""
# pyright: reportPrivateUsage=false

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from gradstep.accumulate import Accumulate
from gradstep.arrays.library import recognise
from gradstep.arrays.stored import Bits, bits_of, dtype_of
from gradstep.checkpoint.checkpoint_file import checked_keep, save_index
from gradstep.checkpoint.container import Tensor
from gradstep.checkpoint.differences import Difference
from gradstep.checkpoint.nodes import Document, keys_of
from gradstep.checkpoint.restore import Restoration, prepare
from gradstep.checkpoint.sharded_file import Index, Piece, Shard, Spread
from gradstep.checkpoint.shards import Written, check_there, named_beside, remove_left_over, writing
from gradstep.checkpoint.snapshot import State, checked_arrays, snapshot
from gradstep.checkpoint.tensors import Shape, Tensors
from gradstep.checkpoint.wants import WantInMemory
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.group import Group
from gradstep.distributed.partition import Partition, Portion
from gradstep.distributed.sharded_step import extent_of, unsharded
from gradstep.errors import CommunicationError, ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.persistence import Loading
from gradstep.program.formats import QUANTUM, scales_of
from gradstep.step.leaf import Leaf


class Part(NamedTuple):
    """Elements `start` to `stop`, in C order, of an array of this dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Parts(NamedTuple):
    """An array in parts: whose ranges of elements are whose, and this rank's own elements, if it has any."""

    dtype: str
    shape: tuple[int, ...]
    ranges: dict[int, tuple[int, int]]
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


class Brought(NamedTuple):
    """What a rank brings to a save: parameters, and for each optimizer with a rule the arrays that it has parts of."""

    path: Path
    keep: int
    params: Mapping[str, Any]
    steps: list[dict[str, int]]
    arrays: list[dict[str, dict[str, tuple[Part, Any]]]]
    facts: Facts


def save(
    whole: Optimizer, path: str | os.PathLike[str], params: object, keep: int | None,
    group: Group, council: Council, partition: Partition,
) -> None:  # fmt: skip
    """Write a shard on every rank, and then the index that makes them a checkpoint; on all ranks or on none.

    Args:
        whole: the outermost optimizer, whose slots are cut as `partition` says.
        path, params, keep: see `Optimizer.save`.
        group, council: the ranks.
        partition: who has what.
    """
    rank = group.rank

    def brought() -> Brought:
        _refuse_round(whole)
        named = checked_arrays({} if params is None else params, "params")
        arrays = [_parts_here(leaf, partition, rank) for leaf in whole._leaves()]
        index, count = Path(os.fsdecode(path)), checked_keep(keep)
        facts = {"the name of the file": repr(index.name), "keep": repr(count), **told_of(whole), **forms_of(named)}
        return Brought(index, count, named, [leaf.steps for leaf in whole._leaves()], arrays, facts)

    here = council.attempt(brought, lambda here: Said(word_of(here.facts), lambda: here.facts))
    token, states = _joined(here, group)
    document, arrays = snapshot(whole, _shared_out(here.params, partition, group), states)
    mine = [parts.tensor(key, rank) for key, parts in arrays.items() if rank in parts.ranges]
    with contextlib.ExitStack() as stack:
        shard = council.attempt(lambda: stack.enter_context(writing(here.path, token, rank, group.size, mine)))
        said = json.dumps([shard.path, shard.size, shard.hashes]).encode()
        shards = [Written(*json.loads(message)) for message in group.gather_messages(said)]
        try:
            council.attempt(lambda: _commit(here, document, arrays, shards) if rank == 0 else None)
        except CommunicationError:
            shard.keep()  # rank 0 may have written the index before somebody was lost
            raise
        shard.keep()


def _refuse_round(whole: Optimizer) -> None:
    if isinstance(whole, Accumulate) and whole.micro_step:
        raise ConfigurationError(
            f"{whole.micro_step} of {whole.every} micro-batches have come, and their sums are each rank's own: save "
            "when opt.micro_step is 0, or drop them with opt.discard()"
        )


def told_of(whole: Optimizer) -> Facts:
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
    portions = partition.of_rank(rank, leaf.entries)
    return {
        name: {
            slot: (_part(array, slot, partition.shape(name), portions[name]), array) for slot, array in arrays.items()
        }
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


def _joined(here: Brought, group: Group) -> tuple[str, list[State]]:
    """A token of rank 0, and the state of all ranks, for each optimizer with a rule and by the names of parameters."""
    parts = [{n: {s: part for s, (part, _) in some.items()} for n, some in arrays.items()} for arrays in here.arrays]
    said = json.dumps([secrets.token_hex(6), here.steps, parts]).encode()
    everybody = [json.loads(message) for message in group.gather_messages(said)]
    states: list[State] = []
    for place, own in enumerate(here.arrays):
        steps = {name: count for _, counts, _ in everybody for name, count in counts[place].items()}
        arrays = _joined_parts([told[place] for *_, told in everybody], own)
        states.append({name: (steps[name], arrays.get(name, {})) for name in sorted(steps)})
    return everybody[0][0], states


def _joined_parts(
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


def _shared_out(params: Mapping[str, Any], partition: Partition, group: Group) -> dict[str, Parts]:
    """Who writes what of the parameters: everybody what he steps, and the rest dealt out by size."""
    sizes = dict.fromkeys(range(group.size), 0)
    shared: dict[str, Parts] = {}
    for name, array in params.items():
        if name in partition and partition.shape(name) == tuple(array.shape):
            ranges = {rank: (start, stop) for rank, start, stop in partition[name]}
        else:
            writer, size = min(sizes, key=lambda rank: (sizes[rank], rank)), math.prod(array.shape)
            sizes[writer] += size
            ranges = {writer: (0, size)}
        start, stop = ranges.get(group.rank, (0, 0))
        shared[name] = Parts(dtype_of(array), tuple(array.shape), ranges, partial(_elements, name, array, start, stop))
    return shared


def _elements(name: str, array: Any, start: int, stop: int) -> Bits:
    return bits_of(array, f"params[{name!r}]").reshape(-1)[start:stop]


def _commit(here: Brought, document: Document, arrays: Mapping[str, Parts], shards: Sequence[Written]) -> None:
    """Write the index, and remove what no index names any more."""
    check_there(here.path, [(shard.path, shard.size) for shard in shards])
    hashes = [shard.hashes for shard in shards]
    spreads = {key: parts.spread(key, hashes) for key, parts in arrays.items()}
    before: set[str] = set()
    with contextlib.suppress(OSError):
        before = named_beside(here.path)
    save_index(here.path, document, Index([Shard(s.path, s.size) for s in shards], spreads), here.keep)
    with contextlib.suppress(OSError):
        remove_left_over(here.path, before)


class Loaded(NamedTuple):
    """A checkpoint that a rank has read its part of."""

    restoration: Restoration
    partition: Partition
    facts: Facts


def load(
    whole: Optimizer, opened: Callable[[], AbstractContextManager[tuple[Document, Tensors]]], loading: Loading,
    group: Group, council: Council, partition: Partition,
) -> tuple[list[Difference], Partition]:  # fmt: skip
    """Read on every rank what will be its own, and adopt it on all of them or on none.

    Args:
        whole: the outermost optimizer.
        opened: gives the checkpoint, of any number of ranks or of one process.
        loading: how it is loaded.
        group, council: the ranks.
        partition: who has what of the state that there is.

    Returns:
        Everything that differs, and who has what from now on.
    """

    def read(stack: contextlib.ExitStack) -> Loaded:
        likes = loading.params if loading.like is None else loading.like
        if likes is None:
            raise ConfigurationError(
                "a Sharded optimizer loads the part of the state that will be its own, which depends on the "
                "parameters: pass params to overwrite them too, or like=params"
            )
        named = checked_arrays(likes, "params" if loading.like is None else "like")
        library = recognise(params=named)
        if library.in_place is False:
            raise unsharded(library)
        larger = partition if not loading.strict else Partition(group.size)

        def share(wants: Mapping[str, WantInMemory]) -> dict[str, tuple[int, int]]:
            nonlocal larger
            larger = larger.extended({name: extent_of(want.program, want.memory) for name, want in wants.items()})
            return {name: part[1:] for name, part in larger.of_rank(group.rank, wants).items()}

        empty: list[State] = [{} for _ in whole._leaves()]
        mine = snapshot(whole, {}, empty).document.optimizer
        document, tensors = stack.enter_context(opened())
        restoration = prepare(whole, mine, document, tensors, loading, share)
        shapes = {key: tensors.shape(key) for key in sorted(keys_of(document.optimizer))}
        checkpoint = f"{word_of([document.to_json(), shapes]):x}"
        return Loaded(restoration, larger, {"the checkpoint, by its contents": checkpoint, **_how(loading, named)})

    with contextlib.ExitStack() as stack:
        loaded = council.attempt(lambda: read(stack), lambda here: Said(word_of(here.facts), lambda: here.facts))
        loaded.restoration.adopt()
    return loaded.restoration.differences, loaded.partition


def _how(loading: Loading, named: Mapping[str, Any]) -> Facts:
    given = {"params": loading.params is not None, "strict": loading.strict, "hyperparameters": loading.whose}
    return {**{f"load's {name}": repr(value) for name, value in given.items()}, **forms_of(named)}
