"""Each rule under optax's name for it, with optax's arguments, and its defaults where it has them."""

from typing import Any, TypeAlias

from gradstep.errors import ArgumentTypeError
from gradstep.ops import abs, maximum, sqrt
from gradstep.optax.transformation import Injected, from_optimizer, jax
from gradstep.program.newton_schulz import ProductDtype
from gradstep.rules.adadelta import AdaDelta
from gradstep.rules.adafactor import Adafactor
from gradstep.rules.adam import Adam, AdamW
from gradstep.rules.custom import rule
from gradstep.rules.lion import Lion
from gradstep.rules.muon import Muon
from gradstep.rules.sgd import SGD

Numeric: TypeAlias = Any
"""A number, an array without dimensions, or a schedule: a function of the step count."""


def _given(value: Any, stand_in: float = 0.5) -> Any:
    """Arrays become schedules, so that nobody asks for their value."""
    return Injected(value, stand_in) if isinstance(value, jax.Array) else value


@rule
def RMSprop(w: Any, g: Any, v: Any, *, learning_rate: Any, decay: Any = 0.9, eps: Any = 1e-8, eps_in_sqrt: Any = True):  # noqa: N802
    """RMSprop with optax's two places for `eps`."""
    v = decay * v + (1 - decay) * (g * g)
    return w - learning_rate * g / (sqrt(v + eps) if eps_in_sqrt else sqrt(v) + eps), v


@rule
def Adagrad(w: Any, g: Any, v: Any, *, learning_rate: Any, initial_accumulator_value: Any = 0.1, eps: Any = 1e-7):  # noqa: N802
    """Adagrad with optax's place for `eps`, and the initial sum added where it is used."""
    v = v + g * g
    return w - learning_rate * g / sqrt(v + (initial_accumulator_value + eps)), v


@rule
def Adamax(  # noqa: N802
    w: Any, g: Any, m: Any, v: Any, *, learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, t: Any
):
    """Adamax with bias correction, and optax's place for `eps`."""
    m = b1 * m + (1 - b1) * g
    v = maximum(abs(g) + eps, b2 * v)
    return w - learning_rate / (1 - b1**t) * m / v, m, v


def sgd(learning_rate: Numeric, momentum: Numeric = None, nesterov: bool = False) -> Any:
    """Stochastic gradient descent: `v = momentum * v + g`, `w = w - learning_rate * v`; see `gradstep.SGD`.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        momentum: how much of the previous update is kept, >= 0; None for no momentum. Default: None.
        nesterov: look ahead by one momentum step. Default: False.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.sgd(0.5)
        >>> tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0].tolist()
        [-0.5, -0.5]

    Source: Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html
    """
    if momentum is None:
        return from_optimizer(SGD(_given(learning_rate)))
    return from_optimizer(SGD(_given(learning_rate), momentum=_given(momentum), nesterov=nesterov))


def rmsprop(learning_rate: Numeric, decay: Numeric = 0.9, eps: Numeric = 1e-8, eps_in_sqrt: bool = True) -> Any:
    """`v = decay * v + (1 - decay) * g**2`, `w = w - learning_rate * g / sqrt(v + eps)`.

    With `eps_in_sqrt=False`, `eps` is added to the root, as in `gradstep.RMSprop`.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        decay: how much of the running mean of squares is kept. Default: 0.9.
        eps: added to the mean, or to the root. Default: 1e-8.
        eps_in_sqrt: which of the two. Default: True.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.rmsprop(0.1, decay=0.75)
        >>> tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[0].tolist()
        [-0.20000000298023224]

    Source: Hinton, 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """
    return from_optimizer(RMSprop(_given(learning_rate), decay=_given(decay), eps=_given(eps), eps_in_sqrt=eps_in_sqrt))


