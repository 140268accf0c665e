"""A new rule in six lines, on the arrays of four libraries."""

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch

import gradstep as gs


@gs.rule
def Signum(w, g, m, *, learning_rate, momentum=0.9, weight_decay=0.0):
    """The sign of the momentum, with decoupled weight decay."""
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * (gs.sign(m) + weight_decay * w), m


def train(steps: int = 3) -> dict[str, list[float]]:
    """The parameters after some steps, by library."""
    start, slope = np.array([1, -2, 3], np.float32), np.array([0.5, -0.25, 0], np.float32)
    libraries = {"NumPy": np.array, "PyTorch": torch.tensor, "JAX": jnp.array, "MLX": mx.array}
    results: dict[str, list[float]] = {}
    for name, array in libraries.items():
        opt, params = Signum(0.5, weight_decay=0.25), {"w": array(start)}
        for _ in range(steps):
            opt.apply_gradients({"w": array(slope)}, params)
        results[name] = params["w"].tolist()
    return results


if __name__ == "__main__":
    for name, values in train().items():
        print(f"{name:8} {values}")
