"""The Newton-Schulz iteration that orthogonalizes a matrix, on the array library's own matrix product."""

import sys
from functools import partial
from typing import Any

import numpy as np

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7


class Workspace:
    """The temporaries of the iteration, kept from one matrix and one step to the next."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Any, tuple[int, ...]], Any] = {}

    def take(self, name: str, like: Any, shape: tuple[int, int]) -> Any:
        """An uninitialised array of that shape, with the dtype and library of `like`."""
        key = (name, like.dtype, shape)
        if key not in self._buffers:
            empty = like.new_empty if hasattr(like, "new_empty") else partial(np.empty, dtype=like.dtype)
            self._buffers[key] = empty(shape)
        return self._buffers[key]


def workspace_shapes(rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """The temporaries that a matrix of this shape needs."""
    side = min(rows, columns)
    return {"gram": (side, side), "square": (side, side), "product": (rows, columns)}


def newton_schulz(x: Any, steps: int, workspace: Workspace | None = None) -> Any:
    """Orthogonalize the matrix `x` in place and return it.

    `X = X / (|X| + 1e-7)`, then `steps` times `X = a X + (b A + c A A) X` with `A = X X'`. The products are
    formed on the shorter side: for a matrix taller than wide, `X (b A + c A A)` with `A = X' X` is the same.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    if not x.size if hasattr(x, "flags") else not x.numel():
        return x
    workspace = workspace or Workspace()
    library = _library(x)
    a, b, c = COEFFICIENTS
    rows, columns = x.shape
    shapes = workspace_shapes(rows, columns)
    gram, square, product = (workspace.take(name, x, shape) for name, shape in shapes.items())
    x /= float(library.linalg.norm(x)) + EPSILON
    for _ in range(steps):
        left, right = (x, x.T) if rows <= columns else (x.T, x)
        library.matmul(left, right, out=gram)
        library.matmul(gram, gram, out=square)
        square *= c
        gram *= b
        gram += square
        if rows <= columns:
            library.matmul(gram, x, out=product)
        else:
            library.matmul(x, gram, out=product)
        x *= a
        x += product
    return x


def orthogonalized(x: Any, steps: int, norm: Any) -> Any:
    """The same in new arrays, of any library with operators, given the norm of `x`."""
    a, b, c = COEFFICIENTS
    wide = x.shape[0] <= x.shape[1]
    x = x / (norm + EPSILON)
    for _ in range(steps):
        gram = x @ x.T if wide else x.T @ x
        factor = b * gram + c * (gram @ gram)
        x = a * x + (factor @ x if wide else x @ factor)
    return x


def _library(x: Any) -> Any:
    return sys.modules[type(x).__module__.partition(".")[0]]
