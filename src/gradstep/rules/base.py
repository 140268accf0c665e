"""The base of every optimizer that is a rule: fields, slots and pure math; state and scalars are kept here."""

import inspect
from collections.abc import Callable, KeysView, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, dataclass_transform

import numpy as np

from gradstep.arrays.library import recognise
from gradstep.arrays.memory import Integers
from gradstep.errors import ArgumentTypeError
from gradstep.hyperparameters import (
    DECAY,
    FINITE,
    NON_NEGATIVE,
    NON_POSITIVE,
    POSITIVE,
    REQUIRED,
    Count,
    Field,
    Flag,
    OptionalFlag,
    OptionalScalar,
    Pair,
    Scalar,
    Settings,
    count,
    flag,
    optional_flag,
    optional_scalar,
    pair,
    scalar,
)
from gradstep.optimizer import Leaf, Optimizer
from gradstep.options import ClipNorm, NonFinite, clip_norm_option, nonfinite_option
from gradstep.program.graph import Kind, Trace, trace
from gradstep.program.program import Program
from gradstep.state import StateView
from gradstep.step.match import check_parameter, make_slots
from gradstep.step.plan import Share

__all__ = [
    "DECAY", "FINITE", "NON_NEGATIVE", "NON_POSITIVE", "POSITIVE",
    "Count", "Flag", "Kind", "OptionalFlag", "OptionalScalar", "Pair", "RuleOptimizer", "Scalar",
    "count", "flag", "optional_flag", "optional_scalar", "pair", "scalar",
]  # fmt: skip

State = tuple[dict[str, dict[str, Any]], dict[str, int], Integers]


@dataclass_transform(
    kw_only_default=True,
    field_specifiers=(
        scalar, optional_scalar, pair, flag, optional_flag, count, clip_norm_option, nonfinite_option,
    ),
)  # fmt: skip
class Declarative:
    """Tells type checkers that annotated fields are the constructor's arguments."""


