"""How one optimizer keeps parameters and slots: its options, checked, and the arrays that follow from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, cast

import numpy as np

from gradstep.errors import ArgumentTypeError, ConfigurationError, DtypeError, RuleError
from gradstep.program.formats import (
    NARROW,
    QUANTUM,
    SIGNS,
    Format,
    Sign,
    compute_dtype,
    master_of,
    scales_of,
)
from gradstep.program.graph import Kind
from gradstep.program.noise import MASK
from gradstep.program.program import Program

SlotDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "int8"]
SlotDtypes: TypeAlias = SlotDtype | Mapping[str, SlotDtype] | None
Rounding: TypeAlias = Literal["nearest", "stochastic"]

SLOT_DTYPES = ("float32", "bfloat16", "float16", "int8")
ROUNDINGS = ("nearest", "stochastic")


class StorageOptions(NamedTuple):
    """The options as they were given."""

    slot_dtype: SlotDtypes = None
    rounding: Rounding = "nearest"
    master_weights: bool = False
    seed: int = 0


class Part(NamedTuple):
    """One array of a parameter's state."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    """`FULL` for one element for each of the parameter's, in their order; `LEAD` for scales, one per block."""


class Storage:
    """What the storage options of one optimizer mean for its arrays.

    Args:
        owner: the optimizer's name.
        slots: the slots that its rule may keep, and their kinds.
        signs: what is known about the values of slots.
        options: as they were given; checked here.
    """

    def __init__(
        self, owner: str, slots: Mapping[str, Kind], signs: Mapping[str, Sign], options: StorageOptions
    ) -> None:
        given = options.slot_dtype
        self.options = options._replace(slot_dtype=dict(given)) if isinstance(given, Mapping) else options
        self._signs: dict[str, Sign] = {slot: signs.get(slot, "unknown") for slot in slots}
        self._dtypes = _slot_dtypes(owner, slots, options.slot_dtype)
        _check_rest(owner, options)
        self._stochastic, self._masters = options.rounding == "stochastic", options.master_weights

    def formats(self, slots: Iterable[str], parameter: str, gradient: str) -> dict[str, Format]:
        """How `w`, `g` and these slots are stored, given the dtypes of parameter and gradient."""
        narrow, compute = parameter in NARROW, compute_dtype(parameter)
        master = narrow and self._masters
        formats = {
            "w": Format(parameter, stochastic=self._stochastic and narrow and not master, master=master),
            "g": Format(gradient),
        }
        for slot in slots:
            dtype = self._dtypes.get(slot, compute)
            stochastic = dtype == "int8" or (self._stochastic and dtype in NARROW)
            formats[slot] = Format(dtype, self._signs[slot], stochastic)
        return formats

    def array_names(self) -> frozenset[str]:
        """The arrays that any parameter may have, by their names."""
        names = {name for slot in self._signs for name in Format(self._dtypes.get(slot, "float32")).parts(slot)}
        return frozenset(names | ({master_of("w")} if self._masters else set()))


def parts_of(program: Program, formats: Mapping[str, Format], shape: Sequence[int]) -> list[Part]:
    """The arrays of state that a parameter of this shape has: its slots, and the copy of the parameter."""
    parts: list[Part] = []
    for place in (*program.slots, "w"):
        kind = program.slots.get(place, Kind.FULL)
        for name, dtype in formats[place].parts(place).items():
            if name == scales_of(place):
                parts.append(Part(name, (count_scales(shape, by_row=program.factored),), dtype, Kind.LEAD))
            elif name != "w":
                parts.append(Part(name, slot_shape(kind, shape), dtype, kind))
    return parts


def slot_shape(kind: Kind, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which a slot is stored."""
    if kind is Kind.ROW:
        return tuple(shape[:-1])
    if kind is Kind.COLUMN:
        return (*shape[:-2], shape[-1])
    return tuple(shape)


def count_scales(shape: Sequence[int], *, by_row: bool) -> int:
    """How many blocks of codes an array has; a rule with row or column statistics begins anew at each row."""
    if by_row:
        return math.prod(shape[:-1]) * -(-shape[-1] // QUANTUM)
    return -(-math.prod(shape) // QUANTUM)


def are_ordered(program: Program, formats: Mapping[str, Format]) -> bool:
    """Whether arrays must be read in C order."""
    return program.ordered or any(kept.ordered for kept in formats.values())


def _slot_dtypes(owner: str, slots: Mapping[str, Kind], given: object) -> dict[str, str]:
    """The dtype of every slot that has not the computation's."""
    if given is None:
        return {}
    if isinstance(given, str):
        wanted: dict[str, object] = dict.fromkeys(slots, given)
    elif isinstance(given, Mapping):
        wanted = dict(cast("Mapping[str, object]", given))
    else:
        raise ArgumentTypeError(
            f"{owner}'s slot_dtype must be one of {_quoted(SLOT_DTYPES)}, or a mapping from slot to one, got {given!r}"
        )
    unknown = [slot for slot in wanted if slot not in slots]
    if unknown:
        raise ConfigurationError(
            f"{owner}'s slot_dtype names {_quoted(unknown)}; its slots are {_quoted(slots) or 'none'}, and those left "
            "out have the dtype of the computation"
        )
    for slot, dtype in wanted.items():
        if dtype not in SLOT_DTYPES:
            where = "" if isinstance(given, str) else f" for {slot!r}"
            raise DtypeError(f"{owner}'s slot_dtype{where} must be one of {_quoted(SLOT_DTYPES)}, got {dtype!r}")
    small = [slot for slot, dtype in wanted.items() if dtype == "int8" and slots[slot] is not Kind.FULL]
    if small:
        able = {slot: "int8" for slot, kind in slots.items() if kind is Kind.FULL}
        raise ConfigurationError(
            f"{owner}'s {' and '.join(map(repr, small))} cannot be int8: means of rows and columns are small already, "
            f"and every element is divided by them; slots that can, where there are any: slot_dtype={able!r}"
        )
    return cast("dict[str, str]", wanted)


def _check_rest(owner: str, options: StorageOptions) -> None:
    rounding, masters, seed = cast("tuple[object, object, object]", options[1:])
    if not isinstance(rounding, str) or rounding not in ROUNDINGS:
        raise ConfigurationError(f"{owner}'s rounding must be one of {_quoted(ROUNDINGS)}, got {rounding!r}")
    if not isinstance(masters, bool):
        raise ConfigurationError(f"{owner}'s master_weights must be True or False, got {masters!r}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(cast("int", seed)) <= MASK:
        raise ConfigurationError(f"{owner}'s seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")


def check_signs(owner: str, slots: Sequence[str], signs: Mapping[str, object]) -> None:
    """Raise `RuleError` for a declaration of signs that says nothing."""
    for slot, sign in signs.items():
        if slot not in slots:
            raise RuleError(f"{owner}: signs names {slot!r}, but the slots are {_quoted(slots) or 'none'}")
        if sign not in SIGNS:
            raise RuleError(f"{owner}: the sign of {slot!r} must be one of {_quoted(SIGNS)}, got {sign!r}")


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))
