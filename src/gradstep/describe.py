"""Which parameter gets what, as a table of text."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

from gradstep.errors import ArgumentTypeError
from gradstep.step.leaf import Leaf

NOTHING = "-"


class Route(NamedTuple):
    """The parameters that one optimizer takes, and what it is called among several."""

    title: str
    leaf: Leaf
    names: list[str]


def describe(named: Mapping[str, Any], routes: Sequence[Route], frozen: Sequence[str]) -> str:
    """One line for each parameter, in their order, and one for the globs that do nothing.

    Those that no route names are frozen.
    """
    used = [route for route in routes if route.names]
    scalars = list(dict.fromkeys(name for route in used for name in route.leaf.settings.scalars))
    several = ["optimizer"] if len(routes) > 1 else []
    rows = {name: [name, *_form(name, array), "frozen"] for name, array in named.items()}
    for title, leaf, names in used:
        for name in names:
            given = leaf.settings_of(name).scalars
            program = leaf.program(name, len(named[name].shape))
            rows[name][-1:] = [title] if several else []
            rows[name] += [_spell(given[scalar]) if scalar in given else NOTHING for scalar in scalars]
            rows[name].append(" ".join(program.slots) or NOTHING)
    table = _aligned([["parameter", "shape", "dtype", *several, *scalars, "slots"], *rows.values()])
    return "\n".join([table, *_idle(named, routes, frozen)])


def _idle(named: Mapping[str, Any], routes: Sequence[Route], frozen: Sequence[str]) -> list[str]:
    """A line that names the globs that no parameter takes anything from, if there are any: they may be misspelt."""
    idle = [f"frozen {glob!r}" for glob in frozen if not any(fnmatchcase(name, glob) for name in named)]
    for title, leaf, names in routes:
        owner = f"{title}'s " if len(routes) > 1 else ""
        for scalar, globs in leaf.settings.unused(names).items():
            idle += [f"{owner}{scalar} {glob!r}" for glob in globs]
    return [f"no parameter takes anything from: {', '.join(idle)}"] if idle else []


def _form(name: str, array: Any) -> tuple[str, str]:
    """The shape and dtype of an array of any library."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ArgumentTypeError(f"params[{name!r}] is no array, got {array!r} ({type(array).__name__})")
    return str(tuple(array.shape)), str(array.dtype).rpartition(".")[-1]


def _spell(value: object) -> str:
    """A number, a schedule or a pair of them; functions go by their names."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_spell, cast('Iterable[object]', value)))})"
    return value.__name__ if inspect.isroutine(value) else repr(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
