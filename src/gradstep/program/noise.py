"""Random words for stochastic rounding: a hash of seed, parameter, place in the rule and element, moved on by steps.

```
key   = mix(hash(parameter) ^ mix(seed) ^ hash(place))             64 bits
x     = index + low(key)                     index: the low 32 bits of the element's number in C order
x     = x * MULTIPLIERS[0]
x     = (x ^ x >> 16 ^ high(key) + (index >> 32) * GOLDEN) * MULTIPLIERS[1]
noise = x + step * GOLDEN
```

Over the steps the noise of an element is a Weyl sequence of the golden ratio. It falls into every interval as often as
it should, and sooner than independent numbers would: what rounding adds in one step it takes away in the next ones.
No state is kept, so neither threads nor the order of parameters matter. `mix` is the finalizer of SplitMix64. Of a
word of noise the high bits are the good ones.

Source: Weyl, 1916, https://doi.org/10.1007/BF01475864; Steele et al., 2014, https://doi.org/10.1145/2660193.2660195;
Wellons, 2018, https://nullprogram.com/blog/2018/07/31/
"""

from gradstep.program.values import Code, splat, vector

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio, made odd
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def mix(word: int) -> int:
    """A bijection of 64-bit words in which every bit depends on every other."""
    for shift, factor in MIX:
        word = (word ^ word >> shift) * factor & MASK
    return word


def name_key(name: str) -> int:
    """The word of a parameter's name, or of a place in a rule."""
    import hashlib  # late: it loads OpenSSL

    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def tensor_key(seed: int, name: str) -> int:
    """The word of a parameter, before the place in the rule comes in."""
    return mix(seed & MASK) ^ name_key(name)


def step_shift(step: int) -> int:
    """By how much the noise has been moved on."""
    return step * GOLDEN & 0xFFFFFFFF


def signed(word: int) -> int:
    """A 64-bit word as the integer that tables of signed words hold."""
    return word - (1 << 64) if word >> 63 else word


def emit_mix(code: Code, word: str) -> str:
    """`mix` as IR."""
    for shift, factor in MIX:
        word = code.let(f"xor i64 {word}, {code.let(f'lshr i64 {word}, {shift}')}")
        if factor != 1:
            word = code.let(f"mul i64 {word}, {signed(factor)}")
    return word


def emit_noise(code: Code, index: str, high: str, shift: str, lanes: int) -> str:
    """The noise of elements as IR: `index` is their number with the low half of the key added."""
    words = vector("i32", lanes)
    constant = [splat(code, "i32", str(factor - (factor >> 31 << 32)), lanes) for factor in MULTIPLIERS]
    half = splat(code, "i32", "16", lanes)
    x = code.let(f"mul {words} {index}, {constant[0]}")
    x = code.let(f"xor {words} {x}, {code.let(f'lshr {words} {x}, {half}')}")
    x = code.let(f"mul {words} {code.let(f'xor {words} {x}, {high}')}, {constant[1]}")
    return code.let(f"add {words} {x}, {shift}")
