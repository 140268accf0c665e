"""The same small arrays in every array library, with float64 everywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

SHAPES = {"vector": (7,), "matrix": (12, 33), "scalar": (), "empty": (0, 3)}


@pytest.fixture(autouse=True, scope="module")
def double_precision() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)  # MLX has float64 there only
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
    mx.set_default_device(device)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "NumPy": lambda array: np.array(array, order="K"),
    "PyTorch": lambda array: torch.from_numpy(np.array(array, order="K")),
    "JAX": jnp.asarray,
    "MLX": lambda array: mx.array(array, getattr(mx, str(array.dtype))),
}
on_all = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
in_place = pytest.mark.parametrize("make", [MAKERS["NumPy"], MAKERS["PyTorch"]], ids=["NumPy", "PyTorch"])
functional = pytest.mark.parametrize("make", [MAKERS["JAX"], MAKERS["MLX"]], ids=["JAX", "MLX"])
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def arrays(seed: int, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
