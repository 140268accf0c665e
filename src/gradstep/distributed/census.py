"""Which elements of each parameter every rank has, as the ranks have told each other."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gradstep.arrays.region import Region, Span, Where
from gradstep.distributed.dtensors import Placed
from gradstep.distributed.group import MeshGroup
from gradstep.errors import ConfigurationError


class Holding(NamedTuple):
    """What one rank has of a parameter, and with whom it shares the parameter out."""

    region: Region | None
    mesh: tuple[int, ...]


class Census:
    """What all ranks have of the parameters that have come so far.

    Args:
        group: the ranks.

    Attributes:
        untried: the parameters whose replicas have not been compared yet.
    """

    def __init__(self, group: MeshGroup) -> None:
        self._group = group
        self._holdings: dict[str, list[Holding]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.untried: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._holdings

    def copy(self) -> "Census":
        """Another one that knows the same."""
        other = Census(self._group)
        other._holdings, other._shapes, other.untried = dict(self._holdings), dict(self._shapes), set(self.untried)
        return other

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return self._shapes[name]

    def lacking(self, placed: Mapping[str, Placed]) -> list[str]:
        """The parameters of which nothing is known, or that this rank has otherwise now."""
        rank = self._group.rank
        return [
            name
            for name, here in placed.items()
            if name not in self._holdings or self._holdings[name][rank] != (here.region, here.mesh)
        ]

    def take(self, placed: Mapping[str, Placed], names: Sequence[str]) -> None:
        """Ask all ranks, at the same time, what they have of these parameters.

        Raises:
            ConfigurationError: what they have is not the whole tensor, once or several times.
        """
        told = {name: _told(placed[name]) for name in names}
        messages = [json.loads(message) for message in self._group.gather_messages(json.dumps(told).encode())]
        for name in names:
            shape = placed[name].shape
            holdings = [_holding(shape, *message[name]) for message in messages]
            _check(name, placed[name], holdings)
            self._holdings[name], self._shapes[name] = holdings, shape
            self.untried.add(name)

    def regions(self, name: str) -> list[Region | None]:
        """What each rank has; None where that is nothing."""
        return [here.region if here.region and here.region.size else None for here in self._holdings[name]]

    def first(self, name: str) -> dict[int, Region]:
        """The ranks whose regions make up the tensor, each element once: the first of those that have the same."""
        found: dict[Region, int] = {}
        for rank, region in enumerate(self.regions(name)):
            if region:
                found.setdefault(region, rank)
        return {rank: region for region, rank in found.items()}

    def wheres(self, name: str) -> dict[int, Where]:
        """The same, as spans where elements follow on each other; one rank has what has no elements."""
        found: dict[int, Where] = {rank: region.where for rank, region in self.first(name).items()}
        return found or {next(rank for rank, here in enumerate(self._holdings[name]) if here.region): Span(0, 0)}

    def replicas(self, name: str) -> list[list[int]]:
        """Ranks that have the same region."""
        groups: dict[Region, list[int]] = {}
        for rank, region in enumerate(self.regions(name)):
            if region:
                groups.setdefault(region, []).append(rank)
        return [ranks for ranks in groups.values() if len(ranks) > 1]

    def copies(self, name: str) -> list[list[int]]:
        """Those of them that no mesh gives equal gradients: nobody but their code makes them equal."""
        holdings = self._holdings[name]
        return [ranks for ranks in self.replicas(name) if len({holdings[rank].mesh for rank in ranks}) > 1]


def _told(here: Placed) -> tuple[object, tuple[int, ...]]:
    return here.region.axes if here.region else None, here.mesh


def _holding(shape: tuple[int, ...], axes: list[list[list[int]]] | None, mesh: list[int]) -> Holding:
    region = None
    if axes is not None:
        region = Region(shape, tuple(tuple((start, stop) for start, stop in runs) for runs in axes))
    return Holding(region, tuple(mesh))


def _check(name: str, placed: Placed, holdings: Sequence[Holding]) -> None:
    different = {here.region for here in holdings if here.region}
    had, whole = sum(region.size for region in different), math.prod(placed.shape)
    if had != whole:
        raise ConfigurationError(
            f"params[{name!r}] is placed as {placed.text} and has {whole} elements, but the ranks of the group have "
            f"{had} between them, copies left out; give Sharded the group of all ranks that share the model, on "
            "meshes that cut the parameter alike"
        )
