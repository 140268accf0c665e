"""A task of one's own: fit a line through noisy points.

Which optimizer, at which learning rate?

    gradstep race examples/my_task.py:task
"""

import numpy as np


class Line:
    """y = slope * x + offset, from batches of 16 noisy points; the loss is the mean squared error."""

    def init(self, seed):
        rng = np.random.default_rng(seed)
        return {"slope": rng.normal(size=(1, 1)), "offset": np.zeros(1)}

    def loss_and_grads(self, params, step, rng):
        x = rng.uniform(-1, 1, size=(16, 1))
        y = 3 * x - 1 + rng.normal(scale=0.1, size=x.shape)
        error = x @ params["slope"] + params["offset"] - y
        grads = {"slope": 2 * x.T @ error / len(x), "offset": 2 * error.mean(axis=0)}
        return np.mean(error**2), grads

    def evaluate(self, params):
        """How far the parameters are from the truth."""
        return {
            "slope error": abs(params["slope"].item() - 3),
            "offset error": abs(params["offset"].item() + 1),
        }


task = Line()
