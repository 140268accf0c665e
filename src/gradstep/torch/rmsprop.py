"""RMSprop as torch defines it."""

from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.ops import maximum, sqrt
from gradstep.rules.base import NON_NEGATIVE, Flag, Scalar, flag, scalar
from gradstep.torch.groups import TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer


class RMSpropRule(TorchRule):
    """See `RMSprop`."""

    lr: Scalar = scalar()
    alpha: Scalar = scalar(check=NON_NEGATIVE)
    eps: Scalar = scalar(check=NON_NEGATIVE)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    momentum: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    centered: Flag = flag(default=False)
    maximize: Flag = flag(default=False)

    @staticmethod
    def rule(
        w: Any, g: Any, square_avg: Any, momentum_buffer: Any, grad_avg: Any, *,
        lr: Any, alpha: Any, eps: Any, weight_decay: Any, momentum: Any, centered: bool, maximize: bool,
    ) -> Any:  # fmt: skip
        if maximize:
            g = -g
        if weight_decay:
            g = g + weight_decay * w
        square_avg = variance = alpha * square_avg + (1 - alpha) * (g * g)
        if centered:
            grad_avg = alpha * grad_avg + (1 - alpha) * g
            variance = maximum(square_avg - grad_avg * grad_avg, 0.0)  # rounding can leave it below 0
        else:
            grad_avg = None
        update = g / (sqrt(variance) + eps)
        if momentum:
            momentum_buffer = update = momentum * momentum_buffer + update
        else:
            momentum_buffer = None
        return w - lr * update, square_avg, momentum_buffer, grad_avg


class RMSprop(TorchOptimizer):
    """`torch.optim.RMSprop` in gradstep's steps: gradients over their running root mean square.

    ```
    g          = -g with maximize
    g          = g + weight_decay * w
    square_avg = alpha * square_avg + (1 - alpha) * g**2
    grad_avg   = alpha * grad_avg + (1 - alpha) * g             only when centered
    update     = g / (sqrt(square_avg) + eps)                   or, when centered, square_avg - grad_avg**2
    buffer     = update = momentum * buffer + update            only with momentum
    w          = w - lr * update
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        alpha: how much of the running means is kept, >= 0.
        eps: added to the root, >= 0.
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        momentum: how much of the previous update is kept, >= 0; 0 for no buffer.
        centered: divide by the standard deviation instead.
        maximize: climb instead of descending.
        foreach: accepted for torch's sake; it chooses among its implementations.
        capturable, differentiable: must be False.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import RMSprop
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = RMSprop([w], lr=0.05, alpha=0.75)
        >>> w.sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, 0.9]

    Source: Hinton, 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """

    family = RMSpropRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered,
            "weight_decay": weight_decay, "capturable": capturable, "foreach": foreach, "maximize": maximize,
            "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults)
