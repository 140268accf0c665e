"""What storage should give, in plain integers, float64 and tables of values, from what the documentation says alone."""

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from families import assert_same_bits

Array = np.ndarray[Any, Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32), "float64": np.dtype(np.float64),
    "bfloat16": BFLOAT16, "float16": np.dtype(np.float16),
}  # fmt: skip
NARROW = ("bfloat16", "float16")
BLOCK = 256  # elements that share a scale

SIGNED = {"SGD": "v", "Muon": "v", "Adam": "m", "AdamW": "m", "Adamax": "m", "Lion": "m", "Adafactor": "m"}


def sign_of(opt: Any, slot: str) -> str:
    """Momentum has both signs; all else that the families keep is a mean of squares or a magnitude."""
    return "signed" if SIGNED.get(type(opt).__name__) == slot else "non-negative"


# Noise


def mixed(word: int) -> int:
    """The finalizer of SplitMix64."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def noise(seed: int, name: str, place: str, step: int, size: int) -> Array:
    """The 32-bit word of each element, as uint64."""
    key = mixed(hashed(name) ^ mixed(seed) ^ hashed(place))
    low, high = key % 2**32, key >> 32
    cut = np.uint64(2**32 - 1)
    x = (np.arange(size, dtype=np.uint64) + np.uint64(low)) & cut
    x = x * np.uint64(0x7FEB352D) & cut
    x = (x ^ (x >> np.uint64(16)) ^ np.uint64(high)) * np.uint64(0x846CA68B) & cut
    return (x + np.uint64(step * 0x9E3779B1 % 2**32)) & cut


# 16 bits


def grid(dtype: str) -> Array:
    """Every finite number of a format that is not negative, and the power of two after them, which is infinity."""
    finite = np.arange(0x7F80 if dtype == "bfloat16" else 0x7C00, dtype=np.uint16).view(DTYPES[dtype])
    return np.append(finite.astype(np.float64), 2.0 ** (128 if dtype == "bfloat16" else 16))


GRIDS = {dtype: grid(dtype) for dtype in NARROW}


def to_nearest(x: Array, dtype: str) -> Array:
    """Float32 numbers in another dtype."""
    with np.errstate(all="ignore"):
        return x.astype(DTYPES[dtype])


def at_random(x: Array, dtype: str, words: Array) -> Array:
    """The neighbour away from zero where the noise and the distance from the other one come to more than the gap."""
    with np.errstate(invalid="ignore"):
        size, numbers = np.abs(x).astype(np.float64), GRIDS[dtype]
    below = np.clip(np.searchsorted(numbers, size, "right") - 1, 0, len(numbers) - 2)
    low, high = numbers[below], numbers[below + 1]
    finer = 16 if dtype == "bfloat16" else np.where(size < 2.0**-14, 21, 13)  # bits of the noise that count
    with np.errstate(all="ignore"):
        share = np.floor((size - low) / (high - low) * 2.0**finer)
        up = share + (words >> np.asarray(32 - finer, np.uint64)) >= 2.0**finer
        rounded = np.where(up, high, low)
        rounded = np.where((size >= numbers[-1]) | (rounded == numbers[-1]), np.inf, rounded)
        return np.where(np.isnan(x), np.nan, np.copysign(rounded, x)).astype(DTYPES[dtype])


# 8 bits


def in_blocks(x: Array, width: int) -> Array:
    """Rows of `width` elements cut into blocks, the last ones filled up with zeros."""
    rows = x.reshape(-1, width) if width else x.reshape(0, 1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK))).reshape(-1, BLOCK)


def out_of_blocks(blocks: Array, shape: Any, width: int) -> Array:
    return blocks.reshape(-1, max(width + -width % BLOCK, 1))[:, :width].reshape(shape)


def units_of_codes(sign: str) -> Array:
    """What each magnitude's code stands for, in units of which the largest code has a square number."""
    if sign != "non-negative":
        return np.arange(128.0) ** 2
    quarters = [64 * 2.0 ** ((c - 48) // 4) * (1 + c % 4 / 4) for c in range(1, 48)]
    return np.array([0.0, *quarters, *((c - 40.0) ** 2 for c in range(48, 256))])


def encode(x: Array, sign: str, words: Array, width: int) -> tuple[Array, Array]:
    """The codes of float32 numbers, and the scale of each block."""
    table = units_of_codes(sign)
    one, blocks = np.float32(1), in_blocks(x.astype(np.float32), width)
    with np.errstate(all="ignore"):
        size = np.abs(blocks)
        largest = size.max(axis=1)
        finite = np.isfinite(largest)
        scales = np.where(largest > 0, np.maximum(largest, np.float32(2.0**-126)), np.float32(0))
        scales = np.where(finite, scales, np.float32(np.nan))
        inverse = one / np.maximum(largest, np.float32(2.0**-126))
        units = np.minimum(size * inverse[:, None], one) * np.float32(table[-1])
        units = np.where(finite[:, None], units, 0)
        codes = np.clip(np.searchsorted(table, units, "right") - 1, 0, len(table) - 2)
        below, gap = table[codes].astype(np.float32), np.diff(table)[codes].astype(np.float32)
        # Squares compare with 24 bits of the noise, quarters of powers of two add 21 of them.
        cut = in_blocks(words, width) >> np.uint64(8)
        up = units - below > cut.astype(np.float32) / np.float32(2**24) * gap
        if sign == "non-negative":
            distance = np.floor((units - below) / gap * 2.0**21).astype(np.uint64)
            up = np.where(units < 64, distance + (cut >> np.uint64(3)) >= 2**21, up)
        codes = (codes + up).astype(np.uint8)
    if sign == "signed":
        codes = np.where(units < 1 - 2**-10, 0, codes).astype(np.uint8)
    else:
        codes = np.where(size > 0, np.maximum(codes, 1), codes)
    if sign != "non-negative":
        codes = codes + np.where(np.signbit(blocks) & (codes > 0), 128, 0)
    return out_of_blocks(codes.astype(np.uint8), x.shape, width), scales


def decode(codes: Array, scales: Array, sign: str, width: int) -> Array:
    """The scale times what each code stands for, from a table."""
    units = units_of_codes(sign)
    table = units.astype(np.float32) * np.float32(1 / units[-1])
    if sign != "non-negative":
        table = np.concatenate([table, -table])
    with np.errstate(all="ignore"):
        return out_of_blocks(table[in_blocks(codes, width)] * scales[:, None], codes.shape, width)


# A parameter and its slots


class Choice(NamedTuple):
    """The storage options of an optimizer."""

    slot_dtype: Any = None
    rounding: str = "nearest"
    master_weights: bool = False
    seed: int = 0

    def dtype_of(self, slot: str, compute: str) -> str:
        """How a slot is stored."""
        if isinstance(self.slot_dtype, Mapping):
            return self.slot_dtype.get(slot, compute)
        return self.slot_dtype or compute


class StoredReference:
    """Decode, call the rule on plain NumPy arrays of the compute dtype, round or encode."""

    def __init__(self, opt: Any, name: str, w: Array, choice: Choice) -> None:
        self.opt, self.name, self.choice, self.t = opt, name, choice, 0
        self.dtype = w.dtype.name
        self.compute = "float64" if self.dtype == "float64" else "float32"
        self.w = w.copy()
        self.master = choice.master_weights and self.dtype in NARROW
        parameters = inspect.signature(opt.rule).parameters.values()
        self.slots = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
        self.state: dict[str, Array] = {}

    def step(self, g: Array, step: int) -> None:
        """One step with the hyperparameters that the optimizer has now; `step` counts those before."""
        self.t += 1
        arguments = {name: getattr(self.opt, name) for name in self.opt.hyperparameters}
        if "t" in inspect.signature(self.opt.rule).parameters:
            arguments["t"] = self.t
        with np.errstate(all="ignore"):
            slots = [self.value_of(slot) for slot in self.slots]
            result = type(self.opt).rule(self.value_of_w(), g.astype(self.compute), *slots, **arguments)
        w, *new = result if isinstance(result, tuple) else (result,)
        for slot, value in zip(self.slots, new, strict=True):
            if value is not None:
                self.store(slot, self.choice.dtype_of(slot, self.compute), value, step)
        self.store("w", self.dtype, w, step)

    def value_of_w(self) -> Array:
        wide = self.w.astype(self.compute)
        if not self.master or "w.master" not in self.state:
            return wide
        master = self.state["w.master"]
        rounded = to_nearest(master, self.dtype)
        kept = (rounded == self.w) & (np.signbit(rounded) == np.signbit(self.w)) | np.isnan(rounded) & np.isnan(self.w)
        return np.where(kept, master, wide)

    def value_of(self, slot: str) -> Array:
        if f"{slot}.codes" in self.state:
            codes, scales = self.state[f"{slot}.codes"], self.state[f"{slot}.scales"]
            return decode(codes, scales, sign_of(self.opt, slot), codes.size).astype(self.compute)
        return self.state.get(slot, np.zeros(self.w.shape)).astype(self.compute)

    def store(self, place: str, dtype: str, value: Array, step: int) -> None:
        sign, stochastic = sign_of(self.opt, place), self.choice.rounding == "stochastic"
        with np.errstate(all="ignore"):
            single = value.astype(np.float32)
        if place == "w" and self.master:
            self.state["w.master"] = single
            stochastic = False
        words = noise(self.choice.seed, self.name, place, step, value.size).reshape(value.shape)
        if dtype == "int8":
            coded = encode(single, sign, words, value.size)
            self.state[f"{place}.codes"], self.state[f"{place}.scales"] = coded
            return
        if dtype in NARROW:
            stored = at_random(single, dtype, words) if stochastic else to_nearest(single, dtype)
            if dtype == "float16" and place != "w" and sign == "non-negative":
                stored = np.where((stored == 0) & (single > 0), DTYPES[dtype].type(2.0**-24), stored)
        else:
            with np.errstate(all="ignore"):
                stored = value.astype(dtype)
        if place == "w":
            self.w = stored
        else:
            self.state[place] = stored


# Arrays of libraries


def held(library: str, array: Array) -> Any:
    """A copy as an array of the library."""
    copy = np.array(array, order="C")
    if library == "numpy":
        return copy
    if copy.dtype == BFLOAT16:
        return torch.from_numpy(copy.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def seen(array: Any) -> Array:
    """The array, whoever owns it, as NumPy's."""
    if isinstance(array, torch.Tensor):
        array = array.detach()
        return array.view(torch.uint16).numpy().view(BFLOAT16) if array.dtype is torch.bfloat16 else array.numpy()
    return np.asarray(array)


def values(seed: int, shape: Any, dtype: str, character: str = "normal") -> Array:
    """Ordinary numbers, of all magnitudes, or the edges of the formats."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    with np.errstate(all="ignore"):
        if character == "wide":
            return (normal * 2.0 ** rng.integers(-150, 128, shape)).astype(DTYPES[dtype])
        if character == "small":
            return (normal * 2.0 ** rng.integers(-30, 2, shape)).astype(DTYPES[dtype])
        if character == "special":
            edges = [0, 1, 2.0**-126, 2.0**-149, 2.0**-24, 2.0**-14, 65504, 65520, 3.3e38, 2.0**-60]
            edges += [np.inf, np.nan] if rng.random() < 0.5 else [1e-3]
            return np.array(rng.choice([*edges, *(-edge for edge in edges)], shape)).astype(DTYPES[dtype])
        return np.asarray(normal).astype(DTYPES[dtype])


def assert_same_state(found: Mapping[str, Any], expected: Mapping[str, Array], what: str = "") -> None:
    """Equal names, shapes, dtypes and bits. Codes of a block without a number stand for nothing."""
    found = {part: seen(array) for part, array in found.items()}
    assert found.keys() == expected.keys(), what
    for part, array in expected.items():
        if part.endswith(".codes"):
            real = np.repeat(~np.isnan(expected[part.replace("codes", "scales")]), BLOCK)[: array.size]
            assert found[part].dtype == np.uint8
            assert found[part].shape == array.shape
            wrong = np.flatnonzero((found[part].ravel() != array.ravel()) & real)
            assert not len(wrong), f"{what}[{part}]: {len(wrong)} codes differ, the first at {wrong[0]}"
        else:
            assert_same_bits(found[part], array, f"{what}[{part}]")
