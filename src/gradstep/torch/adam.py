"""Adam and AdamW as torch defines them."""

from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.ops import maximum
from gradstep.rules.adam import adam_step
from gradstep.rules.base import DECAY, NON_NEGATIVE, Flag, Pair, Scalar, flag, pair, scalar
from gradstep.torch.groups import TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer


class AdamRule(TorchRule):
    """See `Adam`."""

    lr: Scalar = scalar()
    betas: Pair = pair(default=(0.9, 0.999), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    eps: Scalar = scalar(check=NON_NEGATIVE)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    amsgrad: Flag = flag(default=False)
    maximize: Flag = flag(default=False)
    decoupled_weight_decay: Flag = flag(default=False)

    @staticmethod
    def rule(
        w: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, *,
        lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: bool, maximize: bool, decoupled_weight_decay: bool,
        t: Any,
    ) -> Any:  # fmt: skip
        beta1, beta2 = betas
        if maximize:
            g = -g
        if weight_decay and decoupled_weight_decay:
            w = w * (1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * w
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = square = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        if amsgrad:
            max_exp_avg_sq = square = maximum(max_exp_avg_sq, exp_avg_sq)
        else:
            max_exp_avg_sq = None
        return w - adam_step(exp_avg, square, lr, beta1, beta2, eps, t), exp_avg, exp_avg_sq, max_exp_avg_sq


class AdamWRule(AdamRule):
    """See `AdamW`."""


class Adam(TorchOptimizer):
    """`torch.optim.Adam` in gradstep's steps: running means of gradients and their squares, with bias correction.

    ```
    g          = -g with maximize
    g          = g + weight_decay * w
    exp_avg    = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    square     = exp_avg_sq, or with amsgrad the largest one so far
    w          = w - lr / (1 - beta1**step) * exp_avg / (sqrt(square) / sqrt(1 - beta2**step) + eps)
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        betas: how much of the two running means is kept, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        amsgrad: divide by the largest mean of squares so far.
        foreach, fused: accepted for torch's sake; they choose among its implementations.
        maximize: climb instead of descending.
        capturable, differentiable: must be False.
        decoupled_weight_decay: shrink weights as `AdamW` does.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import Adam
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = Adam([w], lr=0.01)
        >>> w.sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.99, 0.99]

    Source: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980
    """

    family = AdamRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)


class AdamW(Adam):
    """`torch.optim.AdamW` in gradstep's steps: Adam with decoupled weight decay.

    ```
    g          = -g with maximize
    exp_avg    = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    square     = exp_avg_sq, or with amsgrad the largest one so far
    w          = w * (1 - lr * weight_decay)
    w          = w - lr / (1 - beta1**step) * exp_avg / (sqrt(square) / sqrt(1 - beta2**step) + eps)
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        betas: how much of the two running means is kept, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0.
        amsgrad: divide by the largest mean of squares so far.
        maximize: climb instead of descending.
        foreach, fused: accepted for torch's sake; they choose among its implementations.
        capturable, differentiable: must be False.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import AdamW
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = AdamW([w], lr=0.01)
        >>> w.sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9899, 0.9899]

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101
    """

    family = AdamWRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also after a checkpoint of Adam's
