"""Scalar expressions: hoisted out of the rule and computed once per step on the host, in float64."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradstep.errors import NonFiniteScalarError
from gradstep.program.formulas import spell
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
    "sqrt": math.sqrt,
    "abs": abs,
    "sign": _sign,
    "exp": math.exp,
    "log": math.log,
    "minimum": _minimum,
    "maximum": _maximum,
    "where": _where,
}

LARGEST = {"float32": 3.4028235677973366e38, "float64": math.inf}  # from here on rounding gives infinity


class ScalarExpressions:
    """The scalar expressions of a program, spelled as Python and compiled once."""

    def __init__(self, name: str, outputs: Sequence[Symbol]) -> None:
        self._name = name
        self.outputs = list(outputs)
        self.spelled = [spell(output) for output in outputs]
        symbols = reachable(outputs)
        self.hyperparameters: list[str] = [symbol.attribute for symbol in symbols if symbol.op == "hyperparameter"]
        self.dimensions: list[int] = [symbol.attribute for symbol in symbols if symbol.op == "dimension"]
        # Private names: a hyperparameter may be called like a function.
        private = {s.index: f"_{i}" for i, s in enumerate(s for s in symbols if s.op == "hyperparameter")}
        private |= {s.index: f"({float(s.attribute)!r})" for s in symbols if s.op == "constant" and not s.boolean}
        private |= {s.index: f"_shape[{s.attribute}]" for s in symbols if s.op == "dimension"}
        self._texts = [spell(output, private) for output in outputs]
        self._checked = [place for place, output in enumerate(outputs) if output.attribute != "grad_scale"]
        self._all = self._compile(f"[{', '.join(self._texts)}]")

    def __len__(self) -> int:
        return len(self.outputs)

    def evaluate(self, known: Mapping[str, float], shape: Mapping[int, int], dtype: str) -> list[float]:
        """The value of each output; `NonFiniteScalarError` for one that is not finite in the compute dtype.

        `grad_scale` alone may be NaN: a non-finite norm that is allowed spreads.
        """
        arguments = [float(known[name]) for name in self.hyperparameters]
        try:
            results = self._all(shape, *arguments)
        except (ArithmeticError, ValueError, TypeError):  # a TypeError: complex numbers have no order
            self._find_undefined(known, shape, arguments)
            raise
        largest = LARGEST[dtype]
        for place in self._checked:
            value = results[place]
            if isinstance(value, complex) or not -largest < value < largest:
                raise self._error(place, f"{value}, which is not finite in {dtype}", known)
        return results

    def _compile(self, expression: str) -> Callable[..., Any]:
        # The text comes from `spell`: operators, numbers, the names in FUNCTIONS, and private names.
        arguments = ", ".join(["_shape", *(f"_{i}" for i in range(len(self.hyperparameters)))])
        return eval(f"lambda {arguments}: {expression}", {**FUNCTIONS, "inf": math.inf, "nan": math.nan})

    def _find_undefined(self, known: Mapping[str, float], shape: Mapping[int, int], arguments: list[float]) -> None:
        for place, expression in enumerate(self._texts):
            try:
                self._compile(expression)(shape, *arguments)
            except (ArithmeticError, ValueError, TypeError) as error:
                raise self._error(place, f"undefined ({error})", known) from None

    def _error(self, place: int, what: str, known: Mapping[str, float]) -> NonFiniteScalarError:
        used = [inner.attribute for inner in reachable([self.outputs[place]]) if inner.op == "hyperparameter"]
        values = ", ".join(f"{name} = {known[name]!r}" for name in used)
        return NonFiniteScalarError(
            f"{self._name}: the scalar {self.spelled[place]} is {what}" + (f", with {values}" if values else "")
        )
