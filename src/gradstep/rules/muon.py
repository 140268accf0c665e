"""Muon."""

from typing import Any

from gradstep.ops import maximum, orthogonalize, sqrt
from gradstep.program.newton_schulz import PRODUCT_DTYPES, ProductDtype
from gradstep.rules.base import (
    DECAY,
    NON_NEGATIVE,
    Count,
    Flag,
    OneOf,
    RuleOptimizer,
    Scalar,
    count,
    flag,
    one_of,
    scalar,
)


class Muon(RuleOptimizer):
    """Muon: momentum whose matrix is orthogonalized by Newton-Schulz iterations.

    ```
    g      = g + weight_decay * w
    v      = momentum * v + (1 - momentum) * g
    update = (1 - momentum) * g + momentum * v with Nesterov, else v
    w      = w - learning_rate * sqrt(max(1, d[-2] / d[-1])) * orthogonalize(update)
    ```

    `d` is the shape of `w`. Parameters of more than two dimensions are flattened to (d[0], rest) to be
    orthogonalized; those of fewer take the plain update
    and are better given to another optimizer: see `MultiOptimizer`.

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be.
        momentum: how much of the running mean is kept, in [0, 1).
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        nesterov: look ahead by one momentum step.
        ns_steps: the number of iterations, >= 1.
        ns_dtype: "bfloat16" to iterate in it, which is faster where the processor has such products, and leaves the
            direction 1 to 2% off, more where singular values are tiny; None for the dtype of the computation. NumPy
            has no such products.
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
        ConfigurationError: an `ns_dtype` that there is not.
        DtypeError: `ns_dtype` with NumPy arrays, at the first step.

    Example:
        >>> import numpy as np, gradstep as gs
        >>> params = {"w": np.zeros((2, 2), np.float32)}
        >>> opt = gs.Muon(0.02, weight_decay=0)
        >>> w = opt.apply_gradients({"w": np.eye(2, dtype=np.float32)}, params)["w"]
        >>> bool(-0.03 < w[0, 0] < -0.01 and w[0, 1] == 0)
        True

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """

    slot_signs = {"v": "signed"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    momentum: Scalar = scalar(default=0.95, check=DECAY)
    weight_decay: Scalar = scalar(default=0.01, check=NON_NEGATIVE, removable=True)
    nesterov: Flag = flag(default=True)
    ns_steps: Count = count(default=5)
    ns_dtype: OneOf = one_of(default=None, choices=PRODUCT_DTYPES)

    @staticmethod
    def rule(
        w: Any, g: Any, v: Any, *,
        learning_rate: Any, momentum: Any, weight_decay: Any, nesterov: bool, ns_steps: int,
        ns_dtype: ProductDtype,
    ) -> Any:  # fmt: skip
        if weight_decay:
            g = g + weight_decay * w
        v = momentum * v + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * v if nesterov else v
        if w.ndim < 2:
            return w - learning_rate * update, v
        rows, columns = w.shape[-2:]
        scale = learning_rate * sqrt(maximum(1.0, rows / columns))
        return w - scale * orthogonalize(update, ns_steps, ns_dtype), v
