"""Whether memory that a step writes overlaps other memory of the step."""

import contextlib
import ctypes
import functools
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import numpy as np

from gradstep.arrays.library import MemoryLibrary
from gradstep.arrays.memory import Integers, Memory, as_array, start_of
from gradstep.errors import AliasedParametersError, GradstepError
from gradstep.program.compiler import load_function
from gradstep.step.match import check_parameter

Places: TypeAlias = Mapping[str, Memory]

# Whether intervals touch none of those that are occupied, which are sorted and disjoint and close with the largest
# integer. A job is six words: how many are occupied, how many are asked about, starts and ends of the first, and how
# far the others reach from their addresses, down and up. Neighbours in the list are often neighbours in memory: only
# for others there is a search.
CLEAR = """
define i64 @clear(ptr %job, ptr %addresses) {
entry:
  %occupied.at = getelementptr i64, ptr %job, i64 0
  %occupied = load i64, ptr %occupied.at
  %count.at = getelementptr i64, ptr %job, i64 1
  %count = load i64, ptr %count.at
  %starts.at = getelementptr i64, ptr %job, i64 2
  %starts = load ptr, ptr %starts.at
  %ends.at = getelementptr i64, ptr %job, i64 3
  %ends = load ptr, ptr %ends.at
  %lows.at = getelementptr i64, ptr %job, i64 4
  %lows = load ptr, ptr %lows.at
  %highs.at = getelementptr i64, ptr %job, i64 5
  %highs = load ptr, ptr %highs.at
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %i.next, %free ]
  %at = phi i64 [ 0, %entry ], [ %here, %free ]
  %left = icmp slt i64 %i, %count
  br i1 %left, label %look, label %exit
look:
  %address.at = getelementptr i64, ptr %addresses, i64 %i
  %low.at = getelementptr i64, ptr %lows, i64 %i
  %high.at = getelementptr i64, ptr %highs, i64 %i
  %address = load i64, ptr %address.at
  %to.low = load i64, ptr %low.at
  %to.high = load i64, ptr %high.at
  %low = add i64 %address, %to.low
  %high = add i64 %address, %to.high
  %start.at = getelementptr i64, ptr %starts, i64 %at
  %end.at = getelementptr i64, ptr %ends, i64 %at
  %start = load i64, ptr %start.at
  %end = load i64, ptr %end.at
  %before = icmp sle i64 %high, %start
  %last.at = getelementptr i64, ptr %end.at, i64 -1
  %first = icmp eq i64 %at, 0
  %safe.at = select i1 %first, ptr %end.at, ptr %last.at
  %last = load i64, ptr %safe.at
  %behind = icmp sle i64 %last, %low
  %after = or i1 %first, %behind
  %between = and i1 %before, %after
  br i1 %between, label %free, label %search
search:
  %from = phi i64 [ 0, %look ], [ %from.new, %search.next ]
  %to = phi i64 [ %occupied, %look ], [ %to.new, %search.next ]
  %open = icmp slt i64 %from, %to
  br i1 %open, label %search.next, label %searched
search.next:
  %sum = add i64 %from, %to
  %middle = lshr i64 %sum, 1
  %middle.at = getelementptr i64, ptr %ends, i64 %middle
  %middle.end = load i64, ptr %middle.at
  %over = icmp sle i64 %middle.end, %low
  %above = add i64 %middle, 1
  %from.new = select i1 %over, i64 %above, i64 %from
  %to.new = select i1 %over, i64 %to, i64 %middle
  br label %search
searched:
  %found.at = getelementptr i64, ptr %starts, i64 %from
  %found = load i64, ptr %found.at
  %apart = icmp sle i64 %high, %found
  br i1 %apart, label %free, label %touch
free:
  %here = phi i64 [ %at, %look ], [ %from, %searched ]
  %i.next = add i64 %i, 1
  br label %next
touch:
  ret i64 0
exit:
  ret i64 1
}
"""


class Occupied:
    """Memory that is written, sorted and without overlap, in the form that `CLEAR` takes."""

    def __init__(self, starts: Integers, ends: Integers, lows: Integers, highs: Integers) -> None:
        beyond = np.iinfo(np.int64).max
        self._tables = np.append(starts, beyond), np.append(ends, beyond), lows, highs
        addresses = (table.ctypes.data for table in self._tables)
        self._job = np.array([len(starts), len(lows), *addresses], np.int64)
        self.address = self._job.ctypes.data


class Extents:
    """The byte ranges of parameters, gradients and slots, and the question whether written ones touch others."""

    def __init__(self, parameters: Places, gradients: Places, slots: Places) -> None:
        self._names = [*parameters, *gradients, *slots]
        self._memories = [memory for places in (parameters, gradients, slots) for memory in places.values()]
        bounds = np.array([memory.bounds for memory in self._memories], np.int64).reshape(-1, 2)
        addresses = np.array([memory.address for memory in self._memories], np.int64)
        self._low, self._high = bounds[:, 0] - addresses, bounds[:, 1] - addresses
        self._read = slice(len(parameters), len(parameters) + len(gradients))
        self._gradient_reach = self._low[self._read], self._high[self._read]
        self._written = np.ones(len(self._names), bool)
        self._written[self._read] = False
        self._slots = addresses[self._read.stop :]
        self._parameters = addresses[: self._read.start]
        self._occupied: Occupied | None = None

    def check(self, parameters: Integers, gradients: Integers) -> None:
        """Raise `AliasedParametersError` if anything written overlaps anything else, at these addresses."""
        self._occupied, self._parameters = None, parameters.copy()
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
            self._occupied = Occupied(low[written], high[written], *self._gradient_reach)

    def check_gradients(self, gradients: Integers) -> None:
        """The same when only gradients have moved since the last check."""
        if self._occupied is not None and _clear()(self._occupied.address, start_of(gradients)):
            return
        self.check(self._parameters, gradients)

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


@functools.cache
def _clear() -> Any:
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    return prototype(load_function("clear", CLEAR))


def refuse_overlap(library: MemoryLibrary, written: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """Raise if parameters that are written overlap each other, or one that is to stay as it is.

    What is kept may be anything: what the library cannot train is left out. Returns the names of the rest.
    """
    places = {f"params[{name!r}]": check_parameter(library, name, array) for name, array in written.items()}
    others: dict[str, Memory] = {}
    for name, array in kept.items():
        with contextlib.suppress(GradstepError, AttributeError, TypeError):
            others[name] = library.describe(array, name)
    addresses = [np.array([m.address for m in some.values()], np.int64) for some in (places, others)]
    Extents(places, {f"params[{name!r}]": memory for name, memory in others.items()}, {}).check(*addresses)
    return list(others)
