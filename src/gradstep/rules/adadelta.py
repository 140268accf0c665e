"""AdaDelta."""

from typing import Any

from gradstep.ops import sqrt
from gradstep.rules.base import DECAY, POSITIVE, RuleOptimizer, Scalar, scalar


class AdaDelta(RuleOptimizer):
    """AdaDelta: the gradient in units of the recent updates.

    ```
    v = rho * v + (1 - rho) * g**2
    d = sqrt(u + eps) / sqrt(v + eps) * g
    u = rho * u + (1 - rho) * d**2
    w = w - learning_rate * d
    ```

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be; the paper's
            method is 1.0.
        rho: how much of the running means is kept, in [0, 1).
        eps: added under the roots, > 0.
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
        >>> bool(gs.AdaDelta(1.0).apply_gradients({"w": np.ones(2, np.float32)}, params)["w"][0] < 1)
        True

    Source: Zeiler, 2012, https://arxiv.org/abs/1212.5701
    """

    slot_signs = {"v": "non-negative", "u": "non-negative"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    rho: Scalar = scalar(default=0.9, check=DECAY)
    eps: Scalar = scalar(default=1e-6, check=POSITIVE)

    @staticmethod
    def rule(w: Any, g: Any, v: Any, u: Any, *, learning_rate: Any, rho: Any, eps: Any) -> Any:
        v = rho * v + (1 - rho) * (g * g)
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * (d * d)
        return w - learning_rate * d, v, u
