"""Training over slow links: inner steps on each rank alone, and now and then an outer step of all of them."""
# pyright: reportPrivateUsage=false

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np

import gradstep
from gradstep.arrays.stored import Stored
from gradstep.distributed.anchors import Trained, View, checksum, trained, views
from gradstep.distributed.changes import NOTHING_LOST, Layout, Losses, Sums, average, spread, sums
from gradstep.distributed.collective import START_AGAIN, Counted
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.exchange import bucket_bytes
from gradstep.distributed.group import Array, Group, group_of
from gradstep.distributed.grouped import Grouped
from gradstep.distributed.outer_state import OuterState, norm
from gradstep.distributed.sharded import Sharded
from gradstep.distributed.wire import WIRES
from gradstep.errors import (
    ArgumentTypeError,
    CommunicationError,
    ConfigurationError,
    GradstepError,
    NonFiniteGradientError,
)
from gradstep.interrupts import InterruptsHeld
from gradstep.multi import MultiOptimizer
from gradstep.optimizer import Optimizer, StepArguments
from gradstep.options import thawed
from gradstep.program.arithmetic import IeeeArithmetic
from gradstep.program.formats import compute_dtype, master_of
from gradstep.rules.sgd import SGD
from gradstep.step.bill import MemoryBill, bill
from gradstep.step.intake import PLAIN, SCALED
from gradstep.step.scalars import Scales
from gradstep.wrapper import Wrapper, checked_every

Params = TypeVar("Params")

DUE = "the inner step has been taken, the outer step is due"
HINT = "(seed all ranks alike, or send those of rank 0 to the others)"


class OuterReport(NamedTuple):
    """What an outer step did.

    Attributes:
        applied: whether the outer optimizer stepped; False where its `nonfinite="skip"` left the step out.
        round: the number of outer steps, this one included.
        members: the ranks whose changes were averaged.
        newcomers: the ranks that were given the state of the others, and whose changes did not count.
        norm: the Euclidean norm of the averaged change.
        sent: how many bytes this rank has sent to others.
    """

    applied: bool
    round: int
    members: tuple[int, ...]
    newcomers: tuple[int, ...]
    norm: float
    sent: int


class Standing(NamedTuple):
    """Whose changes count in an outer step, and who is given the state of the lowest of them."""

    round: int
    members: tuple[int, ...]
    newcomers: tuple[int, ...]


class Kept(NamedTuple):
    """What the next outer steps depend on, besides both optimizers."""

    anchors: dict[str, Array]
    exact: frozenset[str]
    losses: Losses
    round: int
    taken: int


class Brought(NamedTuple):
    """What a rank brings to an outer step."""

    there: Trained
    views: Mapping[str, View]
    anchors: dict[str, Array]


class Ready(NamedTuple):
    """An outer step, up to where it writes; `commit` reads the gradients."""

    brought: Brought
    standing: Standing
    losses: Losses
    gradients: Mapping[str, Array]
    norm: float
    inner_step: int
    commit: Callable[[], None]


