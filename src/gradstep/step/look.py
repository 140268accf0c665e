"""What is found out about gradients on their device: the global norm, whether they are finite, how they are clipped."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.library import FunctionalLibrary
from gradstep.program.graph import Reading
from gradstep.step.scalars import Scales

SMALLEST = {"float32": 1e-20, "float64": 1e-280}
"""Sums of squares from which on the squares that have been lost to underflow do not matter."""


class Policy(NamedTuple):
    """What a step does about its gradients.

    Attributes:
        clipped: whether they are clipped by their norm.
        skipping: whether the step is left out when one is not finite.
        looking: whether the step looks at them itself; where it may raise, somebody has looked before.
    """

    clipped: bool
    skipping: bool
    looking: bool

    @classmethod
    def of(cls, *, clipped: bool, nonfinite: str) -> "Policy":
        """The policy of these options."""
        skipping = nonfinite == "skip"
        return cls(clipped, skipping, skipping or (clipped and nonfinite != "raise"))


class Look(NamedTuple):
    """What has been found out, still on the device where one is asked; there `scale` is the factor that clips."""

    norm: Any
    finite: Any
    scale: Any
    each_finite: Any


def looking_dtype(arrays: Sequence[Any]) -> str:
    """The dtype in which squares of these arrays are summed."""
    return "float64" if any("float64" in str(array.dtype) for array in arrays) else "float32"


def told(library: FunctionalLibrary, max_norm: float | None, scales: Scales, dtype: str) -> Any:
    """What `look` has to be told: the limit of the norm, infinite for none, and the factors of the gradients."""
    limit = math.inf if max_norm is None else max_norm
    return library.table(np.array([limit, abs(scales.whole), scales.micro]), dtype)


def look_at(library: FunctionalLibrary, arrays: list[Any], max_norm: float | None) -> Look:
    """Look at arrays as they are."""
    facts = told(library, max_norm, Scales(), looking_dtype(arrays))
    return compiled_look(library, (Reading.PLAIN,) * len(arrays))(arrays, [], facts)


@functools.lru_cache(maxsize=64)
def compiled_look(library: FunctionalLibrary, readings: tuple[Reading, ...]) -> Callable[..., Look]:
    """`look` for gradients that are read like this, compiled by itself."""
    compiled = library.compile(lambda *arguments: tuple(look(library, readings, *arguments)))
    return lambda *arguments: Look(*compiled(*arguments))


def look(
    library: FunctionalLibrary, readings: Sequence[Reading], gradients: list[Any], totals: list[Any], facts: Any
) -> Look:
    """Look at gradients, within a function that somebody compiles; `totals` are the sums that some are added to."""
    dtype = looking_dtype([*gradients, *totals])
    limit, whole, micro = facts[0], facts[1], facts[2]
    rest = iter(totals)
    seen = [
        _read(library, reading, g, next(rest) if reading is Reading.SUMMED else None, micro, dtype)
        for reading, g in zip(readings, gradients, strict=True)
    ]
    one = library.number(1.0, dtype)
    norm, each_finite = _norm(library, seen, dtype)
    norm = norm * whole
    finite = (norm - norm) == 0
    scale = library.call("minimum", limit / (norm + 1e-6), one)
    return Look(norm, finite, library.apart(library.call("where", finite, scale, norm - norm)), each_finite)


def _norm(library: FunctionalLibrary, gradients: list[Any], dtype: str) -> tuple[Any, Any]:
    """The global norm, and for each gradient whether it is finite."""
    zero, one = library.number(0.0, dtype), library.number(1.0, dtype)
    if not gradients:
        return zero, zero == zero

    def scaled() -> tuple[Any, Any]:
        """Divided by the largest element, no square can over- or underflow."""
        largest = [library.largest(g) for g in gradients]
        unit = functools.reduce(functools.partial(library.call, "maximum"), largest)
        unit = library.call("where", unit < math.inf, unit, one)
        unit = library.apart(library.call("where", unit > 0, unit, one))
        squares = sum((library.total((g / unit) * (g / unit)) for g in gradients), zero)
        return unit * library.call("sqrt", squares), library.stack([size < math.inf for size in largest])

    if library.choose is None:
        return scaled()
    squares = sum((library.total(g * g) for g in gradients), zero)
    sound = (squares < math.inf) & (squares > SMALLEST[dtype])
    plain = library.call("sqrt", squares), library.stack([sound] * len(gradients))
    return library.choose(sound, lambda: plain, scaled)


def _read(library: FunctionalLibrary, reading: Reading, g: Any, total: Any, micro: Any, dtype: str) -> Any:
    """A gradient as a program reads it, before it is scaled as a whole."""
    if reading in (Reading.WEIGHED, Reading.SUMMED):
        own = looking_dtype([g])
        g = library.cast(g, dtype) * library.cast(library.cast(micro, own), dtype)
    g = library.cast(g, dtype)
    return g if total is None else library.cast(total, dtype) + g
