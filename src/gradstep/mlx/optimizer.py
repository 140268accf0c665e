"""An optimizer of MLX whose update is the rule of a gradstep optimizer."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, SupportsFloat, TypeAlias

import mlx.core as mx
from mlx.optimizers import Optimizer

from gradstep.arrays.mlx import MLX
from gradstep.errors import (
    ArgumentTypeError,
    ConfigurationError,
    DtypeError,
    OutOfRangeError,
    ShapeError,
    TracingError,
    UnknownParameterError,
)
from gradstep.learning_rate import LearningRate
from gradstep.program.device_scalars import DeviceScalars
from gradstep.program.device_schedules import schedule_on_device
from gradstep.program.program import Program
from gradstep.rules.base import RuleOptimizer
from gradstep.step.evaluate import Evaluation
from gradstep.step.storage import slot_shape

Rate: TypeAlias = SupportsFloat | mx.array | LearningRate | Callable[[Any], Any]
"""A number, an array without dimensions, or a schedule: MLX's, gradstep's, or a function of the step, an array."""

State: TypeAlias = dict[str, Any]

STAND_IN = 1.0  # the definition's learning rate; the rule runs with the one in the state


class _Call:
    """What belongs to one `apply_gradients`: values that parameters share, and how to undo what has been done."""

    def __init__(self) -> None:
        self.scalars: dict[Any, Mapping[int, Any]] = {}
        self._old: list[tuple[State, State]] = []

    def replace(self, state: State, values: Mapping[str, Any]) -> None:
        """Set entries of a state that are there already."""
        self.remember(state, values)
        state.update(values)

    def remember(self, state: State, names: Mapping[str, Any]) -> None:
        """Note entries that are about to change."""
        self._old.append((state, {name: state[name] for name in names if name in state}))

    def undo(self) -> None:
        """Give every state its old entries."""
        for state, old in reversed(self._old):
            state.update(old)


class RuleUpdate(Optimizer):
    """An optimizer of MLX whose update is the rule of a gradstep optimizer, its definition."""

    slot_names: ClassVar[Mapping[str, str]] = {}
    """MLX's names of slots, where they differ."""

    def __init__(self, definition: RuleOptimizer, learning_rate: Rate | None) -> None:
        super().__init__()
        self._call: _Call | None = None
        self._definition = definition
        self._define(definition.hyperparameters)
        if learning_rate is not None:
            self.learning_rate = learning_rate

    # Hyperparameters

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate in the state. It may be set to a number or to a schedule, and then replaces either."""
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        source = learning_rate.value if isinstance(learning_rate, LearningRate) else learning_rate
        if callable(source):
            schedule = _Schedule(source)
            self.state["learning_rate"] = schedule(self.step)
            self._schedulers["learning_rate"] = schedule
        else:
            self.state["learning_rate"] = _as_rate(source, "the learning rate")
            self._schedulers.pop("learning_rate", None)

    def get_hyperparameter(self, name: str) -> Any:
        """The value of a hyperparameter; the same as the attribute of that name."""
        return self.learning_rate if name == "learning_rate" else self._definition.get_hyperparameter(name)

    def set_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Set several hyperparameters at once, checked together; a function compiled before keeps the old ones."""
        before = self._definition.hyperparameters
        self._define({name: value for name, value in values.items() if name != "learning_rate"})
        if "learning_rate" in values:
            try:
                self.learning_rate = values["learning_rate"]
            except BaseException:
                self._definition.set_hyperparameters(before)
                raise

    def _define(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                raise ArgumentTypeError(
                    f"{type(self).__name__}'s {name} must be one value, got the mapping {value!r}: MLX tells an "
                    "optimizer no names; give parameters that differ to an optimizer of their own: MultiOptimizer"
                )
            parts: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
            if any(map(callable, parts)):
                raise ArgumentTypeError(
                    f"{type(self).__name__}'s {name} must be fixed, got {value!r}; only a learning rate is scheduled"
                )
        before = self._definition.hyperparameters
        self._definition.set_hyperparameters(values)
        try:
            self._leaf.check_rounded("float32")
        except OutOfRangeError:
            self._definition.set_hyperparameters(before)
            raise

    @property
    def _leaf(self) -> Any:
        return self._definition._leaf  # pyright: ignore[reportPrivateUsage]

    # State

    def init_single(self, parameter: mx.array, state: State) -> None:
        """Put zeros for the slots of one parameter into its state."""
        for slot, kind in self._program(parameter).slots.items():
            state[self._name_of(slot)] = mx.zeros(slot_shape(kind, parameter.shape), parameter.dtype)

    def _name_of(self, slot: str) -> str:
        return self.slot_names.get(slot, slot)

    def _program(self, parameter: mx.array) -> Program:
        return self._leaf.program("", parameter.ndim)  # MLX names no parameter here

    # The step

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The updated parameters, in a tree like the gradients; the state is updated, or on any error left alone.

        Args:
            gradients: a tree of arrays.
            parameters: a tree that has at least the arrays of `gradients`.

        Raises:
            GradstepError: a gradient, a schedule or the state does not fit.
        """
        self._call = call = _Call()
        call.remember(self._state, {"step": None, **self._schedulers})
        try:
            return super().apply_gradients(gradients, parameters)
        except BaseException:
            call.undo()
            raise
        finally:
            self._call = None

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        """The updated parameter; its slots in `state` are updated."""
        dtype = _compute_dtype(gradient, parameter)
        call = self._call or _Call()
        program = self._program(parameter)
        slots = {
            slot: self._slot(state, slot, slot_shape(kind, parameter.shape)) for slot, kind in program.slots.items()
        }
        scalars = self._scalars(call, program, dtype, parameter.shape)
        new = Evaluation(MLX, program, dtype, {"w": parameter, "g": gradient, **slots}, scalars).outputs()
        call.replace(state, {self._name_of(slot): new[slot].astype(old.dtype) for slot, old in slots.items()})
        return new["w"].astype(parameter.dtype)

    def _slot(self, state: State, slot: str, shape: tuple[int, ...]) -> mx.array:
        name, owner = self._name_of(slot), type(self).__name__
        if name not in state:
            raise UnknownParameterError(
                f"the state of a parameter has {', '.join(map(repr, state)) or 'nothing'}, but {owner} needs {name!r}: "
                "it comes from another optimizer or configuration; load one that fits, or begin with a new optimizer"
            )
        if state[name].shape != shape:
            raise ShapeError(
                f"{owner}'s {name!r} has shape {state[name].shape} in the state, but its parameter needs {shape}"
            )
        return state[name]

    def _scalars(self, call: _Call, program: Program, dtype: str, shape: tuple[int, ...]) -> Mapping[int, Any]:
        """The values of the program's scalars, shared by parameters for which they are the same."""
        key = id(program), dtype, tuple(shape[axis] for axis in program.scalars.dimensions)
        if key not in call.scalars:
            known = self._leaf.scalars() | {"t": MLX.cast(self.step, dtype)}
            if "learning_rate" in program.scalars.hyperparameters:
                known["learning_rate"] = MLX.cast(self._known_rate(), dtype)
            call.scalars[key] = DeviceScalars(mx, known, shape).of(program)
        return call.scalars[key]

    def _known_rate(self) -> mx.array:
        if "learning_rate" not in self.state:
            raise ConfigurationError(
                f"{type(self).__name__} has no learning rate: set opt.learning_rate, or load it with the state"
            )
        return _as_rate(self.state["learning_rate"], "the learning rate in the state")


class _Schedule:
    """A schedule as MLX calls it: with the step as an array, for an array."""

    def __init__(self, schedule: Callable[[Any], Any]) -> None:
        self.schedule = schedule

    def __call__(self, step: mx.array) -> mx.array:
        try:
            value = schedule_on_device(mx, self.schedule, step)
        except ValueError as error:
            if "[eval]" not in str(error):
                raise
            raise TracingError(
                f"the schedule {self.schedule!r} asks for the value of the step, which mx.compile does not know; "
                "write it with mx.where for if, mx.cos for math.cos and so on, or use a schedule of gradstep or MLX"
            ) from error
        return _as_rate(value, f"the result of {self.schedule!r}")


def _as_rate(value: Any, what: str) -> mx.array:
    """The number as an array; of an array nobody asks the value."""
    if isinstance(value, mx.array):
        if value.size != 1:
            raise ShapeError(f"{what} must be one number, got an array of shape {value.shape}")
        return value.reshape(()) if mx.issubdtype(value.dtype, mx.floating) else value.reshape(()).astype(mx.float32)
    try:
        rate = LearningRate(value)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{what} must be a number, an array or a schedule, got {value!r}") from None
    return mx.array(rate.try_current(0), mx.float32)


def _compute_dtype(gradient: mx.array, parameter: mx.array) -> str:
    if gradient.shape != parameter.shape:
        raise ShapeError(f"a gradient has shape {gradient.shape}, but its parameter has {parameter.shape}")
    for what, array in ("gradient", gradient), ("parameter", parameter):
        if not mx.issubdtype(array.dtype, mx.floating):
            raise DtypeError(f"a {what} has dtype {array.dtype}; expected a real floating dtype")
    return "float64" if parameter.dtype == mx.float64 else "float32"
