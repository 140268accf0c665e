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
        return str(data["value"])
    if kind == "tuple":
        parts = [spelled(part) for part in data["values"]]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if kind == "globs":
        return f"{{{', '.join(f'{glob!r}: {spelled(part)}' for glob, part in by_glob(data).items())}}}"
    if kind == "glob":
        return repr(data["name"])
    if kind == "function":
        return printable(str(data["name"]))
    if kind == "schedule":
        given = ", ".join(f"{name}={_argument(value)}" for name, value in data["arguments"].items())
        return f"{data['name']}({given})"
    return repr(data)


def _argument(value: Any) -> str:
    """An argument of a schedule, which may be a list of others."""
    return f"[{', '.join(map(spelled, cast('list[Any]', value)))}]" if isinstance(value, list) else spelled(value)


def kind_of(data: Any) -> str | None:
    """The kind of an encoded value; None for what stands for itself."""
    return str(cast("Mapping[str, Any]", data).get("kind")) if isinstance(data, Mapping) else None


def by_glob(data: Any) -> dict[str, Any]:
    """The encoded values of a mapped hyperparameter."""
    return dict(zip(data["globs"], data["values"], strict=True))
