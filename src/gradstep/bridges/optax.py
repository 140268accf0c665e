"""The states of optax's transformations, and of gradstep.optax's."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gradstep.arrays.library import Form
from gradstep.arrays.stored import Stored
from gradstep.bridges.foreign import Copied, Entry, copied, state_dict_of, whole_number
from gradstep.errors import ConfigurationError, DuplicateNameError, MismatchError
from gradstep.tree import name_of_path


class Layout(NamedTuple):
    """A state that keeps what the core's slots are, recognised by its fields.

    Attributes:
        slots: the core's slots by the fields that hold a tree of them.
        families: the core's families by whose formula optax goes on from it; None for every family with such slots.
    """

    slots: Mapping[str, str]
    families: tuple[str, ...] | None


LAYOUTS: dict[frozenset[str], Layout] = {
    frozenset({"count", "mu", "nu"}): Layout({"mu": "m", "nu": "v"}, ("Adam", "AdamW")),
    frozenset({"count", "mu"}): Layout({"mu": "m"}, ("Lion",)),
    frozenset({"trace"}): Layout({"trace": "v"}, ("SGD",)),
    frozenset({"nu"}): Layout({"nu": "v"}, ("RMSprop",)),
    frozenset({"count", "nu"}): Layout({"nu": "v"}, ()),  # RMSprop with bias correction
    frozenset({"sum_of_squares"}): Layout({"sum_of_squares": "v"}, ("Adagrad",)),
    frozenset({"e_g", "e_x"}): Layout({"e_g": "v", "e_x": "u"}, ("AdaDelta",)),
    frozenset({"count", "slots"}): Layout({}, None),  # of gradstep.optax, with the slots by the core's names
}

ALIKE = {  # states whose fields are called like Adam's and hold something else
    "ScaleByBeliefState": "the mean square of the gradient's deviation",
    "ScaleByRStdDevWithCountState": "the mean square for a centered RMSprop",
    "ScaleByNovogradState": "one mean square for each array",
}

WHOLE = {  # what the core's options must be for optax to have the formula
    "Adam": ("bias_correction", True),
    "AdamW": ("bias_correction", True),
    "SGD": ("dampening", 0.0),
}

Slots = dict[str, dict[str, Any]]


class Found(NamedTuple):
    """A state with slots, and where it is."""

    where: str
    state: Any
    layout: Layout


def from_optax(state: object) -> dict[str, Any]:
    """A gradstep state dict of the state of an optax transformation, for `load_state_dict`.

    Takes what `tx.init` and `tx.update` return, chained, masked, partitioned or with injected hyperparameters, and the
    states of `gradstep.optax` too. Exactly one state in it must hold slots: that of `scale_by_adam`, `trace`,
    `scale_by_lion`, `scale_by_rms`, `scale_by_rss` or `scale_by_adadelta`. Parameters are named by their paths, joined
    with dots. States know no hyperparameters: the optimizer that loads the result keeps its own, which must be those
    of the transformation: `adam` and `adamw` go on with `bias_correction=True`, `rmsprop(eps_in_sqrt=False)` as
    `RMSprop`, `adagrad` as `Adagrad` but for the place of `eps`; optax's other users of these states have formulas of
    their own, and the slot of `gradstep.optax.adagrad` lacks its initial value.

    All parameters get the count of the state, or of a schedule beside it; 1 where nothing counts.

    Args:
        state: a state; no tree of parameters.

    Returns:
        A dict like that of `opt.state_dict()`; the arrays are those given.

    Raises:
        ConfigurationError: no state holds slots, or several do.
        DuplicateNameError: two paths give one name.

    Example:
        >>> import gradstep as gs, jax.numpy as jnp, optax
        >>> params, tx = {"w": jnp.ones(2)}, optax.adam(0.1)
        >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
        >>> opt = gs.Adam(0.1, bias_correction=True)
        >>> opt.load_state_dict(gs.from_optax(state))
        []
        >>> opt.step, opt.state["w"]["m"]
        (1, array([0.1, 0.1], dtype=float32))
    """
    jax: Any = importlib.import_module("jax")
    found = _the_one(jax, state, "from_optax")
    slots = _slots_in(jax, found)
    if not slots:
        raise ConfigurationError(f"from_optax: {found.where} has no slots, so there is nothing to go on from")
    counts = [whole_number(owner.count, f"the count of {where}") for where, owner in _counters(jax, state)]
    count = max(counts, default=1)
    if "count" in found.state._fields:
        count = whole_number(found.state.count, f"the count of {found.where}")
    entries = {name: Entry(count, arrays) for name, arrays in slots.items()}
    kept = dict.fromkeys(slot for arrays in slots.values() for slot in arrays)
    return state_dict_of(None, list(kept), max([count, *counts]), entries)


def to_optax(opt: object, state: Any) -> Any:
    """A state of an optax transformation with the slots and counts of a gradstep optimizer.

    Hyperparameters are the transformation's own. Counts of schedules become `opt.step`.

    Args:
        opt: an optimizer of the core with one rule, or an `Accumulate` of one. Adam and AdamW need
            `bias_correction=True`, SGD no dampening, as optax has it.
        state: a state of the transformation, such as `tx.init(params)`; it is not changed. As for `from_optax`, one
            state in it must hold slots.

    Returns:
        A state of the same structure, with arrays of JAX where those of `state` are.

    Raises:
        MismatchError: names, slots, shapes or dtypes differ; lists all differences.
        ConfigurationError: optax has another formula, one count does not do, or the state is kept in 8 bits or with
            copies of parameters.
        ArgumentTypeError: `opt` is no optimizer of the core.

    Example:
        >>> import gradstep as gs, jax.numpy as jnp, optax
        >>> params, opt = {"w": jnp.ones(2)}, gs.SGD(0.1, momentum=0.9)
        >>> _ = opt.apply_gradients({"w": jnp.ones(2)}, params)
        >>> gs.to_optax(opt, optax.sgd(0.1, momentum=0.9).init(params))[0].trace["w"].tolist()
        [1.0, 1.0]
    """
    jax: Any = importlib.import_module("jax")
    held = copied(opt, "to_optax")
    found = _the_one(jax, state, "to_optax")
    _check_family(held, found)
    _check_alike(held, _slots_in(jax, found), found.where)
    new = _filled(jax, found, held, held.common_count("optax"))
    return _rebuilt(jax, state, found.state, new, held.step)


def _the_one(jax: Any, state: object, bridge: str) -> Found:
    """The one state that holds slots."""
    found: list[Found] = []
    others: list[str] = []
    for where, node in _states(jax, state):
        name = type(node).__name__
        layout = LAYOUTS.get(frozenset(node._fields))
        if layout is not None and name not in ALIKE:
            found.append(Found(where, node, layout))
        else:
            others.append(f"{where}: {ALIKE[name]}, which no rule of the core keeps" if name in ALIKE else where)
    if len(found) == 1:
        return found[0]
    if found:
        places = "; ".join(one.where for one in found)
        raise ConfigurationError(
            f"{bridge} converts a state in which one transformation keeps slots, got {len(found)}: {places}; convert "
            "each part for itself: a member of a chain's tuple, or of inner_states"
        )
    raise ConfigurationError(
        f"{bridge} found no state with slots, but {'; '.join(others) or f'a {type(state).__name__}'}; expected that of "
        "optax's adam, adamw, lion, sgd with momentum, rmsprop, adagrad or adadelta, or of gradstep.optax"
    )


def _states(jax: Any, node: Any, where: str = "state") -> Iterable[tuple[str, Any]]:
    """All named tuples, down to those that hold slots, with their places."""
    fields: tuple[str, ...] = getattr(node, "_fields", ())
    if hasattr(node, "_fields"):
        yield f"{where} ({type(node).__name__})", node
    if frozenset(fields) not in LAYOUTS:
        for path, child in _children(jax, node):
            yield from _states(jax, child, where + jax.tree_util.keystr(path))


def _children(jax: Any, node: Any) -> list[tuple[Any, Any]]:
    """What is one level below a node, by path; nothing for arrays."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=_other_than(node))[0]
    return [(path, child) for path, child in children if path]


