"""A step for arrays that never change: one compiled function makes the new parameters and slots."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from gradstep.arrays.library import OTHER, STAYED, Form, Found, FunctionalLibrary
from gradstep.arrays.memory import Integers
from gradstep.errors import AliasedParametersError
from gradstep.program.formats import Format, compute_dtype
from gradstep.program.graph import Kind, Reading
from gradstep.program.program import Program
from gradstep.step.evaluate import Evaluation
from gradstep.step.forms import check_devices, check_gradient, describe_floats, make_slots, refuse_tracing
from gradstep.step.intake import Intake
from gradstep.step.leaf import Leaf
from gradstep.step.look import Look, compiled_look, look, looking_dtype, told
from gradstep.step.outcome import Outcome
from gradstep.step.packing import Packing, round_keys, rounded_places
from gradstep.step.scalars import ScalarTable, Scales
from gradstep.step.storage import parts_of


class Task(NamedTuple):
    """What is done to one parameter: part of what a step is compiled for."""

    program: Program
    form: Form
    formats: Mapping[str, Format]
    reading: Reading
    batch: int
    row: int


@dataclass(frozen=True)
class Recipe:
    """What a step is compiled for, besides the forms of its arguments."""

    tasks: tuple[Task, ...]
    clipped: bool
    nonfinite: str

    @property
    def looking(self) -> bool:
        """Whether the step looks at the gradients itself; where it may raise, somebody has looked before."""
        return self.nonfinite == "skip" or (self.clipped and self.nonfinite == "allow")

    @functools.cached_property
    def key(self) -> Any:
        """Equal for recipes that do the same."""
        tasks = tuple((task.program.key, task.form, tuple(task.formats.items()), *task[3:]) for task in self.tasks)
        return tasks, self.clipped, self.nonfinite

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class FunctionalBatch(NamedTuple):
    """Parameters of one optimizer that share a program and dtype, and so a table of scalars."""

    leaf: Leaf
    dtype: str
    table: ScalarTable


class FunctionalShare:
    """The gradients that one optimizer takes in this step, and the slots that they need."""

    def __init__(
        self, leaf: Leaf, names: list[str], library: FunctionalLibrary, params: Mapping[str, Any], intake: Intake
    ) -> None:
        self.leaf, self.names, self.rows = leaf, names, leaf.reserve(names)
        self.forms = {name: describe_floats(library, params[name], f"params[{name!r}]") for name in names}
        self.readings = {name: intake.reading(name) for name in names}
        self.programs = {
            name: leaf.program(name, len(form.shape), self.readings[name]) for name, form in self.forms.items()
        }
        self.formats = {
            name: leaf.storage.formats(self.programs[name].slots, form.dtype, form.dtype)
            for name, form in self.forms.items()
        }
        self._made = {
            name: make_slots(
                library, name, self.forms[name], self.programs[name], self.formats[name], leaf.slots_of(name)
            )
            for name in names
        }
        self._rounded = [rounded_places(self.formats[name]) for name in names]
        self.rounding = any(self._rounded)

    @property
    def published(self) -> bool:
        """Whether the slots are the optimizer's already."""
        return not self._made

    def keys(self) -> "np.ndarray[Any, Any]":
        """The keys of what is rounded at random in the coming step, all parameters after each other."""
        return round_keys(self.names, self._rounded, self.leaf.storage.options.seed, self.leaf.step)

    def slots(self) -> list[Mapping[str, Any]]:
        """The slots of each parameter as they are now."""
        return [self._made[name] if self._made else self.leaf.slots_of(name) for name in self.names]

    def advance(self, slots: Sequence[Mapping[str, Any]], outcome: Outcome | None) -> None:
        """Let the optimizer adopt what a step has made, at once or when the device says that it was taken."""
        self._made = {}
        self.leaf.adopt_slots({name: dict(new) for name, new in zip(self.names, slots, strict=True)})
        self.leaf.take(self.rows, outcome)


class FormWatch:
    """See `Watch`: such arrays have no addresses."""

    def __init__(self, library: FunctionalLibrary, arrays: list[Any]) -> None:
        self.addresses: Integers = np.zeros(0, np.int64)
        self._library, self._forms = library, library.marks(arrays)

    def locate(self, arrays: list[Any]) -> Found:
        """See `Watch.locate`."""
        return STAYED if self._library.marks(arrays) == self._forms else OTHER


