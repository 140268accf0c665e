"""The sides of a case: our step, and the limit; both through gradstep's own kernels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import gradstep as gs
from gradstep.cli.bench.case import Case
from gradstep.cli.bench.libraries import Library

Kind = Literal["ours", "limit", "peer"]


@dataclass(frozen=True)
class Stage:
    """What a side starts from: copies of its own, equal to those of the other sides."""

    case: Case
    library: Library
    params: list[Any]
    rings: list[list[Any]]


class LeftOut(Exception):  # noqa: N818 (nothing is wrong)
    """A side cannot take part in a case; the message says why."""


class Ring:
    """Sets of gradients that take turns; `now` is the one whose turn it is."""

    def __init__(self, sets: Sequence[Any]) -> None:
        self._sets = cycle(sets)
        self.turn()

    def turn(self) -> None:
        """The next one's turn has come."""
        self.now = next(self._sets)


def by_name(arrays: Iterable[Any]) -> dict[str, Any]:
    """Arrays under names, for those who take no lists."""
    return {str(place): array for place, array in enumerate(arrays)}


@dataclass(frozen=True)
class Action:
    """A step that is timed, what comes before it and is not, and the parameters as they are then."""

    prepare: Callable[[], object]
    step: Callable[[], object]
    params: Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Side:
    """Who takes turns: a name, and how its step is made."""

    name: str
    kind: Kind
    make: Callable[[Stage], Action]


def our_sides(case: Case) -> list[Side]:
    """Our step and the limit."""
    return [
        Side("gradstep", "ours", lambda stage: _through_gradstep(case.family.build, stage)),
        Side("limit", "limit", lambda stage: _through_gradstep(case.family.limit, stage)),
    ]


def _through_gradstep(build: Callable[..., gs.Optimizer], stage: Stage) -> Action:
    library = stage.library
    opt = build(**stage.case.options, **library.options)
    params, grads = by_name(stage.params), Ring([by_name(ring) for ring in stage.rings])

    def step() -> None:
        opt.apply_gradients(grads.now, params)

    def step_and_wait() -> None:
        step()
        library.wait([*params.values(), *(slot for slots in opt.state.values() for slot in slots.values())])

    return Action(grads.turn, step_and_wait if library.waits else step, params.values)
