"""A gradstep optimizer as a pure transformation of gradients."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from gradstep.accumulate import Accumulate
from gradstep.arrays.jax import JAX
from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.options import thawed
from gradstep.program.device_scalars import DeviceScalars
from gradstep.program.device_schedules import schedule_on_device
from gradstep.program.graph import Kind, Reading, reachable
from gradstep.program.program import Program
from gradstep.step.evaluate import Evaluation
from gradstep.step.leaf import Leaf
from gradstep.step.look import Look, look, looking_dtype, told
from gradstep.step.scalars import Scales
from gradstep.step.storage import slot_shape
from gradstep.storage_options import STORAGE_DEFAULTS
from gradstep.tree import name_of_path
from gradstep.wrapper import Wrapper

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
optax: Any = importlib.import_module("optax")


class RuleState(NamedTuple):
    """The state of a rule: how many updates have been made, and each slot as a tree like the parameters."""

    count: Any
    slots: dict[str, Any]


class Owner(NamedTuple):
    """Whose rule an array follows, and the array's name there."""

    leaf: Leaf
    name: str


def from_optimizer(optimizer: Optimizer) -> Any:
    """A pure `optax.GradientTransformation` that makes the steps of a gradstep optimizer.

    Its hyperparameters, schedules and options are taken over as they are now; the optimizer itself, its state and
    counters included, is neither used nor changed. Names, for filters, mapped hyperparameters and `frozen`, are the
    paths of the tree, joined with dots. Frozen parameters get updates of zero. With `nonfinite="skip"` an update that
    would be skipped is zero and leaves the state.

    Args:
        optimizer: any optimizer of gradstep, a `@gs.rule` or a `MultiOptimizer` too.

    Returns:
        A transformation; `update` needs the parameters, unless the rule does not read them.

    Raises:
        ArgumentTypeError: not an optimizer of gradstep.
        ConfigurationError: `nonfinite="raise"`, which no compiled function can do; an `Accumulate`; narrow slots,
            stochastic rounding or float32 copies.

    Example:
        >>> import gradstep as gs, jax.numpy as jnp, optax
        >>> from gradstep.optax import from_optimizer
        >>> tx = from_optimizer(gs.Lion(0.5))
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([3.0, -4.0])}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].tolist()
        [-0.5, 0.5]
    """
    if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentTypeError(f"from_optimizer takes an optimizer of gradstep, got {optimizer!r}")
    if isinstance(optimizer, Wrapper) and not isinstance(optimizer, Accumulate):
        raise ConfigurationError(
            f"{optimizer!r} takes steps of its own; pass the optimizer that it wraps: opt.optimizer"
        )
    if isinstance(optimizer, Accumulate):
        raise ConfigurationError(
            f"{optimizer!r} sums gradients between calls; write optax.MultiSteps(from_optimizer(opt.optimizer), "
            f"every_k_schedule={optimizer.every}) instead"
        )
    if optimizer.nonfinite == "raise":
        raise ConfigurationError(
            'nonfinite="raise" cannot work inside of compiled functions; use "skip", or optax.apply_if_finite'
        )
    for leaf in optimizer._leaves():  # pyright: ignore[reportPrivateUsage]
        chosen = {n: v for n, v in leaf.storage.options._asdict().items() if v != STORAGE_DEFAULTS[n]}
        if chosen:
            raise ConfigurationError(
                f"from_optimizer keeps slots in float32 and rounds to nearest, got {chosen}; leave that out, or step "
                "with the optimizer itself, outside of jit"
            )
    transformation = _Transformation(optimizer)
    return optax.GradientTransformation(transformation.init, transformation.update)


