"""Ranks agree, before anybody writes, that they all do the same and that none of them has failed."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from gradstep import errors
from gradstep.distributed.group import Array, Group
from gradstep.errors import CommunicationError, ConfigurationError, GradstepError, MismatchError

Facts = Mapping[str, str]
Result = TypeVar("Result")

DONE, FAILED = 0, 1
PLAIN = (
    ArithmeticError, AttributeError, FileExistsError, FileNotFoundError, FloatingPointError, IndexError,
    IsADirectoryError, MemoryError, NotADirectoryError, NotImplementedError, OSError, OverflowError, PermissionError,
    RuntimeError, TypeError, ValueError, ZeroDivisionError,
)  # fmt: skip
"""Errors of Python that a text makes again."""


class Said(NamedTuple):
    """What a rank says about what it is going to do: a word to compare, and facts to read where words differ."""

    word: int
    facts: Callable[[], Facts]


class Council:
    """The ranks of a group, who report to each other.

    Args:
        group: the ranks.
        of: what they step, for errors.
    """

    def __init__(self, group: Group, of: str) -> None:
        self._group, self._of = group, of

    def attempt(self, body: Callable[[], Result], said: Callable[[Result], Said] | None = None) -> Result:
        """Do on every rank what may fail on some; all of them return, or all of them raise the same error.

        Args:
            body: what is done.
            said: what must be the same everywhere.

        Raises:
            ConfigurationError: the facts differ.
        """
        try:
            result = body()
            here = said(result) if said else None
            row = DONE, here.word if here else 0
        except CommunicationError:
            raise  # the others have it too, or are gone
        except BaseException as error:
            text = _text_of(error)
            self._report(self._gather((FAILED, 0)), text, error)
            raise
        rows = self._gather(row)
        if FAILED in rows[:, 0]:
            self._report(rows, b"", None)
        if (rows[:, 1] != rows[0, 1]).any():
            self._compare(here.facts() if here else {})
        return result

    def _gather(self, row: tuple[int, int]) -> Array:
        return self._group.gather(np.array(row, np.int64))

    def _compare(self, facts: Facts) -> None:
        """Raise the same error on every rank for the first fact in which one of them differs."""
        messages = self._group.gather_messages(json.dumps(facts).encode())
        everybody: list[Facts] = [json.loads(message) for message in messages]
        for what in dict.fromkeys(what for there in everybody for what in there):
            values = [there.get(what) for there in everybody]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is None:
                continue
            first, second = (
                f"there is none on rank {rank}" if values[rank] is None else f"{values[rank]} on rank {rank}"
                for rank in (0, other)
            )
            raise ConfigurationError(
                f"{what}: {first}, but {second}; the ranks of {self._of} take the same step: give all "
                "of them the same parameters and hyperparameters, and run the same code"
            )

    def _report(self, rows: Array, text: bytes, own: BaseException | None) -> None:
        """Tell each other what has gone wrong, and raise the error of the lowest rank that failed."""
        messages = self._group.gather_messages(text)
        if own is not None and not isinstance(own, Exception):
            raise own  # Ctrl-C, or the end of the process
        if isinstance(own, MismatchError) and len(set(messages)) == 1:
            raise own  # the same everywhere, and it has more than its text
        failed = np.flatnonzero(rows[:, 0] == FAILED).tolist()
        name, told = json.loads(messages[failed[0]])
        kind = _kind(name)
        others = f" (ranks {', '.join(map(str, failed[1:]))} failed too)" if failed[1:] else ""
        raise kind(f"rank {failed[0]}: {told if kind.__name__ == name else f'{name}: {told}'}{others}") from own


def word_of(facts: object) -> int:
    """A word of 63 bits that stands for what JSON can say."""
    text = json.dumps(facts, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _text_of(error: BaseException) -> bytes:
    try:
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
    except Exception:
        text = "which does not say more"
    return json.dumps([type(error).__name__, text]).encode()


def _kind(name: str) -> type[Exception]:
    """The class of an error by its name; what a text does not make again is a `RuntimeError`."""
    kind = getattr(errors, name, None) or next((kind for kind in PLAIN if kind.__name__ == name), None)
    return kind if isinstance(kind, type) and issubclass(kind, (GradstepError, *PLAIN)) else RuntimeError
