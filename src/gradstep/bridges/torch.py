"""The states of torch.optim's optimizers, and of gradstep.torch's, which have the same layout."""
# pyright: reportPrivateUsage=false

import importlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import gradstep
from gradstep.arrays.stored import Stored
from gradstep.bridges.foreign import Copied, Entry, copied, state_dict_of, whole_number
from gradstep.bridges.torch_families import ADVICE, MARKS, OTHER_FORMULAS, SHARED, WITH_TORCH_FORMULA, Shared
from gradstep.errors import ArgumentTypeError, ConfigurationError, DuplicateNameError, MismatchError, listing
from gradstep.step.leaf import rule_arguments

Group = Mapping[str, Any]


def from_torch(state_dict: Mapping[str, Any], names: object = None) -> dict[str, Any]:
    """A gradstep state dict of the one that a torch optimizer gave, for `load_state_dict`.

    SGD, RMSprop, Adagrad, Adadelta, Adam and AdamW of `torch.optim` and `gradstep.torch`, and `gradstep.torch.Lion`,
    are converted where they step by the core's formula. Hyperparameters come along; those in which groups differ become
    mappings from parameter name, with `"*"` for the most common value. torch rates are numbers: to go on with a
    schedule, load with `hyperparameters="mine"`, and it is resolved at the step count, the largest of all parameters.
    torch's SGD and Lion count no steps; a parameter that has a slot then counts as having taken one.

    Slots of bfloat16 and float16 parameters have the parameter's dtype in torch: load them into an optimizer with that
    `slot_dtype`.

    Args:
        state_dict: what `optimizer.state_dict()` gave.
        names: the parameters' names in the order in which the torch optimizer got them: a list of strings, or what
            `model.named_parameters()` gives. Default: those in the state dict, which is there if the optimizer got
            named parameters.

    Returns:
        A dict like that of `opt.state_dict()`; the tensors are those given, not copies.

    Raises:
        ConfigurationError: torch's formula is another one, or these are not the state dict and the names of one
            optimizer.
        ArgumentTypeError: `state_dict` or `names` is of another type.
        DuplicateNameError: a name comes twice.

    Example:
        >>> import gradstep as gs, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> old = torch.optim.AdamW([w], lr=0.5)
        >>> w.sum().backward(); old.step()
        >>> opt = gs.AdamW(1e-3, bias_correction=True)
        >>> opt.load_state_dict(gs.from_torch(old.state_dict(), ["w"]))
        []
        >>> opt.learning_rate, opt.steps, opt.state["w"]["m"]
        (0.5, {'w': 1}, array([0.1, 0.1], dtype=float32))
    """
    groups, state = _parts(state_dict)
    owners = [(key, group) for group in groups for key in group["params"]]
    order = _names(names, groups, len(owners))
    family = _family(groups)
    shared = SHARED[family]
    for group in groups:
        _refuse_absent(family, shared, group)
    entries: dict[str, Entry] = {}
    for name, (key, group) in zip(order, owners, strict=True):
        slots = _slots(family, shared, name, state.get(key, {}))
        ignored = family == "SGD" and not plain(group["momentum"])
        if slots and not ignored:
            entries[name] = Entry(_steps(shared, name, state[key]), slots)
    stateless = [name for name in order if name not in entries]
    _refuse_beginnings(family, [(name, group) for name, (_, group) in zip(order, owners, strict=True)], stateless)
    values = _hyperparameters(family, shared, dict(zip(order, (group for _, group in owners), strict=True)))
    step = max((entry.steps for entry in entries.values()), default=0)
    return state_dict_of(
        family,
        rule_arguments(getattr(gradstep, family).rule)[0],
        step,
        entries,
        hyperparameters=values | dict(shared.fixed),
        stateless=stateless,
    )


def _parts(state_dict: object) -> tuple[list[Group], Mapping[Any, Mapping[str, Any]]]:
    kind = type(state_dict).__name__
    if hasattr(state_dict, "param_groups") and hasattr(state_dict, "state_dict"):
        raise ArgumentTypeError(f"from_torch takes a state dict, got {kind}; pass opt.state_dict()")
    given: Mapping[str, Any] = cast("Any", state_dict) if isinstance(state_dict, Mapping) else {}
    if not {"param_groups", "state"} <= given.keys():
        found = f" with {listing(list(map(str, given)))}" if given else ""
        raise ArgumentTypeError(
            "from_torch takes the state dict of a torch optimizer, with the keys 'state' and 'param_groups', got "
            f"{kind}{found}; pass optimizer.state_dict()"
        )
    return list(given["param_groups"]), given["state"]


