"""The parameter groups of one optimizer: a rule for each, all of them stepping as one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.options import DEFAULTS
from gradstep.report import Rate
from gradstep.rules.base import RuleOptimizer
from gradstep.state import StateView
from gradstep.step.leaf import Leaf
from gradstep.step.outcome import Outcome

Group = dict[str, Any]


class TorchRule(RuleOptimizer):
    """A rule in torch's notation: its fields are entries of a parameter group, its slots those of torch's state."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__name__ = cls.__name__.removesuffix("Rule")  # messages name what the user made

    @classmethod
    def fields_of(cls, group: Group) -> dict[str, Any]:
        """The values of the fields in a parameter group, as plain numbers and configuration."""
        return {name: plain(group[name], name) for name in cls._fields}

    @classmethod
    def beginning(cls, group: Group) -> float:
        """Where slots start."""
        return 0.0

    @classmethod
    def fits_kernels(cls, group: Group) -> bool:
        """Whether kernels can follow the values of a group; torch's operations follow all."""
        return True


class Groups(Optimizer):
    """One rule for each parameter group. What the rules remember is told them by whoever owns torch's state.

    Args:
        family: the rule of all groups.
        groups: torch's `param_groups`.
        group_of: the group of each parameter, by its name.
    """

    def __init__(self, family: type[TorchRule], groups: Sequence[Group], group_of: Mapping[str, int]) -> None:
        super().__init__(**DEFAULTS)
        self._kind = family
        self._given = [family.fields_of(group) for group in groups]
        self._rules = [family(**given) for given in self._given]
        rules: list[Optimizer] = [*self._rules]
        self._all_leaves = [leaf for rule in rules for leaf in rule._leaves()]
        self._group_of = group_of
        self._step = 0

    def refresh(self, groups: Iterable[Group]) -> None:
        """Adopt what schedulers, or anybody else, have written into the groups."""
        for place, (rule, group) in enumerate(zip(self._rules, groups, strict=True)):
            now, before = rule.fields_of(group), self._given[place]
            if now != before:
                rule.set_hyperparameters({name: value for name, value in now.items() if value != before[name]})
                self._given[place] = now

    def tell(self, slots: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> None:
        """Replace what the rules know: the slots of each parameter, and how many steps it has taken."""
        shares = self._route(slots)
        for leaf, names in shares:
            entries = {name: dict(slots[name]) for name in names}
            ledger = {name: row for row, name in enumerate(names)}
            leaf.adopt((entries, ledger, np.array([counts[name] for name in names], np.int64)))

    def leaf(self, group: int) -> Leaf:
        """The rule's side of a step, for one group."""
        return self._leaves()[group]

    @property
    def family(self) -> type[TorchRule]:
        """The rule of all groups."""
        return self._kind

    @property
    def size(self) -> int:
        """How many groups there are."""
        return len(self._rules)

    @property
    def epochs(self) -> list[int]:
        """Equal as long as nothing but numbers has changed."""
        return [leaf.epoch for leaf in self._leaves()]

    @property
    def step(self) -> int:
        return self._step

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        return StateView(self._leaves())

    @property
    def steps(self) -> dict[str, int]:
        return {name: count for leaf in self._leaves() for name, count in leaf.steps.items()}

    def _leaves(self) -> list[Leaf]:
        return self._all_leaves

    def _route(self, params: Mapping[str, Any], *, remember: bool = True) -> list[tuple[Leaf, list[str]]]:
        shares: list[list[str]] = [[] for _ in self._rules]
        for name in params:
            shares[self._group_of[name]].append(name)
        return list(zip(self._leaves(), shares, strict=True))

    def _family(self) -> list[Optimizer]:
        return [self]  # nobody else knows the rules

    def _count_step(self, outcome: Outcome | None = None) -> None:
        self._step += 1

    def _check_options(self) -> None:
        pass

    def _forget_routes(self) -> None:
        pass

    def _titles(self) -> list[str]:
        return [f"[{group}]" for group in range(self.size)]

    def _coming_rate(self) -> Rate:
        return None


def plain(value: object, name: str) -> Any:
    """A value of a parameter group without tensors: torch allows them of one element."""
    if isinstance(value, Mapping):
        raise ArgumentTypeError(
            f"{name} must be one value, got the mapping {value!r}; as in torch, parameters that differ belong to "
            "different parameter groups"
        )
    if isinstance(value, (tuple, list)):
        return tuple(plain(part, name) for part in cast("Iterable[object]", value))
    numel: Callable[[], int] | None = getattr(value, "numel", None)
    if numel is None:
        return value
    if numel() != 1:
        raise ConfigurationError(f"{name} must be a number or a tensor of one element, got one of {numel()}")
    return cast("Any", value).item()
