"""Muon as torch defines it, in full precision or in bfloat16."""

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from gradstep.errors import ConfigurationError, OutOfRangeError, ShapeError
from gradstep.hyperparameters import Static
from gradstep.ops import maximum, norm, orthogonalize, sqrt
from gradstep.program.newton_schulz import COEFFICIENTS, EPSILON, PRODUCT_DTYPES, ProductDtype
from gradstep.rules.base import NON_NEGATIVE, Count, Flag, OneOf, Scalar, count, flag, one_of, scalar
from gradstep.torch.groups import Group, TorchRule
from gradstep.torch.optimizer import Number, TorchOptimizer

ADJUSTMENTS = (None, "original", "match_rms_adamw")
MOST_STEPS = 99


class MuonRule(TorchRule):
    """See `Muon`."""

    lr: Scalar = scalar()
    weight_decay: Scalar = scalar(check=NON_NEGATIVE, removable=True)
    momentum: Scalar = scalar(check=NON_NEGATIVE)
    nesterov: Flag = flag(default=True)
    ns_coefficients: Static = Static(default=COEFFICIENTS, kw_only=True)
    eps: Static = Static(default=EPSILON, kw_only=True)  # it decides who computes
    ns_steps: Count = count(default=5)
    adjust_lr_fn: Static = Static(default=None, kw_only=True)
    ns_dtype: OneOf = one_of(default=None, choices=PRODUCT_DTYPES)

    @classmethod
    def fits_kernels(cls, group: Group) -> bool:
        return tuple(group["ns_coefficients"]) == COEFFICIENTS and group["eps"] <= EPSILON

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        if given["adjust_lr_fn"] not in ADJUSTMENTS:
            raise ConfigurationError(f"Muon's adjust_lr_fn must be one of {ADJUSTMENTS}, got {given['adjust_lr_fn']!r}")
        if not given["eps"] > 0:
            raise OutOfRangeError(f"Muon's eps must be > 0, got {given['eps']!r}")
        if len(given["ns_coefficients"]) != 3:
            raise ConfigurationError(f"Muon's ns_coefficients must be three numbers, got {given['ns_coefficients']!r}")
        if given["ns_steps"] > MOST_STEPS:
            raise OutOfRangeError(f"Muon's ns_steps must be <= {MOST_STEPS}, got {given['ns_steps']}")

    @staticmethod
    def rule(
        w: Any, g: Any, momentum_buffer: Any, *,
        lr: Any, weight_decay: Any, momentum: Any, nesterov: bool, ns_coefficients: tuple[float, float, float],
        eps: float, ns_steps: int, adjust_lr_fn: str | None, ns_dtype: ProductDtype,
    ) -> Any:  # fmt: skip
        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
        update = momentum * momentum_buffer + (1 - momentum) * g if nesterov else momentum_buffer
        direction = orthogonalize(update / maximum(norm(update), eps), ns_steps, ns_dtype)
        rows, columns = w.shape
        if adjust_lr_fn == "match_rms_adamw":
            adjustment = 0.2 * sqrt(maximum(rows, columns))
        else:
            adjustment = sqrt(maximum(1.0, rows / columns))
        if weight_decay:
            w = w * (1 - lr * weight_decay)
        return w - lr * adjustment * direction, momentum_buffer


class Muon(TorchOptimizer):
    """`torch.optim.Muon` in gradstep's steps, in full precision or in bfloat16: momentum, orthogonalized as a matrix.

    ```
    buffer = momentum * buffer + (1 - momentum) * g
    update = momentum * buffer + (1 - momentum) * g with Nesterov, else buffer
    w      = w * (1 - lr * weight_decay) - lr * adjustment * orthogonalize(update / max(norm(update), eps))
    ```

    `adjustment` is `sqrt(max(1, rows / columns))`, or `0.2 * sqrt(max(rows, columns))` for "match_rms_adamw". Torch
    iterates in bfloat16, which leaves the direction 1 to 2% off; here that is done on request.

    Args:
        params: matrices, `(name, matrix)` pairs, or dicts of them with values of their own.
        lr: the learning rate, >= 0.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0.
        momentum: how much of the running mean is kept, >= 0.
        nesterov: look ahead by one momentum step.
        ns_coefficients: of the polynomial that is iterated.
        eps: the least norm to divide by, > 0. Others than these coefficients, or a larger eps, run through torch's
            own operations.
        ns_steps: the number of iterations, from 1 to 99.
        adjust_lr_fn: "original", which None means too, or "match_rms_adamw".
        ns_dtype: "bfloat16" to iterate in it, as torch does, None for float32, or float64 for such parameters.

    Raises:
        OutOfRangeError, ConfigurationError: a value outside of its range, or one that cannot be honoured; both are a
            `ValueError`.
        ShapeError: a parameter that is no matrix; give those to AdamW.
        DtypeError: a complex parameter.

    Example:
        >>> import torch
        >>> from gradstep.torch import Muon
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = Muon([w], lr=0.02)
        >>> w.trace().backward()
        >>> opt.step()
        >>> bool(-0.03 < w[0, 0] < -0.01 and w[0, 1] == 0)
        True

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., 2025,
    https://arxiv.org/abs/2502.16982
    """

    family = MuonRule
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        ns_dtype: ProductDtype = None,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }  # fmt: skip
        super().__init__(params, defaults)

    def check_parameter(self, what: str, parameter: Any) -> None:
        super().check_parameter(what, parameter)
        if parameter.ndim != 2:
            raise ShapeError(
                f"Muon takes matrices, but {what} has shape {tuple(parameter.shape)}: "
                "give vectors, embeddings and convolutions to another optimizer, such as AdamW"
            )
