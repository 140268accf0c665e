"""Several optimizers as one: each takes the parameters that its filter claims."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.options import Policy
from gradstep.report import Rate
from gradstep.state import StateView
from gradstep.step.leaf import Leaf
from gradstep.step.outcome import Awaited, Outcome

Filter = str | Callable[[str, Any], bool]


class MultiOptimizer(Optimizer):
    """Optimizers side by side; the first filter that accepts a parameter decides, the last optimizer takes the rest.

    A step is whole across all of them, however nested. Every child counts every step, also one that brings it nothing.

    Args:
        optimizers: at least one, each only once.
        filters: one fewer than optimizers: globs such as `"*.bias"`, or functions `(name, parameter) -> bool`.
            Each is asked once per name.
        clip_norm: clip the gradients of all children together to this global norm; None for not at all.
        nonfinite: "allow", "raise" or "skip" when any gradient holds NaN or infinity.
        donate: let JAX and MLX reuse the memory of old parameters and slots, on the CPU at once and in gradstep's own
            kernels; arrays of JAX that are held elsewhere become invalid.
        frozen: globs of parameters that are left alone: they get no slots and take part in no step.

    Raises:
        ConfigurationError: numbers that do not match, a child given twice, or a child with options of its own.
        ArgumentTypeError: a child that is no optimizer, a filter that is neither a glob nor a function.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> opt = gs.MultiOptimizer([gs.SGD(1.0), gs.SGD(0.5)], ["*.bias"])
        >>> params = {"layer": {"weight": np.zeros(1, np.float32), "bias": np.zeros(1, np.float32)}}
        >>> grads = {"layer": {"weight": np.ones(1, np.float32), "bias": np.ones(1, np.float32)}}
        >>> opt.apply_gradients(grads, params)
        {'layer': {'weight': array([-0.5], dtype=float32), 'bias': array([-1.], dtype=float32)}}
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        filters: Sequence[Filter] = (),
        *,
        clip_norm: float | None = None,
        nonfinite: Policy = "allow",
        donate: bool = False,
        frozen: Sequence[str] = (),
    ) -> None:
        self._children = self._checked(optimizers)
        self._filters = _checked_filters(filters, len(self._children))
        self._routes: dict[str, int] = {}
        self._step = 0
        self._awaited = Awaited()
        super().__init__(clip_norm=clip_norm, nonfinite=nonfinite, donate=donate, frozen=frozen)
        self._check_options()

    @property
    def step(self) -> int:
        self._awaited.settle()
        return self._step

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The children, in order."""
        return self._children

    @property
    def filters(self) -> tuple[Filter, ...]:
        """The globs and functions that choose among the children, in order; the last child has none."""
        return self._filters

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Empty: hyperparameters are the children's."""
        return {}

    @property
    def learning_rate(self) -> Rate:
        """The first child's rate. It cannot be set here."""
        return getattr(self._children[0], "learning_rate", None)

    @learning_rate.setter
    def learning_rate(self, value: object) -> None:
        raise ConfigurationError(
            "a MultiOptimizer has no learning rate of its own; set a child's: opt.optimizers[0].learning_rate = …"
        )

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        return StateView(self._leaves())

    @property
    def steps(self) -> dict[str, int]:
        return {name: count for child in self._children for name, count in child.steps.items()}

    def _coming_rate(self) -> Rate:
        return self._children[0]._coming_rate()

    def _leaves(self) -> list[Leaf]:
        return [leaf for child in self._children for leaf in child._leaves()]

    def _route(self, params: Mapping[str, Any], *, remember: bool = True) -> list[tuple[Leaf, list[str]]]:
        shares: list[dict[str, Any]] = [{} for _ in self._children]
        routes = self._routes if remember else dict(self._routes)
        for name, parameter in params.items():
            if name not in routes:
                routes[name] = self._claim(name, parameter)
            shares[routes[name]][name] = parameter
        parts = zip(self._children, shares, strict=True)
        return [part for child, share in parts for part in child._route(share, remember=remember)]

    def _titles(self) -> list[str]:
        titles = [(place, title) for place, child in enumerate(self._children) for title in child._titles()]
        return [f"[{place}]{title if title.startswith('[') else f' {title}'}" for place, title in titles]

    @staticmethod
    def _checked(optimizers: Sequence[Optimizer]) -> tuple[Optimizer, ...]:
        children = tuple(optimizers)
        if not children:
            raise ConfigurationError("MultiOptimizer needs at least one optimizer")
        for child in children:
            if not isinstance(child, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ArgumentTypeError(f"MultiOptimizer's optimizers must be gradstep optimizers, got {child!r}")
            child._check_inside("MultiOptimizer")
        inner = [leaf for child in children for leaf in child._leaves()]
        if len({id(leaf) for leaf in inner}) < len(inner) or len({id(child) for child in children}) < len(children):
            raise ConfigurationError("MultiOptimizer got the same optimizer twice; make one for each filter")
        return children

    def _claim(self, name: str, parameter: Any) -> int:
        for place, accepts in enumerate(self._filters):
            try:
                claimed = fnmatchcase(name, accepts) if isinstance(accepts, str) else accepts(name, parameter)
            except Exception as error:
                error.add_note(f"raised by filters[{place}] for {name!r}; a filter takes (name, parameter)")
                raise
            if claimed:
                return place
        return len(self._filters)

    def _forget_routes(self) -> None:
        self._routes = {}
        for child in self._children:
            child._forget_routes()

    def _check_options(self) -> None:
        for child in self._children:
            if child._has_options:
                raise ConfigurationError(
                    f"{child!r} has clip_norm, nonfinite, donate or frozen set, but a step of a MultiOptimizer is one "
                    "step: set them on the outermost MultiOptimizer"
                )
            child._check_options()

    def _family(self) -> list[Optimizer]:
        return [self, *(member for child in self._children for member in child._family())]

    def _go_on_from(self, step: int) -> None:
        """Let everybody have taken so many steps, and ask filters again."""
        self._awaited.settle()
        self._step, self._routes = step, {}
        for child in self._children:
            if isinstance(child, MultiOptimizer):
                child._go_on_from(step)
            else:
                for leaf in child._leaves():
                    leaf.go_on_from(step)

    def _count_step(self, outcome: Outcome | None = None) -> None:
        if outcome is None:
            self._advance()
        else:
            self._awaited.add(outcome, self._advance)
        for child in self._children:
            child._count_step(outcome)

    def _advance(self) -> None:
        self._step += 1

    def __repr__(self) -> str:
        children = ", ".join(map(repr, self._children))
        filters = f", {list(self._filters)!r}" if self._filters else ""
        return f"MultiOptimizer([{children}]{filters}{self._spelled_options})"


def _checked_filters(filters: Sequence[Filter], children: int) -> tuple[Filter, ...]:
    if isinstance(filters, str):
        raise ArgumentTypeError(f"filters must be a list, got the text {filters!r}: write [{filters!r}]")
    for accepts in filters:
        if not isinstance(accepts, str) and not callable(accepts):
            raise ArgumentTypeError(f"a filter must be a glob or a function (name, parameter) -> bool, got {accepts!r}")
    if len(filters) != children - 1:
        raise ConfigurationError(
            f"expected one filter fewer than the {children} optimizers, got {len(filters)}: "
            "the last optimizer takes the rest"
        )
    return tuple(filters)
