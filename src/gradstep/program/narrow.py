"""LLVM IR that reads and writes what is narrower than float32: bfloat16, float16 and 8-bit codes."""

from gradstep.program import processor
from gradstep.program.formats import BELOW, CUT, FIRST_SQUARE, LOW, SHIFT, Format
from gradstep.program.rounding import unit
from gradstep.program.values import Code, literal, splat, vector

SIGN_BIT, MAGNITUDE = 0x80000000, 0x7FFFFFFF


class Words:
    """Operations on `lanes` 32-bit words, and on the float32 numbers that they stand for."""

    def __init__(self, code: Code, lanes: int) -> None:
        self.code, self.lanes = code, lanes
        self.words, self.floats = vector("i32", lanes), vector("float", lanes)

    def constant(self, value: int) -> str:
        """The same word in every lane."""
        value = value - (1 << 32) if value >= 1 << 31 else value
        return str(value) if self.lanes == 1 else f"<{', '.join([f'i32 {value}'] * self.lanes)}>"

    def number(self, bits: int) -> str:
        """The same float32 in every lane, given its bits."""
        return self.number_of(self.constant(bits))

    def do(self, op: str, x: str, y: "str | int") -> str:
        """An integer operation."""
        return self.code.let(f"{op} {self.words} {x}, {self.constant(y) if isinstance(y, int) else y}")

    def bits(self, x: str) -> str:
        """The bits of numbers."""
        return self.code.let(f"bitcast {self.floats} {x} to {self.words}")

    def number_of(self, x: str) -> str:
        """The numbers of bits."""
        return self.code.let(f"bitcast {self.words} {x} to {self.floats}")

    def compare(self, predicate: str, x: str, y: "str | int") -> str:
        """A comparison of words."""
        return self.code.let(f"icmp {predicate} {self.words} {x}, {self.constant(y) if isinstance(y, int) else y}")

    def order(self, predicate: str, x: str, y: str) -> str:
        """A comparison of numbers."""
        return self.code.let(f"fcmp {predicate} {self.floats} {x}, {y}")

    def select(self, condition: str, yes: "str | int", no: "str | int") -> str:
        """Words by condition."""
        first, second = (self.constant(x) if isinstance(x, int) else x for x in (yes, no))
        bits = vector("i1", self.lanes)
        return self.code.let(f"select {bits} {condition}, {self.words} {first}, {self.words} {second}")

    def choose(self, condition: str, yes: str, no: str) -> str:
        """Numbers by condition."""
        bits = vector("i1", self.lanes)
        return self.code.let(f"select {bits} {condition}, {self.floats} {yes}, {self.floats} {no}")

    def multiply(self, x: str, y: str) -> str:
        """The product of numbers."""
        return self.code.let(f"fmul {self.floats} {x}, {y}")

    def widen(self, x: str, width: int) -> str:
        """Integers of fewer bits as words."""
        return self.code.let(f"zext {vector(f'i{width}', self.lanes)} {x} to {self.words}")

    def upper(self, x: str) -> str:
        """The upper halves of words."""
        return self.cut(self.do("lshr", x, 16), 16)

    def cut(self, x: str, width: int) -> str:
        """The low bits of words."""
        return self.code.let(f"trunc {self.words} {x} to {vector(f'i{width}', self.lanes)}")

    def real(self, value: float) -> str:
        """A number that float32 holds, in every lane."""
        return literal(value, "float32", self.lanes)

    def count(self, x: str) -> str:
        """Words as numbers."""
        return self.code.let(f"uitofp {self.words} {x} to {self.floats}")

    def floor(self, x: str) -> str:
        """Numbers that are not negative, cut to words."""
        return self.code.let(f"fptoui {self.floats} {x} to {self.words}")

    def fraction(self, x: str) -> str:
        """Words as numbers from 0 to 1, exclusive: their first 24 bits."""
        return self.multiply(self.count(self.do("lshr", x, 8)), self.real(2.0**-24))

    def add(self, x: str, y: str) -> str:
        """The sum of numbers."""
        return self.code.let(f"fadd {self.floats} {x}, {y}")

    def subtract(self, x: str, y: str) -> str:
        """The difference of numbers."""
        return self.code.let(f"fsub {self.floats} {x}, {y}")

    def root(self, x: str) -> str:
        """The square root."""
        suffix = f"v{self.lanes}" if self.lanes > 1 else ""
        return self.code.call(f"llvm.sqrt.{suffix}f32", self.floats, x)

    def spread(self, x: str) -> str:
        """One float32 in every lane."""
        return splat(self.code, "float", x, self.lanes)


