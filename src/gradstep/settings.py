"""All hyperparameters of one optimizer, as given and as resolved for its steps, for all parameters or by name."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, NamedTuple, TypeAlias, cast

from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.hyperparameters import Cell, Field, Pair, Resolved
from gradstep.lazy import computed_once
from gradstep.program.graph import Trace

Group: TypeAlias = tuple[str, ...]
"""What the name of a parameter chooses: for each mapped hyperparameter, in the order of fields, the glob that won."""


class Choice(NamedTuple):
    """One value of a hyperparameter: as given, and the scalars that it is made of; none for configuration."""

    given: Any
    cells: list[Cell]


class Settings:
    """All hyperparameters of one optimizer: as given, and as resolved.

    Some may be mapped: a value for each glob. What holds for the parameters of one group are settings too, those of
    `of(group)`, in which nothing is mapped. They share their scalars, so that a schedule is called for all of them.
    """

    def __init__(self, owner: str, fields: Mapping[str, Field]) -> None:
        self._owner, self._fields = owner, fields
        self.given: dict[str, Any] = {}
        self._cells: dict[str, list[Cell]] = {}
        self._choices: dict[str, dict[str, Choice]] = {}  # of what is mapped, by glob
        self._groups: dict[Group, Settings] = {}
        self._rounded: set[str] = set()  # the dtypes in which the fixed values have been checked

    def _adopt(self, name: str, value: object) -> None:
        field, label = self._fields[name], f"{self._owner}'s {name}"
        self._choices.pop(name, None)
        if not _is_by_name(field, value):
            self.given[name], self._cells[name] = _choice(field, label, value)
            return
        choices = _choices(field, label, cast("Mapping[object, object]", value))
        self._choices[name] = choices
        self.given[name] = {glob: choice.given for glob, choice in choices.items()}
        self._cells[name] = list(dict.fromkeys(cell for choice in choices.values() for cell in choice.cells))

    def replaced(self, values: Mapping[str, object], step: int) -> "Settings":
        """A copy with other values for some hyperparameters, resolved now; the rest is shared."""
        new = Settings(self._owner, self._fields)
        new.given, new._cells, new._choices = dict(self.given), dict(self._cells), dict(self._choices)
        for name, value in values.items():
            new._adopt(name, value)
        for name in values:
            for cell in new._cells[name]:
                cell.resolve(step)
                cell.publish()
        return new

    def restored(
        self, given: Mapping[str, object], resolved: Mapping[str, Sequence[Resolved]], step: int
    ) -> "Settings":
        """Other settings of the same owner: these values, with what schedules gave, or else resolved now."""
        new = Settings(self._owner, self._fields)
        for name in self._fields:
            new._adopt(name, given[name])
            cells, known = new._scheduled_of(name), resolved.get(name, ())
            if known and len(known) != len(cells):
                raise ConfigurationError(
                    f"{self._owner}'s {name} has {len(cells)} schedules, but the checkpoint has values of "
                    f"{len(known)}; a schedule that it only names must be a function step -> float"
                )
            for cell, value in zip(cells, known, strict=bool(known)):
                cell.resolved = value
            for cell in cells if not known else ():
                cell.resolve(step)
                cell.publish()
        return new

    @property
    def resolved(self) -> dict[str, tuple[Resolved, ...]]:
        """What schedules gave, by hyperparameter, in the order in which their values are given."""
        everything = {name: tuple(cell.resolved for cell in self._scheduled_of(name)) for name in self._fields}
        return {name: values for name, values in everything.items() if values}

    def _scheduled_of(self, name: str) -> list[Cell]:
        """The schedules of one hyperparameter, one that is shared by several globs as often as it is given."""
        choices = self._choices.get(name)
        cells = self._cells[name] if choices is None else [cell for choice in choices.values() for cell in choice.cells]
        return [cell for cell in cells if cell.source.is_schedule]

    # Groups

    @computed_once
    def mapped(self) -> list[str]:
        """The hyperparameters in which parameters may differ."""
        return [name for name in self._fields if name in self._choices]

    def group_of(self, parameter: str) -> Group:
        """The globs that win for a parameter, the first that matches of each mapping.

        Raises:
            ConfigurationError: a mapping has none.
        """
        return tuple(self._winner(name, parameter) for name in self.mapped)

    def _winner(self, name: str, parameter: str) -> str:
        globs = list(self._choices[name])
        for glob in globs:
            if fnmatchcase(parameter, glob):
                return glob
        raise ConfigurationError(
            f"{self._owner}'s {name} has no value for params[{parameter!r}], which matches none of its patterns "
            f"{', '.join(map(repr, globs))}; end the mapping with '*', which matches the rest"
        )

    def unused(self, parameters: Iterable[str]) -> dict[str, list[str]]:
        """The globs that win for none of these parameters, by hyperparameter; one that takes the rest may have none."""
        winners = set(map(self.group_of, parameters))
        won = {name: {group[place] for group in winners} for place, name in enumerate(self.mapped)}
        return {n: [g for g in self._choices[n] if g != "*" and g not in won[n]] for n in self.mapped}

    def of(self, group: Group) -> "Settings":
        """What holds for the parameters of a group."""
        if not self._choices:
            return self
        if group not in self._groups:
            new = Settings(self._owner, self._fields)
            new.given, new._cells = dict(self.given), dict(self._cells)
            for name, glob in zip(self.mapped, group, strict=True):
                new.given[name], new._cells[name] = self._choices[name][glob]
            self._groups[group] = new
        return self._groups[group]

    def variants(self) -> "list[tuple[dict[str, list[str]], Settings]]":
        """The settings that groups may have, as far as programs can differ, each with the globs that lead to it."""
        sorts: list[list[list[str]]] = []
        for name in self.mapped:
            alike: dict[object, list[str]] = {}
            for glob, choice in self._choices[name].items():
                alike.setdefault(self._static(name, choice), []).append(glob)
            sorts.append(list(alike.values()))
        return [
            (dict(zip(self.mapped, globs, strict=True)), self.of(tuple(first for first, *_ in globs)))
            for globs in itertools.product(*sorts)
        ]

    # Values

    @property
    def scalars(self) -> dict[str, Any]:
        """The hyperparameters that are no configuration, as given."""
        return {name: value for name, value in self.given.items() if self._fields[name].by_name}

    @computed_once
    def cells(self) -> list[Cell]:
        """Every scalar."""
        return [cell for cells in self._cells.values() for cell in cells]

    @computed_once
    def _fixed(self) -> dict[str, float]:
        return {cell.symbol: cell.value for cell in self.cells if not cell.source.is_schedule}

    @computed_once
    def scheduled(self) -> list[Cell]:
        """The scalars that are schedules."""
        return [cell for cell in self.cells if cell.source.is_schedule]

    def current(self, name: str) -> Any:
        """The value last resolved, or the configuration; of what is mapped, by glob."""
        return self._read(name, lambda cell: cell.value)

    def coming(self, name: str, step: int) -> Any:
        """The same for `step`, resolved before; None for a hyperparameter that there is not."""
        return self._read(name, lambda cell: cell.upcoming(step)) if name in self.given else None

    def _read(self, name: str, value_of: Callable[[Cell], float]) -> Any:
        if name in self._choices:
            return {glob: _read(given, cells, value_of) for glob, (given, cells) in self._choices[name].items()}
        return _read(self.given[name], self._cells[name], value_of)

    def upcoming(self, step: int) -> dict[str, float]:
        """The value of every scalar of a group for `step`, by the name of its symbol."""
        return self._fixed | {cell.symbol: cell.upcoming(step) for cell in self.scheduled}

    def resolve(self, step: int) -> None:
        """Call the schedules for `step`, each at most once; their values stay pending."""
        for cell in self.scheduled:
            cell.resolve(step)

    def publish(self) -> None:
        """Make the pending values current."""
        for cell in self.scheduled:
            cell.publish()

    def check_rounded(self, step: int, dtype: str) -> None:
        """Repeat the checks on the values as the compute dtype holds them; on fixed values once."""
        for cell in self.scheduled if dtype in self._rounded else self.cells:
            cell.check_rounded(step, dtype)
        self._rounded.add(dtype)

    # Tracing

    def arguments(self, trace: Trace) -> dict[str, Any]:
        """What a rule receives while it is traced for a group."""
        return {name: self._fields[name].argument(trace, value) for name, value in self.given.items()}

    @computed_once
    def static(self) -> tuple[object, ...]:
        """What tracing depends on: configuration, which scalars are absent or removed, and how names are grouped."""
        return tuple(
            tuple((glob, self._static(name, choice)) for glob, choice in self._choices[name].items())
            if name in self._choices
            else self._static(name, Choice(value, self._cells[name]))
            for name, value in self.given.items()
        )

    def _static(self, name: str, choice: Choice) -> object:
        value, cells = choice
        if not cells:
            return cast("type[object]", type(value)), value  # 1, 1.0 and True are equal, but not the same configuration
        return bool(self._fields[name].removable) and not callable(value) and value == 0

    @property
    def removable(self) -> list[str]:
        """See `Field.removable`."""
        return [symbol for field in self._fields.values() for symbol in field.removable]


def _read(given: Any, cells: list[Cell], value_of: Callable[[Cell], float]) -> Any:
    """The value of one scalar, of a pair, or the configuration that was given."""
    if len(cells) == 1:
        return value_of(cells[0])
    return tuple(map(value_of, cells)) if cells else given


def _is_by_name(field: Field, value: object) -> bool:
    """Whether the value is a mapping from glob to value; hashable mappings may be configuration."""
    return isinstance(value, Mapping if field.by_name else dict) and not callable(cast("object", value))


def _choice(field: Field, label: str, value: object) -> Choice:
    cells = field.cells(label, value)
    if isinstance(field, Pair):
        return Choice(tuple(cell.source.value for cell in cells), cells)
    return Choice(cells[0].source.value if cells else field.configuration(label, value), cells)


def _choices(field: Field, label: str, mapping: Mapping[object, object]) -> dict[str, Choice]:
    """The choices of a mapping from glob to value."""
    if not field.by_name:
        raise ArgumentTypeError(
            f"{label} is configuration, which is the same for all parameters, got the mapping {mapping!r}; "
            "parameters that differ in it belong to different optimizers: see MultiOptimizer"
        )
    if not mapping:
        raise ArgumentTypeError(f"{label} is an empty mapping, which gives no parameter a number; write {{'*': …}}")
    choices: dict[str, Choice] = {}
    known: dict[tuple[object, ...], Cell] = {}
    for glob, value in mapping.items():
        if not isinstance(glob, str):
            raise ArgumentTypeError(f"{label} maps names of parameters, globs such as '*.bias', got the key {glob!r}")
        given, cells = _choice(field, f"{label}[{glob!r}]", value)
        # One schedule under several globs is one scalar: it is called for all of them.
        shared = [known.setdefault((c.symbol, *_identity(c)), c) if c.source.is_schedule else c for c in cells]
        choices[glob] = Choice(given, shared)
    return choices


def _identity(cell: Cell) -> tuple[int, ...]:
    """What tells schedules apart; a method is another object whenever it is asked for."""
    schedule = cell.source.value
    if isinstance(schedule, MethodType):
        return id(schedule.__self__), id(schedule.__func__)
    return (id(schedule),)
