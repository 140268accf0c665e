"""Optimizers for MLX in the manner of `mlx.optimizers`: `import gradstep.mlx as optim` in place of it.

The classes have MLX's names, arguments and defaults, and keep their state as MLX does, so that a state can go from one
to the other. They work eagerly, in `mx.compile` with the state as input and output, and in MLX's `MultiOptimizer`.
Arithmetic is in float32 for narrower parameters too; parameters and state keep their dtypes. A step that raises leaves
the state as it was, unless `mx.compile` is tracing it: then MLX leaves its placeholders there.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

try:
    from mlx.optimizers import (
        MultiOptimizer,
        Optimizer,
        clip_grad_norm,
        cosine_decay,
        exponential_decay,
        join_schedules,
        linear_schedule,
        step_decay,
    )
except ImportError as error:
    raise ImportError('gradstep.mlx needs MLX: pip install "gradstep[mlx]"') from error

from gradstep.mlx.families import (
    SGD,
    AdaDelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Muon,
    RMSprop,
)

__all__ = [
    "SGD", "AdaDelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "MultiOptimizer", "Muon",
    "Optimizer", "RMSprop", "clip_grad_norm", "cosine_decay", "exponential_decay", "join_schedules",
    "linear_schedule", "step_decay",
]  # fmt: skip
