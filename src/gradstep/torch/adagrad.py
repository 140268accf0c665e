"""Adagrad as torch defines it."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from gradstep.ops import sqrt
from gradstep.rules.base import NON_NEGATIVE, Flag, Scalar, flag, scalar
from gradstep.torch.engine import count_dtype
from gradstep.torch.groups import Group, TorchRule, plain
from gradstep.torch.optimizer import Number, TorchOptimizer


class AdagradRule(TorchRule):
    """See `Adagrad`."""

    lr: Scalar = scalar()
    lr_decay: Scalar = scalar(check=NON_NEGATIVE)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    initial_accumulator_value: Scalar = scalar(check=NON_NEGATIVE)
    eps: Scalar = scalar(check=NON_NEGATIVE)
    maximize: Flag = flag(default=False)

    @classmethod
    def beginning(cls, group: Group) -> float:
        return plain(group["initial_accumulator_value"], "initial_accumulator_value")

    @staticmethod
    def rule(
        w: Any, g: Any, sum: Any, *,  # noqa: A002
        lr: Any, lr_decay: Any, weight_decay: Any, initial_accumulator_value: Any, eps: Any, maximize: bool, t: Any,
    ) -> Any:  # fmt: skip
        if maximize:
            g = -g
        if weight_decay:
            g = g + weight_decay * w
        sum = sum + g * g
        return w - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps), sum


class Adagrad(TorchOptimizer):
    """`torch.optim.Adagrad` in gradstep's steps: gradients over the root of the sum of all their squares.

    ```
    g   = -g with maximize
    g   = g + weight_decay * w
    sum = sum + g**2
    w   = w - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)
    ```

    As in torch, the state of every parameter is there from the start.

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        lr_decay: how fast the rate falls with the steps, >= 0.
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        initial_accumulator_value: where `sum` starts, >= 0.
        eps: added to the root, >= 0.
        maximize: climb instead of descending.
        foreach, fused: accepted for torch's sake; they choose among its implementations.
        differentiable: must be False.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import Adagrad
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = Adagrad([w], lr=0.5)
        >>> (2 * w).sum().backward()
        >>> opt.step()
        >>> w.tolist()
        [0.5, 0.5]

    Source: Duchi, Hazan and Singer, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    family = AdagradRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "foreach": foreach, "maximize": maximize,
            "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        for parameter in param_group["params"]:
            start = torch.full_like(parameter, self.family.beginning(param_group), requires_grad=False)
            self.state[parameter] = {"step": torch.tensor(0.0, dtype=count_dtype()), "sum": start}

    def share_memory(self) -> None:
        """Move the sums to memory that other processes see."""
        for state in self.state.values():
            state["sum"].share_memory_()