class RuleOptimizer(Declarative, Optimizer):
    """An optimizer defined by its fields and its `rule`.

    The rule's positional arguments are `w`, `g` and the slots; its keyword-only ones are the fields, and `t`, the
    parameter's own step count, if it wants it. It returns the new `w` and the new slots, `None` for a slot that
    the configuration does not keep. Slots have the shape of `w` unless `slot_kinds` says otherwise.
    """

    clip_norm: ClipNorm = clip_norm_option(default=None)
    nonfinite: NonFinite = nonfinite_option(default="allow")
    rule: ClassVar[Callable[..., object]]
    slot_kinds: ClassVar[Mapping[str, Kind]] = {}
    _fields: ClassVar[dict[str, Field]] = {}
    _slots: ClassVar[dict[str, Kind]] = {}
    _counts_steps: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fields = {**cls._fields, **{n: f for n, f in vars(cls).items() if isinstance(f, Field)}}
        if "rule" in vars(cls):
            parameters = inspect.signature(cls.rule).parameters
            positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
            cls._slots = {slot: cls.slot_kinds.get(slot, Kind.FULL) for slot in positional[2:]}
            cls._counts_steps = "t" in parameters
        cls.__signature__ = _signature(cls._fields)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        try:
            bound = type(self).__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentTypeError(f"{name}: {error}; its arguments are {type(self).__signature__}") from None
        bound.apply_defaults()
        options = {option: bound.arguments.pop(option) for option in ("clip_norm", "nonfinite")}
        super().__init__(**options)
        self._epoch = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._ledger: dict[str, int] = {}
        self._counts: Integers = np.zeros(0, np.int64)
        self._programs: dict[tuple[int, bool], Program] = {}
        self._settings = Settings(name, self._fields, {})
        self.set_hyperparameters(bound.arguments)

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` for hyperparameters, as given, that do not go together."""

    # Hyperparameters

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter as it was given: a number, a schedule, a pair of them, or configuration."""
        return dict(self._settings.given)

    def get_hyperparameter(self, name: str) -> Any:
        """The value last resolved."""
        return self._settings.current(name)

    def set_hyperparameters(self, values: Mapping[str, object]) -> None:
        """Check these values, together with the others, and adopt them; schedules are resolved now."""
        with self._lock:
            settings = self._settings.replaced(values, self._step)
            self.check_together(settings.given)
            if settings.static != self._settings.static:
                self._programs = {}
                self._epoch += 1
            self._settings = settings

    def upcoming_scalars(self) -> dict[str, float]:
        """The value of each scalar hyperparameter for the step that is being taken."""
        return self._settings.upcoming(self._step)

    def check_rounded(self, dtype: str) -> None:
        """Check the scalars as the compute dtype holds them."""
        self._settings.check_rounded(self._step, dtype)

    def coming_rate(self) -> float | None:
        return self.upcoming_scalars().get("learning_rate")

    # State

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        return StateView([self])

    @property
    def steps(self) -> dict[str, int]:
        counts = self._counts.tolist()
        return {name: counts[self._ledger[name]] for name in self._entries}

    def slots_of(self, name: str) -> Mapping[str, Any]:
        """The slots that a parameter has so far."""
        return self._entries.get(name, {})

    def names(self) -> KeysView[str]:
        """The parameters that have been seen."""
        return self._entries.keys()

    def reserve(self, names: Sequence[str]) -> Integers:
        """The rows of the ledger in which these parameters' steps are counted."""
        for name in names:
            self._ledger.setdefault(name, len(self._ledger))
        missing = len(self._ledger) - len(self._counts)
        if missing:
            self._counts = np.concatenate([self._counts, np.zeros(missing, np.int64)])
        return np.array([self._ledger[name] for name in names], np.int64)

    def counts(self, rows: Integers) -> Integers:
        """How many steps the parameters in these rows have taken."""
        return self._counts[rows]

    def fresh(self, params: Mapping[str, Any]) -> State:
        """Zero slots for all these parameters, and counts at 0."""
        library = recognise(params=params)
        entries: dict[str, dict[str, Any]] = {}
        for name, parameter in params.items():
            memory = check_parameter(library, name, parameter)
            entries[name] = make_slots(library, name, memory, self.program(len(memory.shape), clipped=False), {})
        return entries, {name: row for row, name in enumerate(entries)}, np.zeros(len(entries), np.int64)

    def adopt(self, state: State) -> None:
        """Replace the whole state."""
        self._entries, self._ledger, self._counts = state
        self._epoch += 1

    def stage(self, share: Share) -> State:
        """The state after the step, not yet adopted."""
        counts = self._counts.copy()
        counts[share.rows] += 1
        if share.published:
            return self._entries, self._ledger, counts
        slots = {match.name: dict(match.slots) for match in share.matches}
        return {**self._entries, **slots}, self._ledger, counts

    def advance(self, share: Share, staged: State) -> None:
        """Adopt the state after the step and publish the scalars."""
        share.published = True
        self._entries, self._ledger, self._counts = staged
        self._settings.publish()

    # The life of a step

    @property
    def epoch(self) -> int:
        """Changes whenever a plan made before is void."""
        return self._epoch

    def leaves(self) -> list[Leaf]:
        return [self]

    def route(self, params: Mapping[str, Any]) -> list[tuple[Leaf, list[str]]]:
        return [(self, list(params))]

    def forget_routes(self) -> None:
        """There are none."""

    def check_options(self) -> None:
        """Alone, all go together."""

    def exclusively(self) -> AbstractContextManager[object]:
        return self._lock

    def count_step(self) -> None:
        self._step += 1

    def resolve(self) -> None:
        """Resolve and check the scheduled hyperparameters for the coming step; all stays pending."""
        self._settings.resolve(self._step)

    def publish_scalars(self) -> None:
        """Make the resolved values current."""
        self._settings.publish()

    def program(self, ndim: int, *, clipped: bool) -> Program:
        """The rule traced for this configuration and number of dimensions; equal programs are one object."""
        if (ndim, clipped) not in self._programs:
            program = self._trace(ndim, clipped=clipped)
            equal = (known for known in self._programs.values() if known.key == program.key)
            self._programs[ndim, clipped] = next(equal, program)
        return self._programs[ndim, clipped]

    def _trace(self, ndim: int, *, clipped: bool) -> Program:
        outputs = trace(
            type(self).rule, self._slots, name=type(self).__name__, ndim=ndim,
            arguments=self._arguments, removable=self._settings.removable, clipped=clipped,
        )  # fmt: skip
        kept = {slot: kind for slot, kind in self._slots.items() if slot in outputs}
        return Program(type(self).__name__, kept, outputs)

    def _arguments(self, trace: Trace) -> dict[str, Any]:
        arguments = self._settings.arguments(trace)
        return {**arguments, "t": trace.hyperparameter("t")} if self._counts_steps else arguments

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_programs": {}}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._settings.given.items())
        return f"{type(self).__name__}({given}{self.spelled_options})"


def _signature(fields: Mapping[str, Field]) -> inspect.Signature:
    """The constructor's arguments: the fields in order, positional ones first, then the options."""
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    arguments = [
        inspect.Parameter(
            name, kinds[field.kw_only], default=inspect.Parameter.empty if field.default is REQUIRED else field.default
        )
        for name, field in fields.items()
    ]
    options = [("clip_norm", None), ("nonfinite", "allow")]
    arguments += [inspect.Parameter(name, kinds[True], default=default) for name, default in options]
    return inspect.Signature(sorted(arguments, key=lambda argument: argument.kind))
