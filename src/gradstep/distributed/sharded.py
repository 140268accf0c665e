"""An optimizer whose state is spread over several processes."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from gradstep.arrays.library import MemoryLibrary, recognise
from gradstep.distributed.census import Census
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.dtensors import gradient_parts, is_dtensor, part_of, parts_of
from gradstep.distributed.group import Array, Group, group_of
from gradstep.distributed.grouped import Grouped
from gradstep.distributed.partition import Partition
from gradstep.distributed.placed_step import PlacedPlan, mesh_group, owned_extents, placed_bill
from gradstep.distributed.rank_plan import RankPlan, Routes
from gradstep.distributed.sharded_step import ShardedPlan, exchange_bytes, extents_of, portion_of, unsharded
from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.interrupts import InterruptsHeld
from gradstep.optimizer import Kept, Optimizer, PlanKey, StepArguments, nonfinite_error, pick
from gradstep.options import Policy, thawed
from gradstep.persistence import Loading
from gradstep.program.formats import compute_dtype
from gradstep.program.rounding import widened
from gradstep.step.bill import MemoryBill, bill
from gradstep.step.inspection import Inspection
from gradstep.step.intake import PLAIN, SCALED, Intake
from gradstep.step.overlap import refuse_overlap
from gradstep.step.scalars import Scales
from gradstep.tree import named_arrays

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from gradstep.checkpoint.differences import Difference
    from gradstep.distributed.loading import Source

Params = TypeVar("Params")


class Planned(NamedTuple):
    """A plan, what it was made for, and the partition that it needs."""

    key: PlanKey
    plan: RankPlan
    partition: Partition
    kept: Kept


class Brought(NamedTuple):
    """What a rank brings to a step."""

    planned: Planned
    wanted: Mapping[str, Any]
    named: Mapping[str, Any]
    arguments: StepArguments
    facts: Facts


class Sharded(Grouped):
    """An optimizer whose state is spread over the ranks of a group: each of `size` keeps about 1 / size of it.

    ```
    g = (g on rank 0 + g on rank 1 + …) / size        averaged; each rank gets the part that it steps
    w, slots = rule(w, g, slots)                      each rank its part
    w                                                 the parts brought to all ranks
    ```

    Every rank has all parameters, the same on all of them, and the gradients of its own part of the batch. All call
    `apply_gradients` together. Elementwise rules are cut through tensors, at multiples of 32768 elements; a tensor
    whose rule needs all of it, as those of Adafactor and Muon do, has one owner. Given the same averaged gradients,
    elementwise rules give the bits of one process for every number of ranks.

    Where parameters are DTensors, of `fully_shard` or `parallelize_module`, their placements say who has what: nothing
    is averaged, and each rank steps its shards in place. A tensor whose rule needs all of it goes to an owner and back.

    A step happens on all ranks or on none: what is found wrong on one, a shape, a schedule, a gradient that has no
    counterpart, is an error on all of them that names the rank, and nothing has changed. Whether gradients are finite
    is seen in their average. A rank that is dead or silent is a `CommunicationError` after the group's timeout.

    Everything else is the wrapped optimizer's: hyperparameters, options, counters and `report`. `state` holds this
    rank's parts, flat where a tensor was cut, and `steps` their counts.

    All call `save` and `load` together, with the same name of a file in a folder that they share. Each writes its
    parts into `name.shards/`, then rank 0 the index. Any number of ranks, or a plain optimizer, goes on from it, with
    whole parameters or with DTensors in any placement; `load` needs `params`, or `like`.

    Args:
        optimizer: whose steps are taken, a `MultiOptimizer` too.
        group: a process group of `torch.distributed` with gloo, or a communicator of mpi4py.
        timeout: seconds until a rank that does not come is given up. Default: the process group's own; 1800 with MPI.

    Raises:
        ArgumentTypeError: `optimizer` is no optimizer, or `group` no group.
        ConfigurationError: the optimizer is sharded already, or has state, or accumulates (`Accumulate(Sharded(…),
            every=…)` does that); or a `timeout` for a process group, which has its own.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> class Alone:  # of torch.distributed or mpi4py in earnest
        ...     name, rank, size = "nobody else", 0, 1
        ...     def gather(self, values): return values[None]
        ...     def gather_messages(self, message): return [message]
        ...     def exchange(self, parts): return parts
        >>> opt, params = gs.Sharded(gs.SGD(0.5), Alone()), {"w": np.zeros(2, np.float32)}
        >>> opt.apply_gradients({"w": np.array([1, 2], np.float32)}, params)
        {'w': array([-0.5, -1. ], dtype=float32)}

    Source: Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054
    """

    _mine: ClassVar[frozenset[str]] = Grouped._mine | {
        "_group",
        "_council",
        "_census",
        "_partition",
        "_planned_step",
        "_begun",
        "_compared",
        "_half_loaded",
    }
    _group: Group
    _council: Council
    _census: Census | None  # of DTensors
    _partition: Partition
    _planned_step: Planned | None
    _compared: bool  # whether the values of parameters have been, with other ranks'
    _half_loaded: bool  # whether a load failed when ranks had begun to change
    _begun: int  # how often `init` has been called, which all ranks should do together

    def __init__(self, optimizer: Optimizer, group: object, *, timeout: float | None = None) -> None:
        if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"Sharded takes an optimizer of gradstep, got {optimizer!r}")
        optimizer._check_inside("Sharded")
        if any(leaf.names() for leaf in optimizer._leaves()):
            raise ConfigurationError(
                f"{optimizer!r} has the state of whole parameters, which is not cut; shard a new optimizer, or begin "
                "anew: optimizer.init({})"
            )
        self._inner, self._group = optimizer, group_of(group, timeout)
        self._council, self._partition = Council(self._group, "a Sharded optimizer"), Partition(self._group.size)
        self._census, self._planned_step, self._begun = None, None, 0
        self._compared = self._half_loaded = False
        self._register()

    @property
    def group(self) -> Group:
        """The ranks: `group.rank` and `group.size`."""
        return self._group

    def _check_inside(self, outer: str) -> None:
        if outer == "MultiOptimizer":
            raise ConfigurationError(
                f"{self!r} cannot be one of several optimizers; wrap the MultiOptimizer instead: "
                "Sharded(MultiOptimizer([…]), group)"
            )
        if outer == "a state dict":
            raise ConfigurationError(
                f"the state of {self!r} is spread over {self._group.size} processes: no one of them has a state dict; "
                "save it into a file with all ranks: opt.save(path, params)"
            )
        if outer == "Sharded":
            raise ConfigurationError(f"{self!r} is sharded already")

    @property
    def _nonfinite_of_parts(self) -> Policy:
        return "allow"  # in a round one rank alone must not stop; the step looks at what all have averaged

    def apply_gradients(self, grads: object, params: Params, *, grad_scale: float = 1.0) -> Params:
        """Take one step with all other ranks, which call this too: it happens on all of them or, on any error, on none.

        Args:
            grads: this rank's gradients by name, nested like `params` or flat, of the same parameters on all ranks;
                `None` stands for an absent gradient. Never written.
            params: arrays by name, the same on all ranks: a mapping, or a nested dict, list or tuple.
            grad_scale: multiplies every averaged gradient; finite, and the same on all ranks. Default: 1.

        Returns:
            `params`, the same object.

        Raises:
            GradstepError: what is wrong on one rank, on all of them; nothing has changed.
            ConfigurationError: ranks differ in parameters, hyperparameters or code, or a DTensor is placed in a way
                that the rule or its storage cannot work with; nothing has changed.
            CommunicationError: a rank is dead or silent. Where that happened after the step, while parameters were
                brought to all ranks, they may differ: start again from a checkpoint.
        """
        return super().apply_gradients(grads, params, grad_scale=grad_scale)

    def _take_late(self, make: Callable[[], StepArguments]) -> None:
        """Plan the step, and take it when all ranks have planned the same."""

        def brought() -> Brought:
            self._resolve()
            arguments = make()
            wanted, named = self._name_grads(arguments.grads), self._name_params(arguments.params)
            planned = self._planned_here(wanted, named, arguments.intake)
            planned.plan.plan.check(arguments.scales)
            factor = {"the factor of gradients (grad_scale, or 1 / every)": repr(arguments.scales.whole)}
            facts = {**self._options_told(), **factor, **planned.plan.coming(), **self._begin(planned, named)}
            return Brought(planned, wanted, named, arguments, facts)

        def said(here: Brought) -> Said:
            plan = here.planned.plan
            return Said(word_of([plan.word, here.facts]), lambda: {**self._options_told(), **plan.facts, **here.facts})

        self._refuse_half()
        with InterruptsHeld():  # a rank that leaves a step leaves the others waiting
            here = self._council.attempt(brought, said)
            self._partition, self._planned_step, self._compared = here.planned.partition, here.planned, True
            self._run(here)

    def _together(self, body: Callable[[], Callable[[], None]], word: str) -> None:
        with InterruptsHeld():
            self._council.attempt(body, lambda _: Said(word_of(word), lambda: {"the next thing to do": word}))()

    def _run(self, here: Brought) -> None:
        """Take the step on which all ranks have agreed."""
        inner, council, plan, named = self._inner, self._council, here.planned.plan, here.named
        scales, intake = here.arguments.scales, here.arguments.intake

        def averaged() -> Array:
            plan.average(here.wanted, named, intake, scales.micro)
            return plan.norm.squares() if inner._inspects else np.zeros(0)

        squares = council.attempt(averaged)
        scales = Scales(scales.whole)
        found = plan.norm.found(self._group.gather(squares), scales.whole) if inner._inspects else None
        inspection = Inspection(found.norm, []) if found else None
        if found and not math.isfinite(found.norm) and inner._nonfinite != "allow":
            if inner._nonfinite == "raise":
                raise nonfinite_error(self._whose(here, found.culprits))
            inner._leave_out(inner._make_report(inspection, found.culprits, applied=False), intake)
            return
        if found and inner._clip_norm is not None:
            scales = scales.clipped(found.norm, inner._clip_norm)
        council.attempt(lambda: plan.prepare(named, scales))
        report = inner._make_report(inspection, found.culprits if found else (), applied=True)
        plan.commit(named)
        inner._count_step()
        inner._report = report
        intake.done()
        plan.spread(named)

    def _whose(self, here: Brought, culprits: Sequence[str]) -> list[str]:
        """Gradients whose average is not finite, each with the ranks that have brought it so, if any has."""
        library, intake = here.planned.plan.library, here.arguments.intake

        def is_odd(name: str) -> bool:
            arrays = [array for array in (here.wanted[name], intake.total(name)) if array is not None]
            values = (
                widened(library.as_numpy(part), memory.dtype, compute_dtype(memory.dtype))
                for part in map(part_of, arrays)
                for memory in [library.describe(part, f"grads[{name!r}]")]
            )
            return not all(np.isfinite(value).all() for value in values)

        odd = self._council.attempt(lambda: np.array([is_odd(name) for name in culprits], np.int64))
        by_name = self._group.gather(odd).T if culprits else ()
        ranks = {name: np.flatnonzero(column).tolist() for name, column in zip(culprits, by_name, strict=True)}
        return [name + f" (on rank {', '.join(map(str, some))})" * bool(some) for name, some in ranks.items()]

    def _planned_here(self, wanted: Mapping[str, Any], named: Mapping[str, Any], intake: Intake) -> Planned:
        """The plan for these arrays, as far as this rank can tell: the last one, or a new one."""
        intake_of_plan = SCALED if intake.scaled else PLAIN  # sums join before
        are_placed = any(map(is_dtensor, named.values()))
        key = self._plan_key(wanted, named, intake if are_placed else intake_of_plan)
        last = self._planned_step
        if last and last.key == key and last.plan.plan.published and last.kept.stayed(named):
            chosen = dict(zip(last.plan.names, pick(named, last.plan.names), strict=True))
            if last.plan.finds(chosen, wanted):
                return last
        self._planned_step = None
        chosen = thawed(dict(zip(sorted(wanted), pick(named, sorted(wanted)), strict=True)), self._frozen)
        wanted = {name: wanted[name] for name in chosen}
        library = recognise(params=chosen, grads=wanted)
        if library.in_place is False:
            raise unsharded(library)
        chosen_parts = parts_of(chosen)
        intake.check(library, chosen_parts)
        others = {name: array for name, array in named.items() if name not in chosen}
        kept = Kept(library, others, refuse_overlap(library, chosen_parts, parts_of(others)), part_of)
        routes = self._inner._assign_known(chosen)
        if are_placed:
            assert library.in_place is True
            group = mesh_group(self._group, next(name for name, array in named.items() if is_dtensor(array)))
            self._census = self._census or Census(group)
            partition = self._partition.extended(owned_extents(routes, chosen))
            plan = PlacedPlan(library, group, self._census, routes, partition, chosen, wanted, intake, intake_of_plan)
        else:
            partition = self._partition.extended(extents_of(library, routes, chosen))
            plan = ShardedPlan(library, self._group, routes, partition, chosen, wanted, intake_of_plan)
        self._inner._known_names |= named.keys()
        return Planned(key, plan, partition, kept)

    def _options_told(self) -> Facts:
        options = {name: repr(getattr(self._inner, name)) for name in ("clip_norm", "nonfinite", "frozen")}
        return {**options, "how often init was called": repr(self._begun), "opt.step": repr(self.step)}

    def _begin(self, planned: Planned, named: Mapping[str, Any]) -> Facts:
        """The values of parameters that have not come before; at the first step and after loading of all others."""
        if planned.partition is self._partition and self._compared:
            return {}
        return planned.plan.beginning(self._partition if self._compared else Partition(self._group.size), named)

    def _parts(
        self, grads: Mapping[str, Any], params: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if not any(map(is_dtensor, params.values())):
            return grads, params
        return gradient_parts(grads, params), parts_of(params)

    def init(self, params: object) -> None:
        """Begin anew, on all ranks: no slots, which the next step makes, and `steps` at 0. `step` and schedules stay.

        Args:
            params: a mapping from name to array, or a nested dict, list or tuple of them.

        Raises:
            GradstepError: a parameter cannot be trained; then nothing has changed.
        """
        super().init(params)

    def _init(self, params: object) -> None:
        self._share_out(params, Partition(self._group.size))  # which checks them
        self._inner._init({})
        self._partition, self._planned_step, self._census = Partition(self._group.size), None, None
        self._compared = self._half_loaded = False
        self._begun += 1

    def _share_out(
        self, params: object, partition: Partition
    ) -> tuple[MemoryLibrary, Mapping[str, Any], Routes, Partition]:
        """What would be whose, if all these parameters had gradients."""
        self._check_options()
        everything = named_arrays(params, "params")
        named = thawed(everything, self._frozen)
        library = recognise(params=named)
        if library.in_place is False:
            raise unsharded(library)
        routes = self._inner._assign(named, remember=False)
        if any(map(is_dtensor, everything.values())):
            return library, named, routes, partition.extended(owned_extents(routes, named))
        return library, named, routes, partition.extended(extents_of(library, routes, named))

    def memory(self, params: object) -> MemoryBill:
        """What this rank needs; see `Optimizer.memory`. Scratch has its averaged gradients and the buckets too."""

        def counted() -> MemoryBill:
            library, named, routes, partition = self._share_out(params, self._partition)
            if any(map(is_dtensor, named_arrays(params, "params").values())):
                return placed_bill(library, self._group, routes, partition, named, inspected=self._inspects)
            mine = partition.of_rank(self._group.rank, named)
            parts = {name: portion_of(library, named[name], portion) for name, portion in mine.items()}
            own = [(leaf, [name for name in names if name in mine]) for leaf, names in routes]
            return bill(parts, own, inspected=self._inspects) + MemoryBill(
                scratch=exchange_bytes(library, self._group.size, parts, named)
            )

        return self._exclusively(counted)

    # Checkpoints

    def _save_as(self, whole: Optimizer, path: str | os.PathLike[str], params: object, keep: int | None) -> None:
        from gradstep.distributed.saving import Owned, save

        def body() -> None:
            with InterruptsHeld():
                self._refuse_half()
                owners = Owned(self._partition, self._census)
                save(whole, path, params, keep, self._group, self._council, owners, self._begun)

        whole._exclusively(body)

    def _load_as(
        self, whole: Optimizer, path: str | os.PathLike[str], loading: Loading, stacklevel: int
    ) -> "list[Difference]":
        from gradstep.checkpoint import checkpoint_file
        from gradstep.distributed.loading import Source

        @contextlib.contextmanager
        def opened() -> "Generator[Source]":
            with checkpoint_file.opened(path) as file:
                yield Source(file.document, file.tensors, file.digest)

        return self._load_from(whole, opened, loading)

    def _load_state_as(self, whole: Optimizer, state_dict: Mapping[str, Any], loading: Loading) -> "list[Difference]":
        from gradstep.checkpoint import snapshot
        from gradstep.distributed.loading import Source

        @contextlib.contextmanager
        def opened() -> "Generator[Source]":
            document, tensors = snapshot.from_state_dict(state_dict)
            yield Source(document, tensors, f"{word_of(document.to_json()):x}")

        return self._load_from(whole, opened, loading)

    def _load_from(
        self, whole: Optimizer, opened: "Callable[[], AbstractContextManager[Source]]", loading: Loading
    ) -> "list[Difference]":
        from gradstep.distributed.loading import read_parts

        def body() -> "list[Difference]":
            with InterruptsHeld(), contextlib.ExitStack() as stack:
                loaded = read_parts(
                    whole, opened, loading, self._group, self._council, self._partition, self._census, stack
                )
                self._planned_step, self._compared, self._half_loaded = None, False, True
                self._council.attempt(loaded.restoration.adopt)
                self._partition, self._census, self._half_loaded = loaded.partition, loaded.census, False
            return loaded.restoration.differences

        return whole._exclusively(body)

    def _refuse_half(self) -> None:
        if self._half_loaded:
            raise ConfigurationError(
                "the last load failed on one of the ranks when others had loaded already; load again, or begin anew: "
                "opt.init(params)"
            )

    def __repr__(self) -> str:
        return f"Sharded({self._inner!r}, rank {self._group.rank} of {self._group.size} by {self._group.name})"
