"""The global norm of gradients of which each rank has its shards."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from gradstep.arrays.memory import Integers
from gradstep.distributed.group import Array, Group
from gradstep.distributed.norm import Found
from gradstep.program.blocks import BLOCK, exact_sum
from gradstep.program.threads import Team
from gradstep.step.inspection import Inspector, global_norm
from gradstep.step.sizes import count_blocks


class PlacedNorm:
    """Sums of squares of every rank's shards, one number for each parameter, put together.

    Args:
        group: the ranks.
        forms: dtype and number of elements of each gradient here, by name.
        read: gives the gradients of these names, as arrays of the computation.
        team: the threads of the library that the parameters are of.
    """

    def __init__(
        self,
        group: Group,
        forms: Mapping[str, tuple[str, int]],
        read: Callable[[Iterable[str]], Iterable[Array]],
        team: Team | None,
    ) -> None:
        self._group, self._names, self._read = group, list(forms), read
        self._sizes = [size for _, size in forms.values()]
        dtypes = [dtype for dtype, _ in forms.values()]
        self._exact = "float64" not in dtypes
        self._places = {
            dtype: [place for place, there in enumerate(dtypes) if there == dtype] for dtype in sorted(set(dtypes))
        }
        self._inspectors = {
            dtype: Inspector(dtype, [self._sizes[place] for place in places], team=team)
            for dtype, places in self._places.items()
        }
        self._addresses: Integers = np.zeros(len(self._names), np.int64)
        self._counted: Collection[str] = ()

    def count(self, names: Collection[str]) -> None:
        """Count these here, and leave the others to ranks that have the same elements."""
        self._counted = set(names)

    def look_at(self, addresses: Integers) -> None:
        """Where the gradients lie."""
        self._addresses = addresses

    def squares(self) -> Array:
        """This rank's sums; NaN where a gradient is not finite, of a copy too."""
        sums = np.zeros(len(self._names))
        for dtype, places in self._places.items():
            found, odd = self._inspectors[dtype].inspect(self._addresses[places])
            ends = np.cumsum([count_blocks(self._sizes[place], BLOCK) for place in places]).tolist()
            for number, (place, start, stop) in enumerate(zip(places, [0, *ends], ends, strict=False)):
                name = self._names[place]
                if number in odd and not (dtype == "float64" and self._is_finite(name)):
                    sums[place] = math.nan
                elif name in self._counted:
                    sums[place] = exact_sum(found[start:stop])
        return sums

    def _is_finite(self, name: str) -> bool:
        return all(np.isfinite(array).all() for array in self._read([name]))

    def found(self, everybody: Array, whole: float) -> Found:
        """What the sums of all ranks say; may ask them once more."""
        odd = set(np.flatnonzero(np.isnan(everybody).any(axis=0)).tolist())
        norm = global_norm(
            everybody.reshape(-1).tolist(),
            lambda: self._read(name for name in self._names if name in self._counted),
            exact=self._exact,
            put_together=lambda together, own: together(self._group.gather(np.array(own)).tolist()),
        )
        return Found(norm * abs(whole), tuple(name for place, name in enumerate(self._names) if place in odd))