def _names(names: object, groups: Sequence[Group], expected: int) -> list[str]:
    """The names of all parameters in order, checked."""
    if names is None:
        known = [name for group in groups for name in group.get("param_names", ())]
        if len(known) != expected:
            raise ConfigurationError(
                f"the state dict has {expected} parameters and {len(known)} names for them, because its optimizer got "
                "unnamed parameters; pass names=model.named_parameters(), in the order in which it got them"
            )
        return _checked(known, "the state dict's param_names")
    order = names_in(names)
    if len(order) != expected:
        raise ConfigurationError(
            f"names has {len(order)} names, {listing(order)}, but the state dict has {expected} parameters in "
            f"{len(groups)} groups; pass the names of exactly those that the torch optimizer got, in its order"
        )
    return order


def names_in(names: object) -> list[str]:
    """Names given as a list, as pairs or as a mapping; checked."""
    if callable(getattr(names, "named_parameters", None)):
        raise ArgumentTypeError(f"names is a module ({type(names).__name__}); pass model.named_parameters()")
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise ArgumentTypeError(
            f"names must be a list of names, or (name, parameter) pairs, got {names!r} ({type(names).__name__})"
        )
    items: list[Any] = list(cast("Any", names))
    return _checked([item[0] if isinstance(item, tuple) and item else item for item in items], "names")


def _checked(names: list[Any], what: str) -> list[str]:
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise ArgumentTypeError(f"{what}[{place}] must be a name, got {name!r} ({type(name).__name__})")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DuplicateNameError(f"{what} has {listing(twice)} more than once; every parameter needs a name of its own")
    return names


def _family(groups: Sequence[Group]) -> str:
    """The core's family whose formula the groups follow.

    Raises:
        ConfigurationError: none does.
    """
    if not groups:
        raise ConfigurationError("the state dict has no param groups; expected those of one torch optimizer")
    keys = groups[0].keys()
    name = next((name for name, there, absent in MARKS if there <= keys and not absent & keys), None)
    if name is None:
        raise ConfigurationError(
            f"these param groups are of no class of torch.optim: they have {listing(sorted(map(str, keys)))}; "
            f"{_convertible()}"
        )
    if name in OTHER_FORMULAS:
        remedy = f"; gradstep.torch.{name} loads this state dict and has torch's formula" * (name in WITH_TORCH_FORMULA)
        raise ConfigurationError(
            f"torch's {name} cannot go on in the core: {OTHER_FORMULAS[name]}{remedy}; {_convertible()}"
        )
    if name != "Adam":
        return name
    decoupled = {group.get("decoupled_weight_decay") for group in groups}
    if None in decoupled:
        raise ConfigurationError(
            "these param groups lack 'decoupled_weight_decay', which tells AdamW from Adam: an older torch wrote them; "
            "load them into torch.optim.Adam or torch.optim.AdamW, and convert what its state_dict() gives"
        )
    return "AdamW" if _only(name, "decoupled_weight_decay", groups) else "Adam"


def _convertible() -> str:
    return f"what can be converted: {', '.join(shared.name for shared in SHARED.values())}"


def _only(family: str, key: str, groups: Sequence[Group]) -> Any:
    """The value that all groups have."""
    values = [plain(group[key]) for group in groups]
    if any(value != values[0] for value in values):
        raise ConfigurationError(
            f"the param groups of {family} differ in {key}: {values}; that is configuration, which is the same for all "
            "parameters of one optimizer: convert each group for itself, for the children of a MultiOptimizer"
        )
    return values[0]


