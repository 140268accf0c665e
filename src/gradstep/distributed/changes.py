"""Changes of parameters averaged among ranks over a narrow wire, which loses nothing for good."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gradstep.distributed.collective import sum_by_rank
from gradstep.distributed.exchange import row_bytes
from gradstep.distributed.group import Array, Group
from gradstep.distributed.wire import Wire
from gradstep.program.formats import QUANTUM


class Layout(NamedTuple):
    """Numbers of one dtype by name, one after the other, cut into an equal range for each rank."""

    ranks: int
    dtype: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def length(self) -> int:
        """The length of a range, whole blocks; the last ones may be longer than what is left for them."""
        total = sum(size for _, size in self.sizes)
        return -(-total // (self.ranks * QUANTUM)) * QUANTUM

    def zeros(self) -> Array:
        """Room for all of it, a row for each range."""
        return np.zeros((self.ranks, self.length), self.dtype)

    def by_name(self, rows: Array) -> dict[str, Array]:
        """What the rows hold, the same memory."""
        flat, ends = rows.reshape(-1), itertools.accumulate(size for _, size in self.sizes)
        return {name: flat[end - size : end] for (name, size), end in zip(self.sizes, ends, strict=True)}


class Losses(NamedTuple):
    """What a narrow wire has rounded away, to be sent the next time.

    Attributes:
        sent: of this rank's changes, by name.
        averages: of the averages that this rank sent to all, by layout.
    """

    sent: Mapping[str, Array]
    averages: Mapping[Layout, Array]


NONE = Losses({}, {})


def average(
    group: Group, layout: Layout, rows: Array, wire: Wire, members: Sequence[int], owed: Array | None
) -> tuple[Array, Array] | None:
    """Put the mean of the members' rows in the place of this rank's own.

    ```
    sent = rounded(row)                                      each member, for every owner of a range
    mean = rounded((sent of members[0] + …) / members + owed)   the owner, for everybody
    ```

    Ranks are added in their order, so that all get the same bits.

    Args:
        group: the ranks; all of them own a range, those that are no members too.
        layout: of the rows.
        rows: what to average, with what was lost before.
        wire: how it travels.
        members: whose rows count.
        owed: what the wire has rounded away of this rank's last average. Default: nothing.

    Returns:
        What has been rounded away now, of the rows and of this rank's average; None where nothing can be.
    """
    length, rank = layout.length, group.rank
    lost, owing = (None, None) if wire.exact else (layout.zeros(), np.zeros(length, layout.dtype))
    places = max(row_bytes(layout.ranks) // rows.itemsize // QUANTUM, 1) * QUANTUM
    for low in range(0, length, places):
        part = rows[:, low : low + places]
        sent = wire.encode(part)
        if lost is not None and rank in members:
            np.subtract(part, wire.decode(sent, layout.dtype), out=lost[:, low : low + places])
        received = group.exchange(sent)
        decoded = [wire.decode(received[member : member + 1], layout.dtype)[0] for member in members]
        mean = sum_by_rank(decoded) / rows.dtype.type(len(members))
        if owed is not None:
            mean += owed[low : low + places]
        sent = wire.encode(mean[None])
        if owing is not None:
            np.subtract(mean, wire.decode(sent, layout.dtype)[0], out=owing[low : low + places])
        part[...] = wire.decode(group.gather(sent[0]), layout.dtype)
    if lost is None or owing is None:
        return None
    for each in (lost, owing):  # of what is not finite nothing is left to send
        each[~np.isfinite(each)] = 0
    return lost, owing


def spread(group: Group, members: Sequence[int], arrays: Sequence[Array]) -> None:
    """Bring arrays that members have in common to all others; each member sends its share, and others' are written."""
    flat = [array.reshape(-1).view(np.uint8) for array in arrays]
    total = sum(map(len, flat))
    share = min(-(-total // len(members)), row_bytes(group.size))
    for low in range(0, total, share * len(members)):
        own = np.zeros(share, np.uint8)
        if group.rank in members:
            _copy(flat, low + members.index(group.rank) * share, own, to_flat=False)
        everybody = group.gather(own)
        if group.rank not in members:
            for turn, member in enumerate(members):
                _copy(flat, low + turn * share, everybody[member], to_flat=True)


def _copy(flat: Sequence[Array], start: int, piece: Array, *, to_flat: bool) -> None:
    """Copy between a piece and the bytes from `start` on of arrays one after the other, as far as these go."""
    at = 0
    for array in flat:
        low, high = max(start, at), min(start + len(piece), at + len(array))
        if low < high:
            here, there = array[low - at : high - at], piece[low - start : high - start]
            (here if to_flat else there)[...] = there if to_flat else here
        at += len(array)
