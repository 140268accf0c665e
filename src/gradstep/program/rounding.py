"""What is narrower than float32, on the operations of an array library: the definitions that kernels follow too."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from gradstep.program.formats import CODE_BITS, QUANTUM, Sign
from gradstep.program.noise import MULTIPLIERS

LOW = 23 - CODE_BITS  # bits of float32's mantissa that a code drops


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

    def count(self, length: int) -> Any:
        """The words 0, 1, …"""
        ...

    def pad(self, x: Any, extra: int) -> Any:
        """A matrix with `extra` further columns of zeros."""
        ...


def noise(on: WordOperations, low: Any, high: Any, shape: Sequence[int]) -> Any:
    """Random words for all elements of an array, from the two halves of the key: see `noise.py`."""
    w = on.word
    x = on.count(math.prod(shape)) + low  # of arrays with 2**32 elements or more, the low halves of their numbers
    x = ((x ^ (x >> w(16))) * w(MULTIPLIERS[0])) ^ high
    x = (x ^ (x >> w(15))) * w(MULTIPLIERS[1])
    return (x ^ (x >> w(16))).reshape(shape)


def round_at_random(on: WordOperations, x: Any, dtype: str, words: Any) -> Any:
    """Float32 numbers rounded up or down to numbers that `dtype` holds exactly."""
    w, bits = on.word, on.bits(x)
    if dtype == "bfloat16":
        rounded = on.floats((bits + (words & w(0xFFFF))) & w(0xFFFF0000))
        return on.call("where", x == x, rounded, x)
    magnitude = bits & w(0x7FFFFFFF)
    normal = (magnitude + (words & w(0x1FFF))) & w(0xFFFFE000)
    is_tiny = magnitude < w(113 << 23)
    small = on.floats(on.call("where", is_tiny, magnitude, w(0)))
    fixed = on.cast(small * on.floats(w((127 + 45) << 23)), "uint32")
    units = on.cast((fixed + (words & w(0x1FFFFF))) >> w(21), "float32")
    tiny = on.bits(units * on.floats(w((127 - 24) << 23)))
    rounded = on.floats(on.call("where", is_tiny, tiny, normal) | (bits & w(0x80000000)))
    return on.call("where", x == x, rounded, x)


def encode(on: WordOperations, sign: Sign, values: Any, words: Any | None, *, by_row: bool) -> tuple[Any, Any]:
    """The codes of float32 numbers and the scales of their blocks."""
    w = on.word
    bits = _blocks(on, on.bits(values), by_row=by_row)
    size = bits & w(0x7FFFFFFF)
    largest = size.max(axis=1)
    scales, inverses = _scales(on, largest)
    ratio = on.floats(size) * inverses[:, None]
    one = on.floats(w(127 << 23))
    ratio = on.call("where", ratio < one, ratio, one)
    ratio_bits = on.bits(ratio)
    if words is None:
        addend = ((ratio_bits >> w(LOW)) & w(1)) + w((1 << (LOW - 1)) - 1)
    else:
        words = _blocks(on, words, by_row=by_row)
        addend = words & w((1 << LOW) - 1)
    rounded = ratio_bits + addend
    lowest = lowest_bits(sign)
    least = _least_codes(on, sign, size, ratio, words)
    codes = on.call("where", rounded < w(lowest + (1 << LOW)), least, (rounded - w(lowest)) >> w(LOW))
    if sign != "non-negative":
        signed = codes | ((bits & w(0x80000000)) >> w(24))
        codes = on.call("where", codes == w(0), codes, signed)
    return on.cast(_unblocks(codes, values.shape, by_row=by_row), "uint8"), scales


def decode(on: WordOperations, sign: Sign, codes: Any, scales: Any, *, by_row: bool) -> Any:
    """The float32 numbers of codes."""
    w = on.word
    wide = _blocks(on, on.cast(codes, "uint32"), by_row=by_row)
    magnitude = wide if sign == "non-negative" else wide & w(0x7F)
    bits = on.call("where", magnitude == w(0), w(0), (magnitude << w(LOW)) + w(lowest_bits(sign)))
    if sign != "non-negative":
        bits = bits | ((wide & w(0x80)) << w(24))
    return _unblocks(on.floats(bits) * scales[:, None], codes.shape, by_row=by_row)


def lowest_bits(sign: Sign) -> int:
    """The bits of the number that code 0 would be: 2**-31, or 2**-15 beside a sign bit."""
    return (127 - (31 if sign == "non-negative" else 15)) << 23


def _least_codes(on: WordOperations, sign: Sign, size: Any, ratio: Any, words: Any | None) -> Any:
    """Codes 0 or 1 for numbers below the smallest that has a code."""
    w = on.word
    if sign != "signed":  # a floor: only zero is zero
        up = size != w(0)
    else:
        smallest = lowest_bits(sign) + (1 << LOW)
        if words is None:
            up = ratio >= on.floats(w(smallest - (1 << 23)))
        else:
            up = ratio > on.cast(words & w(0xFFFFFF), "float32") * on.floats(w(smallest - (24 << 23)))
    return on.call("where", up, w(1), w(0))


def _scales(on: WordOperations, largest: Any) -> tuple[Any, Any]:
    """See `narrow.scale_of`."""
    w = on.word
    smallest, infinite = w(1 << 23), w(0xFF << 23)
    clamped = on.floats(on.call("where", largest < smallest, smallest, largest))
    scales = on.call("where", largest == w(0), on.floats(w(0)), clamped)
    scales = on.call("where", largest < infinite, scales, on.floats(w(0x7FC00000)))
    inverses = on.call("where", largest < infinite, on.floats(w(127 << 23)) / clamped, on.floats(w(0)))
    return scales, inverses


def _blocks(on: WordOperations, x: Any, *, by_row: bool) -> Any:
    """One row for each block; the last ones are filled up with zeros."""
    rows = x.reshape(-1, x.shape[-1]) if by_row else x.reshape(1, -1)
    return on.pad(rows, -rows.shape[1] % QUANTUM).reshape(-1, QUANTUM)


def _unblocks(blocks: Any, shape: Sequence[int], *, by_row: bool) -> Any:
    width = shape[-1] if by_row else math.prod(shape)
    rows = blocks.reshape(-1, width + -width % QUANTUM)
    return rows[:, :width].reshape(shape)
