"""Stochastic gradient descent, with momentum and Nesterov's variant."""

from collections.abc import Mapping
from typing import Any

from gradstep.errors import ConfigurationError
from gradstep.rules.base import NON_NEGATIVE, Flag, RuleOptimizer, Scalar, flag, scalar


class SGD(RuleOptimizer):
    """Stochastic gradient descent.

    ```
    g = g + weight_decay * w
    v = momentum * v + (1 - dampening) * g
    w = w - learning_rate * v                       or, with Nesterov, g + momentum * v in place of v
    ```

    Without momentum there is no slot and `w = w - learning_rate * g`.

    Args:
        learning_rate: a number or a schedule, or a mapping from glob to either, as every scalar may be.
        momentum: how much of the previous update is kept, >= 0. A fixed 0 removes the slot `v`.
        weight_decay: the factor of the L2 penalty's gradient, >= 0.
        dampening: the part of the gradient that momentum leaves out, >= 0.
        nesterov: look ahead by one momentum step; needs momentum > 0 and dampening 0.
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
        ConfigurationError: Nesterov without momentum or with dampening.

    Example:
        >>> import numpy as np, gradstep as gs
        >>> params = {"w": np.ones(2, np.float32)}
        >>> gs.SGD(0.5).apply_gradients({"w": np.ones(2, np.float32)}, params)["w"]
        array([0.5, 0.5], dtype=float32)

    Source: Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html
    """

    slot_signs = {"v": "signed"}  # noqa: RUF012

    learning_rate: Scalar = scalar(kw_only=False)
    momentum: Scalar = scalar(default=0.0, check=NON_NEGATIVE, removable=True)
    weight_decay: Scalar = scalar(default=0.0, check=NON_NEGATIVE, removable=True)
    dampening: Scalar = scalar(default=0.0, check=NON_NEGATIVE)
    nesterov: Flag = flag(default=False)

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        if given["nesterov"] and (given["momentum"] == 0 or given["dampening"] != 0):
            raise ConfigurationError(
                "SGD with nesterov=True needs momentum > 0 and dampening = 0; "
                f"got momentum={given['momentum']!r}, dampening={given['dampening']!r}"
            )

    @staticmethod
    def rule(
        w: Any, g: Any, v: Any, *,
        learning_rate: Any, momentum: Any, weight_decay: Any, dampening: Any, nesterov: bool,
    ) -> Any:  # fmt: skip
        if weight_decay:
            g = g + weight_decay * w
        if not momentum:
            return w - learning_rate * g, None
        v = momentum * v + (1 - dampening) * g
        update = g + momentum * v if nesterov else v
        return w - learning_rate * update, v
