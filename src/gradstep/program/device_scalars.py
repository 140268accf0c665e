"""Scalar expressions where the step or a hyperparameter is itself an array, inside a compiled training step."""

import math
from collections.abc import Mapping
from typing import Any

from gradstep.program.graph import Symbol
from gradstep.program.operators import OPERATORS
from gradstep.program.program import Program
from gradstep.program.scalars import FUNCTIONS


class DeviceScalars:
    """Values of scalar symbols: plain numbers stay in float64 for as long as no array comes in.

    Args:
        functions: the library's module with `sqrt`, `exp`, `log`, `expm1`, `where`, …: `jax.numpy` or `mlx.core`.
        known: the hyperparameters and `t`, numbers or arrays without dimensions.
        shape: of the parameter.
    """

    def __init__(self, functions: Any, known: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self._functions, self._known, self._shape = functions, known, shape
        self._values: dict[int, Any] = {}

    def of(self, program: Program) -> dict[int, Any]:
        """The scalars that the program's array operations take, by symbol index."""
        return {symbol.index: self[symbol] for symbol in program.scalars.outputs}

    def less_one(self, symbol: Symbol) -> Any:
        """The scalar minus 1; of `1 - x` it is `-x`, without rounding."""
        return -self[symbol.args[1]] if _from_one(symbol) else self[symbol] - 1

    def __getitem__(self, symbol: Symbol) -> Any:
        if symbol.index not in self._values:
            self._values[symbol.index] = self._compute(symbol)
        return self._values[symbol.index]

    def _compute(self, symbol: Symbol) -> Any:
        if symbol.op == "constant":
            return symbol.attribute
        if symbol.op == "hyperparameter":
            return self._known[symbol.attribute]
        if symbol.op == "dimension":
            axis: int = symbol.attribute
            return max(self._shape[axis], 1)
        inner = _twice_from_one(symbol)
        if inner is not None:
            return self[inner]
        args = [self[arg] for arg in symbol.args]
        plain = all(isinstance(arg, (bool, int, float)) for arg in args)
        if symbol.op == "subtract" and not plain and symbol.args[1].op == "power" and args[0] == 1:
            base, exponent = (self[arg] for arg in symbol.args[1].args)
            return -self._functions.expm1(exponent * self._log(base))  # 1 - 0.999**t loses its digits in float32
        if symbol.op in OPERATORS:
            return OPERATORS[symbol.op](*args)
        return FUNCTIONS[symbol.op](*args) if plain else getattr(self._functions, symbol.op)(*args)

    def _log(self, x: Any) -> Any:
        if isinstance(x, (int, float)):
            return math.log(x) if x > 0 else -math.inf
        return self._functions.log(x)


def _twice_from_one(symbol: Symbol) -> Symbol | None:
    """The `x` of `1 - (1 - x)`, which is computed as such: the difference would round it."""
    if not _from_one(symbol) or not _from_one(symbol.args[1]):
        return None
    return symbol.args[1].args[1]


def _from_one(symbol: Symbol) -> bool:
    return symbol.op == "subtract" and symbol.args[0].op == "constant" and symbol.args[0].attribute == 1
