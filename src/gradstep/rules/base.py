"""The base of every optimizer that is a rule: fields, slots and pure math become a constructor and attributes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, dataclass_transform

from gradstep.errors import ArgumentTypeError
from gradstep.hyperparameters import (
    DECAY,
    FINITE,
    NON_NEGATIVE,
    NON_POSITIVE,
    POSITIVE,
    REQUIRED,
    Count,
    Field,
    Flag,
    OneOf,
    OptionalFlag,
    OptionalScalar,
    Pair,
    Scalar,
    count,
    flag,
    one_of,
    optional_flag,
    optional_scalar,
    pair,
    scalar,
)
from gradstep.optimizer import Optimizer
from gradstep.options import (
    DEFAULTS,
    ClipNorm,
    Donate,
    Frozen,
    NonFinite,
    clip_norm_option,
    donate_option,
    frozen_option,
    nonfinite_option,
)
from gradstep.program.formats import Sign
from gradstep.program.graph import Kind
from gradstep.report import Rate
from gradstep.settings import Settings
from gradstep.state import StateView
from gradstep.step.leaf import Leaf, rule_arguments
from gradstep.step.outcome import Outcome
from gradstep.step.storage import Rounding, SlotDtypes, Storage, StorageOptions
from gradstep.storage_options import (
    STORAGE_DEFAULTS,
    Fixed,
    master_weights_option,
    rounding_option,
    seed_option,
    slot_dtype_option,
)

__all__ = [
    "DECAY", "FINITE", "NON_NEGATIVE", "NON_POSITIVE", "POSITIVE",
    "Count", "Flag", "Kind", "OneOf", "OptionalFlag", "OptionalScalar", "Pair", "RuleOptimizer", "Scalar",
    "count", "flag", "one_of", "optional_flag", "optional_scalar", "pair", "scalar",
]  # fmt: skip


@dataclass_transform(
    kw_only_default=True,
    field_specifiers=(
        scalar, optional_scalar, pair, flag, optional_flag, count, one_of,
        clip_norm_option, nonfinite_option, donate_option, frozen_option,
        slot_dtype_option, rounding_option, master_weights_option, seed_option,
    ),
)  # fmt: skip
class Declarative:
    """Tells type checkers that annotated fields are the constructor's arguments."""


