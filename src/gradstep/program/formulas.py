"""Programs spelled as formulas, for people."""

from collections.abc import Mapping
from typing import cast

from gradstep.program.graph import COMPARISONS, Symbol
from gradstep.program.newton_schulz import Iteration

INFIX = {name: (sign, 0) for sign, name in COMPARISONS.items()} | {
    "add": ("+", 1), "subtract": ("-", 1), "multiply": ("*", 2), "divide": ("/", 2), "power": ("**", 4),
}  # fmt: skip


def spell(symbol: Symbol, names: Mapping[int, str] | None = None) -> str:
    """The expression of `symbol`; symbols in `names` appear by their name."""
    return _spell(symbol, names or {})[0]


def _spell(symbol: Symbol, names: Mapping[int, str]) -> tuple[str, int]:
    """The text and how tightly its outermost operator binds."""
    if symbol.index in names:
        return names[symbol.index], 9
    if symbol.op in ("array", "hyperparameter"):
        return symbol.attribute, 9
    if symbol.op == "dimension":
        return f"w.shape[{symbol.attribute}]", 9
    if symbol.op == "constant":
        return _spell_number(symbol.attribute)
    if symbol.op in INFIX:
        sign, strength = INFIX[symbol.op]
        left, left_strength = _spell(symbol.args[0], names)
        right, right_strength = _spell(symbol.args[1], names)
        # Left to right: parentheses stay on the right at equal strength, because they change the rounding.
        left = f"({left})" if left_strength < strength or (sign == "**" and left_strength == strength) else left
        right = f"({right})" if right_strength < strength or (right_strength == strength and sign != "**") else right
        return f"{left}{sign}{right}" if sign == "**" else f"{left} {sign} {right}", strength
    if symbol.op == "negative":
        text, strength = _spell(symbol.args[0], names)
        return f"-{text}" if strength >= 4 else f"-({text})", 3
    parts = [_spell(arg, names)[0] for arg in symbol.args]
    if symbol.op == "mean" and symbol.attribute is not None:
        parts.append(f"axis={symbol.attribute}")
    if symbol.op == "orthogonalize":
        iteration = cast("Iteration", symbol.attribute)
        parts.append(f"steps={iteration.steps}")
        parts += [f"dtype={iteration.dtype}"] if iteration.dtype else []
    return f"{symbol.op}({', '.join(parts)})", 9


def _spell_number(value: float) -> tuple[str, int]:
    if isinstance(value, (bool, int)) or value != value:
        return repr(value), 3 if value < 0 else 9
    short = f"{value:g}"
    return short if float(short) == value and "e" in short else repr(value), 3 if repr(value)[0] == "-" else 9
