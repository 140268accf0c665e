"""Adafactor as torch defines it."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from gradstep.hyperparameters import Check
from gradstep.ops import maximum, mean, minimum, rms, sqrt
from gradstep.rules.base import NON_NEGATIVE, NON_POSITIVE, Flag, Kind, Scalar, flag, scalar
from gradstep.torch.groups import Group, TorchRule, plain
from gradstep.torch.optimizer import Number, TorchOptimizer


def _at_least_one(x: float) -> bool:
    return x >= 1


AT_LEAST_ONE = Check(">= 1", _at_least_one)


class AdafactorRule(TorchRule):
    """See `Adafactor`."""

    slot_kinds = {"row_var": Kind.ROW, "col_var": Kind.COLUMN}  # noqa: RUF012

    lr: Scalar = scalar()
    beta2_decay: Scalar = scalar(check=NON_POSITIVE)
    eps1: Scalar = scalar(check=NON_NEGATIVE)
    eps2: Scalar = scalar(check=NON_NEGATIVE)
    d: Scalar = scalar(check=AT_LEAST_ONE)
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    maximize: Flag = flag(default=False)

    @classmethod
    def fields_of(cls, group: Group) -> dict[str, Any]:
        eps1, eps2 = plain(group["eps"], "eps")
        if eps1 is None:  # as torch does: by the dtype of the group
            eps1 = torch.finfo(group["params"][0].dtype if group.get("params") else torch.float32).eps
        same = ("lr", "beta2_decay", "d", "weight_decay", "maximize")
        return {"eps1": eps1, "eps2": eps2, **{name: plain(group[name], name) for name in same}}

    @staticmethod
    def rule(
        w: Any, g: Any, row_var: Any, col_var: Any, variance: Any, *,
        lr: Any, beta2_decay: Any, eps1: Any, eps2: Any, d: Any, weight_decay: Any, maximize: bool, t: Any,
    ) -> Any:  # fmt: skip
        if maximize:
            g = -g
        new = t**beta2_decay
        alpha = maximum(eps2, rms(w)) * minimum(lr, 1 / sqrt(t))
        if w.ndim >= 2:
            row_var = (1 - new) * row_var + new * mean(g * g, axis=-1)
            col_var = (1 - new) * col_var + new * mean(g * g, axis=-2)
            estimate = row_var / maximum(mean(row_var, axis=-2), eps1) * col_var
            variance = None
        else:
            row_var = col_var = None
            variance = estimate = (1 - new) * variance + new * (g * g)
        update = g / sqrt(maximum(estimate, eps1 * eps1))
        if weight_decay:
            w = w * (1 - lr * weight_decay)
        return w - alpha / maximum(1.0, rms(update) / d) * update, row_var, col_var, variance


class Adafactor(TorchOptimizer):
    """`torch.optim.Adafactor` in gradstep's steps: a second moment kept as row and column means.

    ```
    g        = -g with maximize
    new      = step**beta2_decay
    alpha    = max(eps[1], rms(w)) * min(lr, 1 / sqrt(step))
    row_var  = (1 - new) * row_var + new * mean(g**2, axis=-1)              from two dimensions on,
    col_var  = (1 - new) * col_var + new * mean(g**2, axis=-2)              per leading index
    variance = row_var * col_var / max(mean(row_var), eps[0])               else a running mean of g**2
    update   = g / sqrt(max(variance, eps[0]**2))
    w        = w * (1 - lr * weight_decay) - alpha * update / max(1, rms(update) / d)
    ```

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0; a bound of the relative step.
        beta2_decay: the exponent of the running means' decay, <= 0.
        eps: the least variance's root, None for the precision of the dtype of the group's first parameter; and the
            least root mean square of a parameter; both >= 0.
        d: the root mean square that an update may have, >= 1.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0.
        foreach: accepted for torch's sake; it chooses among its implementations.
        maximize: climb instead of descending.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import Adafactor
        >>> w = torch.nn.Parameter(torch.ones(2, 3))
        >>> opt = Adafactor([w], lr=0.1)
        >>> w.sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w[0].tolist()], opt.state[w]["row_var"].shape
        ([0.9, 0.9, 0.9], torch.Size([2, 1]))

    Source: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235
    """

    family = AdafactorRule

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay,
            "foreach": foreach, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)
