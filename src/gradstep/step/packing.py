"""Values of a rule to and from the arrays in which they are stored, for arrays that never change."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstep.arrays.library import FunctionalLibrary
from gradstep.program.formats import Format, codes_of, master_of, scales_of
from gradstep.program.noise import tensor_key
from gradstep.program.program import Program
from gradstep.program.rounding import decode, encode, key_words, noise, round_narrow


class Packing:
    """How the arrays of one parameter are stored.

    Args:
        library: whose arrays they are.
        program: the parameter's program.
        formats: how `w` and the slots are stored.
        dtype: the compute dtype.
    """

    def __init__(self, library: FunctionalLibrary, program: Program, formats: Mapping[str, Format], dtype: str) -> None:
        self._on, self._by_row, self._formats, self._dtype = library, program.factored, formats, dtype
        self._places = ["w", *program.slots]

    def unpack(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `w` and the slots, in the compute dtype."""
        return {place: self._unpacked(place, self._formats[place], arrays) for place in self._places}

    def _unpacked(self, place: str, kept: Format, arrays: Mapping[str, Any]) -> Any:
        on = self._on
        if kept.coded:
            value = decode(on, kept, arrays[codes_of(place)], arrays[scales_of(place)], by_row=self._by_row)
            return on.cast(value, self._dtype)
        value = on.cast(arrays[place], self._dtype)
        if not kept.master:
            return value
        # A parameter that somebody else has written no longer is what its copy rounds to; then it counts itself.
        master = arrays[master_of(place)]
        rounded = on.cast(on.cast(master, kept.dtype), self._dtype)
        return on.call("where", on.bits(rounded) == on.bits(value), master, value)

    def pack(self, values: Mapping[str, Any], keys: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The arrays that hold these values; `keys` gives what the noise of those rounded at random begins with."""
        packed: dict[str, Any] = {}
        for place, value in values.items():
            packed |= self._packed(place, self._formats[place], value, keys.get(place))
        return packed

    def _packed(self, place: str, kept: Format, value: Any, key: Sequence[Any] | None) -> dict[str, Any]:
        on = self._on
        if kept.dtype == self._dtype:
            return {place: value}
        value = on.cast(value, "float32")
        words = None if key is None else noise(on, key, value.shape)
        if kept.coded:
            codes, scales = encode(on, kept, value, words, by_row=self._by_row)
            return {codes_of(place): codes, scales_of(place): scales}
        rounded = round_narrow(on, kept, value, words)
        return {place: on.cast(rounded, kept.dtype), **({master_of(place): value} if kept.master else {})}


def rounded_places(formats: Mapping[str, Format]) -> list[str]:
    """The places that are rounded at random."""
    return [place for place, kept in formats.items() if kept.stochastic]


def round_keys(names: Sequence[str], places: Sequence[Sequence[str]], seed: int, step: int) -> np.ndarray[Any, Any]:
    """What the noise of all places of all parameters begins with, in a row each."""
    keys = [
        key_words(tensor_key(seed, name), place, step)
        for name, each in zip(names, places, strict=True)
        for place in each
    ]
    return np.array(keys, np.uint32).reshape(-1, 3)
