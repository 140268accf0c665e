"""One rank's part in a step of several: what holds however the parameters are shared out among the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

import gradstep
from gradstep.arrays.library import OTHER, MemoryLibrary
from gradstep.distributed.council import Facts, word_of
from gradstep.distributed.group import Array
from gradstep.distributed.norm import Found
from gradstep.distributed.partition import Partition
from gradstep.errors import CommunicationError
from gradstep.program.arithmetic import IeeeArithmetic
from gradstep.step.intake import Intake
from gradstep.step.leaf import Leaf
from gradstep.step.plan import Plan
from gradstep.step.scalars import Scales

Routes = Sequence[tuple[Leaf, list[str]]]


class Norm(Protocol):
    """The global norm, of which each rank has a part."""

    def squares(self) -> Array:
        """What this rank says, of the same length on all."""
        ...

    def found(self, everybody: Array, whole: float) -> Found:
        """What the ranks have said together, of gradients that are multiplied by `whole`; may ask them once more."""
        ...


class RankPlan(ABC):
    """One rank's part in a step, planned.

    Attributes:
        plan: the tables of what this rank steps itself.
        facts: what all ranks must have in common.
        word: stands for the facts.
    """

    plan: Plan
    facts: Facts
    word: int

    def __init__(self, library: MemoryLibrary, routes: Routes, names: Sequence[str]) -> None:
        self.library, self.names = library, sorted(names)
        self._routes = routes
        self._examples = [(leaf, {leaf.group(name): name for name in reversed(names)}) for leaf, names in routes]
        self._parameters: Sequence[Any] = ()

    def _adopt(self, plan: Plan) -> None:
        """Take these tables, when everything else is known."""
        self.plan = plan
        self._watch_slots = self.library.watch(plan.shown_slots)
        self.facts = self._describe()
        self.word = word_of(self.facts)

    def _sorted(self, tree: Mapping[str, Any]) -> list[Any]:
        return [tree[name] for name in self.names]

    def finds(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> bool:
        """Whether these are the parameters that were planned, with their slots, and gradients like those."""
        shown = self._watch_slots.locate(self.plan.shown_slots) != OTHER
        return (
            self._finds_arrays(params, grads)
            and shown
            and np.array_equal(self._watch_slots.addresses, self.plan.shown_addresses)
        )

    @property
    @abstractmethod
    def norm(self) -> Norm:
        """The norm of the gradients of all ranks."""

    @abstractmethod
    def _finds_arrays(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> bool:
        """The same without the slots."""

    # What all ranks must have in common

    @abstractmethod
    def _told_of_arrays(self) -> Facts:
        """What is said of gradients and parameters."""

    @abstractmethod
    def _ndim(self, name: str) -> int:
        """How many axes the whole parameter has."""

    @abstractmethod
    def _told_of_owners(self, name: str) -> str:
        """What is said of who steps a parameter."""

    def _describe(self) -> Facts:
        facts = {"the version of gradstep": gradstep.__version__, **self._told_of_arrays()}
        for leaf, examples in self._examples:
            for name in examples.values():
                settings = leaf.settings_of(name)
                for option, chosen in zip(settings.given, settings.static, strict=True):
                    facts[f"{option} in the rule of params[{name!r}]"] = _spelled(chosen)
        for number, (leaf, names) in enumerate(self._routes):
            for name in names:
                program = leaf.program(name, self._ndim(name))
                word = word_of(repr(program.key))
                facts[f"the rule of params[{name!r}]"] = f"{program.name} {number} ({word:x})"
                facts[f"the patterns that params[{name!r}] matches"] = repr(leaf.group(name))
                facts[f"the storage of params[{name!r}]"] = str(leaf.storage.options)
                facts[f"the shares of params[{name!r}]"] = self._told_of_owners(name)
        return facts

    def coming(self) -> Facts:
        """What the coming step depends on and may change from step to step."""
        return {
            f"{hyperparameter} of params[{name!r}]": repr(value)
            for leaf, examples in self._examples
            for group, name in examples.items()
            for hyperparameter, value in leaf.scalars(group).items()
        }

    @abstractmethod
    def beginning(self, known: Partition, named: Mapping[str, Any]) -> Facts:
        """What parameters that are not `known` begin with."""

    # What is done for each step

    @abstractmethod
    def average(self, grads: Mapping[str, Any], params: Mapping[str, Any], intake: Intake, micro: float) -> None:
        """Bring the gradients to where they are needed.

        What ends a round of micro-batches, weighed by `micro`, joins the sum of the others first.
        """

    @abstractmethod
    def _local(self, params: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What this rank steps and with which gradients, in the order of the plan."""

    def prepare(self, params: Mapping[str, Any], scales: Scales) -> None:
        """Run all that writes nothing but scratch."""
        self._parameters, gradients = self._local(params) if self._has_scratch else ((), ())
        self.plan.gather(self._parameters, gradients)
        with IeeeArithmetic():
            self.plan.prepare(scales)
        self._staged = [share.stage() for share in self.plan.shares]

    @property
    def _has_scratch(self) -> bool:
        return any(batch.scratch for batch in self.plan.batches)

    @abstractmethod
    def _written(self, params: Mapping[str, Any]) -> list[Any]:
        """The arrays among the parameters that autograd keeps an account of."""

    def commit(self, params: Mapping[str, Any]) -> None:
        """Write what this rank steps. Nothing in here can fail."""
        self.library.wrote([*self._written(params), *self.plan.shown_slots])
        self.plan.commit(self._parameters)
        for share, state in zip(self.plan.shares, self._staged, strict=True):
            share.advance(state)
            share.leaf.cut = True
        self._parameters, self._staged = (), []

    def spread(self, params: Mapping[str, Any]) -> None:
        """Bring to other ranks what they need of this one's.

        Raises:
            CommunicationError: some have come and others not.
        """
        try:
            self._spread(params)
        except CommunicationError:
            raise
        except Exception as error:
            raise CommunicationError(
                "the step has been taken, but parameters could not be brought to all ranks, so that they differ "
                f"between ranks now ({type(error).__name__}: {error}); start again from the last checkpoint"
            ) from error

    @abstractmethod
    def _spread(self, params: Mapping[str, Any]) -> None:
        """The same, with any error."""


def _spelled(chosen: object) -> str:
    """What `Settings.static` says of one hyperparameter, the same in every process."""
    if not isinstance(chosen, tuple):
        return "0, which leaves it out" if chosen else "kept"
    _, value = cast("tuple[type, object]", chosen)
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else repr(value)
