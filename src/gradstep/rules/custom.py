"""`@gs.rule`: a function becomes an optimizer class."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, overload

from gradstep.errors import RuleError
from gradstep.hyperparameters import FINITE, REQUIRED, Field, Scalar, Static
from gradstep.program.formats import Sign
from gradstep.rules.base import RuleOptimizer
from gradstep.step.storage import check_signs

NOTHING_KNOWN: Mapping[str, Sign] = MappingProxyType({})
RESERVED = frozenset(
    {
        "t",
        "w",
        "g",
        "rule",
        "grad_scale",
        "optimizers",
        "optimizer",
        "every",
        "micro_step",
        "sums",
        "discard",
        *dir(RuleOptimizer),
    }
)


class CustomOptimizer(RuleOptimizer):
    """The base of the classes that `@gs.rule` makes. A rule without a `learning_rate` has rate None."""

    @property
    def learning_rate(self) -> Any:
        """None; a rule with a learning rate has it as a hyperparameter instead."""
        return None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leaf.programs(2)  # an error in the rule's body belongs here, not into the first step


@overload
def rule(function: Callable[..., Any], /) -> type[CustomOptimizer]: ...
@overload
def rule(
    *, static: Iterable[str] = (), signs: Mapping[str, Sign] = NOTHING_KNOWN
) -> Callable[[Callable[..., Any]], type[CustomOptimizer]]: ...
def rule(
    function: Callable[..., Any] | None = None,
    /,
    *,
    static: Iterable[str] = (),
    signs: Mapping[str, Sign] = NOTHING_KNOWN,
) -> Any:
    """Turn a function into an optimizer class of its name.

    The positional arguments are `w`, `g` and the slots, which start at zero with the shape of `w`; keyword-only ones
    are the hyperparameters, and `t`, the parameter's own step count, from 1. The function returns the new `w` and
    the new slots in their order, `None` for one that this configuration does not keep.

    It may use `+ - * /`, comparisons and `gs.sqrt abs sign minimum maximum where`, which are exact; `gs.exp log`;
    and `gs.mean rms norm` of whole tensors. Numbers among the hyperparameters are scalars, fixed or scheduled;
    booleans, strings, None and the names in `static` are configuration, on which it may branch.

    Args:
        function: the rule. It must be pure: it is called on symbols, not on arrays.
        static: names of hyperparameters that are configuration even though they are numbers.
        signs: which values slots take, "signed", "non-negative" or "unknown" (the default): used only by those who
            keep them in 8 bits. A slot that never is negative, such as a mean of squares, has codes for many more
            magnitudes when that is known, and loses the sign of a value that is negative after all; for "signed",
            values far below the largest of their block become 0.

    Raises:
        RuleError: the signature or the body cannot become a program; the body is looked at when the
            optimizer is made.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> @gs.rule
        ... def Signum(w, g, m, *, learning_rate, momentum=0.9, weight_decay=0.0):
        ...     m = momentum * m + (1 - momentum) * g
        ...     return w - learning_rate * (gs.sign(m) + weight_decay * w), m
        >>> opt = Signum(0.5)
        >>> opt.apply_gradients({"w": np.array([3, -4], np.float32)}, {"w": np.zeros(2, np.float32)})["w"]
        array([-0.5,  0.5], dtype=float32)
    """
    if isinstance(static, str):
        raise RuleError(f'static must be a list of names, got the text {static!r}: write static=["{static}"]')
    if function is not None and not inspect.isfunction(function):
        raise RuleError(f"@gs.rule takes a function that was written with def, got {function!r}")
    if not isinstance(signs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuleError(
            f'signs must be a mapping from slot to sign, got {signs!r}: write signs={{"v": "non-negative"}}'
        )
    make = partial(_make, static=frozenset(static), signs=dict(signs))
    return make if function is None else make(function)


def _make(function: Callable[..., Any], static: frozenset[str], signs: Mapping[str, Sign]) -> type[CustomOptimizer]:
    name = function.__name__
    parameters = inspect.signature(function).parameters
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n != "t"}
    _check_signature(name, parameters, positional, keywords, static)
    check_signs(name, positional[2:], signs)
    fields: dict[str, Any] = {
        key: _field(name, key, REQUIRED if default is inspect.Parameter.empty else default, static)
        for key, default in keywords.items()
    }
    body = {
        "rule": staticmethod(function),
        "slot_signs": signs,
        "__doc__": function.__doc__ or f"The rule {name}{inspect.signature(function)}.",
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
    }
    return type(name, (CustomOptimizer,), {**fields, **body})


def _check_signature(
    name: str,
    parameters: Any,
    positional: list[str],
    keywords: dict[str, Any],
    static: frozenset[str],
) -> None:
    if positional[:2] != ["w", "g"]:
        raise RuleError(
            f"{name}: the positional arguments must begin with w, g and go on with the slots, got "
            f"({', '.join(positional)}); write def {name}(w, g, <slots>, *, learning_rate, …)"
        )
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise RuleError(f"{name}: {star}{key} hides what the rule needs; name every slot and hyperparameter")
        if key in positional and parameter.default is not parameter.empty:
            raise RuleError(f"{name}: the slot {key} cannot have a default: slots start at zero; put * before {key}")
    if "learning_rate" in positional:
        raise RuleError(f"{name}: learning_rate stands among the slots; put * before it")
    for key in (*positional[2:], *keywords):
        if key in RESERVED or key.startswith("_"):
            raise RuleError(f"{name}: {key} is a reserved name of optimizers; rename it")
    unknown = static - keywords.keys()
    if unknown:
        raise RuleError(f"{name}: static names {sorted(unknown)}, but the hyperparameters are {sorted(keywords)}")


def _field(owner: str, name: str, default: Any, static: frozenset[str]) -> Field:
    kw_only = name != "learning_rate"
    if name in static or default is None or isinstance(default, (bool, str)):
        return Static(default=default, kw_only=kw_only)
    if default is not REQUIRED and not callable(default) and not isinstance(default, (int, float)):
        raise RuleError(
            f"{owner}: {name}={default!r} is neither a number nor a schedule; "
            f'if it is configuration, declare it: @gs.rule(static=["{name}"])'
        )
    return Scalar(default, FINITE, kw_only=kw_only, removable=False)
