"""Plain data of a checkpoint as a person would write it in Python, and names as a terminal can bear them."""

from collections.abc import Mapping
from typing import Any, cast


def printable(text: str) -> str:
    """The text with escapes for what would move a cursor, colour a terminal or not be seen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def spelled(data: Any) -> str:
    """An encoded value; functions by their names."""
    kind = kind_of(data)
    if kind == "float":
        return str(data["float"])
    if kind == "tuple":
        parts = [spelled(part) for part in data["tuple"]]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if kind == "globs":
        return f"{{{', '.join(f'{glob!r}: {spelled(part)}' for glob, part in data['globs'].items())}}}"
    if kind == "glob":
        return repr(data["glob"])
    if kind == "function":
        return printable(str(data["function"]))
    if kind == "schedule":
        given = ", ".join(f"{name}={_argument(value)}" for name, value in data.items() if name != "schedule")
        return f"{data['schedule']}({given})"
    return repr(data)


def _argument(value: Any) -> str:
    """An argument of a schedule, which may be a list of others."""
    return f"[{', '.join(map(spelled, cast('list[Any]', value)))}]" if isinstance(value, list) else spelled(value)


def kind_of(data: Any) -> str | None:
    """The kind of an encoded value; None for what stands for itself."""
    if not isinstance(data, Mapping):
        return None
    return next(iter(cast("Mapping[str, Any]", data)), None)