def adagrad(learning_rate: Numeric, initial_accumulator_value: Numeric = 0.1, eps: Numeric = 1e-7) -> Any:
    """`v = v + g**2`, `w = w - learning_rate * g / sqrt(v + initial_accumulator_value + eps)`.

    The slot begins at zero; the initial value is added where it is used.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        initial_accumulator_value: what the sum of squares begins at. Default: 0.1.
        eps: added under the root. Default: 1e-7.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.adagrad(0.1, initial_accumulator_value=3.0)
        >>> tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[0].tolist()
        [-0.05000000074505806]

    Source: Duchi et al., 2011, https://jmlr.org/papers/v12/duchi11a.html
    """
    start = _given(initial_accumulator_value)
    return from_optimizer(Adagrad(_given(learning_rate), initial_accumulator_value=start, eps=_given(eps)))


def adadelta(learning_rate: Numeric = 1.0, rho: Numeric = 0.9, eps: Numeric = 1e-6) -> Any:
    """AdaDelta; see `gradstep.AdaDelta`.

    ```
    v = rho * v + (1 - rho) * g**2
    d = sqrt(u + eps) / sqrt(v + eps) * g
    u = rho * u + (1 - rho) * d**2
    w = w - learning_rate * d
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        rho: how much of the running means is kept, in [0, 1). Default: 0.9.
        eps: added under both roots, > 0. Default: 1e-6.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.adadelta()
        >>> bool(tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[0][0] < 0)
        True

    Source: Zeiler, 2012, https://arxiv.org/abs/1212.5701
    """
    return from_optimizer(AdaDelta(_given(learning_rate), rho=_given(rho), eps=_given(eps)))


def adam(learning_rate: Numeric, b1: Numeric = 0.9, b2: Numeric = 0.999, eps: Numeric = 1e-8) -> Any:
    """Adam with bias correction, as in optax; see `gradstep.Adam`.

    ```
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    w = w - learning_rate * (m / (1 - b1**t)) / (sqrt(v / (1 - b2**t)) + eps)
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        b1: how much of the mean of gradients is kept, in [0, 1). Default: 0.9.
        b2: how much of the mean of squares is kept, in [0, 1). Default: 0.999.
        eps: added to the root, >= 0. Default: 1e-8.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.adam(0.5)
        >>> tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0].tolist()
        [-0.5, -0.5]

    Source: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980
    """
    betas = _given(b1), _given(b2)
    return from_optimizer(Adam(_given(learning_rate), betas=betas, eps=_given(eps), bias_correction=True))


def adamw(
    learning_rate: Numeric, b1: Numeric = 0.9, b2: Numeric = 0.999, eps: Numeric = 1e-8, weight_decay: Numeric = 1e-4
) -> Any:
    """AdamW with bias correction and optax's defaults; see `gradstep.AdamW`.

    ```
    w = w * (1 - learning_rate * weight_decay) - the step of Adam
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        b1: how much of the mean of gradients is kept, in [0, 1). Default: 0.9.
        b2: how much of the mean of squares is kept, in [0, 1). Default: 0.999.
        eps: added to the root, >= 0. Default: 1e-8.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0. Default: 1e-4.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.adamw(0.5, weight_decay=0.5)
        >>> params = jnp.full(2, 4.0)
        >>> tx.update(jnp.ones(2), tx.init(params), params)[0].tolist()
        [-1.5, -1.5]

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101
    """
    return from_optimizer(
        AdamW(
            _given(learning_rate), betas=(_given(b1), _given(b2)), eps=_given(eps), weight_decay=_given(weight_decay),
            bias_correction=True,
        )
    )  # fmt: skip


def adamax(learning_rate: Numeric, b1: Numeric = 0.9, b2: Numeric = 0.999, eps: Numeric = 1e-8) -> Any:
    """Adamax with bias correction and `eps` inside of the maximum, as in optax.

    `v = max(|g| + eps, b2 * v)`, `w = w - learning_rate / (1 - b1**t) * m / v`.

    ```
    m = b1 * m + (1 - b1) * g
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        b1: how much of the mean of gradients is kept, in [0, 1). Default: 0.9.
        b2: how much of the maximum is kept, in [0, 1). Default: 0.999.
        eps: added to the gradient's absolute value. Default: 1e-8.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.adamax(0.5)
        >>> tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0].round(3).tolist()
        [-0.5, -0.5]

    Source: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980
    """
    return from_optimizer(Adamax(_given(learning_rate), b1=_given(b1), b2=_given(b2), eps=_given(eps)))


