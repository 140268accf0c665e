"""The small values of a program, between its sweeps: statistics of tensors, rows and columns."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradstep.program.blocks import exact_sum
from gradstep.program.graph import Kind, Symbol

Array = np.ndarray[Any, Any]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(np, name)
    for name in (
        "add", "subtract", "multiply", "divide", "negative", "sqrt", "abs", "sign", "exp", "log",
        "minimum", "maximum", "where", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal",
    )
}  # fmt: skip


class SmallValues:
    """Evaluates symbols below full size in the compute dtype, each once.

    `known` gives one tensor's arrays, statistics and scalars by symbol index.
    """

    def __init__(self, dtype: str, known: Mapping[int, Any]) -> None:
        self._type = np.dtype(dtype).type
        self._values = dict(known)

    def __getitem__(self, symbol: Symbol) -> Any:
        if symbol.index not in self._values:
            self._values[symbol.index] = self._compute(symbol)
        return self._values[symbol.index]

    def learn(self, symbol: Symbol, value: Any) -> None:
        """Add a statistic that a sweep has made known."""
        self._values[symbol.index] = value

    def _compute(self, symbol: Symbol) -> Any:
        if symbol.op == "constant":
            return symbol.attribute if symbol.boolean else self._type(symbol.attribute)
        args = [self[arg] for arg in symbol.args]
        if symbol.op == "mean":
            return average(args[0].sum(axis=symbol.attribute, dtype=np.float64, keepdims=True),
                           args[0].shape[symbol.attribute], self._type)  # fmt: skip
        if symbol.op == "where":
            args[0] = np.asarray(args[0]) != 0
        return FUNCTIONS[symbol.op](*args)


def average(sums: Array, length: int, number_type: Any) -> Array:
    """Float64 sums divided by the length and rounded; the mean of nothing is 0."""
    return (sums / max(length, 1)).astype(number_type)


def whole_statistic(op: str, blocks: Array, size: int) -> float:
    """A statistic of a tensor from its block sums, in float64."""
    total = exact_sum(blocks.tolist())
    if op == "norm":
        return math.sqrt(total)
    return total / max(size, 1) if op == "mean" else math.sqrt(total / max(size, 1))


def matrix_statistic(symbol: Symbol, sums: Array, height: int, width: int, number_type: Any) -> Array:
    """Row or column means from the sums that a kernel left: (stack, rows) or (stack, blocks, columns)."""
    if symbol.kind is Kind.ROW:
        return average(sums[:, :, None], width, number_type)
    return average(sums.sum(axis=1, keepdims=True), height, number_type)