class DiLoCo(Grouped):
    """Local steps, and every `every` of them one outer step of all ranks, driven by the averaged change of parameters.

    ```
    w, slots = inner(w, g, slots)                       every call, on each rank alone
    change = anchor - w                                 every `every` calls, on each rank
    g = (change on rank 0 + change on rank 1 + …) / ranks
    anchor = outer(anchor, g)                           the same bits on every rank
    w = anchor
    ```

    The anchor is where the parameters stood after the last outer step, at first where they began: alike on all ranks.
    It is float32, or float64 for float64 parameters; from narrower ones, changes are measured from the anchor as it was
    rounded to `w`, so that small ones add up. All trained parameters take part, those without gradients too; frozen
    ones do not.

    A call counts when a step is complete: with `Accumulate` inside when a round ends, and also where
    `nonfinite="skip"` left it out. Ranks should make equally many; who comes first waits.

    With `wire="bfloat16"` or `"int8"` less is sent, and what was rounded away is added to the next change. int8 is a
    code for each element and a float32 scale for each 256.

    **Who takes part.** The ranks that have taken most outer steps are members. Others, a rank that begins late or comes
    back, get anchors, outer state and the number of steps from the members; their own change does not count, and
    their inner slots stay. A rank that is dead or silent is a `CommunicationError` on the others after the group's
    timeout: the outer step has not happened, and the inner step has. Set `opt.group` to a group of the ranks that
    are left, or of others too, and call `outer_step`, or simply go on: the next call takes it first.

    Everything else is the inner optimizer's: hyperparameters, options, state, counters and `report`. Each rank saves
    its own, `save(f"run-{opt.group.rank}.safetensors", params)`: both optimizers, anchors, and what the wire owes. A
    rank that loads an older file than others, or none, is a newcomer in the next outer step.

    Args:
        inner: whose steps each rank takes; also `Accumulate`, `MultiOptimizer`, or `Sharded` over a group of its own.
        outer: an optimizer without state, which steps the anchors; its schedules are called with the number of outer
            steps. Default: `SGD(0.7, momentum=0.9, nesterov=True)`.
        every: how many inner steps make a round, at least 1. Default: 500.
        group: a process group of `torch.distributed` with gloo, or a communicator of mpi4py.
        wire: "float32" (float64 for float64 parameters), "bfloat16" or "int8": how changes and averages travel.
        timeout: seconds until a rank that does not come is given up. Default: the process group's own; 1800 with MPI.

    Raises:
        ArgumentTypeError: `inner` or `outer` is no optimizer, `group` no group, or `every` no integer.
        OutOfRangeError: `every` is below 1.
        ConfigurationError: `outer` has state or is a wrapper, or `inner` takes outer steps already; or a `timeout` for
            a process group, which has its own.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> class Alone:  # of torch.distributed or mpi4py in earnest
        ...     name, rank, size = "nobody else", 0, 1
        ...     def gather(self, values): return values[None]
        ...     def gather_messages(self, message): return [message]
        ...     def exchange(self, parts): return parts
        >>> opt = gs.DiLoCo(gs.SGD(0.5), gs.SGD(2.0), every=2, group=Alone())
        >>> params = {"w": np.zeros(2, np.float32)}
        >>> for g in ([1, 2], [3, 4]):
        ...     _ = opt.apply_gradients({"w": np.array(g, np.float32)}, params)
        >>> params["w"], opt.outer_report.norm
        (array([-4., -6.], dtype=float32), 3.605551275463989)

    Source: Douillard et al., 2023, https://arxiv.org/abs/2311.08105
    """

    _mine: ClassVar[frozenset[str]] = Grouped._mine | {
        "_outer", "_every", "_wire", "_timeout", "_group", "_council", "_anchors", "_exact", "_losses", "_round",
        "_taken", "_outer_report", "_seen",
    }  # fmt: skip
    _outer: Optimizer
    _every: int
    _wire: str
    _timeout: float | None
    _group: Counted
    _council: Council
    _anchors: dict[str, Array]
    _exact: frozenset[str]  # the parameters that, with their copy, are what their anchor is
    _losses: Losses
    _round: int
    _taken: int
    _outer_report: OuterReport | None
    _seen: object  # names that have anchors, as they last came

    def __init__(
        self,
        inner: Optimizer,
        outer: Optimizer | None = None,
        *,
        every: int = 500,
        group: object,
        wire: Literal["float32", "bfloat16", "int8"] = "float32",
        timeout: float | None = None,
    ) -> None:
        if not isinstance(inner, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"DiLoCo takes an optimizer of gradstep, got {inner!r}")
        if any(isinstance(member, DiLoCo) for member in inner._family()):
            raise ConfigurationError(f"{inner!r} takes outer steps already")
        if wire not in WIRES:
            raise ConfigurationError(f"wire must be one of {', '.join(map(repr, WIRES))}, got {wire!r}")
        self._inner = inner
        self._outer = _checked_outer(SGD(0.7, momentum=0.9, nesterov=True) if outer is None else outer, inner)
        self._every, self._wire, self._timeout = checked_every(every, "inner steps in a round"), wire, timeout
        self._outer_report = None
        self._forget()
        self._join(group_of(group, timeout))
        self._register()

    @property
    def outer(self) -> Optimizer:
        """The optimizer that steps the anchors."""
        return self._outer

    @property
    def every(self) -> int:
        """How many inner steps make a round."""
        return self._every

    @property
    def wire(self) -> str:
        """How changes travel."""
        return self._wire

    @property
    def group(self) -> Group:
        """The ranks: `group.rank` and `group.size`. It may be set, on all of them, when ranks have left or come."""
        return self._group.group

    @group.setter
    def group(self, group: object) -> None:
        new = group_of(group, self._timeout)
        self._exclusively(lambda: self._join(new))

    @property
    def anchors(self) -> Mapping[str, Array]:
        """The live anchors by parameter name, NumPy arrays; a read-only mapping."""
        return MappingProxyType(self._anchors)

    @property
    def outer_due(self) -> bool:
        """Whether an outer step that was due has failed; the next call takes it before its inner step."""
        return self._taken >= self._every

    @property
    def outer_report(self) -> OuterReport | None:
        """What the last outer step did; None before the first."""
        return self._outer_report

    def _join(self, group: Group) -> None:
        self._group = Counted(group)
        self._council = Council(self._group, "a DiLoCo optimizer")

    def _forget(self) -> None:
        """Begin anew, without anchors."""
        self._anchors, self._exact, self._losses, self._seen = {}, frozenset(), NOTHING_LOST, None
        self._round = self._taken = 0

    def _check_inside(self, outer: str) -> None:
        inside = {
            "Accumulate": "DiLoCo(Accumulate(…, every=…), …)",
            "MultiOptimizer": "DiLoCo(MultiOptimizer([…]), …)",
            "Sharded": "DiLoCo(Sharded(…, sharding_group), group=…)",
        }
        if outer in inside:
            raise ConfigurationError(f"{self!r} cannot be inside of a {outer}; wrap it instead: {inside[outer]}")

    def _check_options(self) -> None:
        self._inner._check_options()
        self._outer._check_options()

    def _family(self) -> list[Optimizer]:
        return [self, *self._inner._family(), *self._outer._family()]

    # Steps

    def apply_gradients(self, grads: object, params: Params, *, grad_scale: float = 1.0) -> Params:
        """Take an inner step and, when a round is complete, the outer step with all other ranks.

        An outer step that is due, since it failed before, is taken first.

        Args:
            grads: this rank's gradients by name; see `Optimizer.apply_gradients`.
            params: arrays by name: a mapping, or a nested dict, list or tuple; the same names, shapes and dtypes on all
                ranks. All that are trained may be written.
            grad_scale: multiplies every gradient. Default: 1.

        Returns:
            `params`, the same object.

        Raises:
            GradstepError: from the inner step, which then has changed nothing (an outer step that was due may have been
                taken before); or from the outer step, on all ranks, with only the inner step taken, and `outer_due` is
                True.
            ConfigurationError: ranks differ in parameters, `every`, `wire`, outer hyperparameters or code, or begin
                with other values.
            CommunicationError: a rank is dead or silent.
        """
        return super().apply_gradients(grads, params, grad_scale=grad_scale)

    def outer_step(self, params: Params) -> Params:
        """Take an outer step now, with all other ranks: at the end, or as a newcomer that waits for the others.

        Args:
            params: as in `apply_gradients`.

        Returns:
            `params`, the same object.

        Raises:
            GradstepError: as in `apply_gradients`; nothing has changed.
        """

        def body() -> None:
            with InterruptsHeld():
                self._take_outer(self._name_params(params))

        self._exclusively(body)
        return params

    def _scaled_step(self, grads: object, params: object, grad_scale: float) -> None:
        with InterruptsHeld():  # an inner step is counted
            named = self._name_params(params)
            if self.outer_due:
                self._take_outer(named)
            anchors, seen = self._lacking(named)
            self._inner._scaled_step(grads, params, grad_scale)
            self._anchors, self._seen = self._anchors | anchors, seen
            if getattr(self._inner, "micro_step", 0) == 0:
                self._taken += 1
            if not self.outer_due:
                return
            try:
                self._take_outer(named)
            except CommunicationError as error:
                raise CommunicationError(f"{DUE}: {error}") from error
            except GradstepError as error:
                error.add_note(DUE)
                raise

    def _trained(self, named: Mapping[str, Any]) -> Trained:
        return trained(named, thawed(named, self._inner.frozen))

    def _lacking(self, named: Mapping[str, Any]) -> tuple[dict[str, Array], object]:
        """Anchors for the parameters that have none yet; and the names that then have theirs."""
        seen = list(named), self._inner.frozen
        if seen == self._seen:
            return {}, seen
        there = self._trained(named)
        return {n: view.anchor() for n, view in views(there, self._master).items() if n not in self._anchors}, seen

    def _master(self, name: str) -> Array | None:
        """The float32 copy that the inner optimizer keeps of a parameter."""
        for leaf in self._inner._leaves():
            copy = leaf.slots_of(name).get(master_of("w"))
            if copy is not None and not leaf.cut:
                return copy.bits if isinstance(copy, Stored) else np.asarray(copy)
        return None

    def _take_outer(self, named: Mapping[str, Any]) -> None:
        """Take an outer step: all that can fail, on all ranks, and then what it writes."""
        state, before, sent = self._outer_state, self._outer_state.kept(), self._group.sent
        try:
            ready = self._agreed_inside(lambda: self._prepared(named))
        except BaseException as error:
            state.go_back(before)
            if isinstance(error, CommunicationError):
                raise CommunicationError(
                    f"{str(error).removesuffix(START_AGAIN)}; no outer step has been taken here, and anchors are what "
                    "they were: set opt.group to a group of the ranks that are left, and call opt.outer_step(params)"
                ) from error
            if isinstance(error, NonFiniteGradientError):
                error.add_note('opt.outer.nonfinite = "skip" lets all ranks go back to their anchors')
            raise
        self._finish(ready, self._group.sent - sent)

    def _agreed_inside(self, body: Callable[[], Ready]) -> Ready:
        """Do the same on all ranks that share the state of one `Sharded` optimizer, or on none of them."""
        sharded = next((member for member in self._inner._family() if isinstance(member, Sharded)), None)
        if sharded is None:
            return body()

        def told() -> Ready | CommunicationError:
            try:
                return body()
            except CommunicationError as error:  # of the others here nobody knows
                return error

        found = sharded._council.attempt(told)
        lost = np.flatnonzero(sharded.group.gather(np.array(isinstance(found, CommunicationError), np.int64)))
        if isinstance(found, CommunicationError):
            raise found
        if len(lost):
            raise CommunicationError(f"rank {lost[0]} of the ranks that share one state could not reach the others")
        return found

    def _prepared(self, named: Mapping[str, Any]) -> Ready:
        council, group = self._council, self._group

        def brought() -> Brought:
            self._check_options()
            there = self._trained(named)
            seen = views(there, self._master)
            anchors = {n: self._anchors[n] if n in self._anchors else view.anchor() for n, view in seen.items()}
            for name, view in seen.items():
                view.check(anchors[name])
            return Brought(there, seen, anchors)

        here = council.attempt(brought, self._said)
        standing = self._standing(here)
        described = json.dumps([self._inner.step, self._outer_state.describe(here.anchors)]).encode()
        inner_step = self._inner.step
        if standing.newcomers:
            told = group.gather_messages(described if group.rank == standing.members[0] else b"")
            inner_step, outer = json.loads(told[standing.members[0]])
            here = council.attempt(lambda: self._room(here, outer) if group.rank in standing.newcomers else here)
            spread(group, standing.members, [*here.anchors.values(), *self._outer_state.arrays(here.anchors)])
        room, owed = council.attempt(lambda: self._changes(here, standing))
        losses = self._averaged(room, owed, standing)
        changes = {name: flat for layout, its in room.items() for name, flat in layout.by_name(its.rows).items()}
        gradients = {name: changes[name].reshape(anchor.shape) for name, anchor in here.anchors.items()}

        def begun() -> Callable[[], None]:
            scaled = self._outer.clip_norm is not None
            return self._outer._begin_step(
                StepArguments(gradients, here.anchors, Scales(1.0), SCALED if scaled else PLAIN)
            )

        commit = council.attempt(begun, lambda _: Said(word_of(self._rates()), self._rates))
        return Ready(here, standing, losses, gradients, norm(gradients.values()), inner_step, commit)

    def _said(self, here: Brought) -> Said:
        def facts() -> Facts:
            return {
                "the version of gradstep": gradstep.__version__,
                "every": repr(self._every),
                "wire": self._wire,
                "the outer optimizer": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self._outer)),
                **{
                    f"params[{name!r}]": f"{memory.dtype} of shape {memory.shape}"
                    for name, memory in here.there.memories.items()
                },
            }

        return Said(word_of(facts()), facts)

    def _rates(self) -> Facts:
        """What schedules of the outer optimizer have given for this step."""
        coming = [leaf.settings for leaf in self._outer._leaves()]
        return {
            f"the outer optimizer's {name}": repr(settings.coming(name, leaf.step))
            for settings, leaf in zip(coming, self._outer._leaves(), strict=True)
            for name in settings.scalars
        }

    def _standing(self, here: Brought) -> Standing:
        """Who is a member and who a newcomer: by the anchors that have been through an outer step.

        Those that have not are compared among members, like all at first.
        """
        counts = self._outer_state.counts(here.anchors)
        stepped = {name for leaf in self._outer._leaves() for name in leaf.names()}
        known = [anchor for name, anchor in here.anchors.items() if name in stepped]
        new = {name: anchor for name, anchor in here.anchors.items() if name not in stepped}
        word = word_of([counts, sorted(stepped), checksum([*known, *self._outer_state.arrays(here.anchors)])])
        beginning = word_of([checksum([anchor]) for anchor in new.values()])
        rounds, words, beginnings = self._group.gather(np.array([self._round, word, beginning], np.int64)).T
        first = int(rounds.argmax())
        are_members = (rounds == rounds[first]) & (words == words[first])
        unequal = rounds[first] == 0 and not are_members.all()
        if unequal or (beginnings[are_members] != beginnings[first]).any():
            said = Said(word_of([word, beginning]), lambda: _values(new, counts))
            self._council.attempt(lambda: None, lambda _: said)
        members, newcomers = (tuple(np.flatnonzero(each).tolist()) for each in (are_members, ~are_members))
        return Standing(int(rounds[first]), members, newcomers)

    def _room(self, here: Brought, outer: list[Any]) -> Brought:
        """Room for the anchors and the state that members send."""
        self._outer_state.adopt(outer)
        return here._replace(anchors={name: np.zeros_like(anchor) for name, anchor in here.anchors.items()})

    def _changes(self, here: Brought, standing: Standing) -> tuple[dict[Layout, Sums], Losses]:
        """This rank's changes, with what was lost of the last ones, and what is owed still; zeros of a newcomer."""
        wire, rank, room = WIRES[self._wire], self._group.rank, dict[Layout, Sums]()
        for dtype in sorted({view.computed for view in here.views.values()}):
            sizes = tuple((n, anchor.size) for n, anchor in here.anchors.items() if anchor.dtype == dtype)
            layout = Layout(self._group.size, dtype, sizes)
            room[layout] = sums(layout, wire)
        if rank in standing.newcomers:  # others may have paid what it owes
            return room, NOTHING_LOST
        losses = self._losses.moved(room, rank, len(standing.members))
        for layout, (rows, _, _) in room.items():
            with IeeeArithmetic(), np.errstate(all="ignore"):
                for name, flat in layout.by_name(rows).items():
                    change = here.views[name].change(here.anchors[name], exact=name in self._exact)
                    flat[...] = change.reshape(-1)
                    if name in losses.sent:
                        flat += losses.sent[name]
                    wire.check(name, flat)
        return room, losses

    def _averaged(self, room: Mapping[Layout, Sums], losses: Losses, standing: Standing) -> Losses:
        """Put the averages in the place of changes; what the wire has lost."""
        sent, averages = dict(losses.sent), dict[tuple[Layout, int], Array]()
        for layout, its in room.items():
            owed = losses.averages.get((layout, self._group.rank))
            with IeeeArithmetic(), np.errstate(all="ignore"):
                average(self._group, layout, its, WIRES[self._wire], standing.members, owed)
            if its.lost is not None and its.owing is not None:
                sent |= layout.by_name(its.lost)
                averages[layout, self._group.rank] = its.owing
        return Losses(sent, averages)

    def _finish(self, ready: Ready, sent: int) -> None:
        """Take the outer step on which all have agreed. Nothing in here can fail."""
        here, standing = ready.brought, ready.standing
        ready.commit()
        applied = self._outer.report is None or self._outer.report.applied
        exact = {name for name, view in here.views.items() if view.write(here.anchors[name])}
        self._exact = self._exact - here.views.keys() | exact
        here.there.library.wrote(list(here.there.arrays.values()))
        self._anchors = {**self._anchors, **here.anchors}
        if applied:
            self._losses = ready.losses
        if self._group.rank in standing.newcomers:
            self._go_on(self._inner, ready.inner_step)
        self._round, self._taken = standing.round + 1, 0
        self._outer_report = OuterReport(applied, self._round, standing.members, standing.newcomers, ready.norm, sent)

    @property
    def _outer_state(self) -> OuterState:
        return OuterState(self._outer._leaves(), lambda step: self._go_on(self._outer, step))

    def _go_on(self, optimizer: Optimizer, step: int) -> None:
        """Let an optimizer, whatever is in it, have taken so many steps."""
        for member in optimizer._family():
            if isinstance(member, MultiOptimizer):
                member._go_on_from(step)
        for leaf in optimizer._leaves():
            leaf.go_on_from(step)

    def init(self, params: object) -> None:
        """Begin anew, on all ranks: zero slots, inner and outer, and no anchors, which the next step makes.

        `steps` and the number of outer steps are then 0; `step`, the outer optimizer's too, and schedules stay.

        Args:
            params: a mapping from name to array, or a nested dict, list or tuple of them.

        Raises:
            GradstepError: a parameter cannot be trained; then nothing has changed.
        """
        super().init(params)

    def _init(self, params: object) -> None:
        self._inner._init(params)
        self._outer._init({})
        self._forget()

    def memory(self, params: object) -> MemoryBill:
        """What the inner optimizer needs, anchors, and the outer optimizer's slots; see `Optimizer.memory`.

        Scratch has the changes and buckets of an outer step too.
        """
        own = self._inner.memory(params)

        def counted() -> MemoryBill:
            there = self._trained(self._name_params(params))
            anchors = {n: np.empty(m.shape, compute_dtype(m.dtype)) for n, m in there.memories.items()}
            outer = bill(anchors, self._outer._assign(anchors, remember=False), inspected=self._outer._inspects)
            size = sum(anchor.nbytes for anchor in anchors.values())
            owed = 0 if WIRES[self._wire].exact else size + size // self._group.size
            buckets = 3 * min(bucket_bytes(self._group.size), size)
            return outer + MemoryBill(anchors=size + owed, scratch=size + owed + buckets)

        return own + self._exclusively(counted)

    def _kept(self) -> Kept:
        return Kept(self._anchors, self._exact, self._losses, self._round, self._taken)

    def _resume(self, kept: Kept) -> None:
        """Go on with outer steps that have been loaded."""
        self._anchors, self._exact, self._losses, self._round, self._taken = kept
        self._seen = self._outer_report = None

    def __repr__(self) -> str:
        return (
            f"DiLoCo({self._inner!r}, {self._outer!r}, every={self._every}, wire={self._wire!r}, rank "
            f"{self._group.rank} of {self._group.size} by {self._group.name})"
        )


def _checked_outer(outer: object, inner: Optimizer) -> Optimizer:
    if not isinstance(outer, Optimizer):
        raise ArgumentTypeError(f"outer must be an optimizer of gradstep, got {outer!r}")
    if isinstance(outer, Wrapper):
        raise ConfigurationError(f"outer must be an optimizer that steps alone, got {outer!r}: pass its opt.optimizer")
    leaves = outer._leaves()
    if any(leaf.names() for leaf in leaves):
        raise ConfigurationError(
            f"outer must be an optimizer without state, got {outer!r}: begin anew, outer.init({{}})"
        )
    if any(leaf in leaves for leaf in inner._leaves()):
        raise ConfigurationError(f"outer must be another optimizer than the inner one, got {outer!r}")
    return outer


def _values(anchors: Mapping[str, Array], counts: str) -> Facts:
    """What tells how ranks that have not taken an outer step begin."""
    return {
        **{f"the values of params[{n!r}] by their CRC-32 {HINT}": f"{checksum([a]):08x}" for n, a in anchors.items()},
        "the steps of the outer optimizer": counts,
    }