def lion(learning_rate: Numeric, b1: Numeric = 0.9, b2: Numeric = 0.99, weight_decay: Numeric = 1e-3) -> Any:
    """Lion with optax's defaults; see `gradstep.Lion`.

    ```
    c = b1 * m + (1 - b1) * g
    m = b2 * m + (1 - b2) * g
    w = w * (1 - learning_rate * weight_decay) - learning_rate * sign(c)
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        b1: the weight of `m` in the update, in [0, 1). Default: 0.9.
        b2: how much of the mean of gradients is kept, in [0, 1). Default: 0.99.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0. Default: 1e-3.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.lion(0.5, weight_decay=0.0)
        >>> params = jnp.zeros(2)
        >>> tx.update(jnp.array([3.0, -4.0]), tx.init(params), params)[0].tolist()
        [-0.5, 0.5]

    Source: Chen et al., 2023, https://arxiv.org/abs/2302.06675
    """
    betas = _given(b1), _given(b2)
    return from_optimizer(Lion(_given(learning_rate), betas=betas, weight_decay=_given(weight_decay)))


def adafactor(
    learning_rate: Numeric = None,
    eps: tuple[Numeric, Numeric] = (1e-30, 1e-3),
    clip_threshold: Numeric = 1.0,
    decay_rate: Numeric = -0.8,
    beta_1: Numeric = None,
    weight_decay: Numeric = 0.0,
    scale_parameter: bool = True,
    warmup_init: bool = False,
) -> Any:
    """Adafactor with the formula and the arguments of `gradstep.Adafactor`, not those of optax.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule; None for the relative step.
        eps, clip_threshold, decay_rate, beta_1, weight_decay, scale_parameter, warmup_init: see `gradstep.Adafactor`.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.adafactor()
        >>> params = jnp.ones((2, 3))
        >>> tx.update(jnp.ones((2, 3)), tx.init(params), params)[0].shape
        (2, 3)

    Source: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235
    """
    return from_optimizer(
        Adafactor(
            _given(learning_rate), eps=(_given(eps[0]), _given(eps[1])), clip_threshold=_given(clip_threshold),
            decay_rate=_given(decay_rate, -0.8), beta_1=_given(beta_1), weight_decay=_given(weight_decay),
            scale_parameter=scale_parameter, warmup_init=warmup_init,
        )
    )  # fmt: skip


def muon(
    learning_rate: Numeric,
    momentum: Numeric = 0.95,
    weight_decay: Numeric = 0.01,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_dtype: ProductDtype = None,
) -> Any:
    """Muon with the formula and the arguments of `gradstep.Muon`, for every parameter that it gets.

    Give what is no matrix to another rule: `optax.multi_transform`, or `from_optimizer` of a `MultiOptimizer`.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of optax or gradstep.
        momentum, weight_decay, nesterov, ns_steps, ns_dtype: see `gradstep.Muon`.

    Raises:
        OutOfRangeError, NonFiniteScalarError: a value outside of its range, or not finite.

    Example:
        >>> import gradstep.optax, jax.numpy as jnp
        >>> tx = gradstep.optax.muon(0.02)
        >>> params = jnp.ones((2, 3))
        >>> tx.update(jnp.ones((2, 3)), tx.init(params), params)[0].shape
        (2, 3)

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    if isinstance(ns_steps, jax.Array):
        raise ArgumentTypeError(
            'muon\'s ns_steps is configuration: optax.inject_hyperparams(muon, static_args="ns_steps") leaves it alone'
        )
    return from_optimizer(
        Muon(
            _given(learning_rate), momentum=_given(momentum), weight_decay=_given(weight_decay),
            nesterov=nesterov, ns_steps=ns_steps, ns_dtype=ns_dtype,
        )
    )  # fmt: skip
