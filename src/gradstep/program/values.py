"""LLVM IR for the operations of a sweep on one element, or on a vector of consecutive elements."""

import math
import struct
from collections.abc import Iterator, Mapping
from itertools import count

import numpy as np

from gradstep.errors import NonFiniteScalarError
from gradstep.program.formats import BYTES
from gradstep.program.graph import Symbol

TYPES = {"float32": "float", "float64": "double", "bfloat16": "i16", "float16": "i16", "uint8": "i8"}
ARITHMETIC = {"add": "fadd", "subtract": "fsub", "multiply": "fmul", "divide": "fdiv"}
PREDICATES = {
    "less": "olt", "less_equal": "ole", "greater": "ogt", "greater_equal": "oge", "equal": "oeq", "not_equal": "une",
}  # fmt: skip
INTRINSICS = {"sqrt": "llvm.sqrt", "abs": "llvm.fabs", "exp": "llvm.exp", "log": "llvm.log"}


class Code:
    """Lines of a function under construction, fresh names, and the intrinsics that it calls."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self._numbers: Iterator[int] = count()

    def let(self, expression: str) -> str:
        """Append `%fresh = expression` and return the name."""
        name = f"%x{next(self._numbers)}"
        self.do(f"{name} = {expression}")
        return name

    def do(self, line: str) -> None:
        """Append an instruction."""
        self.lines.append(f"  {line}")

    def label(self, name: str) -> None:
        """Begin a basic block."""
        self.lines.append(f"{name}:")

    def call(self, function: str, signature: str, *args: str) -> str:
        """Call an intrinsic with arguments of one type."""
        self.declarations.add(f"declare {signature} @{function}({', '.join(signature for _ in args)})")
        return self.let(f"call {signature} @{function}({', '.join(f'{signature} {arg}' for arg in args)})")


class Values:
    """Emits the values of symbols at one position; `lanes` consecutive elements at a time."""

    def __init__(self, code: Code, dtype: str, lanes: int, known: Mapping[int, str]) -> None:
        self._code, self._dtype, self._lanes = code, dtype, lanes
        self._names = dict(known)
        self._given = frozenset(known)

    @property
    def type(self) -> str:
        """The IR type of a value."""
        return vector(TYPES[self._dtype], self._lanes)

    def __getitem__(self, symbol: Symbol) -> str:
        """The name of the symbol's value; its arguments have been emitted or are known."""
        if symbol.index not in self._names:
            self._names[symbol.index] = self._emit(symbol)
        return self._names[symbol.index]

    def number(self, symbol: Symbol) -> str:
        """The same, with a condition as 0 or 1."""
        value = self[symbol]
        return self._as_number(value) if self._is_bits(symbol) else value

    def _emit(self, symbol: Symbol) -> str:
        if symbol.op == "constant":
            return literal(float(symbol.attribute), self._dtype, self._lanes)
        args = [self[arg] for arg in symbol.args]
        if symbol.op in ARITHMETIC:
            return self._code.let(f"{ARITHMETIC[symbol.op]} {self.type} {args[0]}, {args[1]}")
        if symbol.op in PREDICATES:
            return self._compare(PREDICATES[symbol.op], *args)
        if symbol.op == "negative":
            return self._code.let(f"fneg {self.type} {args[0]}")
        if symbol.op in INTRINSICS:
            suffix = f"v{self._lanes}" if self._lanes > 1 else ""
            return self._code.call(f"{INTRINSICS[symbol.op]}.{suffix}f{8 * BYTES[self._dtype]}", self.type, *args)
        if symbol.op in ("minimum", "maximum"):
            first = self._compare("olt" if symbol.op == "minimum" else "ogt", *args)
            return self._nan_or(args[0], self._select(first, args[0], args[1]))
        if symbol.op == "sign":
            zero = "zeroinitializer" if self._lanes > 1 else "0.0"
            above, below = (self._as_number(self._compare(way, args[0], zero)) for way in ("ogt", "olt"))
            return self._nan_or(args[0], self._code.let(f"fsub {self.type} {above}, {below}"))
        if symbol.op == "where":
            return self._select(self._condition(symbol.args[0], args[0]), args[1], args[2])
        raise AssertionError(f"no instruction for {symbol.op}")

    def _compare(self, predicate: str, left: str, right: str) -> str:
        return self._code.let(f"fcmp {predicate} {self.type} {left}, {right}")

    def _select(self, condition: str, yes: str, no: str) -> str:
        bits = vector("i1", self._lanes)
        return self._code.let(f"select {bits} {condition}, {self.type} {yes}, {self.type} {no}")

    def _nan_or(self, value: str, otherwise: str) -> str:
        return self._select(self._compare("uno", value, value), value, otherwise)

    def _as_number(self, condition: str) -> str:
        return self._code.let(f"uitofp {vector('i1', self._lanes)} {condition} to {self.type}")

    def _condition(self, symbol: Symbol, value: str) -> str:
        """A condition as bits."""
        if self._is_bits(symbol):
            return value
        return self._compare("une", value, "zeroinitializer" if self._lanes > 1 else "0.0")

    def _is_bits(self, symbol: Symbol) -> bool:
        """Whether a value is a condition that was computed here; one from elsewhere arrives as 0 or 1."""
        return symbol.op in PREDICATES and symbol.index not in self._given


def vector(element: str, lanes: int) -> str:
    """The type of `lanes` elements."""
    return f"<{lanes} x {element}>" if lanes > 1 else element


def splat(code: Code, element: str, value: str, lanes: int) -> str:
    """A vector with `value` in every lane."""
    if lanes == 1:
        return value
    kind = vector(element, lanes)
    one = code.let(f"insertelement {kind} poison, {element} {value}, i64 0")
    return code.let(f"shufflevector {kind} {one}, {kind} poison, <{lanes} x i32> zeroinitializer")


def literal(value: float, dtype: str, lanes: int) -> str:
    """A number as LLVM writes it: the bits of the double that equals it, after rounding to the dtype."""
    with np.errstate(over="ignore"):
        rounded = float(np.dtype(dtype).type(value))
    if math.isinf(rounded) and not math.isinf(value):
        raise NonFiniteScalarError(f"the number {value!r} in the rule is not finite in {dtype}")
    bits = f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
    return bits if lanes == 1 else f"<{', '.join([f'{TYPES[dtype]} {bits}'] * lanes)}>"
