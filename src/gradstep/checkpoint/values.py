"""Hyperparameters as plain data: numbers, our schedules, and the names of functions that plain data cannot hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MethodType
from typing import Any, TypeAlias, cast

from gradstep.checkpoint.nodes import Entry
from gradstep.errors import CheckpointError, ConfigurationError, GradstepError, listing
from gradstep.schedules import cosine_decay, exponential_decay, join_schedules, linear_schedule, step_decay

Functions: TypeAlias = Mapping[str, Any]
"""What a checkpoint only names, by these names."""

LONGEST = 200  # characters of a name

SCHEDULES: dict[str, Any] = {
    schedule.__name__: schedule
    for schedule in (exponential_decay, step_decay, cosine_decay, linear_schedule, join_schedules)
}


class Encoder:
    """Turns values into plain data. What cannot be is named, different things by different names."""

    def __init__(self) -> None:
        self._named: dict[str, Any] = {}

    def encode(self, value: Any) -> Any:
        """Plain data that `Decoder.decode` turns into an equal value."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) is tuple:
            return {"tuple": [self.encode(part) for part in cast("tuple[object, ...]", value)]}
        if type(value) is join_schedules:
            return {
                "schedule": "join_schedules",
                "schedules": [self.encode(part) for part in value.schedules],
                "boundaries": list(value.boundaries),
            }
        if SCHEDULES.get(type(value).__name__) is type(value):
            return {"schedule": type(value).__name__, **{f.name: getattr(value, f.name) for f in fields(value)}}
        if type(value) is dict:
            return {"globs": {glob: self.encode(part) for glob, part in cast("dict[str, object]", value).items()}}
        return {"function": self._name(value)}

    def _name(self, value: Any) -> str:
        stem, number = name_of(value), 1
        name = stem
        while not _is_same(self._named.setdefault(name, value), value):
            number += 1
            name = f"{stem}#{number}"
        return name


class Decoder:
    """The reverse. Functions are taken from those given, or from the same place of the optimizer if named alike."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._used: set[str] = set()
        self._lacking: dict[str, list[str]] = {}  # names of functions that nobody has, and where they are needed

    def use(self, data: Any) -> None:
        """Note that a filter goes by its name."""
        if isinstance(data, Mapping) and "function" in data:
            self._used.add(str(cast("Mapping[str, Any]", data)["function"]))

    def check_functions(self, source: str, remedy: str = "") -> None:
        """Raise `ConfigurationError` if functions were needed that nobody has, or given that nobody needs."""
        useless = [name for name in self._functions if name not in self._used]
        if self._lacking:
            places = "; ".join(f"{name!r} for {', '.join(places)}" for name, places in self._lacking.items())
            names = ", ".join(f"{name!r}: …" for name in self._lacking)
            raise ConfigurationError(
                f"{source} names functions that a checkpoint cannot hold: {places}; pass them as "
                f"functions={{{names}}}{remedy}"
            )
        if useless:
            raise ConfigurationError(
                f"functions has {listing(useless)}, but {source} names {listing(sorted(self._used))}"
            )

    def decode(self, what: str, data: Any, mine: Any = None) -> Any:
        """The value; `mine` is what the optimizer has in that place."""
        if data is None or type(data) in (bool, int, str, float):
            return data
        entry = Entry(what, data)
        kind = next(iter(cast("Mapping[str, object]", data)), None)
        if kind == "float":
            return self._float(entry)
        if kind == "tuple":
            return tuple(self._all(what, entry.raw("tuple"), mine))
        if kind == "globs":
            own = cast("Mapping[str, Any]", mine if isinstance(mine, Mapping) else {})
            parts = entry.mapping("globs", lambda _, part: part)
            return {glob: self.decode(f"{what}[{glob!r}]", part, own.get(glob)) for glob, part in parts.items()}
        if kind == "function":
            return self._function(what, entry.get("function", str), mine)
        if kind == "schedule":
            return self._schedule(what, entry, cast("Mapping[str, Any]", data), mine)
        raise CheckpointError(f"{what} is of the unknown kind {kind!r}")

    def _all(self, what: str, parts: object, mine: Any) -> list[Any]:
        if not isinstance(parts, (list, tuple)):
            raise CheckpointError(f"{what} must hold a list")
        values = cast("Sequence[Any]", parts)
        own = cast("tuple[Any, ...]", mine) if isinstance(mine, tuple) else ()
        own = own if len(own) == len(values) else (None,) * len(values)
        both = enumerate(zip(values, own, strict=True))
        return [self.decode(f"{what}[{place}]", part, other) for place, (part, other) in both]

    @staticmethod
    def _float(entry: Entry) -> float:
        text = entry.get("float", str)
        if text not in ("nan", "inf", "-inf"):
            raise CheckpointError(f"{entry.what} must be nan, inf or -inf, got {text[:80]!r}")
        return float(text)

    def _function(self, what: str, name: str, mine: Any) -> Any:
        self._used.add(name)
        if name in self._functions:
            return self._functions[name]
        if mine is not None and name_of(mine) == name.partition("#")[0]:
            return mine
        self._lacking.setdefault(name, []).append(what)
        return _stand_in  # an error follows

    def _schedule(self, what: str, entry: Entry, data: Mapping[str, Any], mine: Any) -> Any:
        name = entry.get("schedule", str)
        if name not in SCHEDULES:
            raise CheckpointError(f"{what} is the unknown schedule {name!r}")
        given = {key: value for key, value in data.items() if key != "schedule"}
        if name == "join_schedules":
            own = mine.schedules if isinstance(mine, join_schedules) else None
            given["schedules"] = self._all(f"{what}'s schedules", given.get("schedules"), own)
        try:
            return SCHEDULES[name](**given)
        except (GradstepError, TypeError) as error:
            raise CheckpointError(f"{what} is a {name} that cannot be made: {error}") from None


def _stand_in(_: int) -> float:
    return math.nan


def name_of(value: Any) -> str:
    """What a function is called; how an object without a name reads, or its type where that differs each time."""
    name = getattr(value, "__qualname__", None)
    if name is None:
        text = repr(value)
        name = type(value).__qualname__ if " at 0x" in text or len(text) > LONGEST else text
    return str(name)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two values are one; a method is another object whenever it is asked for."""
    if isinstance(first, MethodType) and isinstance(second, MethodType):
        return first.__self__ is second.__self__ and first.__func__ is second.__func__
    return first is second
