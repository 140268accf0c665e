"""The functions that a rule may call: they build graph nodes on symbols and compute on real arrays."""

from typing import Any

from gradstep.arrays.library import owner
from gradstep.errors import RuleError
from gradstep.hyperparameters import check_choice
from gradstep.program.graph import Symbol
from gradstep.program.newton_schulz import PRODUCT_DTYPES, Iteration, ProductDtype
from gradstep.program.scalars import FUNCTIONS

__all__ = [
    "abs", "exp", "log", "maximum", "mean", "minimum", "norm", "orthogonalize", "rms", "sign", "sqrt", "where",
]  # fmt: skip


NUMBERS = (bool, int, float)  # exactly these: np.float64 is a float too, but stands for an array without dimensions


def sqrt(x: Any) -> Any:
    """The square root, correctly rounded.

    Example:
        >>> import gradstep as gs
        >>> gs.sqrt(9.0)
        3.0
    """
    return _apply("sqrt", x)


def abs(x: Any) -> Any:
    """The absolute value.

    Example:
        >>> import gradstep as gs
        >>> gs.abs(-2.0)
        2.0
    """
    return _apply("abs", x)


def sign(x: Any) -> Any:
    """-1, 0 or 1; +0 for zeros of both signs, NaN for NaN.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> gs.sign(np.array([-3.0, -0.0, 2.0]))
        array([-1.,  0.,  1.])
    """
    return _apply("sign", x)


def exp(x: Any) -> Any:
    """The exponential; equal across executors only within a few ulp.

    Example:
        >>> import gradstep as gs
        >>> gs.exp(0.0)
        1.0
    """
    return _apply("exp", x)


def log(x: Any) -> Any:
    """The natural logarithm; equal across executors only within a few ulp.

    Example:
        >>> import gradstep as gs
        >>> gs.log(1.0)
        0.0
    """
    return _apply("log", x)


def minimum(x: Any, y: Any) -> Any:
    """The smaller one, element by element; NaN when either is NaN.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> gs.minimum(np.array([1.0, 3.0]), 2.0)
        array([1., 2.])
    """
    return _apply("minimum", x, y)


def maximum(x: Any, y: Any) -> Any:
    """The larger one, element by element; NaN when either is NaN.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> gs.maximum(np.array([1.0, 3.0]), 2.0)
        array([2., 3.])
    """
    return _apply("maximum", x, y)


def where(condition: Any, x: Any, y: Any) -> Any:
    """`x` where the condition holds, else `y`, element by element.

    Args:
        condition: a comparison.
        x, y: arrays or numbers, at least one of them an array.

    Raises:
        RuleError: both branches are plain numbers, or the condition is no comparison.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> g = np.array([1.0, -1.0])
        >>> gs.where(g > 0, 2 * g, g)
        array([ 2., -1.])
    """
    if type(condition) is not bool and all(type(branch) in NUMBERS for branch in (x, y)):
        raise RuleError(
            "where(condition, x, y) with two plain numbers has no dtype; "
            "move an array into a branch: where(c, 2 * g, g) instead of where(c, 2, 1) * g"
        )
    return _apply("where", condition, x, y)


def mean(x: Any, axis: int | None = None) -> Any:
    """The mean over the whole tensor, or over the last (`axis=-1`) or second-to-last axis, kept with length 1.

    Sums run in float64 over fixed blocks in C order, so no number of threads changes the result;
    it is rounded once to the dtype of `x`. (On JAX and MLX arrays the library sums in its own way.) The mean of
    nothing is 0.

    Args:
        x: an array, of at least two dimensions when `axis` is given.
        axis: None, -1 or -2.

    Raises:
        RuleError: another axis, or one that has been reduced already.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> float(gs.mean(np.array([1.0, 2.0]))), gs.mean(np.array([[1.0, 3.0]]), axis=-1)
        (1.5, array([[2.]]))
    """
    if axis not in (None, -1, -2):
        raise RuleError(f"mean(x, axis) takes None, -1 or -2, got {axis!r}")
    if isinstance(x, Symbol):
        return x.trace.mean(x, axis)
    return _statistic("mean", x, axis)


def rms(x: Any) -> Any:
    """The root of the mean square over the whole tensor; summed like `mean`.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> float(gs.rms(np.array([2.0, -2.0])))
        2.0
    """
    if isinstance(x, Symbol):
        return x.trace.whole("rms", x)
    return _statistic("rms", x)


def norm(x: Any) -> Any:
    """The Euclidean norm of the whole tensor; summed like `mean`.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> float(gs.norm(np.array([3.0, 4.0])))
        5.0
    """
    if isinstance(x, Symbol):
        return x.trace.whole("norm", x)
    return _statistic("norm", x)


def orthogonalize(x: Any, steps: int = 5, dtype: ProductDtype = None) -> Any:
    """The nearest (semi-)orthogonal matrix to `x`, roughly, by Newton-Schulz iterations.

    Args:
        x: an array of at least two dimensions; more are flattened to (first, rest) meanwhile.
        steps: the number of iterations.
        dtype: "bfloat16" for faster and coarser matrix products, which NumPy does not have; None for the dtype of
            `x`.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> bool(abs(gs.orthogonalize(np.diag([5.0, 1.0])) - np.eye(2)).max() < 0.5)
        True

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    iteration = Iteration(steps, check_choice("orthogonalize's dtype", dtype, PRODUCT_DTYPES))
    if isinstance(x, Symbol):
        return x.trace.orthogonalize(x, iteration)
    if 0 in x.shape:
        return x
    return _statistic("orthogonalize", x.reshape(x.shape[0], -1), iteration).reshape(x.shape)


def _apply(name: str, *args: Any) -> Any:
    for arg in args:
        if isinstance(arg, Symbol):
            return arg.trace.call(name, *args)
    if all(type(arg) in NUMBERS for arg in args):
        return FUNCTIONS[name](*args)
    for arg in args:
        library = owner(arg)
        if library is not None:
            return library.call(name, *args)
    names = ", ".join(sorted({type(arg).__name__ for arg in args}))
    raise RuleError(f"expected symbols, numbers, or arrays of NumPy, PyTorch, JAX or MLX, got {names}")


def _statistic(name: str, x: Any, *args: Any) -> Any:
    library = owner(x)
    if library is None:
        raise RuleError(f"{name}(x) takes an array, got {x!r} ({type(x).__name__})")
    return getattr(library, name)(x, *args)
