"""The base of all optimizers of this package: torch's own base, with gradstep's steps."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias, overload

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from gradstep.errors import ArgumentTypeError, ConfigurationError, DtypeError, OutOfRangeError
from gradstep.torch.engine import Engine
from gradstep.torch.groups import Group, TorchRule, plain

Number: TypeAlias = float | torch.Tensor
IMPOSSIBLE = {
    "differentiable": "steps are not recorded by autograd",
    "capturable": "steps cannot be captured in a graph",
}


class TorchOptimizer(Optimizer):
    """A torch optimizer whose step is one gradstep step of all groups: it happens whole or not at all."""

    family: ClassVar[type[TorchRule]]
    counts_steps: ClassVar[bool] = True  # whether torch's state has an entry `step`

    def __init__(self, params: ParamsT, defaults: Mapping[str, Any]) -> None:
        self._engine = Engine(self.family, counts=self.counts_steps)
        self._check(dict(defaults))
        super().__init__(params, dict(defaults))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; all of them, or, on any error, none.

        Args:
            closure: evaluates the model again and returns the loss, which `step` then returns.

        Raises:
            GradstepError: parameters and state are then what they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._engine.step(self.param_groups, self.state)
        return loss

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with its own values for any of the arguments.

        Args:
            param_group: `{"params": …, "lr": …}`; what is left out is as in the constructor.

        Raises:
            OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured.
            DtypeError: a complex parameter.
        """
        super().add_param_group(param_group)
        try:
            self._check(param_group)
            for place, parameter in enumerate(param_group["params"]):
                self.check_parameter(f"parameter {place} of group {len(self.param_groups) - 1}", parameter)
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        """Raise when values of a group are out of range, do not go together or cannot be honoured."""
        name = type(self).__name__
        for option, why in IMPOSSIBLE.items():
            if group.get(option):
                raise ConfigurationError(
                    f"{name} does not support {option}=True: {why}; leave it out, or use torch.optim's {name}"
                )
        given = self.family.fields_of(group)
        for argument, value in given.items():
            if callable(value):
                raise ArgumentTypeError(
                    f"{name}'s {argument} must be a number, got {value!r}; rates are scheduled as in torch, by "
                    "torch.optim.lr_scheduler, or with gradstep's own optimizers"
                )
        self.family(**given)
        rate = plain(group["lr"], "lr")
        if rate < 0:
            raise OutOfRangeError(f"{name}'s lr must be >= 0, got {rate!r}")

    def check_parameter(self, what: str, parameter: Any) -> None:
        """Raise for a parameter that this optimizer cannot train."""
        if parameter.is_complex():
            raise DtypeError(
                f"{what} is complex ({parameter.dtype}); {type(self).__name__} takes real ones: "
                "train torch.view_as_real(parameter) instead"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = Engine(self.family, counts=self.counts_steps)
        for group in self.param_groups:  # checkpoints may be older than an argument
            for argument, parameter in inspect.signature(type(self).__init__).parameters.items():
                if argument in self.defaults:
                    group.setdefault(argument, parameter.default)
