"""All hyperparameters of one optimizer, as given and as resolved for its steps."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from gradstep.hyperparameters import Cell, Field, Pair
from gradstep.program.graph import Trace


class Settings:
    """All hyperparameters of one optimizer: as given, and as resolved."""

    def __init__(self, owner: str, fields: Mapping[str, Field]) -> None:
        self._owner, self._fields = owner, fields
        self.given: dict[str, Any] = {}
        self._cells: dict[str, list[Cell]] = {}
        self._rounded: set[str] = set()  # the dtypes in which the fixed values have been checked

    def _adopt(self, name: str, value: object) -> None:
        field = self._fields[name]
        cells = field.cells(self._owner, value)
        self._cells[name] = cells
        if isinstance(field, Pair):
            self.given[name] = tuple(cell.source.value for cell in cells)
        else:
            self.given[name] = cells[0].source.value if cells else field.configuration(self._owner, value)

    def replaced(self, values: Mapping[str, object], step: int) -> "Settings":
        """A copy with other values for some hyperparameters, resolved now; the rest is shared."""
        new = Settings(self._owner, self._fields)
        new.given, new._cells = dict(self.given), dict(self._cells)
        for name, value in values.items():
            new._adopt(name, value)
        for name in values:
            for cell in new._cells[name]:
                cell.resolve(step)
                cell.publish()
        return new

    @cached_property
    def cells(self) -> list[Cell]:
        """Every scalar."""
        return [cell for cells in self._cells.values() for cell in cells]

    @cached_property
    def _fixed(self) -> dict[str, float]:
        return {cell.symbol: cell.value for cell in self.cells if not cell.source.is_schedule}

    @cached_property
    def scheduled(self) -> list[Cell]:
        """The scalars that are schedules."""
        return [cell for cell in self.cells if cell.source.is_schedule]

    def current(self, name: str) -> Any:
        """The value last resolved, or the configuration."""
        cells = self._cells[name]
        if not cells:
            return self.given[name]
        return tuple(cell.value for cell in cells) if isinstance(self._fields[name], Pair) else cells[0].value

    def upcoming(self, step: int) -> dict[str, float]:
        """The value of every scalar for `step`, by the name of its symbol."""
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

    def arguments(self, trace: Trace) -> dict[str, Any]:
        """What a rule receives while it is traced."""
        return {name: self._fields[name].argument(trace, value) for name, value in self.given.items()}

    @property
    def static(self) -> tuple[object, ...]:
        """What tracing depends on: configuration, and which scalars are absent or removed."""
        return tuple(self._static(name, value) for name, value in self.given.items())

    def _static(self, name: str, value: object) -> object:
        if not self._cells[name]:
            return type(value), value  # 1, 1.0 and True are equal, but not the same configuration
        return bool(self._fields[name].removable) and not callable(value) and value == 0

    @property
    def removable(self) -> list[str]:
        """See `Field.removable`."""
        return [symbol for field in self._fields.values() for symbol in field.removable]
