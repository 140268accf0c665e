"""Random numbers for stochastic rounding: a hash of seed, step, parameter, place in the rule, and element.

```
key   = mix(hash(parameter) ^ mix(mix(seed) + step * GOLDEN) ^ hash(place))        64 bits
x     = index + low(key)                     index: the low 32 bits of the element's number in C order
x     = (x ^ x >> 16) * MULTIPLIERS[0] ^ (high(key) + (index >> 32) * GOLDEN)
x     = (x ^ x >> 15) * MULTIPLIERS[1]
noise = x ^ x >> 16
```

No state is kept, so neither threads nor the order of parameters matter. `mix` is the finalizer of SplitMix64.

Source: Steele et al., 2014, https://doi.org/10.1145/2660193.2660195; Wellons, 2018,
https://nullprogram.com/blog/2018/07/31/
"""

import hashlib

from gradstep.program.values import Code, vector

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
GOLDEN32 = 0x9E3779B1
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def mix(word: int) -> int:
    """A bijection of 64-bit words in which every bit depends on every other."""
    for shift, factor in MIX:
        word = (word ^ word >> shift) * factor & MASK
    return word


def name_key(name: str) -> int:
    """The word of a parameter's name, or of a place in a rule."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def step_key(seed: int, step: int) -> int:
    """The word of a step."""
    return mix(mix(seed & MASK) + step * GOLDEN & MASK)


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


def emit_noise(code: Code, index: str, high: str, lanes: int) -> str:
    """The noise of elements as IR: `index` is their number with the low half of the key added."""
    words = vector("i32", lanes)
    constant = [f"<{', '.join([f'i32 {n - (n >> 31 << 32)}'] * lanes)}>" if lanes > 1 else str(n - (n >> 31 << 32))
                for n in MULTIPLIERS]  # fmt: skip
    shift = [f"<{', '.join([f'i32 {n}'] * lanes)}>" if lanes > 1 else str(n) for n in (16, 15, 16)]
    x = code.let(f"xor {words} {index}, {code.let(f'lshr {words} {index}, {shift[0]}')}")
    x = code.let(f"xor {words} {code.let(f'mul {words} {x}, {constant[0]}')}, {high}")
    x = code.let(f"xor {words} {x}, {code.let(f'lshr {words} {x}, {shift[1]}')}")
    x = code.let(f"mul {words} {x}, {constant[1]}")
    return code.let(f"xor {words} {x}, {code.let(f'lshr {words} {x}, {shift[2]}')}")
