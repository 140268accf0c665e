"""Tensors whose rule needs all of them: brought from everybody's shards to one owner each, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import MemoryLibrary
from gradstep.arrays.memory import Memory
from gradstep.arrays.region import Region
from gradstep.distributed.census import Census
from gradstep.distributed.exchange import Delivery, Letter
from gradstep.distributed.group import Array, MeshGroup


class Owners:
    """Who owns which whole tensor, and the copies of those that are this rank's.

    Args:
        library: whose arrays they are.
        group: the ranks.
        owners: the rank that owns each tensor, by name.
        shapes: of the whole tensors.
        params, grads: where this rank's shards lie.

    Attributes:
        params, grads: the whole tensors that this rank owns, and their gradients.
    """

    def __init__(
        self,
        library: MemoryLibrary,
        group: MeshGroup,
        owners: Mapping[str, int],
        shapes: Mapping[str, Sequence[int]],
        params: Mapping[str, Memory],
        grads: Mapping[str, Memory],
    ) -> None:
        self._library, self._group, self._owners = library, group, owners
        self._itemsizes = [{name: memories[name].itemsize for name in owners} for memories in (params, grads)]
        mine = {name: shapes[name] for name, owner in owners.items() if owner == group.rank}
        self.params, self.grads = (
            {name: library.zeros(shape, range(len(shape)), memories[name].dtype) for name, shape in mine.items()}
            for memories in (params, grads)
        )

    @property
    def names(self) -> list[str]:
        """The parameters that have owners, here or elsewhere."""
        return list(self._owners)

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def __getitem__(self, name: str) -> int:
        return self._owners[name]

    def meet(self, census: Census) -> None:
        """Lay out what goes from whom to whom, when it is known who has what."""
        self._first = {name: census.first(name) for name in self._owners}
        self._regions = {name: census.regions(name) for name in self._owners}
        self._gatherings = [
            Delivery(
                self._group,
                [
                    Letter(name, sender, owner, region.size * itemsizes[name])
                    for name, owner in self._owners.items()
                    for sender, region in self._first[name].items()
                ],
            )
            for itemsizes in self._itemsizes
        ]
        letters = [
            Letter(name, owner, receiver, region.size * self._itemsizes[0][name])
            for name, owner in self._owners.items()
            for receiver, region in enumerate(self._regions[name])
            if region
        ]
        self._spreading = Delivery(self._group, letters)

    def gather(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
        """Bring everybody's shards of parameters and gradients to their owners."""
        for gathering, shards, whole in zip(self._gatherings, (params, grads), (self.params, self.grads), strict=True):
            self._gather(gathering, shards, whole)

    def _gather(self, gathering: Delivery, shards: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        windows = {
            (name, sender): _window(self._library.as_numpy(array), region)
            for name, array in whole.items()
            for sender, region in self._first[name].items()
        }
        sent = {
            (name, owner): _flat(np.ascontiguousarray(self._library.as_numpy(shards[name])))
            for name, owner in self._owners.items()
        }
        gathering.deliver(sent, {key: _flat(window) for key, window in windows.items()})
        for (name, sender), window in windows.items():
            region = self._first[name][sender]
            if region.start is None:
                self._library.as_numpy(whole[name])[region.picked] = window

    def spread(self, params: Mapping[str, Any]) -> None:
        """Bring the elements of whole parameters to everybody's shards."""
        sent = {
            (name, receiver): _flat(_window(self._library.as_numpy(array), region))
            for name, array in self.params.items()
            for receiver, region in enumerate(self._regions[name])
            if region
        }
        shards = {name: self._library.as_numpy(params[name]) for name in self._owners}
        dense = {name: np.ascontiguousarray(array) for name, array in shards.items()}
        self._spreading.deliver(sent, {(name, self._owners[name]): _flat(array) for name, array in dense.items()})
        for name, array in shards.items():
            if dense[name] is not array:
                array[...] = dense[name].reshape(array.shape)


def _window(array: Array, region: Region) -> Array:
    """These elements of a whole tensor, in its memory where they follow on each other there; else a copy."""
    if region.start is None:
        return np.ascontiguousarray(array[region.picked])
    return array.reshape(-1)[region.start : region.start + region.size]


def _flat(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
