"""What all bridges share: a state dict made of foreign state, and an optimizer's state copied for others."""
# pyright: reportPrivateUsage=false

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradstep
from gradstep.accumulate import Accumulate
from gradstep.arrays.stored import copy_of
from gradstep.checkpoint.nodes import Document, Held, RuleNode
from gradstep.checkpoint.snapshot import DOCUMENT, TENSORS, is_ours
from gradstep.checkpoint.values import Encoder
from gradstep.errors import ArgumentTypeError, ConfigurationError, listing
from gradstep.multi import MultiOptimizer
from gradstep.optimizer import Optimizer
from gradstep.rules.base import RuleOptimizer
from gradstep.step.leaf import rule_arguments


class Entry(NamedTuple):
    """The state of one parameter: its step count, and its slots by the core's names."""

    steps: int
    slots: Mapping[str, Any]


def state_dict_of(
    family: str | None, slots: Sequence[str], step: int, state: Mapping[str, Entry], *,
    hyperparameters: Mapping[str, Any] | None = None, stateless: Iterable[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """A state dict like that of `Optimizer.state_dict`; `family` None fits every rule with these slots."""
    held = {name: Held(steps, {slot: f"{name}.{slot}" for slot in own}) for name, (steps, own) in state.items()}
    tensors = {f"{name}.{slot}": array for name, (_, own) in state.items() for slot, array in own.items()}
    encode = Encoder().encode
    known = {name: encode(value) for name, value in (hyperparameters or {}).items()}
    node = RuleNode(family, family is not None, tuple(slots), step, held, known)
    return {DOCUMENT: Document(gradstep.__version__, node, {}, tuple(stateless)).to_json(), TENSORS: tensors}


def whole_number(value: Any, what: str) -> int:
    """A step count, which may be an array of one element.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        count = float(value)
    except (TypeError, ValueError):
        count = -1.0
    if not (count >= 0 and count.is_integer()):
        raise ConfigurationError(f"{what} must be a number of steps, got {value!r}")
    return int(count)


@dataclass(frozen=True)
class Copied:
    """The state of an optimizer with a rule, copied.

    Attributes:
        optimizer: whose it is.
        step: its count.
        state: each parameter's count and slots.
    """

    optimizer: RuleOptimizer
    step: int
    state: Mapping[str, Entry]

    @property
    def family(self) -> str:
        """The name of its class."""
        return type(self.optimizer).__name__

    @property
    def is_ours(self) -> bool:
        """Whether that is a class of gradstep, not a rule of a user."""
        return is_ours(type(self.optimizer))

    @property
    def uses_counts(self) -> bool:
        """Whether a parameter's step count changes its steps."""
        return rule_arguments(type(self.optimizer).rule)[1] and getattr(self.optimizer, "bias_correction", True)

    def common_count(self, other: str) -> int:
        """The one step count of all parameters, for libraries that keep no more.

        Raises:
            ConfigurationError: parameters differ, and it matters.
        """
        if not self.uses_counts or not self.state:
            return self.step
        names: dict[int, list[str]] = {}
        for name, entry in self.state.items():
            names.setdefault(entry.steps, []).append(name)
        if len(names) > 1:
            counted = "; ".join(f"{count} steps: {listing(some)}" for count, some in sorted(names.items()))
            raise ConfigurationError(
                f"{other} keeps one step count for all parameters, but {self.family} corrects by each one's own, and "
                f"they differ: {counted}; convert when all parameters have taken equally many steps"
            )
        return next(iter(names))


def copied(optimizer: object, bridge: str) -> Copied:
    """Copy the state of an optimizer with a rule, or of the one that an `Accumulate` wraps.

    Raises:
        ArgumentTypeError: no optimizer of gradstep's core.
        ConfigurationError: several rules, a round under way, or narrow storage.
    """
    if isinstance(optimizer, Accumulate):
        if optimizer.micro_step:
            raise ConfigurationError(
                f"{bridge} would lose the round that {optimizer!r} has begun, micro_step is {optimizer.micro_step}; "
                "finish the round, or drop it with opt.discard()"
            )
        optimizer = optimizer.optimizer
    if isinstance(optimizer, MultiOptimizer):
        raise ConfigurationError(
            f"{bridge} converts an optimizer with one rule, got {optimizer!r}; convert each of opt.optimizers "
            "for itself"
        )
    if not isinstance(optimizer, RuleOptimizer):
        raise ArgumentTypeError(
            f"{bridge} converts an optimizer of gradstep's core such as gradstep.AdamW, got {optimizer!r} "
            f"({type(optimizer).__module__}.{type(optimizer).__name__})"
        )
    rule: RuleOptimizer = optimizer
    return rule._exclusively(lambda: _copy(rule, rule, bridge))


def _copy(optimizer: Optimizer, rule: RuleOptimizer, bridge: str) -> Copied:
    (leaf,) = optimizer._leaves()
    _refuse_narrow(leaf.entries, rule_arguments(type(rule).rule)[0], bridge)
    steps = leaf.steps
    state = {
        name: Entry(steps[name], {slot: copy_of(array, f"state[{name!r}][{slot!r}]") for slot, array in slots.items()})
        for name, slots in leaf.entries.items()
    }
    return Copied(rule, leaf.step, state)


def _refuse_narrow(entries: Mapping[str, Mapping[str, Any]], slots: Sequence[str], bridge: str) -> None:
    for name, held in entries.items():
        strange = [array for array in held if array not in slots]
        if strange:
            raise ConfigurationError(
                f"{bridge}: state[{name!r}] has {listing(strange)}, 8-bit codes or float32 copies of parameters, which "
                f'no other library reads; expected only {listing(slots)}: use an optimizer without slot_dtype="int8" '
                "and master_weights"
            )
