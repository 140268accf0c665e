"""Handwritten digits in plain NumPy: a linear classifier with gradients written by hand."""

import numpy as np
from sklearn.datasets import load_digits

import gradstep as gs


def train(steps: int = 300) -> float:
    """The share of test images that are recognised."""
    images, labels = load_digits(return_X_y=True)
    x, test = np.split((images / 16).astype(np.float32), [1400])
    y, answers = np.split(labels, [1400])

    params = {"weight": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}
    opt = gs.AdamW(gs.cosine_decay(0.05, steps), bias_correction=True)

    for _ in range(steps):
        scores = x @ params["weight"] + params["bias"]
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = odds / odds.sum(axis=1, keepdims=True)
        error[np.arange(len(y)), y] -= 1
        error /= len(y)
        opt.apply_gradients({"weight": x.T @ error, "bias": error.sum(axis=0)}, params)

    return float(np.mean((test @ params["weight"] + params["bias"]).argmax(axis=1) == answers))


if __name__ == "__main__":
    print(f"recognised: {train():.1%}")