def plain(value: Any) -> Any:
    """A value of a param group without tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, cast("Sequence[Any]", value)))
    item: Callable[[], Any] | None = getattr(value, "item", None)
    value = value if item is None else item()
    return float(value) if type(value) is int else value


def _refuse_absent(family: str, shared: Shared, group: Group) -> None:
    for key, neutral in shared.absent.items():
        found = group.get(key, neutral)
        if plain(found) != neutral:
            raise ConfigurationError(
                f"torch's {shared.name} with {key}={found!r} steps by another formula than gradstep.{family}, which "
                f"means {key}={neutral!r}{ADVICE.get((family, key), '')}; gradstep.torch.{shared.name} loads this "
                "state dict and has torch's formula"
            )


def _refuse_beginnings(family: str, owners: Sequence[tuple[str, Group]], stateless: Sequence[str]) -> None:
    """Refuse parameters without state which in torch would begin with another value than zero."""
    key = {"SGD": "dampening", "Adagrad": "initial_accumulator_value"}.get(family)
    if key is None:
        return
    missing = set(stateless)
    strange = [name for name, group in owners if name in missing and group.get(key) and group.get("momentum", 1)]
    if strange:
        raise ConfigurationError(
            f"torch's {family} with {key} above 0 begins otherwise than gradstep's, and {listing(strange)} have no "
            "state yet; convert when every parameter has taken a step"
        )


def _slots(family: str, shared: Shared, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The slots of one parameter, or none of them."""
    there = {key: value for key, value in state.items() if key != "step" and value is not None}
    if there and there.keys() != shared.slots.keys():
        raise ConfigurationError(
            f"the state of {name!r} has {listing(list(there))}, but torch's {shared.name} keeps "
            f"{listing(list(shared.slots))}; is this the state dict of one optimizer, as state_dict() gave it?"
        )
    return {shared.slots[key]: tensor.detach().cpu() for key, tensor in there.items()}


def _steps(shared: Shared, name: str, state: Mapping[str, Any]) -> int:
    return whole_number(state.get("step"), f"the step of {name!r}") if shared.counts else 1


def _hyperparameters(family: str, shared: Shared, group_of: Mapping[str, Group]) -> dict[str, Any]:
    """The core's hyperparameters: a value for all parameters, or a mapping where they differ."""
    values: dict[str, Any] = {}
    for key, name in shared.hyperparameters.items():
        if key == "nesterov":
            values[name] = _only(family, key, list(group_of.values()))
            continue
        by_name = {parameter: plain(group[key]) for parameter, group in group_of.items()}
        common = Counter(by_name.values()).most_common(1)[0][0]
        rest = {escaped(parameter): value for parameter, value in by_name.items() if value != common}
        values[name] = {**rest, "*": common} if rest else common
    return values


