"""A step of parameters that the caller has shared out among the ranks, as DTensors: the part of one of them."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import OTHER, STAYED, MemoryLibrary
from gradstep.arrays.memory import Integers, Memory
from gradstep.arrays.region import Region
from gradstep.distributed.census import Census
from gradstep.distributed.council import Facts
from gradstep.distributed.dtensors import (
    Placed,
    is_dtensor,
    is_placed_like,
    part_of,
    parts_of,
    placed,
    placing,
    where,
)
from gradstep.distributed.exchange import bucket_bytes
from gradstep.distributed.group import Array, Group, MeshGroup
from gradstep.distributed.owners import Owners
from gradstep.distributed.partition import Extent, Partition
from gradstep.distributed.placed_norm import PlacedNorm
from gradstep.distributed.rank_plan import RankPlan, Routes
from gradstep.distributed.sharded_step import is_plain, needs_whole, whole_extent
from gradstep.errors import ConfigurationError, ShapeError
from gradstep.program.formats import BYTES, QUANTUM, compute_dtype
from gradstep.program.graph import Reading
from gradstep.program.rounding import widened
from gradstep.step.bill import MemoryBill, bill
from gradstep.step.intake import Intake, joined
from gradstep.step.leaf import Leaf
from gradstep.step.match import check_parameter, describe_floats
from gradstep.step.plan import Piece, Plan, Share


def mesh_group(group: Group, name: str) -> MeshGroup:
    """The group, if it can step DTensors such as `name`."""
    if isinstance(group, MeshGroup):
        return group
    raise ConfigurationError(
        f"params[{name!r}] is a DTensor, and the group is one of {group.name}; DTensors belong to torch.distributed: "
        "pass torch.distributed.group.WORLD, or another process group of all ranks that share the model"
    )


def places_of(params: Mapping[str, Any], group: MeshGroup) -> dict[str, Placed]:
    """Where the elements of parameters belong.

    Raises:
        ConfigurationError: a placement that cannot be stepped, or one among ranks outside of the group.
    """
    places = {name: placed(name, array, group.members[group.rank]) for name, array in params.items()}
    for name, place in places.items():
        strange = sorted(set(place.mesh) - set(group.members))
        if strange:
            raise ConfigurationError(
                f"params[{name!r}] is placed on a mesh with rank {strange[0]}, which is not in the group; give "
                "Sharded the group of all ranks that share the model, such as torch.distributed.group.WORLD"
            )
    return places


def first_element(name: str, text: str, region: Region, *, coded: bool) -> int:
    """The number of a region's first element in the whole tensor, by whose order it is to be stored.

    Args:
        name, text: the parameter, and how it is placed.
        region: which elements are stored.
        coded: whether as codes of 8 bits.

    Raises:
        ConfigurationError: they are out of order, or begin within a block of codes.
    """
    if region.start is None:
        raise ConfigurationError(
            f"params[{name!r}] is placed as {text}, and its elements on this rank do not follow on each other in "
            "the whole tensor, by whose order stochastic rounding and int8 slots go; place it as Shard(0), or "
            'keep slots in float32, bfloat16 or float16 with rounding="nearest"'
        )
    if coded and region.start % QUANTUM:
        raise ConfigurationError(
            f"params[{name!r}] is placed as {text}, and begins with element {region.start} on this rank; int8 "
            f"slots have a scale for each {QUANTUM} elements of the whole tensor, so that a shard must begin at a "
            f"multiple of {QUANTUM}: pad the tensor, or keep its slots in bfloat16"
        )
    return region.start


def owned_extents(routes: Routes, params: Mapping[str, Any]) -> dict[str, Extent]:
    """The parameters whose rule needs the whole tensor, which gets an owner."""
    programs = {name: leaf.program(name, params[name].ndim) for leaf, names in routes for name in names}
    return {
        name: whole_extent(program, tuple(map(int, params[name].shape)))
        for name, program in programs.items()
        if needs_whole(program)
    }


def placed_bill(
    library: MemoryLibrary, group: Group, routes: Routes, partition: Partition, params: Mapping[str, Any], *,
    inspected: bool,
) -> MemoryBill:  # fmt: skip
    """What a rank needs for its shards, and for the whole tensors that it owns: those, their gradients and buckets."""
    whole, parts = owned_extents(routes, params), parts_of(params)
    mine = partition.of_rank(group.rank, whole)
    dtypes = {name: library.describe(parts[name], f"params[{name!r}]").dtype for name in params}
    shapes = {name: whole[name].shape for name in mine}
    arrays = {name: library.zeros(shape, range(len(shape)), dtypes[name]) for name, shape in shapes.items()}
    here = {name: arrays.get(name, part) for name, part in parts.items() if name in mine or name not in whole}
    own = [(leaf, [name for name in names if name in here]) for leaf, names in routes]
    copies = sum(2 * whole[name].size * BYTES[dtypes[name]] for name in mine)
    total = sum(extent.size * BYTES[dtypes[name]] for name, extent in whole.items())
    return bill(here, own, inspected=inspected) + MemoryBill(scratch=copies + 2 * min(bucket_bytes(group.size), total))


class PlacedPlan(RankPlan):
    """One rank's part in a step of parameters whose placements say who has what.

    Elementwise rules step the shards where they are. A tensor whose rule needs all of it is brought to its owner, who
    steps a copy and sends everybody's shard back. Plain tensors are copies of one tensor on every rank.

    Args:
        library: whose arrays they are.
        group: the ranks.
        census: what has been found out about the other ranks' shards.
        routes: which optimizer takes which parameters.
        partition: who owns the tensors that need an owner.
        params, grads: arrays by name, of the parameters that get a gradient.
        intake: how the gradients come in.
        planned_intake: how the rules read them then.

    Raises:
        ConfigurationError: a placement with which the rule or its storage cannot work.
    """

    def __init__(
        self,
        library: MemoryLibrary,
        group: MeshGroup,
        census: Census,
        routes: Routes,
        partition: Partition,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        intake: Intake,
        planned_intake: Intake,
    ) -> None:
        super().__init__(library, routes, list(params))
        self._group, self._census = group, census
        self._places = places_of({name: params[name] for name in self.names}, group)
        # While a step is taken: what is here of the parameters, and the gradients as the rules and the norm read them.
        self._parts: Mapping[str, Any] = parts_of(params)
        self._hands: Mapping[str, Any] = parts_of(grads)
        self._memories = {name: check_parameter(library, name, self._parts[name]) for name in self.names}
        self._signs = self._signs_of(params, grads)
        self._told_of_grads = {name: placing(grads[name]) for name in self.names}
        self._moved = {name for name in self.names if self._is_moved(name, params[name], grads[name])}
        self._buffers: dict[str, Any] = {}
        self._grads = {name: self._describe_gradient(name, intake) for name in self.names}
        owned = owned_extents(routes, params)
        owners = {name: partition[name][0].rank for name in owned}
        shapes = {name: extent.shape for name, extent in owned.items()}
        self._owners = Owners(library, group, owners, shapes, self._memories, self._grads)
        self._hands = {**self._hands, **self._buffers}
        self._watch_params, self._watch_grads = (
            library.watch(self._sorted(self._parts)),
            library.watch(self._sorted(self._hands)),
        )
        self._watch_params.locate(self._sorted(self._parts))
        self._watch_grads.locate(self._sorted(self._hands))
        forms = {name: (memory.dtype, memory.size) for name, memory in self._grads.items()}
        self._norm = PlacedNorm(group, forms, self._read, library.team)
        self._lacking = census.lacking(self._places)
        self._met = False
        shares = [self._share(leaf, names) for leaf, names in routes]
        self._adopt(Plan(library, shares, *self._stepped(), planned_intake))
        self._turn = np.array([self.names.index(name) for name in self.plan.names], np.int64)
        self._fixed = [
            (place, library.describe(self._owners.grads[name], "a buffer").address)
            for place, name in enumerate(self.plan.names)
            if name in self._owners
        ]

    @property
    def norm(self) -> PlacedNorm:
        return self._norm

    # What is made once

    def _new(self, shape: Sequence[int], dtype: str) -> Any:
        return self.library.zeros(shape, range(len(shape)), dtype)

    def _is_moved(self, name: str, parameter: Any, gradient: Any) -> bool:
        """Whether a gradient must be placed like its parameter first."""
        if not is_dtensor(gradient):
            return False
        shape = tuple(gradient.shape)
        if shape != self._places[name].shape:
            raise ShapeError(f"grads[{name!r}] has shape {shape}, but params[{name!r}] has {self._places[name].shape}")
        if is_placed_like(gradient, parameter):
            return False
        if is_dtensor(parameter) and gradient.device_mesh == parameter.device_mesh:
            return True
        raise ConfigurationError(
            f"grads[{name!r}] is placed as {placing(gradient)}, and params[{name!r}] as {placing(parameter)}; a "
            "gradient belongs on the mesh of its parameter"
        )

    def _describe_gradient(self, name: str, intake: Intake) -> Memory:
        """Where a gradient lies here; what has to be computed or laid out first gets a buffer."""
        there = describe_floats(self.library, self._hands[name], f"grads[{name!r}]")
        shape, region = self._memories[name].shape, self._places[name].region
        joins = intake.reading(name) in (Reading.WEIGHED, Reading.SUMMED)
        if name not in self._moved and there.shape != shape:
            cut = "" if region is None or shape == region.shape else f" on this rank, of {region.shape}"
            raise ShapeError(f"grads[{name!r}] has shape {there.shape}, but params[{name!r}] has {shape}{cut}")
        if name not in self._moved and not joins and is_plain(there):
            return there
        self._buffers[name] = self._new(shape, compute_dtype(self._memories[name].dtype) if joins else there.dtype)
        return self.library.describe(self._buffers[name], f"grads[{name!r}]")

    def _share(self, leaf: Leaf, names: list[str]) -> Share:
        stepped = [name for name in names if name in self._owners.params or self._steps_shard(name)]
        return Share(leaf, stepped, pieces={name: self._piece(leaf, name) for name in stepped})

    def _steps_shard(self, name: str) -> bool:
        return name not in self._owners and self._places[name].region is not None

    def _piece(self, leaf: Leaf, name: str) -> Piece:
        """Where the elements are in the whole tensor, if that matters to how they are stored."""
        place, region = self._places[name], self._places[name].region
        formats = leaf.storage.formats(
            leaf.program(name, len(place.shape)).slots, self._memories[name].dtype, self._grads[name].dtype
        )
        start = 0
        if name not in self._owners and region and any(kept.ordered for kept in formats.values()):
            start = first_element(name, place.text, region, coded=any(kept.coded for kept in formats.values()))
        return Piece(start, len(place.shape))

    # What all ranks must have in common

    def _told_of_arrays(self) -> Facts:
        grads = {f"grads[{name!r}]": f"{self._grads[name].dtype}, {self._told_of_grads[name]}" for name in self.names}
        params = {
            f"params[{name!r}]": f"{self._memories[name].dtype} of shape {place.shape}, {place.text}"
            for name, place in self._places.items()
        }
        return grads | params

    def _ndim(self, name: str) -> int:
        return len(self._places[name].shape)

    def _told_of_owners(self, name: str) -> str:
        return f"stepped by rank {self._owners[name]}" if name in self._owners else "as they are placed"

    def coming(self) -> Facts:
        """See `RankPlan.coming`; and what the ranks will tell each other of."""
        return {**super().coming(), "the parameters placed anew": repr(self._lacking)}

    def beginning(self, known: Partition, named: Mapping[str, Any]) -> Facts:
        """Nothing: shards differ, and copies are compared in the step."""
        return {}

    # What is done for each step

    def _finds_arrays(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> bool:
        if self._signs_of(params, grads) != self._signs:
            return False
        self._parts, self._hands = parts_of(params), {**parts_of(grads), **self._buffers}
        found = self._watch_grads.locate(self._sorted(self._hands))
        return self._watch_params.locate(self._sorted(self._parts)) == STAYED and found != OTHER

    def _signs_of(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> list[object]:
        """What must stay the same, besides layouts and addresses of what the rules read."""
        pairs = ((params[name], grads[name]) for name in self.names)
        return [(where(parameter), where(gradient), gradient.dtype, gradient.shape) for parameter, gradient in pairs]

    def average(self, grads: Mapping[str, Any], params: Mapping[str, Any], intake: Intake, micro: float) -> None:
        """Place gradients like their parameters, and bring to their owners what must be whole. Nothing is averaged."""
        if not self._met:
            self._meet()
        moved = {
            name: grads[name].detach().redistribute(placements=params[name].placements)
            for name in self._buffers
            if name in self._moved
        }
        problem = None
        try:
            for name in self._buffers:
                self._fill(name, moved.get(name, grads[name]), intake, micro)
        except Exception as error:
            problem = error
        if self._meets_later and self._group.gather(np.array(problem is not None, np.int64)).any():
            if problem is not None:
                raise problem
            return  # the rank that has failed tells everybody
        if problem is not None:
            raise problem
        addresses = self._watch_grads.addresses.copy()
        self._norm.look_at(addresses)
        self._compare()
        self._owners.gather(self._parts, self._hands)
        self.plan.move_gradients(self._in_turn(addresses))

    @property
    def _meets_later(self) -> bool:
        """Whether ranks need each other again before they vote; all of them know the same."""
        return bool(self._copies or self._first_compared or self._owners.names)

    def _in_turn(self, addresses: Integers) -> Integers:
        turned = addresses[self._turn]
        for place, address in self._fixed:
            turned[place] = address
        return turned

    def _meet(self) -> None:
        """Learn what the other ranks have, all of them together."""
        census, rank = self._census, self._group.rank
        if self._lacking:
            census.take(self._places, self._lacking)
        self._norm.count([name for name in self.names if rank in census.first(name)])
        self._copies = {name: copies for name in self.names if (copies := census.copies(name))}
        replicas = {name: census.replicas(name) for name in self.names if name in census.untried}
        self._first_compared = {name: ranks for name, ranks in replicas.items() if ranks}
        self._owners.meet(census)
        self._lacking, self._met = [], True

    def _fill(self, name: str, gradient: Any, intake: Intake, micro: float) -> None:
        """Put into a buffer what the rules read as the gradient."""
        library = self.library
        values, buffer = library.as_numpy(part_of(gradient)), library.as_numpy(self._buffers[name])
        reading = intake.reading(name)
        if reading in (Reading.WEIGHED, Reading.SUMMED):
            dtype = self._grads[name].dtype
            stored = library.describe(part_of(gradient), "a gradient").dtype
            total = intake.total(name)
            values = joined(widened(values, stored, dtype), micro, None if total is None else library.as_numpy(total))
        buffer[...] = values

    def _read(self, names: Iterable[str]) -> Iterable[Array]:
        """Gradients in the dtype of their computation."""
        for name in names:
            dtype = self._grads[name].dtype
            yield widened(self.library.as_numpy(self._hands[name]), dtype, compute_dtype(dtype))

    def _compare(self) -> None:
        """Raise on all ranks if replicas differ in what they begin with, or copies in their gradients."""
        compared = [("grads", name, self._hands[name], ranks) for name, ranks in self._copies.items()]
        compared += [("params", name, self._parts[name], ranks) for name, ranks in self._first_compared.items()]
        if not compared:
            return
        words = [zlib.crc32(np.ascontiguousarray(self.library.as_numpy(array)).data) for _, _, array, _ in compared]
        everybody = self._group.gather(np.array(words, np.int64))
        for (tree, name, _, replicas), column in zip(compared, everybody.T.tolist(), strict=True):
            for ranks in replicas:
                other = next((rank for rank in ranks if column[rank] != column[ranks[0]]), None)
                if other is not None:
                    raise ConfigurationError(
                        f"{tree}[{name!r}] differs between rank {ranks[0]} and rank {other}, which have copies of the "
                        f"same elements ({self._places[name].text}) and no mesh that keeps them equal; "
                        + ("average it over these ranks before the step" if tree == "grads" else "seed all ranks alike")
                    )
        self._census.untried -= self._first_compared.keys()
        self._first_compared = {}

    def _written(self, params: Mapping[str, Any]) -> list[Any]:
        arrays = self._sorted(params)
        return arrays + [
            part for part, array in zip(self._sorted(self._parts), arrays, strict=True) if part is not array
        ]

    def _stepped(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What this rank steps, and with which gradients."""
        return {**self._parts, **self._owners.params}, {**self._hands, **self._owners.grads}

    def _local(self, params: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        parameters, gradients = self._stepped()
        return [parameters[name] for name in self.plan.names], [gradients[name] for name in self.plan.names]

    def _spread(self, params: Mapping[str, Any]) -> None:
        self._owners.spread(self._parts)
        self._parts, self._hands = {}, {}