def widen(code: Code, dtype: str, bits: str, lanes: int) -> str:
    """The float32 numbers that 16 bits stand for."""
    words = Words(code, lanes)
    if dtype == "bfloat16":
        return words.number_of(words.do("shl", words.widen(bits, 16), 16))
    if processor.converts_float16():
        half = code.let(f"bitcast {vector('i16', lanes)} {bits} to {vector('half', lanes)}")
        return code.let(f"fpext {vector('half', lanes)} {half} to {words.floats}")
    return _widen_float16(words, bits)


def narrow(code: Code, kept: Format, value: str, noise: str | None, lanes: int) -> str:
    """The 16 bits to which float32 numbers round: to nearest even, or at random with `noise`.

    In float16, what is never negative and not zero does not become zero.
    """
    words = Words(code, lanes)
    if kept.dtype == "bfloat16":
        return words.upper(_round_bfloat16(words, value, noise))
    rounded = value if noise is None else _round_float16_at_random(words, value, noise)
    if kept.sign == "non-negative":
        least = words.real(2.0**-24)
        tiny = words.order("olt", rounded, least)
        rounded = words.choose(tiny, words.choose(words.order("ogt", value, words.real(0.0)), least, rounded), rounded)
    if processor.converts_float16():
        half = code.let(f"fptrunc {words.floats} {rounded} to {vector('half', lanes)}")
        return code.let(f"bitcast {vector('half', lanes)} {half} to {vector('i16', lanes)}")
    return words.cut(_narrow_float16(words, rounded), 16)


def _round_bfloat16(words: Words, value: str, noise: str | None) -> str:
    """The bits of bfloat16 in the upper half of words."""
    bits = words.select(words.order("uno", value, value), 0x7FC00000, words.bits(value))
    if noise is not None:
        return words.do("add", bits, words.do("lshr", noise, 16))
    odd = words.compare("ne", words.do("and", bits, 0x10000), 0)
    return words.do("add", bits, words.select(odd, 0x8000, 0x7FFF))


# float16 in integer arithmetic, for processors that have no instructions for it.


def _widen_float16(words: Words, half: str) -> str:
    wide = words.widen(half, 16)
    moved = words.do("shl", words.do("and", wide, 0x7FFF), 13)
    scaled = words.multiply(words.number_of(moved), words.real(2.0**112))  # exact, denormal numbers too
    odd = words.compare("uge", moved, 0x1F << 23)  # infinity and NaN
    magnitude = words.select(odd, words.do("or", moved, 0xFF << 23), words.bits(scaled))
    return words.number_of(words.do("or", magnitude, words.do("shl", words.do("and", wide, 0x8000), 16)))


def _narrow_float16(words: Words, value: str) -> str:
    """To nearest even; the bits of float16 in words."""
    bits = words.bits(value)
    magnitude = words.do("and", bits, MAGNITUDE)
    # In [0.5, 1) float32 has the spacing of float16's denormal numbers: adding 0.5 rounds to them.
    shifted = words.code.let(f"fadd {words.floats} {words.number_of(magnitude)}, {words.real(0.5)}")
    tiny = words.do("sub", words.bits(shifted), 0x3F000000)
    odd = words.do("and", words.do("lshr", magnitude, 13), 1)
    normal = words.do("add", words.do("add", magnitude, odd), (0xFFF - (112 << 23)) & 0xFFFFFFFF)
    half = words.select(words.compare("ult", magnitude, 113 << 23), tiny, words.do("lshr", normal, 13))
    half = words.select(words.compare("uge", magnitude, 143 << 23), 0x7C00, half)  # from 65536 on, infinity
    half = words.select(words.compare("ugt", magnitude, 0xFF << 23), 0x7E00, half)
    return words.do("or", half, words.do("lshr", words.do("and", bits, SIGN_BIT), 16))


