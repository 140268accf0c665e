"""The life of a step: preflight, plan, inspect, commit."""

import itertools
import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeAlias, TypeVar, cast

import numpy as np

from gradstep.arrays.library import OTHER, STAYED, MemoryLibrary, recognise
from gradstep.errors import (
    NonFiniteGradientError,
    NonFiniteScalarError,
    UnknownParameterError,
    listing,
)
from gradstep.interrupts import InterruptsHeld
from gradstep.learning_rate import to_float
from gradstep.options import DEFAULTS, Options, Policy, thawed
from gradstep.persistence import Persistent
from gradstep.program.arithmetic import IeeeArithmetic
from gradstep.program.graph import Reading
from gradstep.report import AwaitedReport, Rate, Report
from gradstep.step.forms import refuse_shared, refuse_tracing
from gradstep.step.intake import PLAIN, SCALED, Intake
from gradstep.step.leaf import Leaf
from gradstep.step.outcome import Outcome
from gradstep.step.scalars import Scales
from gradstep.tree import Namer, entries_of, named_arrays

if TYPE_CHECKING:  # imported when they are needed
    from gradstep.step.bill import MemoryBill
    from gradstep.step.functional import FunctionalPlan, Look
    from gradstep.step.inspection import Inspection
    from gradstep.step.plan import Plan

    AnyPlan: TypeAlias = Plan | FunctionalPlan
    Planned: TypeAlias = tuple[AnyPlan, list[Any], list[Any]]

Params = TypeVar("Params")
Result = TypeVar("Result")


OWN = frozenset({"_lock", "_plan", "_serial", "_name_params", "_name_grads"})
"""What belongs to an optimizer object and its process, and is not copied."""


