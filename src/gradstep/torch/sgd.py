"""Stochastic gradient descent as torch defines it."""

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.errors import ConfigurationError
from gradstep.ops import where
from gradstep.rules.base import FINITE, NON_NEGATIVE, Flag, Scalar, flag, scalar
from gradstep.torch.groups import TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer


class SGDRule(TorchRule):
    """See `SGD`."""

    lr: Scalar = scalar()
    momentum: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    dampening: Scalar = scalar(check=FINITE, removable=True)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    nesterov: Flag = flag(default=False)
    maximize: Flag = flag(default=False)

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        if given["nesterov"] and (given["momentum"] == 0 or given["dampening"] != 0):
            raise ConfigurationError(
                "SGD with nesterov=True needs momentum > 0 and dampening = 0; "
                f"got momentum={given['momentum']!r}, dampening={given['dampening']!r}"
            )

    @staticmethod
    def rule(
        w: Any, g: Any, momentum_buffer: Any, *,
        lr: Any, momentum: Any, dampening: Any, weight_decay: Any, nesterov: bool, maximize: bool, t: Any,
    ) -> Any:  # fmt: skip
        if maximize:
            g = -g
        if weight_decay:
            g = g + weight_decay * w
        if not momentum:
            return w - lr * g, None
        share = where(t == 1, 1.0, 1 - dampening) if dampening else 1.0  # the buffer begins as the first gradient
        momentum_buffer = momentum * momentum_buffer + share * g
        update = g + momentum * momentum_buffer if nesterov else momentum_buffer
        return w - lr * update, momentum_buffer


class SGD(TorchOptimizer):
    """`torch.optim.SGD` in gradstep's steps: stochastic gradient descent, with momentum and Nesterov's variant.

    ```
    g      = -g with maximize
    g      = g + weight_decay * w
    buffer = momentum * buffer + (1 - dampening) * g         at the first step buffer = g
    w      = w - lr * buffer                                 or, with Nesterov, g + momentum * buffer
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        momentum: how much of the previous update is kept, >= 0; 0 for no buffer.
        dampening: the part of the gradient that momentum leaves out.
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        nesterov: look ahead by one momentum step; needs momentum > 0 and dampening 0.
        maximize: climb instead of descending.
        foreach, fused: accepted for torch's sake; they choose among its implementations.
        differentiable: must be False.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or values that do not go together; both
            are a `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import SGD
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = SGD([w], lr=0.5, momentum=0.9)
        >>> w.sum().backward()
        >>> opt.step()
        >>> w.tolist(), opt.state_dict()["state"][0]["momentum_buffer"].tolist()
        ([0.5, 0.5], [1.0, 1.0])

    Source: Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html
    """

    family = SGDRule
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)
