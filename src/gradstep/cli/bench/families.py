"""The families that are measured: how each is built, and the rule that is the limit of its step.

A limit reads and writes the same arrays in the same passes, and computes next to nothing. Its factors are scalars of
the run, so that no compiler can leave a pass out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradstep as gs

LARGEST_MUON = 1 << 20  # elements of a matrix


@gs.rule
def limit_of_one_slot(w: Any, g: Any, m: Any, *, rate: Any = 1e-3, keep: Any = 1.0) -> Any:
    """Reads w g m, writes w m."""
    return w + rate * g, keep * m


@gs.rule
def limit_of_two_slots(w: Any, g: Any, m: Any, v: Any, *, rate: Any = 1e-3, keep: Any = 1.0) -> Any:
    """Reads w g m v, writes w m v."""
    return w + rate * g, keep * m, keep * v


@gs.rule
def limit_of_adafactor(w: Any, g: Any, *, rate: Any = 1e-3) -> Any:
    """Reads w g; reads g; reads w g, writes w."""
    first = gs.mean(w + rate * g)
    second = gs.mean(g * first)
    return w + second * rate * g


@gs.rule
def limit_of_muon(w: Any, g: Any, v: Any, *, rate: Any = 1e-3, keep: Any = 1.0) -> Any:
    """Muon's two passes, without an iteration between them."""
    v = keep * v + rate * (g + rate * w)
    return w - rate * gs.orthogonalize(v, 0), v


@dataclass(frozen=True)
class Family:
    """An optimizer family.

    Attributes:
        name: its name.
        build: makes the optimizer, given its options.
        limit: makes the optimizer that is the limit.
        slots: how many slots of the parameter's size it has.
        matrices: whether it is measured on square matrices.
        largest: the largest tensor that it is measured on.
    """

    name: str
    build: Callable[..., gs.Optimizer]
    limit: Callable[..., gs.Optimizer]
    slots: int
    matrices: bool = False
    largest: int | None = None


FAMILIES = (
    Family("SGD", partial(gs.SGD, 1e-3, momentum=0.9), limit_of_one_slot, 1),
    Family("RMSprop", partial(gs.RMSprop, 1e-3), limit_of_one_slot, 1),
    Family("Adagrad", partial(gs.Adagrad, 1e-3), limit_of_one_slot, 1),
    Family("AdaDelta", partial(gs.AdaDelta, 1.0), limit_of_two_slots, 2),
    Family("Adam", partial(gs.Adam, 1e-3, bias_correction=True), limit_of_two_slots, 2),
    Family("AdamW", partial(gs.AdamW, 1e-3, bias_correction=True), limit_of_two_slots, 2),
    Family("Adamax", partial(gs.Adamax, 1e-3), limit_of_two_slots, 2),
    Family("Lion", partial(gs.Lion, 1e-4), limit_of_one_slot, 1),
    Family("Adafactor", partial(gs.Adafactor, 1e-3), limit_of_adafactor, 0, matrices=True),
    Family("Muon", partial(gs.Muon, 1e-3), limit_of_muon, 1, matrices=True, largest=LARGEST_MUON),
)
BY_NAME = {family.name.lower(): family for family in FAMILIES}
