"""The built-in task: a small network that reads scikit-learn's handwritten digits, in plain NumPy."""

import importlib
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstep.cli.complaint import require

Array = NDArray[Any]
Parameters = dict[str, Array]

PIXELS, CLASSES = 64, 10
MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
TEST_SHARE = 5  # every fifth image is held out
BATCH = 32


class Digits:
    """8x8 images, one hidden layer, cross-entropy in nats.

    The training images come in five copies, as they are and moved by one pixel, so that a few
    hundred steps cannot learn them by heart and the training loss stays worth comparing.
    """

    def __init__(self, hidden: int = 192, dtype: type[np.floating[Any]] = np.float32) -> None:
        images, labels = _load()
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = images[order], labels[order]
        images = ((images - images.mean()) / images.std()).astype(dtype)
        held_out = np.arange(len(labels)) % TEST_SHARE == 0
        self.hidden, self.dtype = hidden, dtype
        self.test_images, self.test_labels = images[held_out].reshape(-1, PIXELS), labels[held_out]
        self.train_images = _moved(images[~held_out])
        self.train_labels = np.tile(labels[~held_out], len(MOVES))

    def init(self, seed: int) -> Parameters:
        """Weights with variance 2 / inputs (He et al., 2015), biases zero."""
        rng = np.random.default_rng(seed)
        hidden = rng.normal(0, np.sqrt(2 / PIXELS), (PIXELS, self.hidden))
        output = rng.normal(0, np.sqrt(2 / self.hidden), (self.hidden, CLASSES))
        return {
            "hidden.weight": hidden.astype(self.dtype),
            "hidden.bias": np.zeros(self.hidden, self.dtype),
            "output.weight": output.astype(self.dtype),
            "output.bias": np.zeros(CLASSES, self.dtype),
        }

    def loss_and_grads(self, params: Parameters, step: int, rng: np.random.Generator) -> tuple[float, Parameters]:
        """The mean cross-entropy of a random batch and its gradient."""
        batch = rng.integers(len(self.train_labels), size=BATCH)
        return backward(params, self.train_images[batch], self.train_labels[batch])

    def evaluate(self, params: Parameters) -> dict[str, float]:
        """Accuracy and cross-entropy on the images held out."""
        _, logits = _forward(params, self.test_images)
        loss, _ = _cross_entropy(logits, self.test_labels)
        accuracy = float((logits.argmax(axis=1) == self.test_labels).mean())
        return {"test accuracy": accuracy, "test loss": loss}


def backward(params: Parameters, images: Array, labels: Array) -> tuple[float, Parameters]:
    """The mean cross-entropy of these images and its gradient, by the chain rule."""
    activity, logits = _forward(params, images)
    loss, d_logits = _cross_entropy(logits, labels)
    d_activity = (d_logits @ params["output.weight"].T) * (activity > 0)
    return loss, {
        "hidden.weight": images.T @ d_activity,
        "hidden.bias": d_activity.sum(axis=0),
        "output.weight": activity.T @ d_logits,
        "output.bias": d_logits.sum(axis=0),
    }


def one_blas_thread() -> AbstractContextManager[object]:
    """Small matrices gain nothing from more threads of NumPy's BLAS, and lose a lot on shared cores."""
    limits: Any = _import("threadpoolctl").threadpool_limits
    return limits(limits=1, user_api="blas")


def _load() -> tuple[Array, Array]:
    digits = _import("sklearn.datasets").load_digits()
    return digits.images, digits.target


def _import(module: str) -> Any:
    require("The task digits", "race", "sklearn", "threadpoolctl")
    return importlib.import_module(module)


def _moved(images: Array) -> Array:
    """One copy of the images per move, flattened to rows of pixels."""
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=images.min())
    copies = [framed[:, 1 + y : 9 + y, 1 + x : 9 + x] for y, x in MOVES]
    return np.concatenate(copies).reshape(-1, PIXELS)


def _forward(params: Parameters, images: Array) -> tuple[Array, Array]:
    """The hidden layer's activity and the logits."""
    activity = np.maximum(images @ params["hidden.weight"] + params["hidden.bias"], 0)
    return activity, activity @ params["output.weight"] + params["output.bias"]


def _cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean of -log softmax(logits) at the labels, and its gradient."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    totals = powers.sum(axis=1, keepdims=True)
    loss = float((np.log(totals[:, 0]) - shifted[rows, labels]).sum()) / len(labels)
    gradient = powers / totals
    gradient[rows, labels] -= 1
    return loss, gradient / len(labels)
