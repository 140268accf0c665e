"""How the arrays of a rule are stored: their dtypes, how they are rounded, and the arrays that each is made of."""

from typing import Literal, NamedTuple, TypeAlias

FLOATS = ("float32", "float64", "bfloat16", "float16")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
NARROW = ("bfloat16", "float16")
EXPECTED = "expected float32, float64, bfloat16 or float16"

QUANTUM = 256  # elements that share a scale
# Codes of what is never negative: from FIRST_SQUARE on c stands for (c - SHIFT)**2 units, below for a number with a
# mantissa of two bits, so that there are four codes for each power of two.
TOP, SHIFT, FIRST_SQUARE = 255, 40, 48
CUT = 1 - 2**-10  # units below which what is signed becomes 0: rounding must not push code 1 there
LOW = 21  # bits of float32 behind such a mantissa
BELOW = (133 << 2) - FIRST_SQUARE  # exponent and mantissa of 64 units, which is code 48, less the code

Sign: TypeAlias = Literal["signed", "non-negative", "unknown"]
SIGNS: tuple[Sign, ...] = ("signed", "non-negative", "unknown")


def compute_dtype(parameter: str) -> str:
    """The dtype in which a parameter's rule is computed."""
    return "float64" if parameter == "float64" else "float32"


class Format(NamedTuple):
    """How one array is stored.

    Attributes:
        dtype: one of `FLOATS`, or "int8" for 8-bit codes with a scale, the largest magnitude, for each block of
            `QUANTUM` elements. A sign bit and c stand for (c / 127)**2 times the scale, with its sign. Where nothing
            is negative, c stands for ((c - 40) / 215)**2 from 48 on, and below for 7 / 8, 6 / 8, 5 / 8, 4 / 8 of what
            48 stands for, then half of these, and so on.
        sign: which values the array takes. Codes of "signed" ones alone become 0 below the smallest: what may be a mean
            of squares is divided by, and must not. For the same reason a "non-negative" one in float16 has a floor.
        stochastic: round up or down at random, so that the expected value is the exact one; else to nearest. Codes
            always are: a running mean that loses a tenth in a step, or a thousandth, would never reach the next one.
        master: keep a float32 copy beside it, which counts where it rounds to what is stored.
    """

    dtype: str
    sign: Sign = "unknown"
    stochastic: bool = False
    master: bool = False

    @property
    def coded(self) -> bool:
        """Whether elements are 8-bit codes."""
        return self.dtype == "int8"

    @property
    def ordered(self) -> bool:
        """Whether an element's place in C order matters: for its block, or for its random number."""
        return self.coded or self.stochastic

    @property
    def steps(self) -> int:
        """The root of the largest magnitude in units of codes: code 1 beside a sign bit stands for one unit."""
        return TOP - SHIFT if self.sign == "non-negative" else 127

    def parts(self, place: str) -> dict[str, str]:
        """The arrays that hold it, name to dtype; all but scales have one element for each of the parameter's."""
        if self.coded:
            return {codes_of(place): "uint8", scales_of(place): "float32"}
        return {place: self.dtype, **({master_of(place): "float32"} if self.master else {})}


def codes_of(place: str) -> str:
    """The name of the array of codes. No slot can have a name with a dot."""
    return f"{place}.codes"


def scales_of(place: str) -> str:
    """The name of the array of scales: the largest magnitude of each block."""
    return f"{place}.scales"


def master_of(place: str) -> str:
    """The name of the float32 copy."""
    return f"{place}.master"