def _other_than(node: Any) -> Callable[[Any], bool]:
    """What makes JAX stop one level below a node."""

    def stops(part: Any) -> bool:
        return part is not node

    return stops


def _counters(jax: Any, state: Any) -> list[tuple[str, Any]]:
    return [(where, node) for where, node in _states(jax, state) if _counts(node)]


def _counts(node: Any) -> bool:
    """Whether this is the state of a schedule, or of injected hyperparameters, which may be schedules."""
    fields: tuple[str, ...] = getattr(node, "_fields", ())
    return fields == ("count",) or {"count", "hyperparams"} <= set(fields)


def _slots_in(jax: Any, found: Found) -> Slots:
    """The slots by parameter name, with the core's names."""
    trees = found.state.slots if found.layout.families is None else {
        slot: getattr(found.state, field) for field, slot in found.layout.slots.items()
    }  # fmt: skip
    slots: Slots = {}
    for slot, tree in trees.items():
        for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = name_of_path(path)
            if slot in slots.setdefault(name, {}):
                raise DuplicateNameError(f"two paths of {found.where} give the name {name!r}; rename one of them")
            slots[name][slot] = array
    return slots


def _check_family(held: Copied, found: Found) -> None:
    families, family = found.layout.families, held.family
    if not held.is_ours or families is None:
        return
    if family not in families:
        raise ConfigurationError(
            f"{found.where} is for {' or '.join(families) or 'no rule of the core'}, got {family}; make the state with "
            "the transformation that has the optimizer's formula, or with gradstep.optax.from_optimizer"
        )
    name, value = WHOLE.get(family, ("learning_rate", None))
    if value is not None and getattr(held.optimizer, name) != value:
        raise ConfigurationError(
            f"optax's transformation always has {name}={value!r}, but {family} has "
            f"{name}={getattr(held.optimizer, name)!r}; its steps would be others: set opt.{name} = {value!r} first, "
            "or use gradstep.optax.from_optimizer"
        )


