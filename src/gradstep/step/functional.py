"""A step for arrays that never change: one compiled function makes the new parameters and slots."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

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
    skipping: bool

    @functools.cached_property
    def key(self) -> Any:
        """Equal for recipes that do the same."""
        tasks = tuple((task.program.key, task.form, tuple(task.formats.items()), *task[3:]) for task in self.tasks)
        return tasks, self.clipped, self.skipping

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

    @property
    def published(self) -> bool:
        """Whether the slots are the optimizer's already."""
        return not self._made

    def keys(self) -> "np.ndarray[Any, Any]":
        """The keys of what is rounded at random in the coming step, all parameters after each other."""
        if not any(self._rounded):
            return np.zeros((0, 3), np.uint32)
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
        self._library, self._forms = library, _forms(arrays)

    def locate(self, arrays: list[Any]) -> Found:
        """See `Watch.locate`."""
        return STAYED if _forms(arrays) == self._forms and not self._library.is_tracing(arrays) else OTHER


def _forms(arrays: list[Any]) -> list[Any]:
    return [(type(array), array.shape, array.dtype, getattr(array, "sharding", None)) for array in arrays]


class Look(NamedTuple):
    """What has been found out about the gradients, on their device; `scale` is the factor that clips them."""

    norm: Any
    finite: Any
    scale: Any
    each_finite: Any


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
        skipping: bool,
        donating: bool,
    ) -> None:
        self.library = library
        refuse_tracing(library, [*params.values(), *grads.values()])
        self.shares = [FunctionalShare(leaf, names, library, params, intake) for leaf, names in routes]
        self.names = [name for share in self.shares for name in share.names]
        self._readings = [intake.reading(name) for name in self.names]
        check_devices(library, {name: form for share in self.shares for name, form in share.forms.items()})
        for share in self.shares:
            for name in share.names:
                check_gradient(library, name, grads[name], share.forms[name])
        self._batches: list[FunctionalBatch] = []
        recipe = Recipe(tuple(self._tasks()), clipped, skipping)
        self._donating = donating
        self._step = _compiled_step(library, recipe, donating)
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
        """The global norm of the gradients, which of them are finite, and the factor that clips them."""
        rest, parts = iter(totals), list[Part]()
        for gradient, reading in zip(gradients, self._readings, strict=True):
            part: Part = {"g": gradient}
            if reading in (Reading.WEIGHED, Reading.SUMMED):
                part["g.scale"] = self.library.number(scales.micro, _looking_dtype([gradient]))
            if reading is Reading.SUMMED:
                part["g.sum"] = next(rest)
            parts.append(part)
        return look_at(self.library, parts, max_norm, scales.whole)

    def read(self, look: Look) -> tuple[float, tuple[str, ...]]:
        """The norm, and the names of gradients that are not finite; waits for the device."""
        each = np.atleast_1d(self.library.read(look.each_finite)).tolist()
        culprits = tuple(name for name, finite in zip(self.names, each, strict=False) if not finite)
        return float(self.library.read(look.norm)), culprits

    def fill(self, scales: Scales) -> None:
        """Compute the scalars of the coming step."""
        for batch in self._batches:
            batch.table.fill(scales)

    def run(
        self, parameters: list[Any], gradients: list[Any], totals: list[Any], look: Look | None
    ) -> tuple[list[Any], list[Any]]:
        """The new parameters, and the new slots of each, in the plan's order."""
        slots = [dict(slots) for share in self.shares for slots in share.slots()]
        library = self.library
        tables = [library.table(batch.table.values[batch.table.rows], batch.dtype) for batch in self._batches]
        keys = library.words(np.concatenate([share.keys() for share in self.shares]))
        one = library.number(1.0, "float32")
        scale, take = (look.scale, look.finite) if look else (one, one)
        if self._donating:
            _refuse_donating_twice(parameters, slots, gradients)
        try:
            return self._step(parameters, slots, gradients, totals, tables, keys, scale, take)
        except ValueError as error:  # two arrays on one buffer
            if "donate" not in str(error):
                raise
            raise AliasedParametersError(DONATED_TWICE) from error

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
    def step(
        parameters: list[Any], slots: list[Any], gradients: list[Any], totals: list[Any], tables: list[Any], keys: Any,
        scale: Any, take: Any,
    ) -> tuple[list[Any], list[Any]]:  # fmt: skip
        rest, unused = iter(totals), iter(range(len(keys)))
        new_parameters: list[Any] = []
        new_slots: list[dict[str, Any]] = []
        for task, w, old, g in zip(recipe.tasks, parameters, slots, gradients, strict=True):
            total = {"g.sum": next(rest)} if task.reading is Reading.SUMMED else {}
            own_keys = {place: keys[next(unused)] for place in rounded_places(task.formats)}
            if 0 in task.form.shape:  # nothing to update, and no statistics to keep
                new_parameters.append(w)
                new_slots.append(old)
                continue
            program, dtype = task.program, compute_dtype(task.form.dtype)
            scalars = {i: tables[task.batch][task.row, place] for i, place in program.scalar_places.items()}
            if recipe.clipped:
                factors = [symbol.index for symbol in program.symbols if symbol.attribute == "grad_scale"]
                scalars |= {index: scalars[index] * library.cast(scale, dtype) for index in factors}
            arrays = {"w": w, **old}
            packing = Packing(library, program, task.formats, dtype)
            inputs = {"g": g, **total, **packing.unpack(arrays)}
            new = packing.pack(Evaluation(library, program, dtype, inputs, scalars).outputs(), own_keys)
            if recipe.skipping:
                new = {place: library.call("where", take, value, arrays[place]) for place, value in new.items()}
            parts = parts_of(program, task.formats, task.form.shape)
            full = ["w", *(part.name for part in parts if part.kind is Kind.FULL)]
            new |= {name: library.keep_place(new[name], task.form) for name in full}
            new_parameters.append(new.pop("w"))
            new_slots.append(new)
        return new_parameters, new_slots

    return library.compile(step, donated=(0, 1) if donating else ())