def _round_float16_at_random(words: Words, value: str, noise: str) -> str:
    """A number that float16 holds exactly, as float32."""
    bits = words.bits(value)
    magnitude = words.do("and", bits, MAGNITUDE)
    normal = words.do("and", words.do("add", magnitude, words.do("lshr", noise, 19)), 0xFFFFE000)
    # Denormal in float16: a multiple of 2**-24, found in fixed point with 21 bits behind the point.
    is_tiny = words.compare("ult", magnitude, 113 << 23)
    small = words.choose(is_tiny, words.number_of(magnitude), words.real(0.0))
    fixed = words.floor(words.multiply(small, words.real(2.0**45)))
    units = words.do("lshr", words.do("add", fixed, words.do("lshr", noise, 11)), 21)
    tiny = words.multiply(words.count(units), words.real(2.0**-24))
    rounded = words.do("or", words.select(is_tiny, words.bits(tiny), normal), words.do("and", bits, SIGN_BIT))
    return words.choose(words.order("uno", value, value), value, words.number_of(rounded))


# Codes: see `Format`. Units are magnitudes over the scale of their block, times the square of `steps`.


def decode(code: Code, kept: Format, codes: str, scale: str, lanes: int) -> str:
    """The float32 numbers of codes; `scale` is one number."""
    words = Words(code, lanes)
    wide = words.widen(codes, 8)
    if kept.sign == "non-negative":
        number = words.subtract(words.count(wide), words.real(float(SHIFT)))
        small = words.do("shl", words.do("add", wide, BELOW), LOW)
        small = words.select(words.compare("eq", wide, 0), 0, small)
        is_small = words.compare("ult", wide, FIRST_SQUARE)
        units = words.choose(is_small, words.number_of(small), words.multiply(number, number))
        return words.multiply(words.multiply(units, words.real(unit(kept))), words.spread(scale))
    number = words.count(words.do("and", wide, 0x7F))
    square = words.multiply(number, number)
    value = words.multiply(words.multiply(square, words.real(unit(kept))), words.spread(scale))
    return words.number_of(words.do("xor", words.bits(value), words.do("shl", words.do("and", wide, 0x80), 24)))


def encode(code: Code, kept: Format, value: str, inverse: str, noise: str, lanes: int) -> str:
    """The codes of float32 numbers; `inverse` is one over the scale of the block.

    Of the two codes next to a number the larger one is taken where the number is more than the share `noise` of the way
    to it.
    """
    words = Words(code, lanes)
    bits = words.bits(value)
    size = words.do("and", bits, MAGNITUDE)
    ratio = words.multiply(words.number_of(size), words.spread(inverse))
    one = words.real(1.0)
    ratio = words.choose(words.order("olt", ratio, one), ratio, one)  # NaN becomes 1: the scale says that it is NaN
    units = words.multiply(ratio, words.real(float(kept.steps**2)))
    lower = words.floor(words.root(units))
    number = words.count(lower)
    past = words.subtract(units, words.multiply(number, number))
    gap = words.add(words.add(number, number), one)
    up = words.order("ogt", past, words.multiply(words.fraction(noise), gap))
    chosen = words.do("add", lower, words.select(up, 1, 0))
    if kept.sign == "non-negative":
        moved = words.do("add", words.bits(units), words.do("lshr", noise, 32 - LOW))
        small = words.do("sub", words.do("lshr", moved, LOW), BELOW)
        is_small = words.order("olt", units, words.real(float((FIRST_SQUARE - SHIFT) ** 2)))
        chosen = words.select(is_small, small, words.do("add", chosen, SHIFT))
    if kept.sign == "signed":
        chosen = words.select(words.order("olt", units, words.real(CUT)), 0, chosen)
    else:  # a floor: only zero is zero
        least = words.select(words.compare("ne", size, 0), 1, 0)
        chosen = words.select(words.compare("sgt", chosen, least), chosen, least)
    if kept.sign == "non-negative":
        return words.cut(chosen, 8)
    negative = words.do("lshr", words.do("and", bits, SIGN_BIT), 24)
    return words.cut(words.do("or", chosen, words.select(words.compare("eq", chosen, 0), 0, negative)), 8)


def scale_of(code: Code, largest: str) -> tuple[str, str]:
    """From the bits of a block's largest magnitude its scale, and one over it.

    A block that holds NaN or infinity is NaN as a whole: its codes are relative to what has no number.
    """
    words = Words(code, 1)
    smallest = 1 << 23  # of the normal numbers: one over it is finite
    clamped = words.number_of(words.select(words.compare("ult", largest, smallest), smallest, largest))
    inverse = words.code.let(f"fdiv float {words.real(1.0)}, {clamped}")
    finite = words.compare("ult", largest, 0xFF << 23)
    scale = words.choose(words.compare("eq", largest, 0), words.real(0.0), clamped)
    return words.choose(finite, scale, words.number(0x7FC00000)), words.choose(finite, inverse, words.real(0.0))
