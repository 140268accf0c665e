"""Whether memory that a step writes overlaps other memory of the step."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from gradstep.arrays.memory import Integers, Memory, as_array
from gradstep.errors import AliasedParametersError


class Extents:
    """The byte ranges of parameters, gradients and slots, and the question whether written ones touch others."""

    def __init__(self, names: Sequence[str], memories: Sequence[Memory], written: Sequence[bool]) -> None:
        self._names, self._memories = list(names), list(memories)
        bounds = np.array([memory.bounds for memory in memories], np.int64).reshape(-1, 2)
        starts = np.array([memory.address for memory in memories], np.int64)
        self._low, self._high = bounds[:, 0] - starts, bounds[:, 1] - starts
        self._written = np.array(written, bool)

    def check(self, addresses: Integers) -> None:
        """Raise `AliasedParametersError` if anything written overlaps anything else, at these addresses."""
        low, high = addresses + self._low, addresses + self._high
        kept = np.flatnonzero(high > low)
        order = kept[np.argsort(low[kept], kind="stable")]
        if len(order) < 2:
            return
        reach = np.maximum.accumulate(high[order])
        suspects = np.flatnonzero(low[order[1:]] < reach[:-1]) + 1
        if len(suspects):
            self._check_closely(order, suspects, low, high, addresses)

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
