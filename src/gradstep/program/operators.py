"""The operations of a program that are operators in Python, on numbers and on the arrays of any library."""

import operator
from collections.abc import Callable
from typing import Any

OPERATORS: dict[str, Callable[..., Any]] = {
    op: getattr(operator, name)
    for op, name in {
        "add": "add", "subtract": "sub", "multiply": "mul", "divide": "truediv", "power": "pow", "negative": "neg",
        "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "equal": "eq", "not_equal": "ne",
    }.items()
}  # fmt: skip
