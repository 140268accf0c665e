"""Adamax."""

from typing import Any

from gradstep.ops import abs, maximum
from gradstep.rules.base import DECAY, NON_NEGATIVE, Pair, RuleOptimizer, Scalar, pair, scalar


class Adamax(RuleOptimizer):
    """Adamax: Adam with a running maximum in place of the second moment; no bias correction.

    ```
    m = beta1 * m + (1 - beta1) * g
    v = max(beta2 * v, |g|)
    w = w - learning_rate * m / (v + eps)
    ```

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be.
        betas: how much of the running mean and of the maximum is kept, each in [0, 1).
        eps: added to the maximum, >= 0.
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
        >>> gs.Adamax(0.1).apply_gradients({"w": np.ones(2, np.float32)}, params)["w"]
        array([0.99, 0.99], dtype=float32)

    Source: Kingma and Ba, 2015, section 7.1, https://arxiv.org/abs/1412.6980
    """

    slot_signs = {"m": "signed", "v": "non-negative"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    betas: Pair = pair(default=(0.9, 0.999), symbols=("beta1", "beta2"), checks=(DECAY, DECAY))
    eps: Scalar = scalar(default=1e-8, check=NON_NEGATIVE)

    @staticmethod
    def rule(w: Any, g: Any, m: Any, v: Any, *, learning_rate: Any, betas: Any, eps: Any) -> Any:
        beta1, beta2 = betas
        m = beta1 * m + (1 - beta1) * g
        v = maximum(beta2 * v, abs(g))
        return w - learning_rate * m / (v + eps), m, v