def _check_alike(held: Copied, slots: Slots, where: str) -> None:
    """Raise `MismatchError` unless both have the same arrays."""
    ours = {(name, slot): array for name, entry in held.state.items() for slot, array in entry.slots.items()}
    theirs = {(name, slot): array for name, arrays in slots.items() for slot, array in arrays.items()}
    lines: list[str] = []
    for name, slot in dict.fromkeys([*ours, *theirs]):
        both = [_shape(arrays.get((name, slot))) for arrays in (ours, theirs)]
        if both[0] != both[1]:
            lines.append(f"  state[{name!r}][{slot!r}]: {both[0]} in the optimizer, {both[1]} in the state of optax")
    if lines:
        raise MismatchError("\n".join([f"the optimizer's state does not fit {where}:", *lines]))


def _shape(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype} {tuple(array.shape)}"


def _filled(jax: Any, found: Found, held: Copied, count: int) -> Any:
    """The state with slots, with those of the optimizer."""

    def put(slot: str, tree: Any) -> Any:
        def landed(path: Any, old: Any) -> Any:
            return _landed(held.state[name_of_path(path)].slots[slot], old)

        return jax.tree_util.tree_map_with_path(landed, tree)

    old = found.state
    if found.layout.families is None:
        new = {"slots": {slot: put(slot, tree) for slot, tree in old.slots.items()}}
    else:
        new = {field: put(slot, getattr(old, field)) for field, slot in found.layout.slots.items()}
    if "count" in old._fields:
        new["count"] = _number(jax, count, old.count)
    return old._replace(**new)


def _landed(stored: Stored, old: Any) -> Any:
    """An array of JAX where another one lies."""
    from gradstep.arrays.jax import JAX

    return stored.in_place_of(JAX, Form(stored.shape, stored.dtype, JAX.place_of(old)))


def _number(jax: Any, count: int, old: Any) -> Any:
    return jax.numpy.asarray(count, jax.numpy.asarray(old).dtype)


def _rebuilt(jax: Any, node: Any, old: Any, new: Any, step: int) -> Any:
    """A copy of a tree of states with `new` for `old`, and `step` for the counts of schedules."""
    if node is old:
        return new
    if jax.tree_util.all_leaves([node]):
        return node
    children, structure = jax.tree_util.tree_flatten(node, is_leaf=_other_than(node))
    copy = structure.unflatten([_rebuilt(jax, child, old, new, step) for child in children])
    return copy._replace(count=_number(jax, step, copy.count)) if _counts(copy) else copy
