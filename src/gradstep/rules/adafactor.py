"""Adafactor."""

from collections.abc import Mapping
from typing import Any

from gradstep.errors import ConfigurationError
from gradstep.ops import maximum, mean, minimum, rms, sqrt
from gradstep.rules.base import (
    DECAY,
    NON_NEGATIVE,
    NON_POSITIVE,
    POSITIVE,
    Flag,
    Kind,
    OptionalFlag,
    OptionalScalar,
    Pair,
    RuleOptimizer,
    Scalar,
    flag,
    optional_flag,
    optional_scalar,
    pair,
    scalar,
)


class Adafactor(RuleOptimizer):
    """Adafactor: a second moment kept as row and column means, and updates clipped by their root mean square.

    ```
    rho    = min(1e-2, 1 / sqrt(t)) without a learning rate, else learning_rate
    rho    = rho * max(eps[1], rms(w))
    beta2  = 1 - t**decay_rate
    row    = beta2 * row + (1 - beta2) * (mean(g**2, axis=-1) + eps[0])       from two dimensions on,
    col    = beta2 * col + (1 - beta2) * (mean(g**2, axis=-2) + eps[0])       per leading index
    update = g * (sqrt(mean(row)) / sqrt(row)) * (1 / sqrt(col))              else g / sqrt(v)
    update = rho / max(1, rms(update) / clip_threshold) * update
    m      = update = beta_1 * m + (1 - beta_1) * update                      only with beta_1
    w      = w - weight_decay * rho * w - update
    ```

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be; None for
            the relative step.
        eps: added to the squared gradient, > 0; and the least root mean square of a parameter, >= 0.
        clip_threshold: the root mean square that an update may have, > 0.
        decay_rate: the exponent of the running means' decay, <= 0.
        beta_1: keep a first moment `m` of the updates, with this decay in [0, 1); None for none.
        weight_decay: how fast weights shrink, in units of `rho`, >= 0.
        scale_parameter: multiply the step by the parameter's root mean square.
        relative_step: derive the step from `t`; None decides by whether there is a learning rate.
        warmup_init: let the relative step begin at `1e-6 * t`.
        clip_norm: clip the gradients to this global norm within the step; None for not at all.
        nonfinite: "allow", "raise" or "skip" when a gradient holds NaN or infinity.
        donate: let JAX and MLX reuse the memory of old parameters and slots, on the CPU at once and in gradstep's own
            kernels; arrays of JAX that are held elsewhere become invalid.
        frozen: globs of parameters that are left alone: they get no slots and take part in no step.
        slot_dtype: "float32", "bfloat16", "float16" or "int8" for all slots, or a mapping from slot to one of them;
            None for the dtype of the computation.
        rounding: "nearest", or "stochastic" for parameters and slots narrower than float32.
        master_weights: keep float32 copies of parameters that are narrower.
        seed: of the random numbers with which stochastic rounding is done.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.
        ConfigurationError: `relative_step=True` with a learning rate, or False without one.

    Example:
        >>> import numpy as np, gradstep as gs
        >>> params = {"w": np.ones((2, 3), np.float32)}
        >>> opt = gs.Adafactor()
        >>> opt.apply_gradients({"w": np.ones((2, 3), np.float32)}, params)["w"][0]
        array([0.99, 0.99, 0.99], dtype=float32)
        >>> opt.state["w"]["row"].shape, opt.state["w"]["col"].shape
        ((2,), (3,))

    Source: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235
    """

    slot_kinds = {"row": Kind.ROW, "col": Kind.COLUMN}  # noqa: RUF012
    slot_signs = {"row": "non-negative", "col": "non-negative", "v": "non-negative", "m": "signed"}  # noqa: RUF012

    learning_rate: OptionalScalar = optional_scalar(default=None, kw_only=False)
    eps: Pair = pair(default=(1e-30, 1e-3), symbols=("eps1", "eps2"), checks=(POSITIVE, NON_NEGATIVE))
    clip_threshold: Scalar = scalar(default=1.0, check=POSITIVE)
    decay_rate: Scalar = scalar(default=-0.8, check=NON_POSITIVE)
    beta_1: OptionalScalar = optional_scalar(default=None, check=DECAY)
    weight_decay: Scalar = scalar(default=0.0, check=NON_NEGATIVE, removable=True)
    scale_parameter: Flag = flag(default=True)
    relative_step: OptionalFlag = optional_flag(default=None)
    warmup_init: Flag = flag(default=False)

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        has_rate = given["learning_rate"] is not None
        if given["relative_step"] is not None and given["relative_step"] == has_rate:
            raise ConfigurationError(
                f"Adafactor with relative_step={given['relative_step']} needs "
                f"{'no learning rate' if has_rate else 'a learning rate'}, got {given['learning_rate']!r}; "
                "leave relative_step out to let the learning rate decide"
            )

    @staticmethod
    def rule(
        w: Any, g: Any, row: Any, col: Any, v: Any, m: Any, *,
        learning_rate: Any, eps: Any, clip_threshold: Any, decay_rate: Any, beta_1: Any, weight_decay: Any,
        scale_parameter: bool, relative_step: bool | None, warmup_init: bool, t: Any,
    ) -> Any:  # fmt: skip
        eps1, eps2 = eps
        rho = learning_rate
        if rho is None:
            rho = minimum(1e-6 * t if warmup_init else 1e-2, 1 / sqrt(t))
        if scale_parameter:
            rho = rho * maximum(eps2, rms(w))
        beta2 = 1 - t**decay_rate
        if w.ndim >= 2:
            row = beta2 * row + (1 - beta2) * (mean(g * g, axis=-1) + eps1)
            col = beta2 * col + (1 - beta2) * (mean(g * g, axis=-2) + eps1)
            v = None
            update = g * (sqrt(mean(row, axis=-2)) / sqrt(row)) * (1 / sqrt(col))  # two roots and no overflow for zeros
        else:
            row = col = None
            v = beta2 * v + (1 - beta2) * (g * g + eps1)
            update = g / sqrt(v)
        update = rho / maximum(1.0, rms(update) / clip_threshold) * update
        if beta_1 is None:
            m = None
        else:
            m = update = beta_1 * m + (1 - beta_1) * update
        if weight_decay:
            w = w - weight_decay * rho * w
        return w - update, row, col, v, m
