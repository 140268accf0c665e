"""Handwritten digits in MLX: an `mlx.nn` model, with the whole training step compiled."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from sklearn.datasets import load_digits

import gradstep.mlx as optim


def train(steps: int = 200) -> float:
    """The share of test images that are recognised."""
    images, labels = load_digits(return_X_y=True)
    x, test = map(mx.array, np.split((images / 16).astype(np.float32), [1400]))
    y, answers = map(mx.array, np.split(labels, [1400]))

    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = optim.AdamW(0.01, bias_correction=True)
    loss_and_grad = nn.value_and_grad(model, lambda model: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step():
        loss, grads = loss_and_grad(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(steps):
        mx.eval(step(), state)

    return mx.mean(mx.argmax(model(test), axis=1) == answers).item()


if __name__ == "__main__":
    print(f"recognised: {train():.1%}")
