"""Anchors: where parameters stood at the last outer step, in the compute dtype, and the way between both."""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradstep.arrays.library import MemoryLibrary, recognise
from gradstep.arrays.memory import Memory
from gradstep.distributed.dtensors import is_dtensor
from gradstep.distributed.group import Array
from gradstep.errors import ArgumentTypeError, DtypeError, ShapeError
from gradstep.program.formats import FLOATS, NARROW, compute_dtype
from gradstep.program.rounding import narrowed, widened
from gradstep.step.match import REMEDY, check_parameter
from gradstep.step.overlap import refuse_overlap

CHUNK = 1 << 16  # elements that are rounded at once where memory for more may be lacking


class Trained(NamedTuple):
    """The parameters of a call that are trained: real numbers that are not frozen, in the order of their names."""

    library: MemoryLibrary
    arrays: dict[str, Any]
    memories: dict[str, Memory]


def trained(named: Mapping[str, Any], chosen: Mapping[str, Any]) -> Trained:
    """Those among `chosen`, checked that they can be written, apart from all others; integers are left out.

    Raises:
        ArgumentTypeError: arrays never change, are DTensors, or belong to several libraries.
        AliasedParametersError: some lie on each other.
    """
    spread = next((name for name, array in chosen.items() if is_dtensor(array)), None)
    if spread is not None:
        raise ArgumentTypeError(
            f"params[{spread!r}] is a DTensor, and DiLoCo averages parameters that are whole on every rank; pass plain "
            "tensors"
        )
    library = recognise(params=chosen)
    if library.in_place is False:
        raise ArgumentTypeError(
            f"DiLoCo steps arrays of NumPy and PyTorch, not of {library.name}, whose arrays never change"
        )
    memories: dict[str, Memory] = {}
    for name in sorted(chosen):
        with contextlib.suppress(DtypeError):
            if library.describe(chosen[name], f"params[{name!r}]").dtype in FLOATS:
                memories[name] = check_parameter(library, name, chosen[name])
    arrays = {name: chosen[name] for name in memories}
    refuse_overlap(library, arrays, {name: array for name, array in named.items() if name not in arrays})
    return Trained(library, arrays, memories)


class View:
    """One parameter as an outer step sees it.

    Args:
        name: of the parameter.
        stored: its elements, floats of 16 bits as their bits.
        dtype: of the parameter.
        master: the float32 copy that the optimizer keeps of it, if there is one.
    """

    def __init__(self, name: str, stored: Array, dtype: str, master: Array | None) -> None:
        self._name, self._stored, self._dtype, self.master = name, stored, dtype, master
        self.computed = compute_dtype(dtype)

    def anchor(self) -> Array:
        """The parameter as it is, copied to the compute dtype."""
        return np.array(self._value(), self.computed, order="C")

    def check(self, anchor: Array) -> None:
        """Raise `ShapeError` for a parameter that is not what it was when it was anchored."""
        if (anchor.shape, anchor.dtype) != (self._stored.shape, self.computed):
            raise ShapeError(
                f"params[{self._name!r}] is {self._dtype} of shape {self._stored.shape}, but its anchor is "
                f"{anchor.dtype} of shape {anchor.shape}; {REMEDY}"
            )

    def change(self, anchor: Array, *, exact: bool) -> Array:
        """How far the parameter has come since the outer step wrote it: exactly as the anchor is, or rounded."""
        start = anchor if exact else widened(narrowed(anchor, self._dtype), self._dtype, self.computed)
        return start - self._value()

    def _value(self) -> Array:
        value = widened(self._stored, self._dtype, self.computed)
        if self.master is None:
            return value
        # A parameter that somebody else has written no longer is what its copy rounds to; then it counts itself.
        return np.where(narrowed(self.master, self._dtype) == self._stored, self.master, value)

    def write(self, anchor: Array) -> bool:
        """Let the parameter be its anchor, rounded; whether a copy has it exactly."""
        if self._dtype not in NARROW:
            self._stored[...] = anchor
            return True
        if self._stored.flags.c_contiguous:
            there, values = self._stored.reshape(-1), anchor.reshape(-1)
            for low in range(0, len(values), CHUNK):
                there[low : low + CHUNK] = narrowed(values[low : low + CHUNK], self._dtype)
        else:
            rows = max(CHUNK * len(anchor) // max(anchor.size, 1), 1)
            for low in range(0, len(anchor), rows):
                self._stored[low : low + rows] = narrowed(anchor[low : low + rows], self._dtype)
        if self.master is not None:
            self.master[...] = anchor
        return self.master is not None


def checksum(arrays: Iterable[Array]) -> int:
    """The CRC-32 of all elements."""
    word = 0
    for array in arrays:
        word = zlib.crc32(np.ascontiguousarray(array).data, word)
    return word


Master = Callable[[str], Array | None]


def views(there: Trained, master: Master) -> dict[str, View]:
    """The trained parameters, with the copies that `master` finds."""
    return {
        name: View(name, there.library.as_numpy(array), there.memories[name].dtype, master(name))
        for name, array in there.arrays.items()
    }
