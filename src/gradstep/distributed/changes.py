"""Changes of parameters averaged among ranks over a narrow wire, which loses nothing for good."""

import itertools
from collections.abc import Collection, Mapping, Sequence
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
        averages: of the averages that this rank sent to all, by layout and this rank's number in it.
    """

    sent: Mapping[str, Array]
    averages: Mapping[tuple[Layout, int], Array]

    def moved(self, layouts: Collection[Layout], rank: int, members: int) -> "Losses":
        """The same for other layouts: what was owed to elements that others average now is sent to them instead.

        Of `members` changes this rank's is one, so it counts as many times.
        """
        sent, averages = dict(self.sent), dict(self.averages)
        for layout, place in [key for key in averages if key[1] != rank or key[0] not in layouts]:
            rows = layout.zeros()
            rows[place] = averages.pop((layout, place)) * rows.dtype.type(members)
            for name, owed in layout.by_name(rows).items():
                if owed.any():
                    sent[name] = sent[name] + owed if name in sent else owed.copy()
        return Losses(sent, averages)


NOTHING_LOST = Losses({}, {})


class Sums(NamedTuple):
    """Where the numbers of one layout are averaged: a row for each range and, of a narrow wire, room for what it loses.

    Attributes:
        rows: changes, and then averages.
        lost: of the rows.
        owing: of this rank's average.
    """

    rows: Array
    lost: Array | None
    owing: Array | None


def sums(layout: Layout, wire: Wire) -> Sums:
    """Room for them, zeros."""
    rows = layout.zeros()
    return Sums(rows, None, None) if wire.exact else Sums(rows, layout.zeros(), np.zeros_like(rows[0]))


def average(
    group: Group, layout: Layout, room: Sums, wire: Wire, members: Sequence[int], owed: Array | None
) -> None:  # fmt: skip
    """Put the mean of the members' rows in the place of this rank's own, and note what the wire loses.

    ```
    sent = rounded(row)                                      each member, for every owner of a range
    mean = rounded((sent of members[0] + …) / members + owed)   the owner, for everybody
    ```

    Ranks are added in their order, so that all get the same bits.

    Args:
        group: the ranks; all of them own a range, those that are no members too.
        layout: of the rows.
        room: what to average, with what was lost before.
        wire: how it travels.
        members: whose rows count.
        owed: what the wire has rounded away of this rank's last average; None for nothing.
    """
    length, rank, (rows, lost, owing) = layout.length, group.rank, room
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
    for each in (lost, owing):
        if each is not None:  # of what is not finite nothing is left to send
            np.nan_to_num(each, copy=False, nan=0, posinf=0, neginf=0)


def spread(group: Group, members: Sequence[int], arrays: Sequence[Array]) -> None:
    """Bring arrays that members have in common to all others; each member sends its share, and others' are written."""
    flat = [array.reshape(-1).view(np.uint8) for array in arrays]
    total = sum(map(len, flat))
    if not total:
        return
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
