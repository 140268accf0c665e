"""The small values of a program, between its sweeps: statistics of tensors, rows and columns."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradstep.program.blocks import exact_sum
from gradstep.program.formats import NARROW, Format
from gradstep.program.graph import Kind, Symbol
from gradstep.program.rounding import noise, round_narrow

Array = np.ndarray[Any, Any]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(np, name)
    for name in (
        "add", "subtract", "multiply", "divide", "negative", "sqrt", "abs", "sign", "exp", "log",
        "minimum", "maximum", "where", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal",
    )
}  # fmt: skip


class NumPyWords:
    """See `WordOperations`."""

    def call(self, name: str, *args: Any) -> Any:
        """See `WordOperations.call`."""
        return FUNCTIONS[name](*args)

    def cast(self, x: Any, dtype: str) -> Any:
        """See `WordOperations.cast`."""
        return x.astype(dtype)

    def bits(self, x: Any) -> Any:
        """See `WordOperations.bits`."""
        return x.view(np.uint32)

    def floats(self, x: Any) -> Any:
        """See `WordOperations.floats`."""
        return x.view(np.float32)

    def word(self, value: int) -> Any:
        """See `WordOperations.word`."""
        return np.uint32(value)

    def real(self, value: float) -> Any:
        """See `WordOperations.real`."""
        return np.float32(value)

    def count(self, length: int) -> Any:
        """See `WordOperations.count`."""
        return np.arange(length, dtype=np.uint32)

    def pad(self, x: Any, extra: int) -> Any:
        """See `WordOperations.pad`."""
        return np.pad(x, ((0, 0), (0, extra)))


NUMPY_WORDS = NumPyWords()


def widened(stored: Array, dtype: str, compute: str) -> Array:
    """A slot of rows or columns in the compute dtype; 16-bit floats come as their bits."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "float16":
        stored = stored.view(np.float16)
    return stored.astype(compute, copy=False)


def narrowed(value: Array, kept: Format, key: tuple[int, int, int] | None) -> Array:
    """The inverse, rounded to nearest or, with what the noise begins with as `key`, at random."""
    if kept.dtype not in NARROW:
        return value
    with np.errstate(all="ignore"):
        words = None if key is None else noise(NUMPY_WORDS, [np.uint32(word) for word in key], value.shape)
        exact: Array = round_narrow(NUMPY_WORDS, kept, value.astype(np.float32), words)
        if kept.dtype == "float16":
            return exact.astype(np.float16).view(np.uint16)
    bits = exact.view(np.uint32)
    rounded = (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(exact), bits >> 16 | 0x40, rounded).astype(np.uint16)


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
