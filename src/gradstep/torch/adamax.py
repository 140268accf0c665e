"""Adamax as torch defines it."""

from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.ops import abs, maximum
from gradstep.rules.base import DECAY, NON_NEGATIVE, Flag, Pair, Scalar, flag, pair, scalar
from gradstep.torch.groups import TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer


class AdamaxRule(TorchRule):
    """See `Adamax`."""

    lr: Scalar = scalar()
    betas: Pair = pair(default=(0.9, 0.999), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    eps: Scalar = scalar(check=NON_NEGATIVE)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    maximize: Flag = flag(default=False)

    @staticmethod
    def rule(
        w: Any, g: Any, exp_avg: Any, exp_inf: Any, *,
        lr: Any, betas: Any, eps: Any, weight_decay: Any, maximize: bool, t: Any,
    ) -> Any:  # fmt: skip
        beta1, beta2 = betas
        if maximize:
            g = -g
        if weight_decay:
            g = g + weight_decay * w
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_inf = maximum(beta2 * exp_inf, abs(g) + eps)
        return w - lr / (1 - beta1**t) * exp_avg / exp_inf, exp_avg, exp_inf


class Adamax(TorchOptimizer):
    """`torch.optim.Adamax` in gradstep's steps: Adam with a running maximum in place of the second moment.

    ```
    g       = -g with maximize
    g       = g + weight_decay * w
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_inf = max(beta2 * exp_inf, |g| + eps)
    w       = w - lr / (1 - beta1**step) * exp_avg / exp_inf
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        betas: how much of the running mean and of the maximum is kept, each in [0, 1).
        eps: added to the gradient's absolute value, >= 0.
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        maximize: climb instead of descending.
        foreach: accepted for torch's sake; it chooses among its implementations.
        capturable, differentiable: must be False.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import Adamax
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = Adamax([w], lr=0.1)
        >>> w.sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, 0.9]

    Source: Kingma and Ba, 2015, section 7.1, https://arxiv.org/abs/1412.6980
    """

    family = AdamaxRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach,
            "maximize": maximize, "differentiable": differentiable, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults)
