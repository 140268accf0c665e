"""Loading what will be spread over ranks: each reads the parts that will be its own."""
# pyright: reportPrivateUsage=false

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from gradstep.arrays.library import recognise
from gradstep.arrays.region import Region, Span, Where
from gradstep.checkpoint.nodes import Document
from gradstep.checkpoint.restore import Restoration, prepare
from gradstep.checkpoint.snapshot import checked_arrays, without_state
from gradstep.checkpoint.tensors import Tensors
from gradstep.checkpoint.wants import WantInMemory
from gradstep.distributed.census import Census
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.dtensors import Placed, is_dtensor, part_of
from gradstep.distributed.group import Group, MeshGroup
from gradstep.distributed.partition import Partition
from gradstep.distributed.placed_step import first_element, mesh_group, places_of
from gradstep.distributed.saving import forms_of
from gradstep.distributed.sharded_step import extent_of, needs_whole, unsharded, whole_extent
from gradstep.errors import ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.persistence import Loading
from gradstep.tree import named_arrays


class Source(NamedTuple):
    """A checkpoint that is open, and what tells it from others."""

    document: Document
    tensors: Tensors
    digest: str


class Loaded(NamedTuple):
    """A checkpoint of which a rank has read its part, and who will have what."""

    restoration: Restoration
    partition: Partition
    census: Census | None
    facts: Facts


class Asked(NamedTuple):
    """Where the elements of the parameters belong, before anything is read."""

    group: MeshGroup | None
    """Where any parameter is a DTensor."""
    places: Mapping[str, Placed]
    facts: Facts


def read_parts(
    whole: Optimizer, opened: Callable[[], AbstractContextManager[Source]], loading: Loading,
    group: Group, council: Council, partition: Partition, census: Census | None, stack: contextlib.ExitStack,
) -> Loaded:  # fmt: skip
    """Read on every rank what will be its own; nothing changes yet.

    Args:
        whole: the outermost optimizer.
        opened: opens the checkpoint, of any number of ranks or of one process.
        loading: how it is loaded.
        group, council: the ranks.
        partition, census: who has what of the state that there is.
        stack: keeps the checkpoint open.
    """
    asked = council.attempt(lambda: _asked(loading, group), lambda here: Said(word_of(here.facts), lambda: here.facts))
    kept = None if loading.strict else census
    if asked.group is not None:
        kept = Census(asked.group) if kept is None else kept.copy()
        kept.take(asked.places, list(asked.places))

    def read() -> Loaded:
        source = stack.enter_context(opened())
        owners = Partition(group.size) if loading.strict else partition
        share = _PlacedShare(asked, group.rank, owners) if asked.group is not None else _CutShare(group.rank, owners)
        restoration = prepare(whole, without_state(whole), source.document, source.tensors, loading, share)
        return Loaded(restoration, share.partition, kept, {"the checkpoint, by its digest": source.digest})

    return council.attempt(read, lambda here: Said(word_of(here.facts), lambda: here.facts))


def _asked(loading: Loading, group: Group) -> Asked:
    loading.checked()
    likes = loading.params if loading.like is None else loading.like
    if likes is None:
        raise ConfigurationError(
            "a Sharded optimizer loads the part of the state that will be its own, which depends on the "
            "parameters: pass params to overwrite them too, or like=params"
        )
    named = dict(sorted(checked_arrays(likes, "params" if loading.like is None else "like").items()))
    library = recognise(params=named)
    if library.in_place is False:
        raise unsharded(library)
    both = {**named, **({} if loading.params is None else named_arrays(loading.params, "params"))}
    placed = sorted(name for name, array in both.items() if is_dtensor(array))
    meshes = mesh_group(group, placed[0]) if placed else None
    places = {} if meshes is None else places_of(named, meshes)
    return Asked(meshes, places, _how(loading, named, placed))


def _how(loading: Loading, named: Mapping[str, Any], placed: Sequence[str]) -> Facts:
    given = {
        "params": loading.params is not None,
        "strict": loading.strict,
        "hyperparameters": loading.whose,
        "DTensors": placed,
    }
    return {**{f"load's {name}": repr(value) for name, value in given.items()}, **forms_of(named)}


class _CutShare:
    """A rank's share of what `Sharded` cuts itself: all of every parameter, and portions of their state.

    `partition` grows when it is asked for state.
    """

    def __init__(self, rank: int, partition: Partition) -> None:
        self._rank, self.partition = rank, partition

    def here(self, array: Any) -> Any:
        """See `Share.here`."""
        return array

    def region(self, name: str, array: Any) -> Region:
        """See `Share.region`."""
        return Region.all_of(tuple(array.shape))

    def state(self, wants: Mapping[str, WantInMemory]) -> Mapping[str, Where]:
        """See `Share.state`."""
        extents = {name: extent_of(want.program, want.memory) for name, want in wants.items()}
        self.partition = self.partition.extended(extents)
        return {name: Span(*part[1:]) for name, part in self.partition.of_rank(self._rank, wants).items()}


class _PlacedShare:
    """A rank's share of what placements share out: its parts of parameters, their state, and that of what it owns."""

    def __init__(self, asked: Asked, rank: int, partition: Partition) -> None:
        assert asked.group is not None
        self._group, self._places, self._rank, self.partition = asked.group, asked.places, rank, partition

    def here(self, array: Any) -> Any:
        """See `Share.here`."""
        return part_of(array)

    def region(self, name: str, array: Any) -> Region:
        """See `Share.region`."""
        place = places_of({name: array}, self._group)[name]
        return place.region or Region.none_of(place.shape)

    def state(self, wants: Mapping[str, WantInMemory]) -> Mapping[str, Where]:
        """See `Share.state`."""
        owned = {
            name: whole_extent(want.program, self._places[name].shape)
            for name, want in wants.items()
            if needs_whole(want.program)
        }
        self.partition = self.partition.extended(owned)
        found: dict[str, Where] = {
            name: Span(*part[1:]) for name, part in self.partition.of_rank(self._rank, owned).items()
        }
        for name, want in wants.items():
            _, text, region, _ = self._places[name]
            if name in owned or region is None:
                continue
            if want.is_coded:
                first_element(name, text, region, coded=True)
            found[name] = region
        return found
