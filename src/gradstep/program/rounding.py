"""What is narrower than float32, on the operations of an array library: the definitions that kernels follow too."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gradstep.program.formats import BELOW, CUT, FIRST_SQUARE, LOW, QUANTUM, SHIFT, Format
from gradstep.program.noise import MULTIPLIERS, mix, name_key, step_shift


class WordOperations(Protocol):
    """What is asked of a library: its float32 numbers as 32-bit words."""

    def call(self, name: str, *args: Any) -> Any:
        """An elementwise function of `gradstep.ops`."""
        ...

    def cast(self, x: Any, dtype: str) -> Any:
        """The array in another dtype, of numbers or words."""
        ...

    def bits(self, x: Any) -> Any:
        """The bits of float32 numbers."""
        ...

    def floats(self, x: Any) -> Any:
        """The float32 numbers of bits."""
        ...

    def word(self, value: int) -> Any:
        """A 32-bit word without dimensions."""
        ...

    def real(self, value: float) -> Any:
        """A float32 number without dimensions."""
        ...

    def count(self, length: int) -> Any:
        """The words 0, 1, …"""
        ...

    def pad(self, x: Any, extra: int) -> Any:
        """A matrix with `extra` further columns of zeros."""
        ...


def noise(on: WordOperations, key: Sequence[Any], shape: Sequence[int]) -> Any:
    """Random words for all elements of an array: see `noise.py`.

    `key` is three words: the low and the high half of the key, and the shift of the step.
    """
    low, high, shift = key
    w = on.word
    x = on.count(math.prod(shape)) + low  # of arrays with 2**32 elements or more, the low halves of their numbers
    x = x * w(MULTIPLIERS[0])
    x = (x ^ (x >> w(16)) ^ high) * w(MULTIPLIERS[1])
    return (x + shift).reshape(shape)


def widened(stored: np.ndarray[Any, Any], dtype: str, compute: str) -> np.ndarray[Any, Any]:
    """A NumPy array in the compute dtype; 16-bit floats come as their bits."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "float16":
        stored = stored.view(np.float16)
    return stored.astype(compute, copy=False)


