"""The optimizer step, done right: fused, all-or-nothing, state by name, on arrays of NumPy, PyTorch, JAX and MLX."""

import importlib
from typing import TYPE_CHECKING, Any

from gradstep.errors import (
    AliasedParametersError,
    ArgumentTypeError,
    CheckpointError,
    CommunicationError,
    ConfigurationError,
    DeviceError,
    DtypeError,
    DuplicateNameError,
    GradstepError,
    MismatchError,
    NonFiniteGradientError,
    NonFiniteScalarError,
    OutOfRangeError,
    ReadOnlyError,
    RuleError,
    ShapeError,
    TracingError,
    UnknownParameterError,
)
from gradstep.explain import explain
from gradstep.learning_rate import LearningRate
from gradstep.ops import abs, exp, log, maximum, mean, minimum, norm, orthogonalize, rms, sign, sqrt, where
from gradstep.optimizer import Optimizer
from gradstep.report import Report
from gradstep.rules.adadelta import AdaDelta
from gradstep.rules.adafactor import Adafactor
from gradstep.rules.adagrad import Adagrad
from gradstep.rules.adam import Adam, AdamW
from gradstep.rules.adamax import Adamax
from gradstep.rules.lion import Lion
from gradstep.rules.muon import Muon
from gradstep.rules.rmsprop import RMSprop
from gradstep.rules.sgd import SGD

if TYPE_CHECKING:
    from gradstep.accumulate import Accumulate
    from gradstep.bridges.mlx import from_mlx, to_mlx
    from gradstep.bridges.optax import from_optax, to_optax
    from gradstep.bridges.torch import from_torch, to_torch
    from gradstep.checkpoint.checkpoint_file import latest, load
    from gradstep.checkpoint.differences import Difference
    from gradstep.clip import clip_grad_norm
    from gradstep.distributed.diloco import DiLoCo, OuterReport
    from gradstep.distributed.sharded import Sharded
    from gradstep.gradients import value_and_grad
    from gradstep.multi import MultiOptimizer
    from gradstep.program.threads import set_num_threads
    from gradstep.rules.custom import rule
    from gradstep.schedules import cosine_decay, exponential_decay, join_schedules, linear_schedule, step_decay
    from gradstep.step.bill import MemoryBill

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Accumulate",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "AliasedParametersError",
    "ArgumentTypeError",
    "CheckpointError",
    "CommunicationError",
    "ConfigurationError",
    "DeviceError",
    "DiLoCo",
    "Difference",
    "DtypeError",
    "DuplicateNameError",
    "GradstepError",
    "LearningRate",
    "Lion",
    "MemoryBill",
    "MismatchError",
    "MultiOptimizer",
    "Muon",
    "NonFiniteGradientError",
    "NonFiniteScalarError",
    "Optimizer",
    "OutOfRangeError",
    "OuterReport",
    "RMSprop",
    "ReadOnlyError",
    "Report",
    "RuleError",
    "ShapeError",
    "Sharded",
    "TracingError",
    "UnknownParameterError",
    "abs",
    "clip_grad_norm",
    "cosine_decay",
    "exp",
    "explain",
    "exponential_decay",
    "from_mlx",
    "from_optax",
    "from_torch",
    "join_schedules",
    "latest",
    "linear_schedule",
    "load",
    "log",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "orthogonalize",
    "rms",
    "rule",
    "set_num_threads",
    "sign",
    "sqrt",
    "step_decay",
    "to_mlx",
    "to_optax",
    "to_torch",
    "value_and_grad",
    "where",
]

_LATE = {
    "Accumulate": "accumulate", "MemoryBill": "step.bill", "MultiOptimizer": "multi", "clip_grad_norm": "clip",
    "DiLoCo": "distributed.diloco", "OuterReport": "distributed.diloco", "Sharded": "distributed.sharded",
    "rule": "rules.custom", "set_num_threads": "program.threads", "value_and_grad": "gradients",
    "cosine_decay": "schedules", "exponential_decay": "schedules", "join_schedules": "schedules",
    "linear_schedule": "schedules", "step_decay": "schedules",
    "Difference": "checkpoint.differences",
    "latest": "checkpoint.checkpoint_file", "load": "checkpoint.checkpoint_file",
    "from_mlx": "bridges.mlx", "from_optax": "bridges.optax", "from_torch": "bridges.torch",
    "to_mlx": "bridges.mlx", "to_optax": "bridges.optax", "to_torch": "bridges.torch",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What a step does not need is imported when it is first asked for."""
    if name not in _LATE:
        raise AttributeError(f"module 'gradstep' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"gradstep.{_LATE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
