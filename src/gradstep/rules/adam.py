"""Adam, and AdamW with its decoupled weight decay."""

from typing import Any

from gradstep.ops import sqrt
from gradstep.rules.base import DECAY, NON_NEGATIVE, Flag, Pair, RuleOptimizer, Scalar, flag, pair, scalar


class Adam(RuleOptimizer):
    """Adam, without bias correction unless `bias_correction=True`: the first steps are then up to 3.16 times longer.

    ```
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w - learning_rate * m / (sqrt(v) + eps)
    ```

    With bias correction `m` is divided by `1 - beta1**t` and `v` by `1 - beta2**t`, where `t` is the parameter's
    own step count.

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be.
        betas: how much of the running means `m` and `v` is kept, each in [0, 1).
        eps: added to the root, >= 0.
        bias_correction: make up for the means' start at zero.
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

    Example:
        >>> import numpy as np, gradstep as gs
        >>> params = {"w": np.ones(2, np.float32)}
        >>> opt = gs.Adam(0.01, bias_correction=True)
        >>> opt.apply_gradients({"w": np.ones(2, np.float32)}, params)["w"]
        array([0.99, 0.99], dtype=float32)

    Source: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980
    """

    slot_signs = {"m": "signed", "v": "non-negative"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    betas: Pair = pair(default=(0.9, 0.999), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    eps: Scalar = scalar(default=1e-8, check=NON_NEGATIVE)
    bias_correction: Flag = flag(default=False)

    @staticmethod
    def rule(
        w: Any, g: Any, m: Any, v: Any, *, learning_rate: Any, betas: Any, eps: Any, bias_correction: bool, t: Any
    ) -> Any:
        beta1, beta2 = betas
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        return w - adam_step(m, v, learning_rate, beta1, beta2, eps, t if bias_correction else None), m, v


class AdamW(RuleOptimizer):
    """AdamW, without bias correction unless `bias_correction=True`: the first steps are then up to 3.16 times longer.

    ```
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w * (1 - learning_rate * weight_decay) - learning_rate * m / (sqrt(v) + eps)
    ```

    With bias correction `m` is divided by `1 - beta1**t` and `v` by `1 - beta2**t`, where `t` is the parameter's
    own step count.

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be.
        betas: how much of the running means `m` and `v` is kept, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0.
        bias_correction: make up for the means' start at zero.
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

    Example:
        >>> import numpy as np, gradstep as gs
        >>> params = {"w": np.ones(2, np.float32)}
        >>> opt = gs.AdamW(0.01, weight_decay=0, bias_correction=True)
        >>> opt.apply_gradients({"w": np.ones(2, np.float32)}, params)["w"]
        array([0.99, 0.99], dtype=float32)

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101
    """

    slot_signs = {"m": "signed", "v": "non-negative"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    betas: Pair = pair(default=(0.9, 0.999), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    eps: Scalar = scalar(default=1e-8, check=NON_NEGATIVE)
    weight_decay: Scalar = scalar(default=0.01, check=NON_NEGATIVE, removable=True)
    bias_correction: Flag = flag(default=False)

    @staticmethod
    def rule(
        w: Any, g: Any, m: Any, v: Any, *,
        learning_rate: Any, betas: Any, eps: Any, weight_decay: Any, bias_correction: bool, t: Any,
    ) -> Any:  # fmt: skip
        beta1, beta2 = betas
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        if weight_decay:
            w = w * (1 - learning_rate * weight_decay)
        return w - adam_step(m, v, learning_rate, beta1, beta2, eps, t if bias_correction else None), m, v


def adam_step(m: Any, v: Any, learning_rate: Any, beta1: Any, beta2: Any, eps: Any, t: Any) -> Any:
    """What Adam subtracts from `w`; corrected for the means' start at zero when `t` is given."""
    if t is None:
        return learning_rate * m / (sqrt(v) + eps)
    c1 = learning_rate / (1 - beta1**t)
    c2 = 1 / sqrt(1 - beta2**t)
    return c1 * m / (sqrt(v) * c2 + eps)
