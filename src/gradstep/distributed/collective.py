"""What the groups share: messages by way of arrays, sums in the order of the ranks, and the error of a lost rank."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from gradstep.distributed.group import Array, Group
from gradstep.errors import CommunicationError

GATHERING, EXCHANGING = "gathering values", "exchanging parts"
START_AGAIN = "; parameters may differ between ranks now: start again from the last checkpoint"


def gather_messages(gather: Callable[[Array], Array], message: bytes) -> list[bytes]:
    """The messages of all ranks, by a `gather` of their lengths and one of their bytes, padded to the longest."""
    lengths = [int(length) for (length,) in gather(np.array([len(message)], np.int64))]
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    return [row[:length].tobytes() for row, length in zip(gather(padded), lengths, strict=True)]


def sum_parts(group: Group, parts: Array) -> Array:
    """Row `rank` of the sum of all ranks' `parts`, float32 or float64 with a row for each rank.

    Every rank gets the sum of its own row alone. An all-to-all is no slower than MPI's reduce_scatter, and gloo's is an
    all-reduce, which sends and adds twice as much.
    """
    return sum_by_rank(group.exchange(parts))


def sum_by_rank(received: Sequence[Array] | Array) -> Array:
    """The sum of the rows, added one after the other: the same bits from every library."""
    total = received[0].copy()
    with np.errstate(all="ignore"):
        for part in received[1:]:
            total += part
    return total


class Counted:
    """A group, and how many bytes this rank has sent to others; its small messages too."""

    def __init__(self, group: Group) -> None:
        self.group, self.sent = group, 0
        self.rank, self.size, self.name = group.rank, group.size, group.name

    def gather(self, values: Array) -> Array:
        """See `Group.gather`."""
        self.sent += values.nbytes * (self.size - 1)
        return self.group.gather(values)

    def gather_messages(self, message: bytes) -> list[bytes]:
        """See `Group.gather_messages`."""
        messages = self.group.gather_messages(message)
        self.sent += (8 + max(map(len, messages))) * (self.size - 1)  # lengths, and messages as long as the longest
        return messages

    def exchange(self, parts: Array) -> Array:
        """See `Group.exchange`."""
        self.sent += parts.nbytes // self.size * (self.size - 1)
        return self.group.exchange(parts)


def communication_error(
    doing: str, rank: int, size: int, library: str, waited: float, why: object
) -> CommunicationError:
    """What to raise when a collective operation of `library` has failed after `waited` seconds."""
    # Gloo begins with a line of its source, and goes on with advice of its own.
    reason = re.sub(r"^\[\S+\] ", "", str(why)).partition("\n")[0].partition(". ")[0]
    return CommunicationError(
        f"{doing} through {library} failed on rank {rank} of {size} after {waited:.1f} s: {reason}; another rank is "
        f"dead, silent or does something else, which the output of the other ranks tells{START_AGAIN}"
    )
