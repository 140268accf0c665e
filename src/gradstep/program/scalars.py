"""Scalar expressions: hoisted out of the rule and computed once per step on the host, in float64."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradstep.errors import NonFiniteScalarError
from gradstep.program.graph import Symbol, reachable


def _sign(x: float) -> float:
    return x if x != x else float((x > 0) - (x < 0))


def _minimum(x: float, y: float) -> float:
    return x if x != x or x < y else y


def _maximum(x: float, y: float) -> float:
    return x if x != x or x > y else y


def _where(condition: bool, x: float, y: float) -> float:
    return x if condition else y


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "power": operator.pow,
    "negative": operator.neg,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "sqrt": math.sqrt,
    "abs": operator.abs,
    "sign": _sign,
    "exp": math.exp,
    "log": math.log,
    "minimum": _minimum,
    "maximum": _maximum,
    "where": _where,
}

LARGEST = {"float32": 3.4028235677973366e38, "float64": math.inf}  # from here on rounding gives infinity


class ScalarTape:
    """The scalar expressions of a program in the order of their evaluation."""

    def __init__(self, name: str, outputs: Sequence[Symbol], spell: Callable[[Symbol], str]) -> None:
        self._name, self._spell = name, spell
        self.outputs = list(outputs)
        symbols = reachable(outputs)
        places = {symbol.index: place for place, symbol in enumerate(symbols)}
        self._steps = [
            (symbol, FUNCTIONS.get(symbol.op), tuple(places[arg.index] for arg in symbol.args)) for symbol in symbols
        ]
        self._places = [places[output.index] for output in outputs]
        self.hyperparameters = [symbol.attribute for symbol in symbols if symbol.op == "hyperparameter"]
        self.dimensions = [symbol.attribute for symbol in symbols if symbol.op == "dimension"]

    def __len__(self) -> int:
        return len(self.outputs)

    def evaluate(self, known: Mapping[str, float], shape: Mapping[int, int], dtype: str) -> list[float]:
        """The value of each output; `NonFiniteScalarError` for one that is not finite in the compute dtype.

        `clip_scale` alone may be NaN: a non-finite norm that is allowed spreads.
        """
        values: list[Any] = []
        for symbol, function, args in self._steps:
            if function is not None:
                try:
                    values.append(function(*[values[arg] for arg in args]))
                except (ArithmeticError, ValueError) as error:
                    raise self._undefined(symbol, f"undefined ({error})", known) from None
            elif symbol.op == "hyperparameter":
                values.append(known[symbol.attribute])
            elif symbol.op == "dimension":
                values.append(shape[symbol.attribute])
            else:
                values.append(symbol.attribute)
        results = [values[place] for place in self._places]
        largest = LARGEST[dtype]
        for symbol, value in zip(self.outputs, results, strict=True):
            if isinstance(value, complex):
                raise self._undefined(symbol, f"complex ({value})", known)
            finite = -largest < value < largest
            if not finite and symbol.attribute != "clip_scale":
                raise self._undefined(symbol, f"{value}, which is not finite in {dtype}", known)
        return [float(value) for value in results]

    def _undefined(self, symbol: Symbol, what: str, known: Mapping[str, float]) -> NonFiniteScalarError:
        used = [inner.attribute for inner in reachable([symbol]) if inner.op == "hyperparameter"]
        values = ", ".join(f"{name} = {known[name]!r}" for name in used)
        return NonFiniteScalarError(
            f"{self._name}: the scalar {self._spell(symbol)} is {what}" + (f", with {values}" if values else "")
        )