class FunctionalPlan:
    """A step planned: what is compiled, and the tables of scalars. Holds no parameters or gradients."""

    in_place: Literal[False] = False

    def __init__(
        self,
        library: FunctionalLibrary,
        routes: Sequence[tuple[Leaf, list[str]]],
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        intake: Intake,
        *,
        clipped: bool,
        nonfinite: str,
        donating: bool,
    ) -> None:
        self.library = library
        refuse_tracing(library, [*params.values(), *grads.values()])
        self.shares = [FunctionalShare(leaf, names, library, params, intake) for leaf, names in routes]
        self.names = [name for share in self.shares for name in share.names]
        self._readings = tuple(intake.reading(name) for name in self.names)
        self._looking_dtype = looking_dtype([*grads.values(), *intake.totals(self.names)])
        self._last_told: tuple[float | None, Scales | None, Any] = None, None, None
        self._rounding = any(share.rounding for share in self.shares)
        check_devices(library, {name: form for share in self.shares for name, form in share.forms.items()})
        for share in self.shares:
            for name in share.names:
                check_gradient(library, name, grads[name], share.forms[name])
        self._batches: list[FunctionalBatch] = []
        self._recipe = Recipe(tuple(self._tasks()), clipped, nonfinite)
        self._donating = donating
        self._step = _compiled_step(library, self._recipe, donating)
        self.shown_slots: list[Any] = []
        self.shown_addresses: Integers = np.zeros(0, np.int64)

    @property
    def published(self) -> bool:
        """See `Plan.published`."""
        return all(share.published for share in self.shares)

    def watch(self, arrays: list[Any]) -> FormWatch:
        """See `Plan.watch`."""
        return FormWatch(self.library, arrays)

    def check(self, scales: Scales) -> None:
        """See `Plan.check`."""
        for batch in self._batches:
            scales.check(batch.dtype)

    def look(self, gradients: list[Any], totals: list[Any], max_norm: float | None, scales: Scales) -> Look:
        """What there is to know about the gradients before a step."""
        return compiled_look(self.library, self._readings)(gradients, totals, self._told(max_norm, scales))

    def _told(self, max_norm: float | None, scales: Scales) -> Any:
        if self._last_told[:2] != (max_norm, scales):
            self._last_told = max_norm, scales, told(self.library, max_norm, scales, self._looking_dtype)
        return self._last_told[2]

    def read(self, look: Look) -> tuple[float, tuple[str, ...]]:
        """The norm, and the names of gradients that are not finite; waits for the device."""
        norm = float(self.library.read(look.norm))
        each = np.atleast_1d(self.library.read(look.each_finite)).tolist()
        return norm, tuple(name for name, finite in zip(self.names, each, strict=False) if not finite)

    def fill(self, scales: Scales) -> None:
        """Compute the scalars of the coming step."""
        for batch in self._batches:
            batch.table.fill(scales)

    def run(
        self, parameters: list[Any], gradients: list[Any], totals: list[Any], look: Look | None, max_norm: float | None,
        scales: Scales,
    ) -> tuple[list[Any], list[Any], Look | None]:  # fmt: skip
        """The new parameters, the new slots of each, in the plan's order, and what was found in the gradients."""
        slots = [slots for share in self.shares for slots in share.slots()]
        library = self.library
        tables = [library.table(batch.table.values[batch.table.rows], batch.dtype) for batch in self._batches]
        # Each argument has its price, so there is nothing for what is not needed.
        keys = [library.words(np.concatenate([share.keys() for share in self.shares]))] if self._rounding else []
        facts = [self._told(max_norm, scales)] if self._recipe.looking else []
        if self._donating:
            _refuse_donating_twice(parameters, slots, gradients)
        try:
            new, new_slots, found = self._step(
                parameters, slots, gradients, totals, tables, keys, facts, [look.scale, look.finite] if look else []
            )
        except ValueError as error:  # two arrays on one buffer
            if "donate" not in str(error):
                raise
            raise AliasedParametersError(DONATED_TWICE) from error
        return new, new_slots, Look(*found) if found else look

    def advance(self, slots: Sequence[Mapping[str, Any]], outcome: Outcome | None) -> None:
        """Let every optimizer adopt its new slots, and count the step."""
        for batch in self._batches:
            batch.table.advance()
        start = 0
        for share in self.shares:
            share.advance(slots[start : start + len(share.names)], outcome)
            start += len(share.names)

    def _tasks(self) -> list[Task]:
        """The task of each parameter; makes the batches on the way."""
        tasks: list[Task] = []
        for share in self.shares:
            sorts: dict[tuple[int, str], list[str]] = {}
            for name in share.names:
                dtype = compute_dtype(share.forms[name].dtype)
                sorts.setdefault((id(share.programs[name]), dtype), []).append(name)
            places: dict[str, tuple[int, int]] = {}
            for (_, dtype), names in sorts.items():
                places |= {name: (len(self._batches), row) for row, name in enumerate(names)}
                program, shapes = share.programs[names[0]], [share.forms[name].shape for name in names]
                table = ScalarTable(share.leaf, program, dtype, names, shapes)
                self._batches.append(FunctionalBatch(share.leaf, dtype, table))
            tasks += [
                Task(share.programs[name], share.forms[name], share.formats[name], share.readings[name], *places[name])
                for name in share.names
            ]
        return tasks


