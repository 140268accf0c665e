"""One rule's side of a step: its programs, its scalars, and the slots and step counts of its parameters."""

import functools
import inspect
from collections.abc import Callable, KeysView, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gradstep.arrays.library import recognise
from gradstep.arrays.memory import Integers
from gradstep.program.graph import Kind, Reading, Trace, trace
from gradstep.program.program import Program
from gradstep.settings import Settings
from gradstep.step import forms
from gradstep.step.match import Match, check_parameter, make_slots
from gradstep.step.outcome import Awaited, Outcome

State = tuple[dict[str, dict[str, Any]], dict[str, int], Integers]


class Family(Protocol):
    """An optimizer class that is defined by a rule."""

    __name__: str
    rule: Callable[..., object]
    slot_kinds: Mapping[str, Kind]


class Leaf:
    """What an optimizer with a rule keeps from step to step.

    Args:
        family: the optimizer's class: its name, its rule and the kinds of its slots.
        settings: the hyperparameters.
    """

    def __init__(self, family: Family, settings: Settings) -> None:
        self._family, self.settings = family, settings
        self._step = 0
        self._awaited = Awaited()
        self.epoch = 0  # changes whenever a plan made before is void
        self.entries: dict[str, dict[str, Any]] = {}
        self.shown: set[str] = set()  # the parameters whose slots somebody else may hold, and move
        self._ledger: dict[str, int] = {}  # the row of each parameter in the counts
        self._counts: Integers = np.zeros(0, np.int64)
        self._programs: dict[tuple[int, Reading], Program] = {}

    # Hyperparameters

    def change(self, settings: Settings) -> None:
        """Adopt other hyperparameters; programs are void when their configuration differs."""
        if settings.static != self.settings.static:
            self._programs = {}
            self.epoch += 1
        self.settings = settings

    def resolve(self) -> None:
        """Resolve and check the scheduled hyperparameters for the coming step; all stays pending."""
        self.settings.resolve(self._step_if_asked)

    def scalars(self) -> dict[str, float]:
        """The value of each scalar hyperparameter for the step that is being taken."""
        return self.settings.upcoming(self._step_if_asked)

    def current(self, name: str) -> Any:
        """The value of a hyperparameter in the last step that was taken."""
        self._awaited.settle()
        return self.settings.current(name)

    def check_rounded(self, dtype: str) -> None:
        """Check the scalars as the compute dtype holds them."""
        self.settings.check_rounded(self._step_if_asked, dtype)

    @property
    def _step_if_asked(self) -> int:
        """The coming step where schedules depend on it; without any, no device is asked."""
        return self.step if self.settings.scheduled else 0

    # State

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        self._awaited.settle()
        return self._step

    @property
    def steps(self) -> dict[str, int]:
        """How many steps each parameter has taken."""
        self._awaited.settle()
        counts = self._counts.tolist()
        return {name: counts[self._ledger[name]] for name in self.entries}

    def names(self) -> KeysView[str]:
        """The parameters that have been seen."""
        return self.entries.keys()

    def slots_of(self, name: str) -> Mapping[str, Any]:
        """The slots that a parameter has so far."""
        return self.entries.get(name, {})

    def show(self, name: str) -> Mapping[str, Any]:
        """The same for somebody outside: from now on these slots are looked at before every step."""
        slots = self.entries[name]
        if name not in self.shown:
            self.shown.add(name)
            self.epoch += 1
        return slots

    def reserve(self, names: Sequence[str]) -> Integers:
        """The rows in which these parameters' steps are counted."""
        for name in names:
            self._ledger.setdefault(name, len(self._ledger))
        missing = len(self._ledger) - len(self._counts)
        if missing:
            self._counts = np.concatenate([self._counts, np.zeros(missing, np.int64)])
        return np.array([self._ledger[name] for name in names], np.int64)

    def count(self, row: int) -> int:
        """How many steps the parameter in this row has taken."""
        self._awaited.settle()
        return int(self._counts[row])

    def fresh(self, params: Mapping[str, Any]) -> State:
        """Zero slots for all these parameters, and counts at 0; not yet adopted."""
        library = recognise(params=params)
        entries: dict[str, dict[str, Any]] = {}
        for name, parameter in params.items():
            if library.in_place is False:
                form = library.describe(parameter, f"params[{name!r}]")
                entries[name] = forms.make_slots(library, name, form, self.program(len(form.shape)), {})
                continue
            memory = check_parameter(library, name, parameter)
            entries[name] = make_slots(library, name, memory, self.program(len(memory.shape)), {})
        return entries, {name: row for row, name in enumerate(entries)}, np.zeros(len(entries), np.int64)

    def adopt(self, state: State) -> None:
        """Replace the whole state."""
        self._awaited.settle()
        self.entries, self._ledger, self._counts = state
        self.shown = set()
        self.epoch += 1

    def stage(self, rows: Integers, matches: Sequence[Match]) -> State:
        """The state after a step of the parameters in `rows`; `matches` are those whose slots are new."""
        counts = self._counts.copy()
        counts[rows] += 1
        slots = {match.name: dict(match.slots) for match in matches}
        return {**self.entries, **slots} if slots else self.entries, self._ledger, counts

    def advance(self, staged: State) -> None:
        """Adopt the state after the step and publish the scalars."""
        self.entries, self._ledger, self._counts = staged
        self.settings.publish()
        self._step += 1

    def adopt_slots(self, slots: Mapping[str, dict[str, Any]]) -> None:
        """Replace the slots of some parameters."""
        self.entries = {**self.entries, **slots}

    def take(self, rows: Integers, outcome: Outcome | None) -> None:
        """Count a step of these rows, at once or, given an outcome, when somebody asks."""
        if outcome is not None:
            self._awaited.add(outcome, lambda: self.take(rows, None))
            return
        counts = self._counts.copy()
        counts[rows] += 1
        self._counts = counts
        self.settings.publish()
        self._step += 1

    # Programs

    def program(self, ndim: int, reading: Reading = Reading.PLAIN) -> Program:
        """The rule traced for this configuration and number of dimensions; equal programs are one object."""
        if (ndim, reading) not in self._programs:
            program = self._trace(ndim, reading)
            equal = (known for known in self._programs.values() if known.key == program.key)
            self._programs[ndim, reading] = next(equal, program)
        return self._programs[ndim, reading]

    def _trace(self, ndim: int, reading: Reading) -> Program:
        family, (names, takes_t) = self._family, rule_arguments(self._family.rule)
        slots = {slot: family.slot_kinds.get(slot, Kind.FULL) for slot in names}

        def arguments(trace: Trace) -> dict[str, Any]:
            known = self.settings.arguments(trace)
            return {**known, "t": trace.hyperparameter("t")} if takes_t else known

        outputs = trace(
            family.rule, slots, name=family.__name__, ndim=ndim,
            arguments=arguments, removable=self.settings.removable, reading=reading,
        )  # fmt: skip
        return Program(family.__name__, {slot: kind for slot, kind in slots.items() if slot in outputs}, outputs)

    def __getstate__(self) -> dict[str, Any]:
        self._awaited.settle()
        return {**vars(self), "_programs": {}}


@functools.cache
def rule_arguments(rule: Callable[..., object]) -> tuple[tuple[str, ...], bool]:
    """The names of the slots, and whether the rule takes `t`."""
    parameters = inspect.signature(rule).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return tuple(positional[2:]), "t" in parameters
