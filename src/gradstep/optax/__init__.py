"""Optimizers for JAX in optax's manner: each rule as a pure, jittable `optax.GradientTransformation`.

`gradstep.optax.adamw(…)` takes optax's arguments; `from_optimizer` makes a transformation of any gradstep optimizer.
"""

try:
    from gradstep.optax.aliases import (
        adadelta,
        adafactor,
        adagrad,
        adam,
        adamax,
        adamw,
        lion,
        muon,
        rmsprop,
        sgd,
    )
    from gradstep.optax.transformation import RuleState, from_optimizer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("jax", "optax"):
        raise
    raise ImportError('gradstep.optax needs JAX and optax: pip install "gradstep[optax]"') from error

__all__ = [
    "RuleState", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "from_optimizer", "lion", "muon",
    "rmsprop", "sgd",
]  # fmt: skip
