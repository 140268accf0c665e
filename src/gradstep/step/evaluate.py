"""A program run on the operations of an array library, one after the other."""

import math
from collections.abc import Mapping
from typing import Any

from gradstep.arrays.library import FunctionalLibrary
from gradstep.program.graph import REDUCTIONS, Kind, Symbol
from gradstep.program.operators import OPERATORS
from gradstep.program.program import Program

LARGE = 1 << 12  # elements from which on it pays to keep small values out of the loops over them


class Evaluation:
    """The values of a program's symbols for one parameter, each computed once.

    Args:
        library: whose arrays they are.
        program: what to compute.
        dtype: the compute dtype.
        arrays: `w`, `g` and the slots, as they are stored.
        scalars: the value of each scalar expression, by symbol index.
    """

    def __init__(
        self,
        library: FunctionalLibrary,
        program: Program,
        dtype: str,
        arrays: Mapping[str, Any],
        scalars: Mapping[int, Any],
    ) -> None:
        self._library, self._program, self._dtype = library, program, dtype
        self._arrays, self._values = arrays, dict(scalars)
        self._apart = library.apart if math.prod(arrays["w"].shape) >= LARGE else _unchanged

    def outputs(self) -> dict[str, Any]:
        """The new value of `w` and of each slot, in the shapes in which they are stored."""
        return {
            place: self[symbol].reshape(self._arrays[place].shape) for place, symbol in self._program.outputs.items()
        }

    def __getitem__(self, symbol: Symbol) -> Any:
        if symbol.index not in self._values:
            value = self._compute(symbol)
            self._values[symbol.index] = self._apart(value) if _is_apart(symbol) else value
        return self._values[symbol.index]

    def _compute(self, symbol: Symbol) -> Any:
        if symbol.op == "array":
            return _spread(self._library.cast(self._arrays[symbol.attribute], self._dtype), symbol.kind)
        if symbol.op == "constant":
            return symbol.attribute if symbol.boolean else self._library.number(symbol.attribute, self._dtype)
        args = [self[arg] for arg in symbol.args]
        if _is_spread(symbol):
            args = [self._apart(arg) for arg in args]
        if symbol.op in OPERATORS:
            return OPERATORS[symbol.op](*args)
        if symbol.op == "mean":
            return self._library.mean(args[0], symbol.attribute)
        if symbol.op in REDUCTIONS:
            return getattr(self._library, symbol.op)(args[0])
        if symbol.op == "orthogonalize":
            matrix = args[0].reshape(args[0].shape[0], -1) if 0 not in args[0].shape else args[0]
            return self._library.orthogonalize(matrix, symbol.attribute).reshape(args[0].shape)
        if symbol.op == "where" and symbol.args[0].kind is Kind.HOST:
            args[0] = args[0] != 0  # a condition on scalars arrives as 0 or 1
        return self._library.call(symbol.op, *args)


def _unchanged(value: Any) -> Any:
    return value


def _is_apart(symbol: Symbol) -> bool:
    """Whether a value is computed once and not within the loops over the elements that it meets."""
    small = Kind.WHOLE <= symbol.kind < Kind.FULL
    return _is_spread(symbol) or (small and symbol.op not in ("array", "constant"))


def _is_spread(symbol: Symbol) -> bool:
    """Whether values of rows or columns meet others than of their own kind here."""
    return symbol.kind is Kind.FULL and any(Kind.LEAD <= arg.kind < Kind.FULL for arg in symbol.args)


def _spread(array: Any, kind: Kind) -> Any:
    """Slots of rows and columns with the axis along which they extend."""
    if kind is Kind.ROW:
        return array[..., None]
    return array[..., None, :] if kind is Kind.COLUMN else array
