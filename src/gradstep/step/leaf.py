"""One rule's side of a step: its programs, its scalars, and the slots and step counts of its parameters."""

import functools
import inspect
from collections.abc import Callable, KeysView, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gradstep.arrays.library import recognise
from gradstep.arrays.memory import Integers
from gradstep.arrays.stored import Stored
from gradstep.errors import ConfigurationError, MismatchError, listing
from gradstep.program.graph import Kind, Reading, Trace, trace
from gradstep.program.program import Program
from gradstep.settings import Group, Settings
from gradstep.step import forms
from gradstep.step.match import Match, check_parameter, make_slots
from gradstep.step.outcome import Awaited, Outcome
from gradstep.step.storage import Storage

State = tuple[dict[str, dict[str, Any]], dict[str, int], Integers]


class Family(Protocol):
    """An optimizer class that is defined by a rule."""

    __name__: str
    rule: Callable[..., object]
    slot_kinds: Mapping[str, Kind]

    def check_together(self, given: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` for hyperparameters that do not go together."""
        ...


class Leaf:
    """What an optimizer with a rule keeps from step to step.

    Args:
        family: the optimizer's class: its name, its rule and the kinds of its slots.
        settings: the hyperparameters.
        storage: how parameters and slots are kept.
    """

    def __init__(self, family: Family, settings: Settings, storage: Storage) -> None:
        self._family, self.settings, self.storage = family, settings, storage
        self._step = 0
        self._awaited = Awaited()
        self.epoch = 0  # changes whenever a plan made before is void
        self.entries: dict[str, dict[str, Any]] = {}
        self.cut = False  # whether slots are pieces of those of whole parameters
        self.shown: set[str] = set()  # the parameters whose slots somebody else may hold, and move
        self._known: frozenset[str] | None = None  # of a checkpoint, until the first step after loading it
        self._ledger: dict[str, int] = {}  # the row of each parameter in the counts
        self._counts: Integers = np.zeros(0, np.int64)
        self._programs: dict[Any, Program] = {}
        self._groups: dict[str, Group] = {}  # which settings each parameter has, as far as anybody has asked

    @property
    def family(self) -> str:
        """The name of the optimizer's class."""
        return self._family.__name__

    # Hyperparameters

    def change(self, settings: Settings) -> None:
        """Adopt other hyperparameters, if they go together.

        Programs and groups are void when configuration or patterns differ.
        """
        same = settings.static == self.settings.static
        self.check_together(settings)
        if settings.mapped and same:  # else groups are checked when they come up again
            firsts = {group: name for name, group in reversed(self._groups.items())}
            for group, name in firsts.items():
                self._check_group(settings.of(group), name)
        if not same:
            self._programs, self._groups = {}, {}
            self.epoch += 1
        self.settings = settings

    def check_together(self, settings: Settings) -> None:
        """Raise `ConfigurationError` for hyperparameters that do not go together; of groups nothing is known yet."""
        if not settings.mapped:
            self._family.check_together(settings.given)

    def settings_in(self, settings: Settings, name: str) -> Settings:
        """Of other hyperparameters, those of one parameter, checked together."""
        chosen = settings.of(settings.group_of(name))
        if settings.mapped:
            self._check_group(chosen, name)
        return chosen

    def group(self, name: str) -> Group:
        """What the name of a parameter chooses, looked up once.

        Raises:
            ConfigurationError: a mapping has no value for it, or the values do not go together.
        """
        if not self.settings.mapped:
            return ()
        if name not in self._groups:
            group = self.settings.group_of(name)
            self._check_group(self.settings.of(group), name)
            self._groups[name] = group
        return self._groups[name]

    def forget_groups(self) -> None:
        """Let every parameter's name be looked at again."""
        self._groups = {}

    def _check_group(self, settings: Settings, name: str) -> None:
        try:
            self._family.check_together(settings.given)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} (for params[{name!r}])") from None

    def settings_of(self, name: str) -> Settings:
        """The hyperparameters of one parameter."""
        return self.settings.of(self.group(name))

    def resolve(self) -> None:
        """Resolve and check the scheduled hyperparameters for the coming step; all stays pending."""
        self.settings.resolve(self._step_if_asked)

    def scalars(self, group: Group = ()) -> dict[str, float]:
        """The value of each scalar hyperparameter of a group for the step that is being taken."""
        return self.settings.of(group).upcoming(self._step_if_asked)

    def coming(self, name: str) -> Any:
        """The value of a hyperparameter for that step; None if there is none of that name."""
        return self.settings.coming(name, self._step_if_asked)

    def current(self, name: str) -> Any:
        """The value of a hyperparameter in the last step that was taken."""
        self._awaited.settle()
        return self.settings.current(name)

    def check_rounded(self, dtype: str, group: Group = ()) -> None:
        """Check the scalars of a group as the compute dtype holds them."""
        self.settings.of(group).check_rounded(self._step_if_asked, dtype)

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

    def slots_of(self, name: str) -> dict[str, Any]:
        """The slots that a parameter has so far."""
        return self.entries.get(name, {})

    def show(self, name: str) -> Mapping[str, Any]:
        """The same for somebody outside: from now on these slots are looked at before every step."""
        slots = self.entries[name]
        if name not in self.shown:
            self.shown.add(name)
            self.epoch += 1
        if any(isinstance(array, Stored) for array in slots.values()):
            return {slot: array.shown() if isinstance(array, Stored) else array for slot, array in slots.items()}
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
                form = forms.describe_floats(library, parameter, f"params[{name!r}]")
                program = self.program(name, len(form.shape))
                formats = self.storage.formats(program.slots, form.dtype, form.dtype)
                entries[name] = forms.make_slots(library, name, form, program, formats, {})
                continue
            memory = check_parameter(library, name, parameter)
            program = self.program(name, len(memory.shape))
            formats = self.storage.formats(program.slots, memory.dtype, memory.dtype)
            entries[name] = make_slots(library, name, memory, program, formats, {})
        return entries, {name: row for row, name in enumerate(entries)}, np.zeros(len(entries), np.int64)

    def adopt(self, state: State) -> None:
        """Replace the whole state."""
        self._awaited.settle()
        self.entries, self._ledger, self._counts = state
        self._known = None
        self.shown, self.cut = set(), False
        self.epoch += 1

    def restore(
        self,
        settings: Settings,
        entries: dict[str, dict[str, Any]],
        steps: Mapping[str, int],
        step: int,
        known: frozenset[str] | None,
    ) -> None:
        """Replace hyperparameters, state and counters. `known`: parameters that may have a gradient without state."""
        counts = np.array([steps[name] for name in entries], np.int64)
        self.adopt((entries, {name: row for row, name in enumerate(entries)}, counts))
        self.settings, self._step = settings, step
        self._programs, self._groups = {}, {}
        self._known = known

    def go_on_from(self, step: int) -> None:
        """Let so many steps have been taken; the state stays."""
        self._awaited.settle()
        self._step = step

    def check_known(self, names: Sequence[str]) -> None:
        """Raise `MismatchError` when the first step after loading brings parameters that were not in the checkpoint."""
        if self._known is None:
            return
        strange = [name for name in names if name not in self.entries and name not in self._known]
        if strange:
            raise MismatchError(
                f"the checkpoint that was loaded has no state for {listing(strange)}, but for "
                f"{listing(list(self.entries))}; state is matched by name: rename one of them, or load with "
                "strict=False to let the others begin anew"
            )

    def stage(self, rows: Integers, matches: Sequence[Match]) -> State:
        """The state after a step of the parameters in `rows`; `matches` are those whose slots are new."""
        counts = self._counts.copy()
        counts[rows] += 1
        slots = {match.name: dict(match.slots) for match in matches}
        return {**self.entries, **slots} if slots else self.entries, self._ledger, counts

    def advance(self, staged: State) -> None:
        """Adopt the state after the step and publish the scalars."""
        self.entries, self._ledger, self._counts = staged
        self._known = None
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
        self._known = None
        self.settings.publish()
        self._step += 1

    # Programs

    def program(self, name: str, ndim: int, reading: Reading = Reading.PLAIN) -> Program:
        """The rule traced for a parameter's configuration and number of dimensions; equal programs are one object."""
        return self._program(self.settings_of(name), ndim, reading)

    def program_for(self, settings: Settings, ndim: int) -> Program:
        """The same for a group of other hyperparameters."""
        return self._program(settings, ndim, Reading.PLAIN)

    def programs(self, ndim: int, reading: Reading = Reading.PLAIN) -> list[tuple[dict[str, list[str]], Program]]:
        """Every program that a parameter may have, each with the globs that lead to it."""
        variants = self.settings.variants()
        return [(globs, self._program(settings, ndim, reading)) for globs, settings in variants]

    def _program(self, settings: Settings, ndim: int, reading: Reading) -> Program:
        key = settings.static, ndim, reading
        if key not in self._programs:
            program = self._trace(settings, ndim, reading)
            equal = (known for known in self._programs.values() if known.key == program.key)
            self._programs[key] = next(equal, program)
        return self._programs[key]

    def _trace(self, settings: Settings, ndim: int, reading: Reading) -> Program:
        family, (names, takes_t) = self._family, rule_arguments(self._family.rule)
        slots = {slot: family.slot_kinds.get(slot, Kind.FULL) for slot in names}

        def arguments(trace: Trace) -> dict[str, Any]:
            known = settings.arguments(trace)
            return {**known, "t": trace.hyperparameter("t")} if takes_t else known

        outputs = trace(
            family.rule, slots, name=family.__name__, ndim=ndim,
            arguments=arguments, removable=settings.removable, reading=reading,
        )  # fmt: skip
        return Program(family.__name__, {slot: kind for slot, kind in slots.items() if slot in outputs}, outputs)

    def __getstate__(self) -> dict[str, Any]:
        self._awaited.settle()
        return {**vars(self), "_programs": {}, "_groups": {}}


@functools.cache
def rule_arguments(rule: Callable[..., object]) -> tuple[tuple[str, ...], bool]:
    """The names of the slots, and whether the rule takes `t`."""
    parameters = inspect.signature(rule).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return tuple(positional[2:]), "t" in parameters
