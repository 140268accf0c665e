"""The steps of one torch optimizer: which parameters take part, what they remember, and who computes.

The truth is torch's: `param_groups` and `state`. What is kept here is made from it, and made anew as soon as anybody
has changed it: loaded a checkpoint, replaced or moved a tensor, set a step count.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch

from gradstep.arrays.library import STAYED
from gradstep.arrays.torch import TORCH
from gradstep.errors import ArgumentTypeError, GradstepError, ShapeError
from gradstep.interrupts import InterruptsHeld
from gradstep.program.graph import Kind
from gradstep.program.newton_schulz import COEFFICIENTS
from gradstep.program.program import Program
from gradstep.torch.groups import Group, Groups, TorchRule
from gradstep.torch.interpreter import interpret

Tensor: TypeAlias = Any  # torch's stubs leave too much of a tensor's face untyped
Gradients: TypeAlias = dict[str, Tensor]

PLAIN: Any = getattr(torch.Tensor, "__torch_dispatch__", None)
KERNEL_DTYPES = (torch.float32, torch.float64)


class Engine:
    """Takes steps on torch's parameter groups and state.

    Args:
        family: the rule of all groups.
        counts: whether torch's state has an entry `step`.
    """

    def __init__(self, family: type[TorchRule], *, counts: bool) -> None:
        self._family, self._counts = family, counts
        self._roster: Roster | None = None
        self._arrangement: Arrangement | None = None

    def step(self, groups: Sequence[Group], state: dict[Any, dict[str, Any]]) -> None:
        """Update every parameter that has a gradient, all or none."""
        roster = self._roster
        if roster is None or not roster.lists(groups):
            roster, self._arrangement = Roster(self._family, groups), None
        self._roster = None  # whatever an error leaves behind is made anew
        gradients = roster.gradients()
        roster.groups.refresh(groups)
        known, self._arrangement = self._arrangement, None
        if known is not None and known.suits(gradients, state):
            self._arrangement = self._try(known, gradients)
        if self._arrangement is None:
            arrangement = Arrangement(roster, groups, gradients, state, counts=self._counts)
            arrangement.step(gradients, state)
            self._arrangement = arrangement
        self._roster = roster

    @staticmethod
    def _try(known: "Arrangement", gradients: Gradients) -> "Arrangement | None":
        """Step as before; None if these gradients are of another sort than those before."""
        try:
            known.step(gradients, {})
        except GradstepError:
            return None
        return known


class Roster:
    """The parameters of all groups, each under a name of its own, and the rules of the groups.

    A name is the one that torch was given, or `group.place`.
    """

    def __init__(self, family: type[TorchRule], groups: Sequence[Group]) -> None:
        self.params: list[Tensor] = _parameters(groups)
        self.numbered = [f"{i}.{j}" for i, group in enumerate(groups) for j in range(len(group["params"]))]
        given: list[str] = [name for group in groups for name in group.get("param_names", ())]
        self.names = given if len(set(given)) == len(self.params) else self.numbered
        owners = (i for i, group in enumerate(groups) for _ in group["params"])
        self.group_of = dict(zip(self.names, owners, strict=True))
        self.groups = Groups(family, groups, self.group_of)
        self._sizes = _sizes(groups)
        self._named = list(zip(self.names, self.params, strict=True))

    def lists(self, groups: Sequence[Group]) -> bool:
        """Whether these are still the parameters of the groups."""
        return _sizes(groups) == self._sizes and _same(_parameters(groups), self.params)

    def gradients(self) -> Gradients:
        """The gradients that there are, by name."""
        return {name: gradient for name, parameter in self._named if (gradient := parameter.grad) is not None}

    def apply(self, gradients: Gradients, parameters: dict[str, Tensor]) -> None:
        """Let kernels take the step."""
        try:
            self.groups.apply_gradients(gradients, parameters)
        except GradstepError as error:
            if self.names is self.numbered:
                error.add_note("torch's parameters go by group.place: '0.3' is param_groups[0]['params'][3]")
            raise

    def describe(self, name: str) -> str:
        """The parameter of this name, for people."""
        group, place = self.numbered[self.names.index(name)].split(".")
        known = f" ({name!r})" if self.names is not self.numbered else ""
        return f"parameter {place} of group {group}{known}"


class Member(NamedTuple):
    """One parameter that takes part in a step."""

    name: str
    parameter: Tensor
    group: Group
    program: Program
    slots: dict[str, Tensor]  # as they stand in torch's state, or will
    new: dict[str, Tensor]  # those of them that do not stand there yet
    taken: int  # steps so far


class Arrangement:
    """The parameters that take part, arranged for steps that are alike.

    Those that kernels reach step together. For the others torch's own operations run the same program; all their new
    values are computed before anything is written.
    """

    def __init__(
        self, roster: Roster, groups: Sequence[Group], gradients: Gradients, state: dict[Any, Any], *, counts: bool
    ) -> None:
        self._roster, self._names = roster, list(gradients)
        parameters = dict(zip(roster.names, roster.params, strict=True))
        self._members = [
            _enlist(roster, groups[roster.group_of[name]], name, parameters[name], gradient, state, counts=counts)
            for name, gradient in gradients.items()
        ]
        fits = roster.groups.family.fits_kernels
        by_kernel = [m for m in self._members if fits(m.group) and _suits_kernels(m, gradients[m.name])]
        self._kernel_params = {member.name: member.parameter for member in by_kernel}
        self._others = [member for member in self._members if member.name not in self._kernel_params]
        self._kernel_slots = [slot for member in by_kernel for slot in member.slots.values()]
        self._taken = 0  # steps since this was arranged
        slots = {member.name: _as_stored(member) for member in by_kernel}
        roster.groups.tell(slots, {member.name: member.taken for member in by_kernel})
        self._clock = Clock([member.taken for member in self._members]) if counts else None
        self._snapshot: Snapshot | None = None

    def suits(self, gradients: Gradients, state: dict[Any, Any]) -> bool:
        """Whether the same parameters take part, and find everything as the last step left it."""
        return (
            self._snapshot is not None
            and list(gradients) == self._names
            and self._snapshot.epochs == self._roster.groups.epochs
            and (self._clock is None or self._clock.undisturbed)
            and self._snapshot.shows(state)
        )

    def step(self, gradients: Gradients, state: dict[Any, Any]) -> None:
        """Take one step; `state` receives what is new, when there is anything."""
        results = [(member, self._compute(member, gradients[member.name])) for member in self._others]
        kernel_gradients = gradients
        if self._others:
            kernel_gradients = {name: gradients[name] for name in self._kernel_params}
        with InterruptsHeld():
            if self._kernel_params:
                self._roster.apply(kernel_gradients, self._kernel_params)
            for member, result in results:
                for place, value in result.items():
                    (member.parameter if place == "w" else member.slots[place]).copy_(value)
            TORCH.wrote(self._kernel_slots)
            self._taken += 1
            if self._clock is not None:
                self._clock.tick()
            if self._snapshot is None:
                self._publish(state)

    def _compute(self, member: Member, gradient: Tensor) -> dict[str, Tensor]:
        """The new values of a parameter and its slots, by torch's own operations."""
        parameter, program = member.parameter, member.program
        _check_gradient(self._roster, member.name, parameter, gradient)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        held = {"w": parameter, **member.slots}
        arrays = {place: array.detach().to(dtype) for place, array in {**held, "g": gradient}.items()}
        leaf = self._roster.groups.leaf(self._roster.group_of[member.name])
        known = {**leaf.scalars(), "t": float(member.taken + self._taken + 1)}
        coefficients = member.group.get("ns_coefficients", COEFFICIENTS)
        new = interpret(program, arrays, known, str(dtype).removeprefix("torch."), coefficients)
        return {place: value.to(held[place].dtype) for place, value in new.items()}

    def _publish(self, state: dict[Any, Any]) -> None:
        """Put into torch's state what was made for the first step, and remember what it looks like."""
        for place, member in enumerate(self._members):
            entries = {"step": self._clock.entries[place]} if self._clock is not None else {}
            entries |= member.new
            if entries:
                state.setdefault(member.parameter, {}).update(entries)
        held = self._kernel_slots + (self._clock.entries if self._clock is not None else [])
        dicts = [state[member.parameter] for member in self._members if member.parameter in state]
        self._snapshot = Snapshot(state, dicts, held, self._roster.groups.epochs)


