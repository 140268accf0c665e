"""Adadelta as torch defines it."""

from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.hyperparameters import Check
from gradstep.ops import sqrt
from gradstep.rules.base import NON_NEGATIVE, Flag, Scalar, flag, scalar
from gradstep.torch.groups import TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer


def _fraction(x: float) -> bool:
    return 0 <= x <= 1


FRACTION = Check("in [0, 1]", _fraction)


class AdadeltaRule(TorchRule):
    """See `Adadelta`."""

    lr: Scalar = scalar()
    rho: Scalar = scalar(check=FRACTION)
    eps: Scalar = scalar(check=NON_NEGATIVE)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    maximize: Flag = flag(default=False)

    @staticmethod
    def rule(
        w: Any, g: Any, square_avg: Any, acc_delta: Any, *,
        lr: Any, rho: Any, eps: Any, weight_decay: Any, maximize: bool,
    ) -> Any:  # fmt: skip
        if maximize:
            g = -g
        if weight_decay:
            g = g + weight_decay * w
        square_avg = rho * square_avg + (1 - rho) * (g * g)
        delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
        acc_delta = rho * acc_delta + (1 - rho) * (delta * delta)
        return w - lr * delta, square_avg, acc_delta


class Adadelta(TorchOptimizer):
    """`torch.optim.Adadelta` in gradstep's steps: steps in the units of earlier steps.

    ```
    g          = -g with maximize
    g          = g + weight_decay * w
    square_avg = rho * square_avg + (1 - rho) * g**2
    delta      = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
    acc_delta  = rho * acc_delta + (1 - rho) * delta**2
    w          = w - lr * delta
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        rho: how much of the running means is kept, in [0, 1].
        eps: added under the roots, >= 0.
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
        >>> from gradstep.torch import Adadelta
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = Adadelta([w], rho=0.75, eps=0.25)
        >>> w.sum().backward()
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.2929, 0.2929]

    Source: Zeiler, 2012, https://arxiv.org/abs/1212.5701
    """

    family = AdadeltaRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "capturable": capturable, "foreach": foreach, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults)
