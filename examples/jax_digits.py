"""Handwritten digits in JAX: a small network, its parameters in a nested tree."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import gradstep as gs


def predict(params, x):
    """The scores of the ten digits."""
    for layer in params["hidden"]:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
    return x @ params["out"]["weight"] + params["out"]["bias"]


def loss(params, x, y):
    """The mean cross entropy."""
    return -jnp.mean(jax.nn.log_softmax(predict(params, x))[jnp.arange(len(y)), y])


def train(steps: int = 200) -> float:
    """The share of test images that are recognised."""
    images, labels = load_digits(return_X_y=True)
    x, test = np.split((images / 16).astype(np.float32), [1400])
    y, answers = np.split(labels, [1400])

    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": [{"weight": jax.random.normal(keys[0], (64, 32)) / 8, "bias": jnp.zeros(32)}],
        "out": {"weight": jax.random.normal(keys[1], (32, 10)) / 6, "bias": jnp.zeros(10)},
    }
    opt = gs.MultiOptimizer([gs.Muon(0.02), gs.AdamW(0.01, bias_correction=True)], ["hidden.*.weight"])
    loss_and_grads = jax.jit(jax.value_and_grad(loss))

    for _ in range(steps):
        _, grads = loss_and_grads(params, x, y)
        opt.apply_gradients(grads, params)  # new arrays take the old ones' places in `params`

    return float(np.mean(predict(params, test).argmax(axis=1) == answers))


if __name__ == "__main__":
    print(f"recognised: {train():.1%}")