class _Transformation:
    """The two functions of a transformation."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        leaves = optimizer._leaves()  # pyright: ignore[reportPrivateUsage]
        self._clipped = optimizer.clip_norm is not None
        self._reading = Reading.SCALED if self._clipped else Reading.PLAIN
        programs = [leaf.programs(ndim, self._reading) for leaf in leaves for ndim in (0, 1, 2)]
        self._slots = list(dict.fromkeys(slot for found in programs for _, program in found for slot in program.slots))

    def init(self, params: Any) -> RuleState:
        """Zero slots."""
        arrays, structure, owners = self._flatten(params)
        made: list[dict[str, Any]] = []
        for w, owner in zip(arrays, owners, strict=True):
            kinds = self._program(owner, w).slots.items() if owner else ()
            made.append({slot: _zeros(kind, w) for slot, kind in kinds})
        return RuleState(jnp.zeros((), jnp.int32), self._columns(structure, made))

    def update(self, updates: Any, state: RuleState, params: Any = None) -> tuple[Any, RuleState]:
        """What is to be added to the parameters, and the state after it."""
        reference = updates if params is None else params
        arrays, structure, owners = self._flatten(reference)
        gradients = structure.flatten_up_to(updates)
        rows = {slot: structure.flatten_up_to(tree) for slot, tree in state.slots.items()}
        seen = [g for g, owner in zip(gradients, owners, strict=True) if owner]
        found = self._look(seen) if self._looks and seen else None
        results: list[tuple[Any, dict[str, Any]]] = []
        for i, (w, g, owner) in enumerate(zip(arrays, gradients, owners, strict=True)):
            if owner is None:
                results.append((jnp.zeros_like(w), {}))
                continue
            program = self._program(owner, w)
            old = {slot: rows[slot][i] for slot in program.slots}
            if params is None:
                _check_independence(program)
                w = jnp.zeros_like(w)
            known = _hyperparameters(owner, state.count) | {"grad_scale": found.scale if found else 1.0}
            results.append(_update(program, w, g, old, known))
        taken = found.finite if found and self._optimizer.nonfinite == "skip" else True
        if taken is not True:
            results = [
                (jnp.where(taken, u, 0), {slot: jnp.where(taken, new[slot], rows[slot][i]) for slot in new})
                for i, (u, new) in enumerate(results)
            ]
        count = jnp.where(taken, optax.safe_increment(state.count), state.count)
        new_slots = self._columns(structure, [new for _, new in results])
        return structure.unflatten([u for u, _ in results]), RuleState(count, new_slots)

    def _look(self, gradients: list[Any]) -> Look:
        facts = told(JAX, self._optimizer.clip_norm, Scales(), looking_dtype(gradients))
        return look(JAX, [Reading.PLAIN] * len(gradients), gradients, [], facts)

    @property
    def _looks(self) -> bool:
        return self._clipped or self._optimizer.nonfinite == "skip"

    def _program(self, owner: Owner, w: Any) -> Program:
        return owner.leaf.program(owner.name, w.ndim, self._reading)

    def _flatten(self, params: Any) -> tuple[list[Any], Any, list[Owner | None]]:
        """The arrays, the tree's structure, and whose rule each array follows, under which name; None if frozen."""
        paths, structure = jax.tree_util.tree_flatten_with_path(params)
        named = {name_of_path(path): array for path, array in paths}
        if len(named) < len(paths):
            raise ArgumentTypeError("two paths of the parameters give one name when joined with dots")
        moving = thawed(named, self._optimizer.frozen)
        routes = self._optimizer._assign(moving)  # pyright: ignore[reportPrivateUsage]
        owners = {name: Owner(leaf, name) for leaf, names in routes for name in names}
        return list(named.values()), structure, [owners.get(name) for name in named]

    def _columns(self, structure: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One tree for each slot; None where a parameter has none."""
        return {slot: structure.unflatten([row.get(slot) for row in rows]) for slot in self._slots}


def _update(program: Program, w: Any, g: Any, old: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    dtype = "float64" if w.dtype == "float64" else "float32"
    arrays = {"w": w, "g": g, **old}
    scalars = DeviceScalars(jnp, known, tuple(w.shape))
    values = Evaluation(JAX, program, dtype, arrays, scalars.of(program))
    new = values.outputs()
    result = program.outputs["w"]
    if result.op == "subtract":  # what is subtracted is the update; a difference of parameters would round it away
        kept, step = result.args
        update = _growth(kept, values, scalars, w.astype(dtype)) - values[step]
    else:
        update = new["w"] - w.astype(dtype)
    del new["w"]
    return jnp.broadcast_to(update, w.shape).astype(w.dtype), new


def _growth(kept: Any, values: Evaluation, scalars: DeviceScalars, w: Any) -> Any:
    """`kept - w`, without a difference where `kept` is `w` or a multiple of it."""
    if _is_w(kept):
        return jnp.zeros_like(w)
    if kept.op == "multiply" and _is_w(kept.args[0]) and kept.args[1].kind is Kind.HOST:
        return w * scalars.less_one(kept.args[1])
    return values[kept] - w


def _is_w(symbol: Any) -> bool:
    return symbol.op == "array" and symbol.attribute == "w"


def _check_independence(program: Program) -> None:
    result = program.outputs["w"]
    inside = [*result.args[1:], *(value for place, value in program.outputs.items() if place != "w")]
    if result.op != "subtract" or not _is_w(result.args[0]) or any(map(_is_w, reachable(inside))):
        raise ValueError(f"{program.name} needs the parameters: call update(grads, state, params)")


def _hyperparameters(owner: Owner, count: Any) -> dict[str, Any]:
    """Every scalar by the name of its symbol, schedules at `count`."""
    known: dict[str, Any] = {"t": (count + 1).astype("float32")}
    for cell in owner.leaf.settings_of(owner.name).cells:
        source = cell.source.value
        if isinstance(source, Injected):
            known[cell.symbol] = source.value
        elif callable(source):
            known[cell.symbol] = schedule_on_device(jnp, cast("Callable[[Any], Any]", source), count)
        else:
            known[cell.symbol] = float(source)
    return known


def _zeros(kind: Kind, w: Any) -> Any:
    dtype = "float64" if w.dtype == "float64" else "float32"
    return jnp.zeros_like(w, dtype=dtype) if kind is Kind.FULL else jnp.zeros(slot_shape(kind, w.shape), dtype)


class Injected:
    """A hyperparameter that is an array, as `optax.inject_hyperparams` gives it; a schedule for everybody else."""

    def __init__(self, value: Any, stand_in: float) -> None:
        self.value, self._stand_in = value, stand_in

    def __call__(self, step: int) -> float:
        return self._stand_in