def narrowed(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The reverse of `widened`: rounded to nearest, with ties to even."""
    with np.errstate(all="ignore"):
        if dtype == "float16":
            return values.astype(np.float16).view(np.uint16)
        if dtype != "bfloat16":
            return values.astype(dtype, copy=False)
        bits = values.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return np.where(values == values, rounded, np.uint32(0x7FC0)).astype(np.uint16)


def round_at_random(on: WordOperations, x: Any, dtype: str, words: Any) -> Any:
    """Float32 numbers rounded up or down to numbers that `dtype` holds exactly."""
    w, bits = on.word, on.bits(x)
    if dtype == "bfloat16":
        rounded = on.floats((bits + (words >> w(16))) & w(0xFFFF0000))
        return on.call("where", x == x, rounded, x)
    magnitude = bits & w(0x7FFFFFFF)
    normal = (magnitude + (words >> w(19))) & w(0xFFFFE000)
    is_tiny = magnitude < w(113 << 23)
    small = on.floats(on.call("where", is_tiny, magnitude, w(0)))
    fixed = on.cast(small * on.real(2.0**45), "uint32")
    units = on.cast((fixed + (words >> w(11))) >> w(21), "float32")
    tiny = on.bits(units * on.real(2.0**-24))
    rounded = on.floats(on.call("where", is_tiny, tiny, normal) | (bits & w(0x80000000)))
    return on.call("where", x == x, rounded, x)


def round_narrow(on: WordOperations, kept: Format, x: Any, words: Any | None) -> Any:
    """Float32 numbers before they are cut to 16 bits: at random with `words`, and with the floor of `narrow`."""
    rounded = x if words is None else round_at_random(on, x, kept.dtype, words)
    if kept.dtype != "float16" or kept.sign != "non-negative":
        return rounded
    least = on.real(2.0**-24)
    return on.call("where", rounded < least, on.call("where", x > on.real(0.0), least, rounded), rounded)


def encode(on: WordOperations, kept: Format, values: Any, words: Any, *, by_row: bool) -> tuple[Any, Any]:
    """The codes of float32 numbers and the scales of their blocks: see `narrow.encode`."""
    w, real = on.word, on.real
    bits = _blocks(on, on.bits(values), by_row=by_row)
    size = bits & w(0x7FFFFFFF)
    scales, inverses = _scales(on, size.max(axis=1))
    ratio = on.floats(size) * inverses[:, None]
    ratio = on.call("where", ratio < real(1.0), ratio, real(1.0))
    units = ratio * real(float(kept.steps**2))
    lower = on.cast(on.call("sqrt", units), "uint32")
    number = on.cast(lower, "float32")
    words = _blocks(on, words, by_row=by_row)
    share = on.cast(words >> w(8), "float32") * real(2.0**-24)
    past, gap = units - number * number, number + number + real(1.0)
    chosen = lower + on.cast(past > share * gap, "uint32")
    if kept.sign == "non-negative":
        moved = on.bits(units) + (words >> w(32 - LOW))
        small = on.call("maximum", moved >> w(LOW), w(BELOW)) - w(BELOW)
        is_small = units < real(float((FIRST_SQUARE - SHIFT) ** 2))
        chosen = on.call("where", is_small, small, chosen + w(SHIFT))
    if kept.sign == "signed":
        chosen = on.call("where", units < real(CUT), w(0), chosen)
    else:  # a floor: only zero is zero
        chosen = on.call("maximum", chosen, on.cast(size != w(0), "uint32"))
    if kept.sign != "non-negative":
        negative = (bits & w(0x80000000)) >> w(24)
        chosen = chosen | on.call("where", chosen == w(0), w(0), negative)
    return on.cast(_unblocks(chosen, values.shape, by_row=by_row), "uint8"), scales


def decode(on: WordOperations, kept: Format, codes: Any, scales: Any, *, by_row: bool) -> Any:
    """The float32 numbers of codes."""
    w = on.word
    wide = _blocks(on, on.cast(codes, "uint32"), by_row=by_row)
    if kept.sign == "non-negative":
        number = on.cast(wide, "float32") - on.real(float(SHIFT))
        small = on.call("where", wide == w(0), w(0), (wide + w(BELOW)) << w(LOW))
        units = on.call("where", wide < w(FIRST_SQUARE), on.floats(small), number * number)
    else:
        number = on.cast(wide & w(0x7F), "float32")
        units = number * number
    values = units * on.real(unit(kept)) * scales[:, None]
    if kept.sign != "non-negative":
        values = on.floats(on.bits(values) ^ ((wide & w(0x80)) << w(24)))
    return _unblocks(values, codes.shape, by_row=by_row)


def unit(kept: Format) -> float:
    """One unit of codes in float32; the largest magnitude in units, times this, is 1 exactly."""
    return float(np.float32(1 / kept.steps**2))


def key_words(tensor: int, place: str, step: int) -> tuple[int, int, int]:
    """The three words with which the noise of an array begins; `tensor` is its parameter's key."""
    key = mix(tensor ^ name_key(place))
    return key & 0xFFFFFFFF, key >> 32, step_shift(step)


def _scales(on: WordOperations, largest: Any) -> tuple[Any, Any]:
    """See `narrow.scale_of`."""
    w = on.word
    smallest, infinite = w(1 << 23), w(0xFF << 23)
    clamped = on.floats(on.call("where", largest < smallest, smallest, largest))
    scales = on.call("where", largest == w(0), on.real(0.0), clamped)
    scales = on.call("where", largest < infinite, scales, on.floats(w(0x7FC00000)))
    inverses = on.call("where", largest < infinite, on.real(1.0) / clamped, on.real(0.0))
    return scales, inverses


def _blocks(on: WordOperations, x: Any, *, by_row: bool) -> Any:
    """One row for each block; the last ones are filled up with zeros."""
    rows = x.reshape(-1, x.shape[-1]) if by_row else x.reshape(1, -1)
    return on.pad(rows, -rows.shape[1] % QUANTUM).reshape(-1, QUANTUM)


def _unblocks(blocks: Any, shape: Sequence[int], *, by_row: bool) -> Any:
    width = shape[-1] if by_row else math.prod(shape)
    rows = blocks.reshape(-1, width + -width % QUANTUM)
    return rows[:, :width].reshape(shape)
