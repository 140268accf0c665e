"""Ranks agree, before anybody writes, that they all do the same and that none of them has failed."""

import builtins
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from gradstep import errors
from gradstep.distributed.group import Group
from gradstep.errors import ConfigurationError, GradstepError

Facts = Mapping[str, str]
Result = TypeVar("Result")

DONE, FAILED = 0, 1


class Council:
    """The ranks of a group, who report to each other.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def attempt(self, body: Callable[[], Result], told: Callable[[Result], int] = lambda _: 0) -> Result:
        """Do on every rank what may fail on some; all of them return, or all of them raise the same error.

        Args:
            body: what is done.
            told: a word about the result that must be the same everywhere.
        """
        try:
            result = body()
            row = DONE, told(result)
        except Exception as error:
            self._report(self._gather((FAILED, 0)), error)
            raise
        rows = self._gather(row)
        if FAILED in rows[:, 0]:
            self._report(rows, None)
        self._words = rows[:, 1]
        return result

    @property
    def agreed(self) -> bool:
        """Whether the words of the last attempt were the same."""
        return bool((self._words == self._words[0]).all())

    def compare(self, facts: Facts) -> None:
        """Raise the same `ConfigurationError` on every rank for the first fact in which one of them differs."""
        messages = self._group.gather_messages(json.dumps(facts).encode())
        everybody: list[Facts] = [json.loads(message) for message in messages]
        for what in dict.fromkeys(what for there in everybody for what in there):
            values = [there.get(what) for there in everybody]
            if len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                said = [
                    f"{values[rank]} on rank {rank}" if values[rank] is not None else f"there is none on rank {rank}"
                    for rank in (0, other)
                ]
                raise ConfigurationError(
                    f"{what}: {said[0]}, but {said[1]}; the ranks of a Sharded optimizer take the same step: give all "
                    "of them the same parameters and hyperparameters, and run the same code"
                )
        raise ConfigurationError("the ranks of a Sharded optimizer differ; run the same code on all of them")

    def _gather(self, row: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        return self._group.gather(np.array(row, np.int64))

    def _report(self, rows: np.ndarray[tuple[int, int], np.dtype[np.int64]], own: Exception | None) -> None:
        """Tell each other what has gone wrong, and raise the error of the lowest rank that failed."""
        message = "" if own is None else json.dumps([type(own).__name__, str(own)])
        messages = self._group.gather_messages(message.encode())
        failed = np.flatnonzero(rows[:, 0] == FAILED).tolist()
        name, text = json.loads(messages[failed[0]])
        kind = _kind(name)
        said = text if kind.__name__ == name else f"{name}: {text}"
        others = f" (ranks {', '.join(map(str, failed[1:]))} failed too)" if failed[1:] else ""
        raise kind(f"rank {failed[0]}: {said}{others}") from own


def _kind(name: str) -> type[Exception]:
    """The class of an error by its name; what only the failing rank knows is a `RuntimeError` here."""
    for place in (errors, builtins):
        kind = getattr(place, name, None)
        if isinstance(kind, type) and issubclass(kind, (GradstepError, *_PLAIN)):
            return kind
    return RuntimeError


_PLAIN = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def word_of(facts: bytes) -> int:
    """A word of 63 bits that stands for these bytes."""
    return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little") >> 1
