"""MLX arrays. This module is imported only where the caller has imported mlx."""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, cast

import numpy as np

from gradstep.arrays.library import Form, Lender
from gradstep.errors import DtypeError
from gradstep.program.formats import BYTES, EXPECTED, NARROW
from gradstep.program.newton_schulz import Iteration, orthogonalized

mx: Any = importlib.import_module("mlx.core")

SHORT = 1 << 16  # elements from which on rows are reduced first
FEW, MANY = 16, 1 << 13  # rows of an array that are reduced as they are


class Mlx:
    """Arrays of MLX: a step runs under `mx.compile`, as lazily as everything else there."""

    name = "MLX"
    in_place: Literal[False] = False
    adapter = "mlx"

    def __init__(self) -> None:
        self._looks = 0
        self._look = mx.compile(self._count_look)

    def _count_look(self, *_: Any) -> Any:
        self._looks += 1
        return mx.array(0)

    @property
    def lender(self) -> Lender:
        """See `FunctionalLibrary.lender`."""
        return _lender()

    @property
    def choose(self) -> None:
        """See `FunctionalLibrary.choose`."""

    def call(self, name: str, *args: Any) -> Any:
        """See `Operations.call`."""
        result = getattr(mx, name)(*args)
        return mx.where(mx.isnan(args[0]), args[0], result) if name == "sign" else result  # mlx: sign(NaN) is 0

    def mean(self, x: Any, axis: int | None) -> Any:
        """See `Operations.mean`."""
        if axis is None:
            return self.total(x) / max(x.size, 1)
        if not x.size:
            return mx.zeros(_reduced(x.shape, axis), x.dtype)
        return mx.sum(x, axis=axis, keepdims=True) / x.shape[axis]

    def rms(self, x: Any) -> Any:
        """See `Operations.rms`."""
        return mx.sqrt(self.total(x * x) / max(x.size, 1))

    def norm(self, x: Any) -> Any:
        """See `Operations.norm`."""
        return mx.sqrt(self.total(x * x))

    def orthogonalize(self, x: Any, iteration: Iteration) -> Any:
        """See `Operations.orthogonalize`."""
        return orthogonalized(self, x, iteration)

    def value_and_grad(self, function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
        """See `Operations.value_and_grad`."""
        return cast("Callable[..., tuple[Any, Any]]", mx.value_and_grad(function))

    def describe(self, array: Any, what: str) -> Form:
        """See `FunctionalLibrary.describe`."""
        dtype = str(array.dtype).removeprefix("mlx.core.")
        if dtype not in BYTES:
            raise DtypeError(f"{what} has dtype {dtype}; {EXPECTED}: .astype(mx.float32) converts it")
        return Form(tuple(array.shape), dtype, None)

    def place_of(self, array: Any) -> object:
        """See `FunctionalLibrary.place_of`."""
        return None

    def is_tracing(self, arrays: list[Any]) -> bool:
        """See `FunctionalLibrary.is_tracing`.

        A compiled function runs its Python code when it sees new forms, or arrays that stand for others: when it does
        so twice in a row, they do.
        """
        before = self._looks
        self._look(*arrays)
        if self._looks == before:
            return False
        before = self._looks
        self._look(*arrays)
        return self._looks != before

    def marks(self, arrays: list[Any]) -> list[Any]:
        """See `FunctionalLibrary.marks`."""
        kinds: list[Any] = [(type(a), getattr(a, "shape", None), getattr(a, "dtype", None)) for a in arrays]
        return [*kinds, {mx.array} >= set(map(type, arrays)) and self.is_tracing(arrays)]

    def devices(self, form: Form) -> object:
        """See `FunctionalLibrary.devices`. Memory is shared between devices."""
        return None

    def zeros(self, form: Form) -> Any:
        """See `FunctionalLibrary.zeros`."""
        return mx.zeros(form.shape, _dtype(form.dtype))

    def table(self, values: np.ndarray[Any, Any], dtype: str) -> Any:
        """See `FunctionalLibrary.table`."""
        with np.errstate(all="ignore"):
            return mx.array(values.astype(dtype), _dtype(dtype))

    def number(self, value: float, dtype: str) -> Any:
        """See `FunctionalLibrary.number`."""
        return mx.array(value, _dtype(dtype))

    def cast(self, x: Any, dtype: str) -> Any:
        """See `FunctionalLibrary.cast`."""
        return x.astype(_dtype(dtype))

    def words(self, values: np.ndarray[Any, Any]) -> Any:
        """See `FunctionalLibrary.words`."""
        return mx.array(values)

    def bits(self, x: Any) -> Any:
        """See `FunctionalLibrary.bits`."""
        return x.view(mx.uint32)

    def floats(self, x: Any) -> Any:
        """See `FunctionalLibrary.floats`."""
        return x.view(mx.float32)

    def word(self, value: int) -> Any:
        """See `FunctionalLibrary.word`."""
        return mx.array(value, mx.uint32)

    def real(self, value: float) -> Any:
        """See `FunctionalLibrary.real`."""
        return mx.array(value, mx.float32)

    def count(self, length: int) -> Any:
        """See `FunctionalLibrary.count`."""
        return mx.arange(length, dtype=mx.uint32)

    def pad(self, x: Any, extra: int) -> Any:
        """See `FunctionalLibrary.pad`."""
        return mx.pad(x, ((0, 0), (0, extra)))

    def apart(self, x: Any) -> Any:
        """See `FunctionalLibrary.apart`. MLX would compute it anew for every element that it meets."""
        return mx.contiguous(x)

    def largest(self, x: Any) -> Any:
        """See `FunctionalLibrary.largest`."""
        return _folded(mx.max, mx.abs(x)) if x.size else mx.zeros((), x.dtype)

    def total(self, x: Any) -> Any:
        """See `FunctionalLibrary.total`."""
        # MLX may not come back from reducing nothing
        return _folded(mx.sum, x) if x.size else mx.zeros((), x.dtype)

    def stack(self, values: list[Any]) -> Any:
        """See `FunctionalLibrary.stack`."""
        return mx.stack(values)

    def keep_place(self, x: Any, form: Form) -> Any:
        """See `FunctionalLibrary.keep_place`."""
        return x

    def compile(self, function: Callable[..., Any], donated: Sequence[int] = ()) -> Callable[..., Any]:
        """See `FunctionalLibrary.compile`. MLX reuses the memory of arrays that nobody holds by itself."""
        return cast("Callable[..., Any]", mx.compile(function))

    def read(self, x: Any) -> Any:
        """See `FunctionalLibrary.read`."""
        return np.array(x)

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """See `FunctionalLibrary.as_numpy`."""
        narrow = array.dtype in (mx.bfloat16, mx.float16)
        return np.asarray(array.view(mx.uint16) if narrow else array)

    def from_bits(self, bits: np.ndarray[Any, Any], form: Form) -> Any:
        """See `FunctionalLibrary.from_bits`."""
        if form.dtype in NARROW:
            return mx.array(bits).view(_dtype(form.dtype))
        return mx.array(bits, mx.float64) if form.dtype == "float64" else mx.array(bits)


@cache
def _lender() -> Lender:
    from gradstep.arrays.mlx_lending import MlxLender

    return MlxLender()


def _folded(reduce: Callable[..., Any], x: Any) -> Any:
    """All elements reduced to one, rows before the rest: three times as fast as one after the other.

    Sums of millions of elements also lose half of their digits when they are formed one after the other.
    """
    if x.size < SHORT:
        return reduce(x)
    width = x.shape[-1]
    if FEW <= x.size // width <= MANY and width >= FEW:
        return reduce(reduce(x.reshape(-1, width), axis=0))
    width = 1 << (x.size.bit_length() // 2)
    flat, whole = x.reshape(-1), x.size // width * width
    folded = reduce(reduce(flat[:whole].reshape(-1, width), axis=0))
    return reduce(mx.stack([folded, reduce(flat[whole:])])) if whole < x.size else folded


def _reduced(shape: tuple[int, ...], axis: int) -> list[int]:
    return [1 if place == axis % len(shape) else length for place, length in enumerate(shape)]


def _dtype(name: str) -> Any:
    return getattr(mx, name)


MLX = Mlx()
