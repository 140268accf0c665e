"""Adagrad."""

from typing import Any

from gradstep.ops import sqrt
from gradstep.rules.base import POSITIVE, RuleOptimizer, Scalar, scalar


class Adagrad(RuleOptimizer):
    """Adagrad: the gradient over the root of the sum of all its squares.

    ```
    v = v + g**2
    w = w - learning_rate * g / (sqrt(v) + eps)
    ```

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be.
        eps: added to the root, > 0.
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
        >>> gs.Adagrad(0.5).apply_gradients({"w": np.ones(2, np.float32)}, params)["w"]
        array([0.5, 0.5], dtype=float32)

    Source: Duchi et al., 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    slot_signs = {"v": "non-negative"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    eps: Scalar = scalar(default=1e-8, check=POSITIVE)

    @staticmethod
    def rule(w: Any, g: Any, v: Any, *, learning_rate: Any, eps: Any) -> Any:
        v = v + g * g
        return w - learning_rate * g / (sqrt(v) + eps), v
