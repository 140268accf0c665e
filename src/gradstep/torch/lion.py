"""Lion, which torch does not have, in torch's manner."""

from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.ops import sign
from gradstep.rules.base import DECAY, NON_NEGATIVE, Flag, Pair, Scalar, flag, pair, scalar
from gradstep.torch.groups import TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer


class LionRule(TorchRule):
    """See `Lion`."""

    lr: Scalar = scalar()
    betas: Pair = pair(default=(0.9, 0.99), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    maximize: Flag = flag(default=False)

    @staticmethod
    def rule(w: Any, g: Any, exp_avg: Any, *, lr: Any, betas: Any, weight_decay: Any, maximize: bool) -> Any:
        beta1, beta2 = betas
        if maximize:
            g = -g
        update = sign(beta1 * exp_avg + (1 - beta1) * g)
        exp_avg = beta2 * exp_avg + (1 - beta2) * g
        if weight_decay:
            w = w * (1 - lr * weight_decay)
        return w - lr * update, exp_avg


class Lion(TorchOptimizer):
    """Lion for torch: the sign of an interpolated momentum, with decoupled weight decay.

    ```
    g       = -g with maximize
    update  = sign(beta1 * exp_avg + (1 - beta1) * g)
    exp_avg = beta2 * exp_avg + (1 - beta2) * g
    w       = w * (1 - lr * weight_decay) - lr * update
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0; 3 to 10 times smaller than Adam's serves well.
        betas: the interpolation of the update, and how much of the momentum is kept, each in [0, 1).
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0.
        maximize: climb instead of descending.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or values that do not go together; both
            are a `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import Lion
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = Lion([w], lr=0.25)
        >>> (w * torch.tensor([3.0, -3.0])).sum().backward()
        >>> opt.step()
        >>> w.tolist()
        [0.75, 1.25]

    Source: Chen et al., 2023, https://arxiv.org/abs/2302.06675
    """

    family = LionRule
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})
