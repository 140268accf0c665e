"""A step for arrays that never change, compiled: one function makes the new parameters and slots."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.library import Form, FunctionalLibrary
from gradstep.errors import AliasedParametersError
from gradstep.lazy import computed_once
from gradstep.program.formats import Format, compute_dtype
from gradstep.program.graph import Kind, Reading
from gradstep.program.program import Program
from gradstep.step.evaluate import Evaluation
from gradstep.step.leaf import Leaf
from gradstep.step.look import Look, Policy, compiled_look, look, looking_dtype, told
from gradstep.step.packing import Packing, round_keys, rounded_places
from gradstep.step.scalars import ScalarTable, Scales
from gradstep.step.share import FunctionalShare, Slots
from gradstep.step.storage import parts_of

DONATED_TWICE = (
    "a parameter or slot shares its memory with another one or with a gradient, so it cannot be donated; "
    "pass copies, or donate=False"
)


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
    policy: Policy

    @computed_once
    def key(self) -> Any:
        """Equal for recipes that do the same."""
        tasks = tuple((task.program.key, task.form, tuple(task.formats.items()), *task[3:]) for task in self.tasks)
        return tasks, self.policy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class FunctionalBatch(NamedTuple):
    """Parameters of one optimizer that share a program and dtype, and so a table of scalars."""

    leaf: Leaf
    dtype: str
    table: ScalarTable


class CompiledStep:
    """The function that takes a planned step, and the tables of its scalars.

    Args:
        library: whose arrays they are.
        shares: what each optimizer takes.
        seen: the gradients, and the sums that they are added to, as examples of their dtypes.
        policy: what is done about the gradients.
        donating: whether old parameters and slots lend their memory.
    """

    def __init__(
        self,
        library: FunctionalLibrary,
        shares: Sequence[FunctionalShare],
        seen: Sequence[Any],
        policy: Policy,
        *,
        donating: bool,
    ) -> None:
        self._library, self._shares = library, shares
        self._readings = tuple(share.readings[name] for share in shares for name in share.names)
        self._looking_dtype = looking_dtype(seen)
        self._last_told: tuple[float | None, Scales | None, Any] = None, None, None
        self._rounded = [[rounded_places(share.formats[name]) for name in share.names] for share in shares]
        self._batches: list[FunctionalBatch] = []
        self._recipe = Recipe(tuple(self._tasks()), policy)
        self._step = _compiled_step(library, self._recipe, donating)

    def check(self, scales: Scales) -> None:
        """See `Plan.check`."""
        for batch in self._batches:
            scales.check(batch.dtype)

    def look(self, gradients: list[Any], totals: list[Any], max_norm: float | None, scales: Scales) -> Look:
        """See `Way.look`."""
        return compiled_look(self._library, self._readings)(gradients, totals, self._told(max_norm, scales))

    def _told(self, max_norm: float | None, scales: Scales) -> Any:
        if self._last_told[:2] != (max_norm, scales):
            self._last_told = max_norm, scales, told(self._library, max_norm, scales, self._looking_dtype)
        return self._last_told[2]

    def run(
        self, parameters: list[Any], slots: list[Slots], gradients: list[Any], totals: list[Any], found: Look | None,
        max_norm: float | None, scales: Scales,
    ) -> tuple[list[Any], list[Slots], Look | None]:  # fmt: skip
        """See `Way.run`."""
        library = self._library
        for batch in self._batches:
            batch.table.fill(scales)
        tables = [library.table(batch.table.values[batch.table.rows], batch.dtype) for batch in self._batches]
        # Each argument has its price, so there is nothing for what is not needed.
        facts = [self._told(max_norm, scales)] if self._recipe.policy.looking else []
        known = [found.scale, found.finite] if found else []
        try:
            new, new_slots, seen = self._step(parameters, slots, gradients, totals, tables, self._keys(), facts, known)
        except ValueError as error:  # two arrays on one buffer
            if "donate" not in str(error):
                raise
            raise AliasedParametersError(DONATED_TWICE) from error
        for batch in self._batches:
            batch.table.advance()
        return new, new_slots, Look(*seen) if seen else found

    def finish(self, parameters: list[Any], slots: list[Slots]) -> None:
        """See `Way.finish`."""

    def _keys(self) -> list[Any]:
        """The keys of what is rounded at random in the coming step, all parameters after each other."""
        keys = [
            round_keys(share.names, rounded, share.leaf.storage.options.seed, share.leaf.step)
            for share, rounded in zip(self._shares, self._rounded, strict=True)
            if any(rounded)
        ]
        return [self._library.words(np.concatenate(keys))] if keys else []

    def _tasks(self) -> list[Task]:
        """The task of each parameter; makes the batches on the way."""
        tasks: list[Task] = []
        for share in self._shares:
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
    readings, policy = [task.reading for task in recipe.tasks], recipe.policy

    def step(
        parameters: list[Any], slots: list[Any], gradients: list[Any], totals: list[Any], tables: list[Any],
        keys: list[Any], facts: list[Any], seen: list[Any],
    ) -> tuple[list[Any], list[Any], list[Any]]:  # fmt: skip
        found = look(library, readings, gradients, totals, *facts) if policy.looking else None
        scale, take = (found.scale, found.finite) if found else seen or (None, None)
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
            if policy.clipped:
                factors = [symbol.index for symbol in program.symbols if symbol.attribute == "grad_scale"]
                scalars |= {index: library.apart(scalars[index] * library.cast(scale, dtype)) for index in factors}
            arrays = {"w": w, **old}
            packing = Packing(library, program, task.formats, dtype)
            inputs = {"g": g, **total, **packing.unpack(arrays)}
            new = packing.pack(Evaluation(library, program, dtype, inputs, scalars).outputs(), own_keys)
            if policy.skipping:
                new = {place: library.call("where", take, value, arrays[place]) for place, value in new.items()}
            parts = parts_of(program, task.formats, task.form.shape)
            full = ["w", *(part.name for part in parts if part.kind is Kind.FULL)]
            new |= {name: library.keep_place(new[name], task.form) for name in full}
            new_parameters.append(new.pop("w"))
            new_slots.append(new)
        return new_parameters, new_slots, list(found or ())

    return library.compile(step, donated=(0, 1) if donating else ())