def escaped(name: str) -> str:
    """The glob that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def to_torch(opt: object, names: object = None) -> dict[str, Any]:
    """A state dict for torch's optimizer of the same family, for its `load_state_dict`.

    Schedules become the value that they gave last. Where hyperparameters are mapped, parameters with equal values make
    one group; groups come in the order of their first parameters, and the torch optimizer must have got them so.

    Args:
        opt: an optimizer of the core with one rule, or an `Accumulate` of one: SGD, RMSprop, Adagrad, AdaDelta, Adam
            and AdamW with `bias_correction=True`, for torch.optim's class; Lion for gradstep.torch's.
        names: the parameters' names in the order in which the torch optimizer got them: a list of strings, or what
            `model.named_parameters()` gives. Default: those of `opt.state`, in its order.

    Returns:
        A dict with copies of the state in tensors, whatever library they were of.

    Raises:
        ConfigurationError: torch has another formula, or the state is kept in 8 bits or with copies of parameters.
        MismatchError: `opt` has state for parameters that `names` lacks.
        ArgumentTypeError: `opt` is no optimizer of the core.

    Example:
        >>> import gradstep as gs, numpy as np, torch
        >>> opt = gs.SGD(0.5, momentum=0.9)
        >>> _ = opt.apply_gradients({"w": np.ones(2, np.float32)}, {"w": np.ones(2, np.float32)})
        >>> new = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> new.load_state_dict(gs.to_torch(opt))
        >>> new.param_groups[0]["lr"], new.state_dict()["state"]
        (0.5, {0: {'momentum_buffer': tensor([1., 1.])}})
    """
    held = copied(opt, "to_torch")
    shared = _shared_with(held)
    order = list(held.state) if names is None else names_in(names)
    if not order:
        raise ConfigurationError(
            f"to_torch: {held.family} has seen no parameters yet; pass names, those of the torch optimizer's parameters"
        )
    lacking = [name for name in held.state if name not in order]
    if lacking:
        raise MismatchError(
            f"names lacks {listing(lacking)}, for which the optimizer has state; it has {listing(order)}: pass the "
            "names of all parameters of the torch optimizer, in its order"
        )
    _refuse_missing(held, [name for name in order if name not in held.state])
    torch: Any = importlib.import_module("torch")
    groups: dict[Hashable, list[str]] = {}
    for name in order:
        groups.setdefault(_values(held, shared, name), []).append(name)
    place = {name: i for i, name in enumerate(chain.from_iterable(groups.values()))}
    entries = {place[n]: _entry(torch, shared, held.state[n]) for n in place if n in held.state}
    blank = _defaults(torch, shared)
    return {
        "state": {key: entry for key, entry in entries.items() if entry},
        "param_groups": [
            {**blank, **dict(cast("Any", values)), "params": [place[name] for name in some]}
            for values, some in groups.items()
        ],
    }


def _shared_with(held: Copied) -> Shared:
    """What torch calls the family of this optimizer.

    Raises:
        ConfigurationError: torch has no such formula.
    """
    family = held.family
    if not held.is_ours:
        raise ConfigurationError(
            f"to_torch: {family} is a rule of your own, which torch.optim has not; {_convertible()}"
        )
    if family not in SHARED:
        remedy = f"; gradstep.torch.{family} has torch's formula too" if family in WITH_TORCH_FORMULA else ""
        raise ConfigurationError(
            f"to_torch: {family} cannot go on in torch.optim: {OTHER_FORMULAS[family]}{remedy}; {_convertible()}"
        )
    shared = SHARED[family]
    for name, value in shared.fixed.items():
        if getattr(held.optimizer, name) != value:
            raise ConfigurationError(
                f"torch's {shared.name} always has {name}={value!r}, but {family} has "
                f"{name}={getattr(held.optimizer, name)!r}; its steps would be others: set opt.{name} = {value!r} first"
            )
    return shared


def _refuse_missing(held: Copied, stateless: Sequence[str]) -> None:
    """Refuse parameters without state which in torch would not begin at zero, or not at all."""
    if stateless and held.family == "Adagrad":
        raise ConfigurationError(
            f"torch's Adagrad needs state for every parameter, but there is none for {listing(stateless)}; convert "
            "when they have taken a step, or leave them out of names"
        )
    if held.family != "SGD":
        return
    settings = {name: held.optimizer._leaf.settings_of(name) for name in stateless}
    strange = [name for name, own in settings.items() if own.current("momentum") and own.current("dampening")]
    if strange:
        raise ConfigurationError(
            f"torch's SGD with dampening begins otherwise than gradstep's, and {listing(strange)} have no state yet; "
            "convert when they have taken a step"
        )


def _values(held: Copied, shared: Shared, name: str) -> tuple[tuple[str, Any], ...]:
    """The values of a param group that hold for one parameter."""
    settings = held.optimizer._leaf.settings_of(name)
    return tuple((key, settings.current(own)) for key, own in shared.hyperparameters.items())


def _entry(torch: Any, shared: Shared, entry: Entry) -> dict[str, Any]:
    """The state of one parameter as torch keeps it."""
    from gradstep.arrays.torch import TORCH

    def tensor(slot: Stored) -> Any:
        return TORCH.from_bits(slot.bits, slot.dtype)

    slots = {key: tensor(entry.slots[slot]) for key, slot in shared.slots.items() if slot in entry.slots}
    if not shared.counts:
        return slots
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return {"step": torch.tensor(float(entry.steps), dtype=dtype), **slots}


def _defaults(torch: Any, shared: Shared) -> dict[str, Any]:
    """Every entry of a param group of torch's class, as it is without arguments."""
    make = getattr(importlib.import_module(shared.module), shared.name)
    (group,) = make([torch.nn.Parameter(torch.zeros(1))]).state_dict()["param_groups"]
    return cast("dict[str, Any]", group)
