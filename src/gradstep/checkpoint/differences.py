"""What does not fit between a checkpoint and an optimizer, both sides of it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from gradstep.errors import MismatchError

Kind: TypeAlias = Literal["missing", "unexpected", "different"]
KINDS: tuple[Kind, ...] = ("missing", "unexpected", "different")
SHOWN = 100  # lines of a message for each kind; all are in the error's `differences`


class Difference(NamedTuple):
    """One thing in which a checkpoint and an optimizer differ.

    Attributes:
        kind: "missing" for what the checkpoint lacks, "unexpected" for what it alone has, else "different".
        where: what differs, such as `state['w']['m']`.
        file: what the checkpoint has there; None if nothing.
        here: what the optimizer, or the parameters, have there; None if nothing.
    """

    kind: Kind
    where: str
    file: str | None
    here: str | None

    def __str__(self) -> str:
        sides = {"in the checkpoint": self.file, "here": self.here}
        return f"{self.where}: " + ", ".join(f"{side or 'nothing'} {place}" for place, side in sides.items())


def missing(where: str, here: str) -> Difference:
    """Something that the checkpoint lacks."""
    return Difference("missing", where, None, here)


def unexpected(where: str, file: str) -> Difference:
    """Something that the checkpoint alone has."""
    return Difference("unexpected", where, file, None)


def different(where: str, file: str, here: str) -> Difference:
    """Something that both have, and that is not the same."""
    return Difference("different", where, file, here)


def mismatch(what: str, differences: Sequence[Difference]) -> MismatchError:
    """The error that lists all differences."""
    lines = [f"{what} does not fit; nothing was changed."]
    for kind in KINDS:
        some = [difference for difference in differences if difference.kind == kind]
        lines += [f"  {kind}: {difference}" for difference in some[:SHOWN]]
        if len(some) > SHOWN:
            lines.append(f"  {kind}: and {len(some) - SHOWN} more, in this error's differences")
    lines.append("opt.load(…, strict=False) takes what fits and returns this list")
    return MismatchError("\n".join(lines), differences)