class RuleOptimizer(Declarative, Optimizer):
    """An optimizer defined by its fields and its `rule`.

    The rule's positional arguments are `w`, `g` and the slots; its keyword-only ones are the fields, and `t`, the
    parameter's own step count, if it wants it. It returns the new `w` and the new slots, `None` for a slot that
    the configuration does not keep. Slots have the shape of `w` unless `slot_kinds` says otherwise; `slot_signs` tells
    which values they take, for those who keep them in 8 bits.
    """

    clip_norm: ClipNorm = clip_norm_option(default=None)
    nonfinite: NonFinite = nonfinite_option(default="allow")
    donate: Donate = donate_option(default=False)
    frozen: Frozen = frozen_option(default=())
    slot_dtype: Fixed[SlotDtypes] = slot_dtype_option(default=None)
    rounding: Fixed[Rounding] = rounding_option(default="nearest")
    master_weights: Fixed[bool] = master_weights_option(default=False)
    seed: Fixed[int] = seed_option(default=0)
    rule: ClassVar[Callable[..., object]]
    slot_kinds: ClassVar[Mapping[str, Kind]] = {}
    slot_signs: ClassVar[Mapping[str, Sign]] = {}
    _fields: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fields = {**cls._fields, **{n: f for n, f in vars(cls).items() if isinstance(f, Field)}}
        cls.__signature__ = _signature(cls._fields)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        try:
            bound = type(self).__signature__.bind(*args, **kwargs)
        except TypeError as error:
            hint = _hint(type(self).__signature__, kwargs)
            raise ArgumentTypeError(f"{name}: {error}{hint}; its arguments are {type(self).__signature__}") from None
        bound.apply_defaults()
        options = {option: bound.arguments.pop(option) for option in DEFAULTS}
        storage = StorageOptions(**{option: bound.arguments.pop(option) for option in STORAGE_DEFAULTS})
        super().__init__(**options)
        self._leaf = Leaf(type(self), Settings(name, self._fields), self._storage(storage))
        self.set_hyperparameters(bound.arguments)

    @classmethod
    def _from_parts(cls, settings: Settings, storage: StorageOptions, options: Mapping[str, Any]) -> Self:
        """An optimizer with hyperparameters that have been resolved already."""
        new = cls.__new__(cls)
        Optimizer.__init__(new, **{**DEFAULTS, **options})
        new._leaf = Leaf(cls, settings, cls._storage(storage))
        new._leaf.check_together(settings)
        return new

    @classmethod
    def _blank_settings(cls) -> Settings:
        """Hyperparameters without any values."""
        return Settings(cls.__name__, cls._fields)

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` for hyperparameters, as given, that do not go together."""

    @classmethod
    def _storage(cls, options: StorageOptions) -> Storage:
        slots = {slot: cls.slot_kinds.get(slot, Kind.FULL) for slot in rule_arguments(cls.rule)[0]}
        return Storage(cls.__name__, slots, cls.slot_signs, options)

    # Hyperparameters

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter as it was given: a number, a schedule, a pair of them, a mapping, or configuration."""
        given, mapped = self._leaf.settings.given, self._leaf.settings.mapped
        return {name: dict(value) if name in mapped else value for name, value in given.items()}

    def get_hyperparameter(self, name: str) -> Any:
        """The value of a hyperparameter as last resolved; the same as the attribute of that name.

        Of a hyperparameter that is mapped, a new dict from glob to value.
        """
        return self._leaf.current(name)

    def set_hyperparameters(self, values: Mapping[str, object]) -> None:
        """Set several hyperparameters at once: checked together, schedules resolved now at the current step."""
        with self._lock:
            self._leaf.change(self._leaf.settings.replaced(values, self.step))

    @property
    def step(self) -> int:
        return self._leaf.step

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        return StateView([self._leaf])

    @property
    def steps(self) -> dict[str, int]:
        return self._leaf.steps

    def _coming_rate(self) -> Rate:
        return self._leaf.coming("learning_rate")

    def _leaves(self) -> list[Leaf]:
        return [self._leaf]

    def _route(self, params: Mapping[str, Any], *, remember: bool = True) -> list[tuple[Leaf, list[str]]]:
        return [(self._leaf, list(params))]

    def _titles(self) -> list[str]:
        return [type(self).__name__]

    def _forget_routes(self) -> None:
        self._leaf.forget_groups()

    def _check_options(self) -> None:
        pass  # without children, no options contradict each other

    def _family(self) -> list[Optimizer]:
        return [self]

    def _count_step(self, outcome: Outcome | None = None) -> None:
        pass  # `step` is counted with the state

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._leaf.settings.given.items())
        return f"{type(self).__name__}({given}{self._spelled_options}{self._spelled_storage})"

    @property
    def _spelled_storage(self) -> str:
        chosen = self._leaf.storage.options._asdict()
        return "".join(f", {n}={v!r}" for n, v in chosen.items() if v != STORAGE_DEFAULTS[n])


def _signature(fields: Mapping[str, Field]) -> inspect.Signature:
    """The constructor's arguments: the fields in order, positional ones first, then the options."""
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    arguments = [
        inspect.Parameter(
            name, kinds[field.kw_only], default=inspect.Parameter.empty if field.default is REQUIRED else field.default
        )
        for name, field in fields.items()
    ]
    options = {**DEFAULTS, **STORAGE_DEFAULTS}
    arguments += [inspect.Parameter(name, kinds[True], default=default) for name, default in options.items()]
    return inspect.Signature(sorted(arguments, key=lambda argument: argument.kind))


def _hint(signature: inspect.Signature, given: Mapping[str, Any]) -> str:
    """What may have been meant by arguments that do not exist."""
    from difflib import get_close_matches

    hints: list[str] = []
    for unknown in given.keys() - signature.parameters.keys():
        close = ["learning_rate"] if unknown == "lr" else get_close_matches(unknown, signature.parameters, 1)
        hints += [f"{unknown} is called {name} here" for name in close if name in signature.parameters]
    return "".join(f"; {hint}" for hint in sorted(hints))