@functools.lru_cache(maxsize=64)
def _compiled_step(library: FunctionalLibrary, recipe: Recipe, donating: bool) -> Callable[..., Any]:
    readings = [task.reading for task in recipe.tasks]

    def step(
        parameters: list[Any], slots: list[Any], gradients: list[Any], totals: list[Any], tables: list[Any],
        keys: list[Any], facts: list[Any], seen: list[Any],
    ) -> tuple[list[Any], list[Any], list[Any]]:  # fmt: skip
        found = list(look(library, readings, gradients, totals, *facts)) if recipe.looking else []
        scale, take = (found[2], found[1]) if found else seen or (None, None)
        rest, unused = iter(totals), iter(range(len(keys[0]) if keys else 0))
        new_parameters: list[Any] = []
        new_slots: list[dict[str, Any]] = []
        for task, w, old, g in zip(recipe.tasks, parameters, slots, gradients, strict=True):
            total = {"g.sum": next(rest)} if task.reading is Reading.SUMMED else {}
            own_keys = {place: keys[0][next(unused)] for place in rounded_places(task.formats)}
            if 0 in task.form.shape:  # nothing to update, and no statistics to keep
                new_parameters.append(w)
                new_slots.append(old)
                continue
            program, dtype = task.program, compute_dtype(task.form.dtype)
            scalars = {i: tables[task.batch][task.row, place] for i, place in program.scalar_places.items()}
            if recipe.clipped:
                factors = [symbol.index for symbol in program.symbols if symbol.attribute == "grad_scale"]
                scalars |= {index: library.apart(scalars[index] * library.cast(scale, dtype)) for index in factors}
            arrays = {"w": w, **old}
            packing = Packing(library, program, task.formats, dtype)
            inputs = {"g": g, **total, **packing.unpack(arrays)}
            new = packing.pack(Evaluation(library, program, dtype, inputs, scalars).outputs(), own_keys)
            if recipe.nonfinite == "skip":
                new = {place: library.call("where", take, value, arrays[place]) for place, value in new.items()}
            parts = parts_of(program, task.formats, task.form.shape)
            full = ["w", *(part.name for part in parts if part.kind is Kind.FULL)]
            new |= {name: library.keep_place(new[name], task.form) for name in full}
            new_parameters.append(new.pop("w"))
            new_slots.append(new)
        return new_parameters, new_slots, found

    return library.compile(step, donated=(0, 1) if donating else ())


DONATED_TWICE = (
    "a parameter or slot shares its memory with another one or with a gradient, so it cannot be donated; "
    "pass copies, or donate=False"
)


def _refuse_donating_twice(parameters: list[Any], slots: list[Mapping[str, Any]], gradients: list[Any]) -> None:
    arrays = [*parameters, *gradients, *(array for row in slots for array in row.values())]
    if len(set(map(id, arrays))) < len(arrays) - len(gradients) + len(set(map(id, gradients))):
        raise AliasedParametersError(DONATED_TWICE)