class Optimizer(Persistent, Options, ABC):
    """What every optimizer does: state by name, and steps that happen whole or not at all."""

    _uncopied: ClassVar[frozenset[str]] = OWN

    def __init__(self, *, clip_norm: float | None, nonfinite: Policy, donate: bool, frozen: Sequence[str]) -> None:
        self._register()
        self._report: Report | AwaitedReport | None = None
        self._known_names: frozenset[str] = frozenset()  # of all parameters that have come, with gradients or without
        Options.__init__(self, {"clip_norm": clip_norm, "nonfinite": nonfinite, "donate": donate, "frozen": frozen})

    @abstractmethod
    def _leaves(self) -> list[Leaf]:
        """The optimizers with rules, in order; this one itself when it has a rule."""

    @abstractmethod
    def _route(self, params: Mapping[str, Any], *, remember: bool = True) -> list[tuple[Leaf, list[str]]]:
        """Which leaf takes which parameters; each leaf appears once. `remember`: filters are not asked again."""

    def _assign(self, params: Mapping[str, Any], *, remember: bool = True) -> list[tuple[Leaf, list[str]]]:
        """The same, with the group of every parameter looked up: errors belong before anything is allocated."""
        routes = self._route(params, remember=remember)
        for leaf, names in routes:
            for name in names:
                leaf.group(name)
        return routes

    def _assign_known(self, params: Mapping[str, Any]) -> list[tuple[Leaf, list[str]]]:
        """The same for a step, which after loading a checkpoint must be of its parameters."""
        routes = self._assign(params)
        for leaf, names in routes:
            leaf.check_known(names)
        return routes

    @abstractmethod
    def _check_options(self) -> None:
        """Raise when the options of this optimizer and its children do not go together."""

    def _check_inside(self, outer: str) -> None:
        """Raise `ConfigurationError` if it cannot be inside of an optimizer of this class."""

    def _parts(
        self, grads: Mapping[str, Any], params: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What is here of gradients and parameters; others may be elsewhere."""
        return grads, params

    @property
    def _nonfinite_of_parts(self) -> Policy:
        """What a gradient that is not finite means while a round is added up."""
        return self._nonfinite

    @abstractmethod
    def _titles(self) -> list[str]:
        """What the leaves are called in a table."""

    @abstractmethod
    def _family(self) -> "list[Optimizer]":
        """This optimizer and everybody below it."""

    def _exclusively(self, body: Callable[[], Result]) -> Result:
        """Call `body` while other threads are kept from stepping this optimizer and its children."""
        # Everybody takes locks in the same order, so that two trees that share children cannot wait for each other.
        family = self._family()
        return _locked([member._lock for member in sorted(family, key=lambda member: member._serial)], body)

    @abstractmethod
    def _count_step(self, outcome: Outcome | None = None) -> None:
        """Advance the counters that are not the leaves', at once or when the outcome is known."""

    @property
    @abstractmethod
    def step(self) -> int:
        """How many steps have been taken."""

    @property
    def report(self) -> Report | None:
        """What the last `apply_gradients` did; None before the first. Waits for what only a device knows."""
        report = self._report
        if not isinstance(report, AwaitedReport):
            return report
        complete = report.read()
        if self._report is report:  # no other step has been taken meanwhile
            self._report = complete
        return complete

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """The live slots by parameter name and slot name, read-only mappings."""

    @property
    @abstractmethod
    def steps(self) -> dict[str, int]:
        """How many steps each parameter has taken."""

    @abstractmethod
    def _coming_rate(self) -> Rate:
        """The learning rate of the coming step, resolved before."""

    def init(self, params: object) -> None:
        """Begin anew: zero slots for every parameter and `steps` at 0. `step` and schedules stay.

        Args:
            params: a mapping from name to array, or a nested dict, list or tuple of them.

        Raises:
            GradstepError: a parameter cannot be trained; then nothing has changed.
        """
        self._exclusively(lambda: self._init(params))

    def _init(self, params: object) -> None:
        self._check_options()
        everything = named_arrays(params, "params")
        named = thawed(everything, self._frozen)
        library = recognise(params=named)
        if library.in_place is True:
            from gradstep.step.overlap import refuse_overlap

            refuse_overlap(library, named, {name: everything[name] for name in everything if name not in named})
        else:
            refuse_tracing(library, list(named.values()))
            refuse_shared(everything, named)
        self._forget_routes()
        fresh = [(leaf, leaf.fresh({n: named[n] for n in names})) for leaf, names in self._assign(named)]
        self._plan = None  # it holds the old slots
        with InterruptsHeld():
            for leaf, state in fresh:
                leaf.adopt(state)

    def _begin_again(self, known: frozenset[str]) -> None:
        """Forget plans and the report: another state has been loaded, of these parameters."""
        self._plan, self._report, self._known_names = None, None, known

    @abstractmethod
    def _forget_routes(self) -> None:
        """Let filters be asked again, and groups looked up."""

    def describe(self, params: object) -> None:
        """Print which parameter gets what: a table of their hyperparameters, as given, and the slots they have.

        Nothing is allocated or changed.

        Args:
            params: a mapping from name to array, or a nested dict, list or tuple of them.

        Raises:
            ConfigurationError: a mapping has no value for a parameter, or its values do not go together.
            ArgumentTypeError: an entry is no array.

        Example:
            >>> import gradstep as gs, numpy as np
            >>> opt = gs.SGD({"*.bias": 0.1, "*": 0.01}, momentum=0.9, frozen=["embed*"])
            >>> opt.describe({"embed": np.ones((9, 2)), "layer": {"weight": np.ones((2, 2)), "bias": np.ones(2)}})
            parameter     shape   dtype    learning_rate  momentum  weight_decay  dampening  slots
            embed         (9, 2)  float64  frozen
            layer.weight  (2, 2)  float64  0.01           0.9       0.0           0.0        v
            layer.bias    (2,)    float64  0.1            0.9       0.0           0.0        v
        """
        print(self._exclusively(lambda: self._describe(params)))

    def _describe(self, params: object) -> str:
        from gradstep.describe import Route, describe

        self._check_options()
        named = named_arrays(params, "params")
        routes = self._assign(thawed(named, self._frozen), remember=False)
        parts = zip(self._titles(), routes, strict=True)
        return describe(named, [Route(title, leaf, names) for title, (leaf, names) in parts], self._frozen)

    def memory(self, params: object) -> "MemoryBill":
        """How many bytes of slots, float32 copies and scratch these parameters need; nothing is allocated.

        What is the optimizer's already counts too. Tables of about a hundred bytes for each parameter do not.

        Args:
            params: a mapping from name to array, or a nested dict, list or tuple of them.

        Returns:
            A `MemoryBill` with `slots`, `masters`, `scratch` and their `total`.

        Raises:
            GradstepError: a parameter cannot be trained.

        Example:
            >>> import gradstep as gs, numpy as np
            >>> params = {"w": np.zeros(1 << 20, np.float32)}
            >>> gs.AdamW(1e-3).memory(params).total, gs.AdamW(1e-3, slot_dtype="int8").memory(params).total
            (8388608, 2129920)
        """
        from gradstep.step.bill import bill

        named = thawed(named_arrays(params, "params"), self._frozen)
        return self._exclusively(lambda: bill(named, self._assign(named, remember=False), inspected=self._inspects))

    def preflight(self) -> None:
        """Resolve and check this step's schedules. A second call at the same step does nothing.

        Raises:
            NonFiniteScalarError, OutOfRangeError: a schedule gave a value that cannot be used; none has changed.
        """
        self._exclusively(self._preflight)

    def _preflight(self) -> None:
        self._resolve()
        with InterruptsHeld():
            for leaf in self._leaves():
                leaf.settings.publish()

    def _resolve(self) -> None:
        self._check_options()
        for leaf in self._leaves():
            leaf.resolve()

    def apply_gradients(self, grads: object, params: Params, *, grad_scale: float = 1.0) -> Params:
        """Take one step: update `params` in place from `grads`, wholly or, on any error, not at all.

        The rule is given `g = grad_scale * g`; the product is formed in the pass that reads the gradient, and
        clipping and `report.grad_norm` go by it.

        Args:
            grads: gradients by name, nested like `params` or flat; a subset of `params` is enough, and `None`
                stands for an absent gradient. Never written.
            params: arrays by name: a mapping, or a nested dict, list or tuple. Nested names join with dots.
            grad_scale: multiplies every gradient, such as 1 over a loss scale; finite, 0 and negative allowed.
                Default: 1.

        Returns:
            `params`, the same object.

        Raises:
            NonFiniteScalarError, OutOfRangeError: `grad_scale` is not finite, or not in the dtype of the computation.
            GradstepError: parameters, slots, counters and resolved rates are then what they were.
        """
        self._exclusively(lambda: self._scaled_step(grads, params, grad_scale))
        return params

    def _scaled_step(self, grads: object, params: object, grad_scale: float) -> None:
        def weighed() -> StepArguments:
            scale = checked_scale(grad_scale)
            scaled = self._clip_norm is not None or scale != 1
            return StepArguments(grads, params, Scales(scale), SCALED if scaled else PLAIN)

        self._take_late(weighed)

    def _take_late(self, make: "Callable[[], StepArguments]") -> None:
        """Take the step of these arguments, which may fail to be made."""
        self._begin_step(make())()

    def _together(self, body: Callable[[], Callable[[], None]], word: str) -> None:
        """Do what may fail, and then what it has prepared; `word` says what that is, in case ranks differ."""
        body()()

    def _begin_step(self, arguments: "StepArguments") -> Callable[[], None]:
        """Do all of a step that may fail, as far as the array library lets it; the rest is returned."""
        grads, params, scales, intake = arguments
        self._resolve()
        plan, parameters, gradients = self._planned(grads, params, intake)
        if intake.scaled:
            plan.check(scales)
        if plan.in_place is True:
            return self._overwriting(plan, parameters, gradients, scales, intake)
        return lambda: self._replace(plan, parameters, gradients, params, scales, intake)

    def _overwriting(
        self, plan: "Plan", parameters: list[Any], gradients: list[Any], scales: Scales, intake: Intake
    ) -> Callable[[], None]:
        """A step in the memory of the arrays, up to where it writes."""
        plan.gather(parameters, gradients)
        inspection = self._inspect(plan, gradients, scales)
        culprits = tuple(plan.names[i] for i in inspection.culprits) if inspection else ()
        if inspection and not math.isfinite(inspection.norm) and self._nonfinite != "allow":
            if self._nonfinite == "raise":
                raise nonfinite_error(culprits)
            report = self._make_report(inspection, culprits, applied=False)
            return lambda: self._leave_out(report, intake)
        if inspection and self._clip_norm is not None:
            scales = scales.clipped(inspection.norm, self._clip_norm)
        with IeeeArithmetic():
            plan.prepare(scales)
        report = self._make_report(inspection, culprits, applied=True)
        return lambda: self._commit(plan, parameters, report, intake)

    def _leave_out(self, report: Report, intake: Intake) -> None:
        with InterruptsHeld():
            self._report = report
            intake.done()

    def _commit(self, plan: "Plan", parameters: Sequence[Any], report: Report, intake: Intake) -> None:
        staged = [(share, share.stage()) for share in plan.shares]
        written = [*parameters, *plan.shown_slots]  # who holds no slot keeps no account of it
        with InterruptsHeld():
            plan.library.wrote(written)  # while what it touches is still in the cache
            plan.commit(parameters)
            for share, state in staged:
                share.advance(state)
            self._count_step()
            self._report = report
            intake.done()

    def _replace(
        self, plan: "FunctionalPlan", parameters: list[Any], gradients: list[Any], params: object, scales: Scales,
        intake: Intake,
    ) -> None:  # fmt: skip
        """Take the step by putting new arrays where the old ones were."""
        entries = entries_of(params, plan.names)
        totals = intake.totals(plan.names)
        look = plan.look(gradients, totals, self._clip_norm, scales) if self._nonfinite == "raise" else None
        if look:
            norm, culprits = plan.read(look)
            if not math.isfinite(norm):
                raise nonfinite_error(culprits)
        rate = self._coming_rate()
        with InterruptsHeld():  # from here on old arrays may have been donated
            new_parameters, new_slots, look = plan.run(parameters, gradients, totals, look, self._clip_norm, scales)
            outcome = Outcome(plan.library, look.finite) if look and self._nonfinite == "skip" else None
            parameters.clear()  # who holds an old array still wants its elements
            for (container, key), array in zip(entries, new_parameters, strict=True):
                container[key] = array
            plan.finish(new_parameters, new_slots)
            plan.advance(outcome)
            self._count_step(outcome)
            self._report = AwaitedReport(lambda: self._read_report(plan, look, outcome, rate))
            intake.done()

    def _read_report(self, plan: "FunctionalPlan", look: "Look | None", outcome: Outcome | None, rate: Rate) -> Report:
        norm, culprits = plan.read(look) if look else (None, ())
        return Report(outcome.applied if outcome else True, self.step, rate, norm, culprits)

    @property
    def _inspects(self) -> bool:
        """Whether the gradients are looked at before the step."""
        return self._clip_norm is not None or self._nonfinite != "allow"

    def _make_report(self, inspection: "Inspection | None", culprits: tuple[str, ...], *, applied: bool) -> Report:
        norm = inspection.norm if inspection else None
        return Report(applied, self.step + applied, self._coming_rate(), norm, culprits)

    def _inspect(self, plan: "Plan", gradients: Sequence[Any], scales: Scales) -> "Inspection | None":
        if not self._inspects:
            return None
        with IeeeArithmetic():
            return plan.inspect(gradients, scales)

    def _planned(self, grads: object, params: object, intake: Intake) -> "Planned":
        """The plan for these arrays, and the arrays in its order."""
        as_before = self._planned_before(grads, params, intake)  # flat and named as planned: there are no names to make
        if as_before is not None:
            return as_before
        named, wanted = self._name_params(params), self._name_grads(grads)
        if named is not params or wanted is not grads:
            as_before = self._planned_before(wanted, named, intake)
        return as_before or self._plan_anew(wanted, named, intake)

    def _planned_before(self, grads: object, params: object, intake: Intake) -> "Planned | None":
        """The last plan, if it was for such arrays under such names and its step succeeded."""
        cached = self._plan
        if cached is None or not cached.plan.published or type(grads) is not dict or type(params) is not dict:
            return None
        named, wanted = cast("dict[str, Any]", params), cast("dict[str, Any]", grads)
        if cached.key != self._plan_key(wanted, named, intake):
            return None
        if cached.plan.in_place is False:
            refuse_shared(named, cached.plan.names)
        parameters, gradients = cached.sort(named.values(), wanted.values())
        totals = intake.totals(cached.plan.names)
        suits = cached.suits(parameters, gradients, totals) and cached.finds_kept(named)
        return (cached.plan, parameters, gradients) if suits else None

    def _plan_key(self, wanted: Mapping[str, Any], named: Mapping[str, Any], intake: Intake) -> "PlanKey":
        epochs = [leaf.epoch for leaf in self._leaves()]
        options = intake.scaled, self._clip_norm is not None, self._nonfinite, self._donate
        return PlanKey(list(named), list(wanted), options, self._frozen, epochs, intake.readings(list(wanted)))

    def _plan_anew(self, wanted: Mapping[str, Any], named: Mapping[str, Any], intake: Intake) -> "Planned":
        self._plan = None  # its scratch is free before the next plan takes its own
        key = self._plan_key(wanted, named, intake)  # before anything that it stands for is read
        chosen = thawed(dict(zip(wanted, pick(named, list(wanted)), strict=True)), self._frozen)
        wanted = thawed(wanted, self._frozen)
        library = recognise(params=chosen, grads=wanted)
        intake.check(library, chosen)
        _, clipped, nonfinite, donating = key.options
        kept: dict[str, Any] = {}
        if library.in_place is True:
            from gradstep.step.overlap import refuse_overlap
            from gradstep.step.plan import Plan, Share

            others = {name: array for name, array in named.items() if name not in chosen}
            kept = {name: others[name] for name in refuse_overlap(library, chosen, others)}
            shares = [Share(leaf, names) for leaf, names in self._assign_known(chosen)]
            plan = Plan(library, shares, chosen, wanted, intake)
        else:
            from gradstep.step.functional import FunctionalPlan
            from gradstep.step.look import Policy

            refuse_shared(named, chosen)
            policy = Policy.of(clipped=clipped, nonfinite=nonfinite)
            routes = self._assign_known(chosen)
            plan = FunctionalPlan(library, routes, chosen, wanted, intake, policy, donating=donating)
        parameters, gradients = [chosen[name] for name in plan.names], [wanted[name] for name in plan.names]
        if not named.keys() <= self._known_names:
            self._known_names |= named.keys()
        self._plan = _CachedPlan(key, plan, parameters, gradients, kept, intake.totals(plan.names))
        return plan, parameters, gradients

    @property
    def _has_options(self) -> bool:
        """Whether any option differs from its default."""
        return bool(self._spelled_options)

    @property
    def _spelled_options(self) -> str:
        """The options that differ from their defaults, as further arguments."""
        given = {name: getattr(self, name) for name in DEFAULTS}
        return "".join(f", {name}={value!r}" for name, value in given.items() if value != DEFAULTS[name])

    if not TYPE_CHECKING:  # type checkers find misspelt attributes themselves, unless they see this

        def __setattr__(self, name: str, value: object) -> None:
            if not name.startswith("_") and not _is_settable(type(self), name):
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r} that could be set")
            super().__setattr__(name, value)

    def _snapshot(self, memo: dict[int, Any]) -> dict[str, Any]:
        import copy

        kept = vars(self).keys() - self._uncopied

        def copied() -> dict[str, Any]:
            _ = self.report  # nothing that awaits a device is copied
            return copy.deepcopy({name: vars(self)[name] for name in kept}, memo)

        return self._exclusively(copied)

    def __getstate__(self) -> dict[str, Any]:
        return self._snapshot({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._register()
        vars(self).update(state)

    def __copy__(self) -> Self:
        import copy

        return copy.deepcopy(self)  # two optimizers cannot share their slots

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(self._snapshot(memo))
        return new

    def _register(self) -> None:
        """What belongs to this object and process, and is not copied."""
        self._lock = threading.RLock()
        self._plan: _CachedPlan | None = None
        self._name_params, self._name_grads = Namer("params"), Namer("grads")
        self._serial = next(_serials)
        _optimizers.add(self)


def _is_settable(family: type, name: str) -> bool:
    """Whether the class has a hyperparameter, option or property of that name."""
    found: object = next((vars(base)[name] for base in family.__mro__ if name in vars(base)), None)
    return hasattr(found, "__set__")


_serials = itertools.count()
_optimizers: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child, the threads that held locks are gone; a step that one had begun is abandoned."""
    for optimizer in list(_optimizers):
        optimizer._lock = threading.RLock()  # pyright: ignore[reportPrivateUsage]
        optimizer._plan = None  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _locked(locks: Sequence[AbstractContextManager[object]], body: Callable[[], Result]) -> Result:
    """Call `body` with all locks held. One `with` within the other: no interrupt leaves a lock behind."""
    if not locks:
        return body()
    with locks[0]:
        return _locked(locks[1:], body)


class StepArguments(NamedTuple):
    """What a step is taken with, the gradients' factors and where they come from included."""

    grads: object
    params: object
    scales: Scales
    intake: Intake


class PlanKey(NamedTuple):
    """What a plan was made for, besides the layouts of the arrays."""

    parameters: list[str]
    gradients: list[str]
    options: tuple[bool, bool, str, bool]  # scaling, clipping, nonfinite, donating
    frozen: tuple[str, ...]
    epochs: list[int]
    readings: list[Reading]


class Kept:
    """Parameters that get no gradient, and lie apart from those that are written; `part` gives what is here of one."""

    def __init__(
        self,
        library: MemoryLibrary,
        named: Mapping[str, Any],
        names: list[str],
        part: Callable[[Any], Any] = lambda array: array,
    ) -> None:
        self._names, self._part = names, part
        arrays = [part(named[name]) for name in names]
        self._watch = library.watch(arrays)
        self._watch.locate(arrays)
        self._addresses = self._watch.addresses.copy()

    def stayed(self, named: Mapping[str, Any]) -> bool:
        """Whether they lie where they lay."""
        if not self._names:
            return True
        found = self._watch.locate([self._part(named[name]) for name in self._names])
        return found != OTHER and np.array_equal(self._watch.addresses, self._addresses)


class _CachedPlan:
    """A plan, and what must still be the same for it to serve again."""

    def __init__(
        self, key: PlanKey, plan: "AnyPlan", parameters: list[Any], gradients: list[Any], kept: Mapping[str, Any],
        totals: list[Any],
    ) -> None:  # fmt: skip
        self.key, self.plan = key, plan
        watch = plan.watch
        self._parameters, self._gradients = watch(parameters), watch(gradients)
        self._slots, self._totals = watch(plan.shown_slots), watch(totals)
        self._totals.locate(totals)
        self._kept = Kept(plan.library, kept, list(kept)) if plan.in_place is True else None
        self._orders = _order(plan.names, key.parameters), _order(plan.names, key.gradients)
        # Whether the plan's tables hold the addresses that were last found.
        self._settled = OTHER not in (self._parameters.locate(parameters), self._gradients.locate(gradients))

    def sort(self, parameters: Iterable[Any], gradients: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Arrays in the order of the caller's names, in the plan's order."""
        first, second = list(parameters), list(gradients)
        to_plan, from_grads = self._orders
        return (
            first if to_plan is None else [first[i] for i in to_plan],
            second if from_grads is None else [second[i] for i in from_grads],
        )

    def suits(self, parameters: list[Any], gradients: list[Any], totals: list[Any]) -> bool:
        """Whether the arrays have the types, shapes, strides and dtypes that were planned; the plan then knows where.

        Sums, and slots that somebody has been given, must lie where they lay, since they can be moved.
        """
        settled, self._settled = self._settled, False
        found = self._parameters.locate(parameters), self._gradients.locate(gradients)
        if OTHER in found or not self._slots_stayed() or (totals and self._totals.locate(totals) != STAYED):
            return False
        if self.plan.in_place is False:
            return True
        if found[0] != STAYED or not settled:
            self.plan.move(self._parameters.addresses, self._gradients.addresses)
        elif found[1] != STAYED:
            self.plan.move_gradients(self._gradients.addresses)
        self._settled = True
        return True

    def finds_kept(self, named: Mapping[str, Any]) -> bool:
        """Whether the parameters that get no gradient lie where they lay, apart from those that are written."""
        return self._kept is None or self._kept.stayed(named)

    def _slots_stayed(self) -> bool:
        shown = self.plan.shown_slots
        if not shown:
            return True
        return self._slots.locate(shown) != OTHER and np.array_equal(self._slots.addresses, self.plan.shown_addresses)


def _order(wanted: list[str], there: list[str]) -> list[int] | None:
    """Where each of the wanted names stands; None when it is they that are there, in this order."""
    places = {name: place for place, name in enumerate(there)}
    return None if wanted == there else [places[name] for name in wanted]


def checked_scale(grad_scale: object) -> float:
    """The factor of the gradients as a number, or an error that says what it must be."""
    scale = grad_scale if type(grad_scale) is float else to_float(grad_scale, "grad_scale")
    if not math.isfinite(scale):
        raise NonFiniteScalarError(
            f"grad_scale must be a finite number, got {scale}; for a loss that was multiplied by s pass 1 / s"
        )
    return scale


def pick(named: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The parameters of these names."""
    try:
        return [named[name] for name in names]
    except KeyError:
        unknown = [name for name in names if name not in named]
        raise UnknownParameterError(
            f"there are gradients for {listing(unknown)}, but params holds {listing(list(named))}; "
            "a gradient needs a parameter of its name"
        ) from None


def nonfinite_error(culprits: Sequence[str]) -> NonFiniteGradientError:
    found = f"hold NaN or infinity: {', '.join(culprits)}" if culprits else "have an infinite norm"
    return NonFiniteGradientError(
        f"these gradients {found}; nothing was changed. "
        'Find the cause, or pass nonfinite="skip" to leave such steps out'
    )
