"""The Newton-Schulz iteration that orthogonalizes a matrix, on the array library's own matrix products."""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
RUN = 3  # iterations on one Gram matrix: each makes the noise of its small eigenvalues a**2 = 12 times larger
STACKED = 1 << 18  # elements of the largest matrix that is computed in a stack with others
STACK = 1 << 20  # elements of a stack
PIECE = 1024  # elements whose squares PyTorch adds up in one go
HALVED = 384  # rows from which a symmetric product is formed in halves

ProductDtype: TypeAlias = Literal["bfloat16"] | None
PRODUCT_DTYPES: tuple[ProductDtype, ...] = (None, "bfloat16")


class Iteration(NamedTuple):
    """How a matrix is orthogonalized: the number of iterations, and the dtype of the products if it is another."""

    steps: int
    dtype: ProductDtype = None


class Workspace:
    """Memory for the temporaries of the iteration, which all matrices take in turns, in this step and the next."""

    def __init__(self) -> None:
        self._memory: dict[Any, Any] = {}

    def take(self, library: Any, dtype: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
        """Uninitialised arrays of these shapes."""
        sizes = [math.prod(shape) for shape in shapes]
        if dtype not in self._memory or len(self._memory[dtype]) < sum(sizes):
            self._memory.pop(dtype, None)  # before there is more
            self._memory[dtype] = library.empty(sum(sizes), dtype=dtype)
        places = np.cumsum([0, *sizes]).tolist()
        memory = self._memory[dtype]
        return [memory[a:b].reshape(shape) for a, b, shape in zip(places, places[1:], shapes, strict=False)]


def count_stacked(rows: int, columns: int) -> int:
    """How many matrices of this shape are computed at once, if there are so many."""
    size = rows * columns
    return STACK // size if 0 < size <= STACKED else 1


def workspace_shapes(shape: tuple[int, ...], *, exact: bool) -> list[tuple[int, ...]]:
    """The temporaries for a matrix of this shape, or for a stack of them: as large as it, then as its Gram matrix."""
    side = min(shape[-2:])
    gram = (*shape[:-2], side, side)
    return [shape] * (1 if exact else 2) + [gram] * (2 if _run(shape, exact=exact) == 1 else 4)


def newton_schulz(x: Any, iteration: Iteration, workspace: Workspace | None = None) -> Any:
    """Orthogonalize in place the matrix `x`, or every matrix of a stack of three dimensions, and return it.

    `X = X / (|X| + 1e-7)`, then `steps` times `X = P X` with `P = a I + b A + c A A` and `A = X X'`, on the shorter
    side. What this does to `A` needs no `X`: `A = A P P`. So a few iterations are made on `A` alone, and then
    `X = Q X` with the product `Q` of their `P`: less work where one side is much longer. The small eigenvalues of `A`
    lose their digits meanwhile; that is why there are only a few before `A` is formed anew.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    steps, dtype = iteration
    if 0 in x.shape:
        return x
    if x.ndim == 3 and len(x) == 1:
        newton_schulz(x[0], iteration, workspace)
        return x
    library = sys.modules[type(x).__module__.partition(".")[0]]
    products = _NumPyProducts() if library is np else _TorchProducts(library, stacked=x.ndim == 3)
    exact = dtype is None and x.dtype.itemsize >= 4
    run = _run(x.shape, exact=exact)
    shapes = workspace_shapes(tuple(x.shape), exact=exact)
    taken = (workspace or Workspace()).take(library, x.dtype if dtype is None else getattr(library, dtype), shapes)
    now, other, *grams = [x, *taken] if exact else taken
    if exact and -(-steps // run) % 2:
        now, other = other, now  # so that the result comes to lie in `x`
    _divide(library, products, x, now)
    while steps > 0:
        _iterate(products, min(run, steps), now, other, grams, exact=exact)
        now, other, steps = other, now, steps - run
    if now is not x:
        x[...] = now
    return x


def _run(shape: Sequence[int], *, exact: bool) -> int:
    """How many iterations are made on one Gram matrix."""
    return RUN if exact and max(shape[-2:]) >= 2 * min(shape[-2:]) else 1


def _divide(library: Any, products: Any, x: Any, out: Any) -> None:
    """Every matrix over its norm."""
    for matrix, result in zip(x, out, strict=True) if x.ndim == 3 else [(x, out)]:
        library.divide(matrix, products.norm(matrix) + EPSILON, out=result)


def _iterate(products: Any, steps: int, x: Any, out: Any, grams: list[Any], *, exact: bool) -> None:
    """Some iterations on the Gram matrix of `x`."""
    wide, turned, free = x.shape[-2] <= x.shape[-1], _turned(x), list(grams)
    gram, total = free.pop(), None
    products.symmetric(*((x, turned) if wide else (turned, x)), gram)
    for step in range(steps):
        last = step == steps - 1
        factor = free.pop()
        products.polynomial(gram, factor, gram if last else free[-1])
        if exact:
            _diagonal(factor)[...] += COEFFICIENTS[0]
        if total is None:
            total = factor
        else:
            grown = free.pop()
            products.symmetric(factor, total, grown)
            free.append(total)
            total = grown
        if not last:
            square = free.pop()
            products.symmetric(factor, _turned(factor), square)
            if factor is not total:
                free.append(factor)
            following = free.pop()
            products.symmetric(gram, square, following)
            free += [gram, square]
            gram = following
    products.product(*((total, x) if wide else (x, total)), out, None if exact else x)


def _turned(x: Any) -> Any:
    return x.swapaxes(-1, -2)


def _diagonal(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1] ** 2)[:, :: x.shape[-1] + 1]


class _NumPyProducts:
    """A product of a matrix and its own transpose takes half the work in BLAS, and NumPy sees to it."""

    def norm(self, x: Any) -> float:
        """The norm of one matrix."""
        return float(np.linalg.norm(x))

    def product(self, left: Any, right: Any, out: Any, kept: Any = None) -> None:
        """`left right`, and `a kept`."""
        np.matmul(left, right, out=out)
        if kept is not None:
            out += COEFFICIENTS[0] * kept

    def symmetric(self, left: Any, right: Any, out: Any) -> None:
        """`left right`, known to be symmetric."""
        np.matmul(left, right, out=out)

    def polynomial(self, gram: Any, out: Any, spare: Any) -> None:
        """`b A + c A A`; `spare` is overwritten, and may be `A`."""
        np.matmul(gram, _turned(gram), out=out)
        out *= COEFFICIENTS[2]
        np.multiply(gram, COEFFICIENTS[1], out=spare)
        out += spare


class _TorchProducts:
    """Of a large symmetric product a corner is left out and copied. Stacks have products of their own."""

    def __init__(self, torch: Any, *, stacked: bool) -> None:
        self._product, self._sum = (torch.bmm, torch.baddbmm) if stacked else (torch.mm, torch.addmm)
        self._norm = torch.linalg.vector_norm

    def norm(self, x: Any) -> float:
        """See `_NumPyProducts.norm`; in pieces, because PyTorch adds up millions of squares with an error of 1e-4."""
        flat, norm = x.reshape(-1), self._norm
        whole = len(flat) // PIECE * PIECE
        return math.hypot(norm(norm(flat[:whole].reshape(-1, PIECE), dim=-1)), norm(flat[whole:]))

    def product(self, left: Any, right: Any, out: Any, kept: Any = None) -> None:
        """See `_NumPyProducts.product`."""
        if kept is None:
            self._product(left, right, out=out)
        else:
            self._sum(kept, left, right, beta=COEFFICIENTS[0], out=out)

    def symmetric(self, left: Any, right: Any, out: Any, kept: Any = None) -> None:
        """See `_NumPyProducts.symmetric`; with `kept`, `b kept + c left right`."""
        if out.ndim == 3 or len(out) < HALVED:
            self._form(left, right, out, kept)
            return
        half = len(out) // 2
        head, tail = slice(half), slice(half, None)
        for rows, columns, form in (
            (head, head, self.symmetric),
            (tail, tail, self.symmetric),
            (head, tail, self._form),
        ):
            form(left[rows], right[:, columns], out[rows, columns], None if kept is None else kept[rows, columns])
        out[tail, head] = out[head, tail].T

    def _form(self, left: Any, right: Any, out: Any, kept: Any) -> None:
        if kept is None:
            self._product(left, right, out=out)
        else:
            self._sum(kept, left, right, beta=COEFFICIENTS[1], alpha=COEFFICIENTS[2], out=out)

    def polynomial(self, gram: Any, out: Any, spare: Any) -> None:
        """See `_NumPyProducts.polynomial`."""
        self.symmetric(gram, gram, out, gram)


def orthogonalized(library: Any, x: Any, iteration: Iteration) -> Any:
    """The same in new arrays, of a library whose arrays never change."""
    steps, dtype = iteration
    scaled = x / (library.norm(x) + EPSILON)
    return _iterated(scaled, steps) if dtype is None else _iterated_in(library, dtype, scaled, steps)


def _iterated(x: Any, steps: int) -> Any:
    a, b, c = COEFFICIENTS
    wide, run = x.shape[0] <= x.shape[1], _run(x.shape, exact=True)
    while steps > 0:
        gram, scale, rest, factor = (x @ x.T if wide else x.T @ x), 1.0, None, None  # Q is scale I + rest
        for _ in range(min(run, steps)):
            if factor is not None:
                half = a * gram + gram @ factor
                gram = a * half + half @ factor
            factor = b * gram + c * (gram @ gram)
            rest = factor if rest is None else a * rest + scale * factor + factor @ rest
            scale *= a
        x = scale * x + (rest @ x if wide else x @ rest)
        steps -= run
    return x


def _iterated_in(library: Any, dtype: str, x: Any, steps: int) -> Any:
    """Products in this dtype, sums in that of `x`."""
    a, b, c = COEFFICIENTS
    full, wide = x.dtype, x.shape[0] <= x.shape[1]
    x = library.cast(x, dtype)
    for _ in range(steps):
        gram = x @ x.T if wide else x.T @ x
        factor = library.cast(b * gram.astype(full) + c * (gram @ gram).astype(full), dtype)
        x = library.cast(a * x.astype(full) + (factor @ x if wide else x @ factor).astype(full), dtype)
    return x.astype(full)
