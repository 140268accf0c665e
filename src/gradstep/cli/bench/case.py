"""A case: one family on tensors of one size and library; how many bytes its step moves, and what it needs of memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import gradstep as gs
from gradstep.cli.bench.families import Family
from gradstep.cli.bench.machine import available_memory
from gradstep.cli.complaint import Complaint
from gradstep.cli.numbers import bytes_text
from gradstep.explain import bytes_per_element
from gradstep.program.formats import BYTES, compute_dtype
from gradstep.program.graph import Reading

CLIP = 1.0
CACHES = 1 << 26  # bytes of gradients that go around before one comes again
FEWEST, MOST = 2, 8  # sets of gradients
SHARE = 0.6  # of the memory that is free
TEMPORARIES = 3  # arrays of the parameters' size that some peers make on the way


@dataclass(frozen=True)
class Case:
    """What is measured at once, by all sides in turns."""

    family: Family
    library: str
    dtype: str
    size: int  # as asked for
    tensors: int
    clip: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each tensor."""
        each = self.size // self.tensors
        if self.family.largest is not None:
            each = min(each, self.family.largest)
        return (math.isqrt(each),) * 2 if self.family.matrices else (each,)

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return self.tensors * math.prod(self.shape)

    @property
    def rings(self) -> int:
        """How many sets of gradients take turns."""
        return min(max(CACHES // (self.elements * BYTES[self.dtype]), FEWEST), MOST)

    @property
    def options(self) -> dict[str, float]:
        """What ours and the limit get."""
        return {"clip_norm": CLIP} if self.clip else {}

    @property
    def bytes_per_element(self) -> float:
        """Bytes that a step moves, the pass of clipping included."""
        return moved(self.family.build(**self.options), len(self.shape), self.dtype)

    def bytes(self, sides: int) -> int:
        """Memory that so many sides need at once, and the arrays that they are copied from."""
        stored, computed = BYTES[self.dtype], BYTES[compute_dtype(self.dtype)]
        each = stored * (1 + self.rings) + computed * self.family.slots
        return self.elements * (sides * each + TEMPORARIES * computed + 4 * (1 + self.rings))

    def arrays(self) -> tuple[list[NDArray[np.float32]], list[list[NDArray[np.float32]]]]:
        """The parameters, and the sets of gradients, that each side copies."""
        rng = np.random.default_rng(0)
        params, *rings = (
            [rng.standard_normal(self.shape, np.float32) for _ in range(self.tensors)] for _ in range(1 + self.rings)
        )
        return params, rings


def moved(opt: gs.Optimizer, ndim: int, dtype: str) -> float:
    """Bytes that a step reads and writes for each element."""
    clipped = opt.clip_norm is not None
    (leaf,) = opt._leaves()  # pyright: ignore[reportPrivateUsage]
    ((_, program),) = leaf.programs(ndim, Reading.SCALED if clipped else Reading.PLAIN)
    return bytes_per_element(program, leaf.storage.formats(program.slots, dtype, dtype)) + clipped * BYTES[dtype]


def check_memory(cases: Sequence[tuple[Case, int]]) -> None:
    """Complain when a case, with this many sides, needs more than its share of the memory that is free."""
    free = available_memory()
    case, sides = max(cases, key=lambda pair: pair[0].bytes(pair[1]))
    if free is not None and (need := case.bytes(sides)) > SHARE * free:
        raise Complaint(
            f"--sizes: {case.family.name} on {case.elements:,} elements needs {bytes_text(need)} for {sides} sides in "
            f"{case.library}, more than {SHARE:.0%} of the {bytes_text(free)} that are free; choose smaller --sizes, "
            "or fewer --peers"
        )
