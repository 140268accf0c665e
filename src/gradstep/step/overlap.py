"""Whether memory that a step writes overlaps other memory of the step."""

import contextlib
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import numpy as np

from gradstep.arrays.library import ArrayLibrary
from gradstep.arrays.memory import Integers, Memory, as_array
from gradstep.errors import AliasedParametersError, GradstepError
from gradstep.step.match import check_parameter

Places: TypeAlias = Mapping[str, Memory]


class Extents:
    """The byte ranges of parameters, gradients and slots, and the question whether written ones touch others."""

    def __init__(self, parameters: Places, gradients: Places, slots: Places) -> None:
        self._names = [*parameters, *gradients, *slots]
        self._memories = [memory for places in (parameters, gradients, slots) for memory in places.values()]
        bounds = np.array([memory.bounds for memory in self._memories], np.int64).reshape(-1, 2)
        addresses = np.array([memory.address for memory in self._memories], np.int64)
        self._low, self._high = bounds[:, 0] - addresses, bounds[:, 1] - addresses
        self._read = slice(len(parameters), len(parameters) + len(gradients))
        self._written = np.ones(len(self._names), bool)
        self._written[self._read] = False
        self._slots = addresses[self._read.stop :]
        self._occupied: tuple[Integers, Integers] | None = None

    def check(self, parameters: Integers, gradients: Integers) -> None:
        """Raise `AliasedParametersError` if anything written overlaps anything else, at these addresses."""
        self._occupied = None
        addresses = np.concatenate([parameters, gradients, self._slots])
        low, high = addresses + self._low, addresses + self._high
        kept = np.flatnonzero(high > low)
        order = kept[np.argsort(low[kept], kind="stable")]
        reach = np.maximum.accumulate(high[order])
        suspects = np.flatnonzero(low[order[1:]] < reach[:-1]) + 1
        if len(suspects):
            self._check_closely(order, suspects, low, high, addresses)
        else:
            written = order[self._written[order]]
            self._occupied = np.append(low[written], np.iinfo(np.int64).max), high[written]

    def check_gradients(self, parameters: Integers, gradients: Integers) -> None:
        """The same when only gradients have moved since the last check."""
        if self._occupied is not None:
            starts, ends = self._occupied
            following = starts[np.searchsorted(ends, gradients + self._low[self._read], side="right")]
            if not (following < gradients + self._high[self._read]).any():
                return
        self.check(parameters, gradients)

    def _check_closely(
        self, order: Integers, suspects: Integers, low: Integers, high: Integers, addresses: Integers
    ) -> None:
        """Compare each suspect with everything that begins before it and ends after its start."""
        for place in suspects.tolist():
            second = int(order[place])
            before = order[:place]
            for first in before[high[before] > low[second]].tolist():
                if (self._written[first] or self._written[second]) and self._share(first, second, addresses):
                    self._refuse(first, second)

    def _share(self, first: int, second: int, addresses: Integers) -> bool:
        one, other = (
            as_array(self._memories[i]._replace(address=int(addresses[i]))) for i in (first, second)
        )  # interleaved views touch each other's range but not each other's elements
        try:
            return np.shares_memory(one, other, max_work=cast("Any", 10_000))
        except np.exceptions.TooHardError:
            return True

    def _refuse(self, first: int, second: int) -> None:
        one, other = sorted((self._names[first], self._names[second]))
        raise AliasedParametersError(
            f"{one} and {other} overlap in memory, and a step would write there; pass shared memory once, under "
            "one name (for tied weights: one entry, with the sum of the gradients), or copy one of the two"
        )


def refuse_overlap(library: ArrayLibrary, written: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Raise if parameters that are written overlap each other, or one that is to stay as it is.

    What is kept may be anything: what the library cannot train is left out.
    """
    places = {f"params[{name!r}]": check_parameter(library, name, array) for name, array in written.items()}
    others: dict[str, Memory] = {}
    for name, array in kept.items():
        with contextlib.suppress(GradstepError, AttributeError, TypeError):
            others[f"params[{name!r}]"] = library.describe(array, name)
    addresses = [np.array([m.address for m in some.values()], np.int64) for some in (places, others)]
    Extents(places, others, {}).check(*addresses)
