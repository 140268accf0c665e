"""Where the gradients of a step come from: as they are, scaled, or added to the sums of a round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import Form, Library, owner
from gradstep.arrays.memory import Memory
from gradstep.arrays.stored import Stored
from gradstep.errors import ArgumentTypeError, DtypeError, ShapeError
from gradstep.program.formats import compute_dtype
from gradstep.program.graph import Reading

REMEDY = "opt.discard() drops the sums of this round"


def joined(values: np.ndarray[Any, Any], micro: float, total: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    """A micro-batch weighed and, if there is a sum, added to it, as kernels do; in the dtype of the computation."""
    with np.errstate(all="ignore"):
        weighed = values * values.dtype.type(micro)
        return weighed if total is None else total + weighed


class Intake:
    """How a step comes by its gradients.

    Args:
        scaled: whether anything multiplies them.
        sums: for the last micro-batch of a round, the sums of those before it, by parameter name.
        lacking: the parameters whose sum stands in for a gradient that has not come.
        done: called within the commit, also where the step is skipped.
    """

    def __init__(
        self,
        *,
        scaled: bool,
        sums: Mapping[str, Any] | None = None,
        lacking: frozenset[str] = frozenset(),
        done: Callable[[], object] = lambda: None,
    ) -> None:
        self.scaled, self._sums, self._lacking, self.done = scaled, sums, lacking, done

    def reading(self, name: str) -> Reading:
        """How the program of this parameter reads its gradient."""
        if self._sums is None:
            return Reading.SCALED if self.scaled else Reading.PLAIN
        if name in self._lacking:
            return Reading.SCALED
        return Reading.SUMMED if name in self._sums else Reading.WEIGHED

    def readings(self, names: Sequence[str]) -> list[Reading]:
        """All of them where they differ, which is within a round."""
        return [] if self._sums is None else [self.reading(name) for name in names]

    def total(self, name: str) -> Any:
        """The sum that the gradient is added to; None where it is added to nothing."""
        return self._sums[name] if self._sums and self.reading(name) is Reading.SUMMED else None

    def totals(self, names: Sequence[str]) -> list[Any]:
        """The sums that there are, in this order of parameters."""
        return [total for name in names if (total := self.total(name)) is not None] if self._sums else []

    def check(self, library: Library, params: Mapping[str, Any]) -> None:
        """Raise for sums that do not fit their parameter any more."""
        for name in self._sums or ():
            if name in params and name not in self._lacking:
                check_sum(library, name, self.total(name), params[name])


PLAIN, SCALED = Intake(scaled=False), Intake(scaled=True)


def check_sum(library: Library, name: str, total: Any, parameter: Any) -> None:
    """Raise if a sum was made for another parameter than this."""
    what = f"sums[{name!r}]"
    if owner(total) is not library:
        raise ArgumentTypeError(
            f"{what} is a {type(total).__module__}.{type(total).__name__}, but the parameter now belongs to "
            f"{library.name}; {REMEDY}"
        )
    _check_form(what, name, library.describe(total, what), library.describe(parameter, f"params[{name!r}]"))


def check_stored_sum(library: Library, name: str, total: Stored, parameter: Any) -> None:
    """The same for a sum that has been loaded and belongs to no library yet."""
    _check_form(f"sums[{name!r}]", name, total, library.describe(parameter, f"params[{name!r}]"))


def _check_form(what: str, name: str, found: Form | Memory | Stored, wanted: Form | Memory) -> None:
    if found.shape != wanted.shape:
        raise ShapeError(f"{what} has shape {found.shape}, but params[{name!r}] now has {wanted.shape}; {REMEDY}")
    if found.dtype != compute_dtype(wanted.dtype):
        raise DtypeError(f"{what} has dtype {found.dtype}, but params[{name!r}] now has {wanted.dtype}; {REMEDY}")