class Clock:
    """The step counts of all members: one vector, whose elements are the entries `step` of torch's state."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._now = torch.tensor(counts, dtype=count_dtype())
        self._expected = self._now.clone()
        self.entries: list[Tensor] = [self._now[i] for i in range(len(counts))]

    @property
    def undisturbed(self) -> bool:
        """Whether nobody else has set a count."""
        return torch.equal(self._now, self._expected)

    def tick(self) -> None:
        """Count a step of every member."""
        self._now += 1
        self._expected += 1


class Snapshot:
    """What torch's state looked like: the same objects, with their memory in the same place."""

    def __init__(
        self, state: Mapping[Any, Any], dicts: list[dict[str, Any]], held: list[Tensor], epochs: list[int]
    ) -> None:
        self.epochs = epochs
        self._keys, self._values, self._dicts = list(state), list(state.values()), dicts
        self._contents = _contents(dicts)
        self._held, self._watch = held, TORCH.watch(held)
        self._watch.locate(held)

    def shows(self, state: Mapping[Any, Any]) -> bool:
        """Whether it still looks like that."""
        return (
            _same(state.keys(), self._keys)
            and _same(state.values(), self._values)
            and _same(_contents(self._dicts), self._contents)
            and self._watch.locate(self._held) == STAYED
        )


