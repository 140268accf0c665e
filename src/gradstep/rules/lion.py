"""Lion."""

from typing import Any

from gradstep.ops import sign
from gradstep.rules.base import DECAY, NON_NEGATIVE, Pair, RuleOptimizer, Scalar, pair, scalar


class Lion(RuleOptimizer):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    ```
    c = beta1 * m + (1 - beta1) * g
    m = beta2 * m + (1 - beta2) * g
    w = w * (1 - learning_rate * weight_decay) - learning_rate * sign(c)
    ```

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be; 3 to 10 times
            smaller than Adam's serves well.
        betas: the interpolation of the update, and how much of the momentum is kept, each in [0, 1).
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0.
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
        >>> gs.Lion(0.25).apply_gradients({"w": np.array([3, -3], np.float32)}, params)["w"]
        array([0.75, 1.25], dtype=float32)

    Source: Chen et al., 2023, https://arxiv.org/abs/2302.06675
    """

    slot_signs = {"m": "signed"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    betas: Pair = pair(default=(0.9, 0.99), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    weight_decay: Scalar = scalar(default=0.0, check=NON_NEGATIVE, removable=True)

    @staticmethod
    def rule(w: Any, g: Any, m: Any, *, learning_rate: Any, betas: Any, weight_decay: Any) -> Any:
        beta1, beta2 = betas
        c = beta1 * m + (1 - beta1) * g
        m = beta2 * m + (1 - beta2) * g
        if weight_decay:
            w = w * (1 - learning_rate * weight_decay)
        return w - learning_rate * sign(c), m
