"""Hyperparameters as plain data: numbers, our schedules, and the names of functions that plain data cannot hold."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MethodType
from typing import Any, TypeAlias, cast

import numpy as np

from gradstep.checkpoint.nodes import Entry, read_all, read_text
from gradstep.errors import ArgumentTypeError, CheckpointError, ConfigurationError, GradstepError
from gradstep.schedules import cosine_decay, exponential_decay, join_schedules, linear_schedule, step_decay

Functions: TypeAlias = Mapping[str, Any]
"""What a checkpoint only names, by these names."""

LONGEST = 200  # characters of a name
LARGEST = 1 << 62

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
        value = cast("Any", value.item()) if isinstance(value, np.generic) else value
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"kind": "float", "value": repr(value)}
        if type(value) is tuple:
            return {"kind": "tuple", "values": self._all(cast("tuple[object, ...]", value))}
        if type(value) is dict:
            globs = cast("dict[str, object]", value)
            return {"kind": "globs", "globs": list(globs), "values": self._all(globs.values())}
        if SCHEDULES.get(type(value).__name__) is type(value):
            arguments = {field.name: getattr(value, field.name) for field in fields(value)}
            if type(value) is join_schedules:
                arguments = {"schedules": self._all(value.schedules), "boundaries": list(value.boundaries)}
            return {"kind": "schedule", "name": type(value).__name__, "arguments": arguments}
        return {"kind": "function", "name": self.name(value)}

    def _all(self, values: Iterable[object]) -> list[Any]:
        return [self.encode(value) for value in values]

    def name(self, value: Any) -> str:
        """What something is called that cannot be plain data."""
        stem, number = name_of(value), 1
        name = stem
        while not _is_same(self._named.setdefault(name, value), value):
            number += 1
            name = f"{stem}#{number}"
        return name


class Decoder:
    """The reverse. Functions are taken from those given, or from the same place of the optimizer if named alike."""

    def __init__(self, functions: Functions) -> None:
        if not isinstance(functions, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"functions must be a mapping from name to function, got {functions!r}")
        self._functions = functions
        self._lacking: dict[str, list[str]] = {}  # names of functions that nobody has, and where they are needed

    def refuse_lacking(self, source: str, remedy: str = "") -> None:
        """Raise `ConfigurationError` if functions were needed that nobody has."""
        if self._lacking:
            places = "; ".join(f"{name!r} for {', '.join(places)}" for name, places in self._lacking.items())
            names = ", ".join(f"{name!r}: …" for name in self._lacking)
            raise ConfigurationError(
                f"{source} names functions or objects that a checkpoint cannot hold: {places}; pass them as "
                f"functions={{{names}}}{remedy}"
            )

    def decode(self, what: str, data: Any, mine: Any = None) -> Any:
        """The value; `mine` is what the optimizer has in that place."""
        if data is None or type(data) in (bool, int, str, float):
            return data
        entry = Entry(what, data)
        kind = entry.get("kind", str)
        if kind == "float":
            return self._float(entry)
        if kind == "tuple":
            return tuple(self._all(what, entry.raw("values"), mine))
        if kind == "globs":
            return self._globs(what, entry, mine)
        if kind == "function":
            return self._function(what, entry.get("name", str), mine)
        if kind == "schedule":
            return self._schedule(what, entry, mine)
        raise CheckpointError(f"{what} is of the unknown kind {kind!r}")

    def _all(self, what: str, parts: object, mine: Any) -> list[Any]:
        values = read_all(what, parts, lambda _, part: part)
        own = cast("tuple[Any, ...]", mine) if isinstance(mine, tuple) else ()
        own = own if len(own) == len(values) else (None,) * len(values)
        both = enumerate(zip(values, own, strict=True))
        return [self.decode(f"{what}[{place}]", part, other) for place, (part, other) in both]

    def _globs(self, what: str, entry: Entry, mine: Any) -> dict[str, Any]:
        globs = entry.sequence("globs", read_text)
        own = cast("Mapping[str, Any]", mine if isinstance(mine, Mapping) else {})
        values = self._all(f"{what}'s values", entry.raw("values"), tuple(own.get(glob) for glob in globs))
        if len(values) != len(globs) or len(set(globs)) != len(globs):
            raise CheckpointError(f"{what} must have a value for each glob, and no glob twice")
        return dict(zip(globs, values, strict=True))

    @staticmethod
    def _float(entry: Entry) -> float:
        text = entry.get("value", str)
        if text not in ("nan", "inf", "-inf"):
            raise CheckpointError(f"{entry.what} must be nan, inf or -inf, got {text[:80]!r}")
        return float(text)

    def _function(self, what: str, name: str, mine: Any) -> Any:
        if name in self._functions:
            return self._functions[name]
        if mine is not None and name_of(mine) == name.partition("#")[0]:
            return mine
        self._lacking.setdefault(name, []).append(what)
        return _stand_in  # an error follows

    def _schedule(self, what: str, entry: Entry, mine: Any) -> Any:
        name = entry.get("name", str)
        if name not in SCHEDULES:
            raise CheckpointError(f"{what} is the unknown schedule {name!r}")
        arguments: dict[str, Any] = entry.mapping("arguments", lambda _, argument: argument)
        if name == "join_schedules":
            own = mine.schedules if isinstance(mine, join_schedules) else None
            arguments["schedules"] = self._all(f"{what}'s schedules", arguments.get("schedules"), own)
        if any(type(argument) is int and abs(argument) > LARGEST for argument in arguments.values()):
            raise CheckpointError(f"{what} is a {name} with a number of more than {LARGEST}")
        try:
            return SCHEDULES[name](**arguments)
        except (GradstepError, TypeError) as error:
            raise CheckpointError(f"{what} is a {name} that cannot be made: {error}") from None


def _stand_in(_: int) -> float:
    return math.nan


def name_of(value: Any) -> str:
    """What a function is called; how an object without a name reads, or its type where that differs each time."""
    kind = type(value).__qualname__
    if isinstance(value, functools.partial):
        text = _partial_name(cast("functools.partial[Any]", value))
    else:
        text = str(getattr(value, "__qualname__", None) or repr(value))
    return kind if " at 0x" in text or len(text) > LONGEST else text


def _partial_name(value: "functools.partial[Any]") -> str:
    keywords = [f"{key}={part!r}" for key, part in value.keywords.items()]
    return f"partial({', '.join([name_of(value.func), *map(repr, value.args), *keywords])})"


def _is_same(first: Any, second: Any) -> bool:
    """Whether two values are one; a method is another object whenever it is asked for."""
    if isinstance(first, MethodType) and isinstance(second, MethodType):
        return first.__self__ is second.__self__ and first.__func__ is second.__func__
    return first is second
