"""The states of MLX's optimizers, and of gradstep.mlx's, which have the same layout."""

import importlib
from collections.abc import Mapping
from typing import Any, cast

from gradstep.arrays.library import Form
from gradstep.arrays.stored import Stored
from gradstep.bridges.foreign import Copied, Entry, copied, state_dict_of, whole_number
from gradstep.errors import ArgumentTypeError, ConfigurationError, DuplicateNameError, MismatchError, listing
from gradstep.tree import flatten

NAMES = {"m": "m", "v": "v", "u": "u"}
ADAFACTOR = {"exp_avg_sq_row": "row", "exp_avg_sq_col": "col", "exp_avg_sq": "v", "exp_avg": "m"}
KNOWN = NAMES | ADAFACTOR  # the core's slots by MLX's names
RATE = "learning_rate"


def from_mlx(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A gradstep state dict of the state of an MLX optimizer, for `load_state_dict`.

    All of MLX's optimizers that the core has too can go on. Parameters are named by their paths, joined with dots; each
    has taken as many steps as the optimizer. The state knows no hyperparameters but the rate, which may have come from
    a schedule: the optimizer that loads the result keeps its own. Where `v` is the only slot and zero everywhere after
    some steps, it is left out: MLX's `SGD` keeps one without momentum too.

    Slots of bfloat16 and float16 parameters have the parameter's dtype in MLX: load them into an optimizer with that
    `slot_dtype`.

    Args:
        tree: `optimizer.state`, of `mlx.optimizers` or `gradstep.mlx`.

    Returns:
        A dict like that of `opt.state_dict()`; the arrays are those given.

    Raises:
        ConfigurationError: this is not the state of one optimizer of MLX.
        ArgumentTypeError: not a mapping.
        DuplicateNameError: two paths give one name.

    Example:
        >>> import gradstep as gs, mlx.core as mx, mlx.optimizers
        >>> old = mlx.optimizers.Lion(0.1)
        >>> _ = old.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
        >>> opt = gs.Lion(0.1)
        >>> opt.load_state_dict(gs.from_mlx(old.state))
        []
        >>> opt.step, opt.state["w"]["m"].round(3)
        (1, array([0.01, 0.01], dtype=float32))
    """
    if not isinstance(tree, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        remedy = "; pass optimizer.state" if hasattr(tree, "state") else ""
        raise ArgumentTypeError(f"from_mlx takes the state of an MLX optimizer, got a {type(tree).__name__}{remedy}")
    if "step" not in tree:
        remedy = ": it is a MultiOptimizer's, so convert that of each of its optimizers" if "states" in tree else ""
        raise ConfigurationError(
            f"from_mlx takes the state of an MLX optimizer, which has the entry 'step', got {listing(list(tree))}"
            + remedy
        )
    step = whole_number(tree["step"], "the state's 'step'")
    slots: dict[str, dict[str, Any]] = {}
    for key, value in tree.items():
        if isinstance(value, (Mapping, list, tuple)):
            _collect(value, key, slots)
    kept = {slot for arrays in slots.values() for slot in arrays}
    if step and kept == {"v"} and not any(_any(arrays["v"]) for arrays in slots.values()):
        slots, kept = {name: dict[str, Any]() for name in slots}, set[str]()
    return state_dict_of(None, sorted(kept), step, {name: Entry(step, arrays) for name, arrays in slots.items()})


def _collect(node: Any, name: str, slots: dict[str, dict[str, Any]]) -> None:
    """Note all parameters below. A parameter is a dict of arrays; what is empty has no state."""
    if isinstance(node, Mapping) and node and not any(map(_is_nested, cast("Mapping[str, Any]", node).values())):
        found = cast("Mapping[str, Any]", node)
        strange = [slot for slot in found if slot not in KNOWN]
        if strange:
            raise ConfigurationError(
                f"the state of {name!r} has {listing(strange)}; expected slots of MLX's optimizers: "
                + listing(list(KNOWN))
            )
        if name in slots:
            raise DuplicateNameError(f"two paths of the state give the name {name!r}; rename one of the parameters")
        slots[name] = {KNOWN[slot]: array for slot, array in found.items()}
    elif isinstance(node, Mapping):
        for key, value in cast("Mapping[str, Any]", node).items():
            _below(value, f"{name}.{key}", slots)
    else:
        for place, value in enumerate(node):
            _below(value, f"{name}.{place}", slots)


def _below(node: Any, name: str, slots: dict[str, dict[str, Any]]) -> None:
    if not _is_nested(node):
        raise ConfigurationError(
            f"the state at {name!r} is of type {type(node).__name__}, expected a dict of slots; pass optimizer.state "
            "as it is"
        )
    _collect(node, name, slots)


def _is_nested(node: Any) -> bool:
    return isinstance(node, (Mapping, list, tuple))


def _any(array: Any) -> bool:
    return bool((array != 0).any())


def to_mlx(opt: object, params: object = None) -> dict[str, Any]:
    """A state for MLX's optimizer of the same family, to be assigned to its `state`.

    The rate is the optimizer's; a schedule becomes the value that it gave last, and MLX's own schedule, if its
    optimizer has one, goes on from the step.

    Args:
        opt: an optimizer of the core with one rule, or an `Accumulate` of one.
        params: the parameters, in whose nesting the state is made, such as `model.trainable_parameters()`. Default:
            names are split at dots, as `mlx.utils.tree_unflatten` does.

    Returns:
        `step`, `learning_rate` unless there is none, and the tree of slots; copies in arrays of MLX.

    Raises:
        ConfigurationError: a rule of your own, rates that differ, counts that differ where it matters, a name that MLX
            uses itself, or state that is kept in 8 bits or with copies of parameters.
        MismatchError: `opt` has state for parameters that `params` lacks.
        ArgumentTypeError: `opt` is no optimizer of the core, or `params` no tree.

    Example:
        >>> import gradstep as gs, mlx.core as mx, mlx.optimizers
        >>> opt = gs.Lion(0.1)
        >>> _ = opt.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
        >>> new = mlx.optimizers.Lion(0.1)
        >>> new.state = gs.to_mlx(opt)
        >>> new.step.item(), new.state["w"]
        (1, {'m': array([0.01, 0.01], dtype=float32)})
    """
    held = copied(opt, "to_mlx")
    if not held.is_ours:
        raise ConfigurationError(
            f"to_mlx: {held.family} is a rule of your own, which MLX has not; expected a family of gradstep"
        )
    mx: Any = importlib.import_module("mlx.core")
    step = held.common_count("MLX")
    if step != held.step:
        raise ConfigurationError(
            f"MLX counts one step for the optimizer and its parameters, but {held.family} has taken {held.step} and "
            f"its parameters {step}; they agree when every step brings every gradient"
        )
    state: dict[str, Any] = {"step": mx.array(step, mx.uint64)}
    rate = _rate(held)
    if rate is not None:
        state[RATE] = mx.array(rate, mx.float32)
    slots = {name: _slots(held, entry) for name, entry in held.state.items()}
    tree = _unflattened(slots) if params is None else _nested_like(slots, params)
    taken = [key for key in tree if key in ("step", RATE)]
    if taken:
        raise ConfigurationError(f"MLX keeps {listing(taken)} of its own in the state; give the parameter another name")
    return state | tree


def _rate(held: Copied) -> float | None:
    """The one learning rate of all parameters."""
    rate = held.optimizer.get_hyperparameter(RATE)
    if not isinstance(rate, Mapping):
        return rate
    rates = {held.optimizer._leaf.settings_of(name).current(RATE) for name in held.state}  # pyright: ignore[reportPrivateUsage]
    if len(rates) != 1:
        raise ConfigurationError(
            f"MLX has one learning rate for all parameters, got {rate!r}; give parameters that differ to optimizers of "
            "their own: MultiOptimizer, whose children are converted one by one"
        )
    return rates.pop()


def _slots(held: Copied, entry: Entry) -> dict[str, Any]:
    """The slots of one parameter as MLX keeps them."""
    from gradstep.arrays.mlx import MLX

    def array(slot: Stored) -> Any:
        return slot.in_place_of(MLX, Form(slot.shape, slot.dtype, None))

    table = ADAFACTOR if held.family == "Adafactor" else NAMES
    return {name: array(entry.slots[slot]) for name, slot in table.items() if slot in entry.slots}


def _unflattened(slots: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    utils: Any = importlib.import_module("mlx.utils")
    tree: Any = utils.tree_unflatten(list(slots.items())) if slots else {}
    if not isinstance(tree, dict):
        raise ConfigurationError(
            f"MLX's parameters are a dict at the top, but the names {listing(list(slots))} begin with numbers; nest "
            "them in a dict"
        )
    return cast("dict[str, Any]", tree)


def _nested_like(slots: Mapping[str, dict[str, Any]], params: object) -> dict[str, Any]:
    """The slots in the nesting of parameters; an empty dict for those that have none yet."""
    if callable(getattr(params, "trainable_parameters", None)):
        raise ArgumentTypeError(f"params is a module ({type(params).__name__}); pass model.trainable_parameters()")
    if not isinstance(params, Mapping):
        raise ArgumentTypeError(f"params must be a dict of parameters, nested or not, got a {type(params).__name__}")
    there = flatten(cast("Any", params), "params")
    lacking = [name for name in slots if name not in there]
    if lacking:
        raise MismatchError(
            f"params lacks {listing(lacking)}, for which the optimizer has state; it has {listing(list(there))}: pass "
            "all parameters, under the names that they had in the optimizer's steps"
        )

    def put(node: Any, name: str) -> Any:
        if isinstance(node, Mapping):
            return {key: put(value, f"{name}.{key}") for key, value in cast("Mapping[str, Any]", node).items()}
        if isinstance(node, (list, tuple)):
            parts = [put(value, f"{name}.{place}") for place, value in enumerate(cast("list[Any]", node))]
            return tuple(parts) if isinstance(node, tuple) else parts
        return slots.get(name, {})

    return {key: put(value, key) for key, value in cast("Mapping[str, Any]", params).items()}