Part: TypeAlias = dict[str, Any]
"""A gradient `g` to be looked at, with `g.scale` that weighs it and `g.sum` that it is added to, if it has them."""


def look_at(library: FunctionalLibrary, parts: list[Part], max_norm: float | None, scale: float = 1.0) -> Look:
    """See `FunctionalPlan.look`."""
    dtype = _looking_dtype([array for part in parts for array in part.values()])
    limit = library.number(math.inf if max_norm is None else max_norm, dtype)
    return Look(*_compiled_look(library)(parts, limit, library.number(abs(scale), dtype)))


def _looking_dtype(arrays: list[Any]) -> str:
    return "float64" if any("float64" in str(array.dtype) for array in arrays) else "float32"


@functools.cache
def _compiled_look(library: FunctionalLibrary) -> Callable[..., Any]:
    return library.compile(functools.partial(_look, library))


def inspect_gradients(library: FunctionalLibrary, gradients: list[Any], max_norm: float | None) -> Look:
    """The same inside of a function that somebody else compiles."""
    parts = [{"g": gradient} for gradient in gradients]
    return Look(*_look(library, parts, math.inf if max_norm is None else max_norm, 1.0))


def _look(library: FunctionalLibrary, parts: list[Part], limit: Any, scale: Any) -> tuple[Any, Any, Any, Any]:
    dtype = _looking_dtype([array for part in parts for array in part.values()])
    wide = [_read(library, part, dtype) for part in parts]
    zero, one = library.number(0.0, dtype), library.number(1.0, dtype)
    largest = functools.reduce(
        functools.partial(library.call, "maximum"), (library.largest(library.call("abs", g)) for g in wide), zero
    )
    # Divided by the largest element, no square can over- or underflow.
    unit = library.call("where", largest < math.inf, largest, one)
    unit = library.call("where", unit > 0, unit, one)
    norm = unit * library.call("sqrt", sum((library.total((g / unit) * (g / unit)) for g in wide), zero))
    norm = norm * scale
    finite = (norm - norm) == 0
    scale = library.call("minimum", limit / (norm + 1e-6), one)
    scale = library.call("where", finite, scale, norm - norm)
    each = library.stack([library.all_finite(g) for g in wide]) if wide else finite
    return norm, finite, scale, each


def _read(library: FunctionalLibrary, part: Part, dtype: str) -> Any:
    """A gradient as a program reads it, before it is scaled as a whole."""
    g = library.cast(part["g"], dtype)
    if "g.scale" in part:
        g = g * library.cast(part["g.scale"], dtype)
    return library.cast(part["g.sum"], dtype) + g if "g.sum" in part else g


DONATED_TWICE = (
    "a parameter or slot shares its memory with another one or with a gradient, so it cannot be donated; "
    "pass copies, or donate=False"
)


def _refuse_donating_twice(parameters: list[Any], slots: list[dict[str, Any]], gradients: list[Any]) -> None:
    arrays = [*parameters, *gradients, *(array for row in slots for array in row.values())]
    if len(set(map(id, arrays))) < len(arrays) - len(gradients) + len(set(map(id, gradients))):
        raise AliasedParametersError(DONATED_TWICE)
