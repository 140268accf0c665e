"""An optimizer around another one, which has everything that the wrapper does not say otherwise."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from gradstep.errors import ArgumentTypeError, OutOfRangeError
from gradstep.optimizer import OWN, Optimizer
from gradstep.persistence import Loading
from gradstep.report import Rate, Report
from gradstep.step.leaf import Leaf
from gradstep.step.outcome import Outcome

if TYPE_CHECKING:
    from gradstep.checkpoint.differences import Difference


class Wrapper(Optimizer):
    """Hyperparameters, options, state, counters and `report` are the wrapped optimizer's."""

    _mine: ClassVar[frozenset[str]] = frozenset({"_inner", *OWN})
    """The attributes that are the wrapper's own."""
    _inner: Optimizer

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._inner

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's rate; it may be set to a number or a schedule."""
        return getattr(self._inner, "learning_rate", None)

    @learning_rate.setter
    def learning_rate(self, value: object) -> None:
        setattr(self._inner, "learning_rate", value)  # noqa: B010

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of the wrapped optimizer; each is also an attribute."""
        return cast("Any", self._inner).hyperparameters

    @property
    def report(self) -> Report | None:
        """What the last step of the wrapped optimizer did; None before the first."""
        return self._inner.report

    @property
    def step(self) -> int:
        return self._inner.step

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        return self._inner.state

    @property
    def steps(self) -> dict[str, int]:
        return self._inner.steps

    def _coming_rate(self) -> Rate:
        return self._inner._coming_rate()

    def _leaves(self) -> list[Leaf]:
        return self._inner._leaves()

    def _route(self, params: Mapping[str, Any], *, remember: bool = True) -> list[tuple[Leaf, list[str]]]:
        return self._inner._route(params, remember=remember)

    def _parts(
        self, grads: Mapping[str, Any], params: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self._inner._parts(grads, params)

    def _titles(self) -> list[str]:
        return self._inner._titles()

    def _forget_routes(self) -> None:
        self._inner._forget_routes()

    def _check_options(self) -> None:
        self._inner._check_options()

    def _family(self) -> list[Optimizer]:
        return [self, *self._inner._family()]

    def _save_as(self, whole: Optimizer, path: str | os.PathLike[str], params: object, keep: int | None) -> None:
        self._inner._save_as(whole, path, params, keep)

    def _load_as(
        self, whole: Optimizer, path: str | os.PathLike[str], loading: Loading, stacklevel: int
    ) -> "list[Difference]":
        return self._inner._load_as(whole, path, loading, stacklevel + 1)

    def _load_state_as(self, whole: Optimizer, state_dict: Mapping[str, Any], loading: Loading) -> "list[Difference]":
        return self._inner._load_state_as(whole, state_dict, loading)

    def _count_step(self, outcome: Outcome | None = None) -> None:
        self._inner._count_step(outcome)

    if not TYPE_CHECKING:  # hyperparameters, options and whatever else the wrapped optimizer has

        def __getattr__(self, name: str) -> Any:
            if name in type(self)._mine:
                raise AttributeError(name)
            return getattr(self._inner, name)

        def __setattr__(self, name: str, value: object) -> None:
            if name in type(self)._mine or isinstance(getattr(type(self), name, None), property):
                object.__setattr__(self, name, value)
            else:
                setattr(self._inner, name, value)


def checked_every(every: object, of: str) -> int:
    """The number `every`, or an error that says what it must be."""
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)):
        raise ArgumentTypeError(f"every must be an integer, the number of {of}, got {every!r}")
    number = int(cast("int", every))
    if number < 1:
        raise OutOfRangeError(f"every must be at least 1, got {number}")
    return number