def count_dtype() -> torch.dtype:
    """The dtype in which torch counts steps."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _parameters(groups: Iterable[Group]) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in groups))


def _sizes(groups: Iterable[Group]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _contents(dicts: list[dict[str, Any]]) -> list[Any]:
    values: Callable[[dict[str, Any]], Iterable[Any]] = dict[str, Any].values
    return list(chain.from_iterable(map(values, dicts)))


def _same(some: Collection[Any], others: Collection[Any]) -> bool:
    """Whether these are the same objects; tensors cannot be asked with `==`."""
    return len(some) == len(others) and all(map(is_, some, others))


def _check_gradient(roster: Roster, name: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout is not torch.strided:
        raise ArgumentTypeError(
            f"the gradient of {roster.describe(name)} is sparse ({gradient.layout}); gradstep takes dense ones: "
            "make the layer with sparse=False, or set parameter.grad = parameter.grad.to_dense() before the step"
        )
    if gradient.shape != parameter.shape:
        raise ShapeError(
            f"the gradient of {roster.describe(name)} has shape {tuple(gradient.shape)}, "
            f"but the parameter has {tuple(parameter.shape)}"
        )


def _enlist(
    roster: Roster, group: Group, name: str, parameter: Tensor, gradient: Tensor, state: Mapping[Any, Any], *,
    counts: bool,
) -> Member:  # fmt: skip
    """Find what torch's state knows of a parameter, checked, and make what it lacks."""
    _check_gradient(roster, name, parameter, gradient)
    program = roster.groups.leaf(roster.group_of[name]).program(name, parameter.ndim)
    there: Mapping[str, Any] = state.get(parameter, {})
    slots: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for slot, kind in program.slots.items():
        wanted = _slot_shape(kind, parameter)
        found = there.get(slot)
        if found is None:
            start = roster.groups.family.beginning(group)
            if kind is Kind.FULL:
                found = new[slot] = torch.full_like(parameter, start, requires_grad=False)
            else:
                found = new[slot] = torch.full(wanted, start, dtype=parameter.dtype, device=parameter.device)
        elif tuple(found.shape) != wanted:
            raise ShapeError(
                f"state[{slot!r}] of {roster.describe(name)} has shape {tuple(found.shape)}, expected {wanted}; "
                "was the checkpoint made for another model, or with the parameters in another order?"
            )
        elif kind is not Kind.FULL and not found.is_contiguous():
            found = new[slot] = found.contiguous()
        slots[slot] = found
    taken = int(there.get("step", 0)) if counts else int(not new)
    return Member(name, parameter, group, program, slots, new, taken)


def _slot_shape(kind: Kind, parameter: Tensor) -> tuple[int, ...]:
    """The shape of a slot as torch's state has it: reduced dimensions have the length 1."""
    shape = list(parameter.shape)
    if kind in (Kind.ROW, Kind.COLUMN):
        shape[-1 if kind is Kind.ROW else -2] = 1
    return tuple(shape)


def _as_stored(member: Member) -> dict[str, Tensor]:
    """The slots as kernels want them: the same memory without the reduced dimensions."""
    reduced = {Kind.ROW: -1, Kind.COLUMN: -2}
    kinds = member.program.slots
    return {s: array.squeeze(reduced[kinds[s]]) if kinds[s] in reduced else array for s, array in member.slots.items()}


def _suits_kernels(member: Member, gradient: Tensor) -> bool:
    """Whether kernels reach all arrays of a parameter."""
    parameter, slots = member.parameter, member.slots.values()
    return all(map(_in_reach, (parameter, gradient, *slots))) and all(s.dtype == parameter.dtype for s in slots)


def _in_reach(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in KERNEL_DTYPES
        and tensor.layout is torch.strided
        and getattr(tensor, "__torch_dispatch__", None) is PLAIN  # else its memory need not hold its values
        and not tensor.is_neg()
    )
