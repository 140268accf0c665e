"""MLX's optimizers by name, each with the rule of the gradstep optimizer that is called like it."""

from collections.abc import Sequence

import mlx.core as mx

import gradstep as gs
from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.mlx.optimizer import STAND_IN, Rate, RuleUpdate, State
from gradstep.program.newton_schulz import ProductDtype


class SGD(RuleUpdate):
    """Stochastic gradient descent.

    ```
    g = g + weight_decay * w
    v = momentum * v + (1 - dampening) * g
    w = w - learning_rate * v                       or, with Nesterov, g + momentum * v in place of v
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        momentum: how much of the previous update is kept, >= 0. Default: 0.
        weight_decay: the factor of the L2 penalty's gradient, >= 0. Default: 0.
        dampening: the part of the gradient that momentum leaves out, >= 0. Default: 0.
        nesterov: look ahead by one momentum step; needs momentum > 0 and dampening 0. Default: False.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.
        ConfigurationError: Nesterov without momentum or with dampening.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.SGD(0.5, momentum=0.9)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.5, -0.5], dtype=float32)

    Source: Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html
    """

    momentum = gs.SGD.momentum
    weight_decay = gs.SGD.weight_decay
    dampening = gs.SGD.dampening
    nesterov = gs.SGD.nesterov

    def __init__(
        self,
        learning_rate: Rate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        definition = gs.SGD(
            STAND_IN, momentum=momentum, weight_decay=weight_decay, dampening=dampening, nesterov=nesterov
        )
        super().__init__(definition, learning_rate)

    def init_single(self, parameter: mx.array, state: State) -> None:
        """Put the slot `v` into the state; MLX keeps it without momentum too."""
        state["v"] = mx.zeros_like(parameter)


class RMSprop(RuleUpdate):
    """RMSprop: the gradient over a running root mean square of it.

    ```
    v = alpha * v + (1 - alpha) * g**2
    w = w - learning_rate * g / (sqrt(v) + eps)
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        alpha: how much of the running mean is kept, in [0, 1). Default: 0.99.
        eps: added to the root, > 0. Default: 1e-8.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.RMSprop(0.1, alpha=0.75)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.8, 0.8], dtype=float32)

    Source: Tieleman and Hinton, 2012, Lecture 6.5, COURSERA: Neural Networks for Machine Learning
    """

    alpha = gs.RMSprop.alpha
    eps = gs.RMSprop.eps

    def __init__(self, learning_rate: Rate, alpha: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(gs.RMSprop(STAND_IN, alpha=alpha, eps=eps), learning_rate)


class Adagrad(RuleUpdate):
    """Adagrad: the gradient over the root of the sum of all its squares.

    ```
    v = v + g**2
    w = w - learning_rate * g / (sqrt(v) + eps)
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        eps: added to the root, > 0. Default: 1e-8.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.Adagrad(0.5)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.5, 0.5], dtype=float32)

    Source: Duchi, Hazan and Singer, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    eps = gs.Adagrad.eps

    def __init__(self, learning_rate: Rate, eps: float = 1e-8) -> None:
        super().__init__(gs.Adagrad(STAND_IN, eps=eps), learning_rate)


class AdaDelta(RuleUpdate):
    """AdaDelta: the gradient in units of the recent updates.

    ```
    v = rho * v + (1 - rho) * g**2
    d = sqrt(u + eps) / sqrt(v + eps) * g
    u = rho * u + (1 - rho) * d**2
    w = w - learning_rate * d
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        rho: how much of the running means is kept, in [0, 1). Default: 0.9.
        eps: added under the roots, > 0. Default: 1e-6.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.AdaDelta(1.0)
        >>> w = opt.apply_gradients({"w": mx.array([1.0])}, {"w": mx.array([1.0])})["w"]
        >>> 0.99 < w.item() < 1
        True

    Source: Zeiler, 2012, https://arxiv.org/abs/1212.5701
    """

    rho = gs.AdaDelta.rho
    eps = gs.AdaDelta.eps

    def __init__(self, learning_rate: Rate, rho: float = 0.9, eps: float = 1e-6) -> None:
        super().__init__(gs.AdaDelta(STAND_IN, rho=rho, eps=eps), learning_rate)


class Adam(RuleUpdate):
    """Adam, without bias correction unless `bias_correction=True`: the first steps are then up to 3.16 times longer.

    ```
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w - learning_rate * m / (sqrt(v) + eps)
    ```

    With bias correction `m` is divided by `1 - beta1**step` and `v` by `1 - beta2**step`, accurately for every step.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        betas: how much of the running means `m` and `v` is kept, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root, >= 0. Default: 1e-8.
        bias_correction: make up for the means' start at zero. Default: False, as in MLX.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.Adam(0.5, bias_correction=True)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.5, 0.5], dtype=float32)

    Source: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980
    """

    betas = gs.Adam.betas
    eps = gs.Adam.eps
    bias_correction = gs.Adam.bias_correction

    def __init__(
        self,
        learning_rate: Rate,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
    ) -> None:
        super().__init__(gs.Adam(STAND_IN, betas=betas, eps=eps, bias_correction=bias_correction), learning_rate)


class AdamW(RuleUpdate):
    """AdamW, without bias correction unless `bias_correction=True`: the first steps are then up to 3.16 times longer.

    ```
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w * (1 - learning_rate * weight_decay) - learning_rate * m / (sqrt(v) + eps)
    ```

    With bias correction `m` is divided by `1 - beta1**step` and `v` by `1 - beta2**step`, accurately for every step.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        betas: how much of the running means `m` and `v` is kept, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root, >= 0. Default: 1e-8.
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0. Default: 0.01.
        bias_correction: make up for the means' start at zero. Default: False, as in MLX.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.AdamW(0.5, weight_decay=0.5, bias_correction=True)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.25, 0.25], dtype=float32)

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101
    """

    betas = gs.AdamW.betas
    eps = gs.AdamW.eps
    weight_decay = gs.AdamW.weight_decay
    bias_correction = gs.AdamW.bias_correction

    def __init__(
        self,
        learning_rate: Rate,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
    ) -> None:
        definition = gs.AdamW(
            STAND_IN, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction
        )
        super().__init__(definition, learning_rate)


class Adamax(RuleUpdate):
    """Adamax: Adam with a running maximum in place of the second moment; no bias correction.

    ```
    m = beta1 * m + (1 - beta1) * g
    v = max(beta2 * v, |g|)
    w = w - learning_rate * m / (v + eps)
    ```

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        betas: how much of the running mean and of the maximum is kept, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the maximum, >= 0. Default: 1e-8.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.Adamax(1.0)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.9, 0.9], dtype=float32)

    Source: Kingma and Ba, 2015, section 7.1, https://arxiv.org/abs/1412.6980
    """

    betas = gs.Adamax.betas
    eps = gs.Adamax.eps

    def __init__(self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(gs.Adamax(STAND_IN, betas=betas, eps=eps), learning_rate)


class Lion(RuleUpdate):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    ```
    c = beta1 * m + (1 - beta1) * g
    m = beta2 * m + (1 - beta2) * g
    w = w * (1 - learning_rate * weight_decay) - learning_rate * sign(c)
    ```

    Args:
        learning_rate: a number, an array, or a schedule; 3 to 10 times smaller than Adam's serves well.
        betas: the interpolation of the update, and how much of the momentum is kept, each in [0, 1).
            Default: (0.9, 0.99).
        weight_decay: how fast weights shrink, in units of the learning rate, >= 0. Default: 0.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.Lion(0.25)
        >>> opt.apply_gradients({"w": mx.array([1.0, 3.0])}, {"w": mx.array([1.0, 1.0])})["w"]
        array([0.75, 0.75], dtype=float32)

    Source: Chen et al., 2023, https://arxiv.org/abs/2302.06675
    """

    betas = gs.Lion.betas
    weight_decay = gs.Lion.weight_decay

    def __init__(self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(gs.Lion(STAND_IN, betas=betas, weight_decay=weight_decay), learning_rate)


class Adafactor(RuleUpdate):
    """Adafactor: a second moment kept as row and column means, and updates clipped by their root mean square.

    ```
    rho    = min(1e-2, 1 / sqrt(step)) with relative_step, else learning_rate
    rho    = rho * max(eps[1], rms(w))
    beta2  = 1 - step**decay_rate
    row    = beta2 * row + (1 - beta2) * (mean(g**2, axis=-1) + eps[0])       from two dimensions on,
    col    = beta2 * col + (1 - beta2) * (mean(g**2, axis=-2) + eps[0])       per leading index
    update = g * (sqrt(mean(row)) / sqrt(row)) * (1 / sqrt(col))              else g / sqrt(v)
    update = rho * update / max(1, rms(update) / clip_threshold)
    m      = update = beta_1 * m + (1 - beta_1) * update                      only with beta_1
    w      = w - weight_decay * rho * w - update
    ```

    Args:
        learning_rate: a number, an array, or a schedule; without effect unless `relative_step=False`, as in MLX.
            Default: None.
        eps: added to the squared gradient, > 0; and the least root mean square of a parameter, >= 0.
            Default: (1e-30, 1e-3).
        clip_threshold: the root mean square that an update may have, > 0. Default: 1.0.
        decay_rate: the exponent of the running means' decay, <= 0. Default: -0.8.
        beta_1: keep a first moment of the updates, with this decay in [0, 1). Default: None, for none.
        weight_decay: how fast weights shrink, in units of `rho`, >= 0. Default: 0.
        scale_parameter: multiply the step by the parameter's root mean square. Default: True.
        relative_step: derive the step from the number of steps, whatever the learning rate. Default: True.
        warmup_init: let the relative step begin at `1e-6 * step`. Default: False.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.
        ConfigurationError: `relative_step=False` without a learning rate.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.Adafactor()
        >>> opt.apply_gradients({"w": mx.ones((2, 3))}, {"w": mx.ones((2, 3))})["w"][0]
        array([0.99, 0.99, 0.99], dtype=float32)
        >>> opt.state["w"]["exp_avg_sq_row"].shape, opt.state["w"]["exp_avg_sq_col"].shape
        ((2,), (3,))

    Source: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235
    """

    slot_names = {"row": "exp_avg_sq_row", "col": "exp_avg_sq_col", "v": "exp_avg_sq", "m": "exp_avg"}  # noqa: RUF012

    eps = gs.Adafactor.eps
    clip_threshold = gs.Adafactor.clip_threshold
    decay_rate = gs.Adafactor.decay_rate
    beta_1 = gs.Adafactor.beta_1
    weight_decay = gs.Adafactor.weight_decay
    scale_parameter = gs.Adafactor.scale_parameter
    warmup_init = gs.Adafactor.warmup_init

    def __init__(
        self,
        learning_rate: Rate | None = None,
        eps: Sequence[float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta_1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if learning_rate is None and not relative_step:
            raise ConfigurationError("Adafactor with relative_step=False needs a learning rate, got None")
        definition = gs.Adafactor(
            eps=eps, clip_threshold=clip_threshold, decay_rate=decay_rate, beta_1=beta_1, weight_decay=weight_decay,
            scale_parameter=scale_parameter, warmup_init=warmup_init,
        )  # fmt: skip
        super().__init__(definition, learning_rate)
        self.relative_step = relative_step

    @property
    def relative_step(self) -> bool:
        """Whether the step is derived from the number of steps."""
        return self._definition.hyperparameters["learning_rate"] is None

    @relative_step.setter
    def relative_step(self, value: bool) -> None:
        if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"Adafactor's relative_step must be True or False, got {value!r}")
        self._define({"learning_rate": None if value else STAND_IN})


class Muon(RuleUpdate):
    """Muon: momentum whose matrix is orthogonalized by Newton-Schulz iterations.

    ```
    g      = g + weight_decay * w
    v      = momentum * v + (1 - momentum) * g
    update = (1 - momentum) * g + momentum * v with Nesterov, else v
    w      = w - learning_rate * sqrt(max(1, d[-2] / d[-1])) * orthogonalize(update)
    ```

    `d` is the shape of `w`. Parameters of more than two dimensions are flattened to (d[0], rest) to be orthogonalized;
    those of fewer take the plain update and are better given to another optimizer: see `MultiOptimizer`.

    Args:
        learning_rate: a number, an array without dimensions, or a schedule of MLX or gradstep.
        momentum: how much of the running mean is kept, in [0, 1). Default: 0.95.
        weight_decay: the factor of the L2 penalty's gradient, >= 0. Default: 0.01.
        nesterov: look ahead by one momentum step. Default: True.
        ns_steps: the number of iterations, >= 1. Default: 5.
        ns_dtype: "bfloat16" to iterate in it, which is faster and coarser. Default: None, the dtype of the computation.

    Raises:
        OutOfRangeError, NonFiniteScalarError, ArgumentTypeError: a value outside of its range, or no number.
        ConfigurationError: an `ns_dtype` that there is not.

    Example:
        >>> import mlx.core as mx, gradstep.mlx as optim
        >>> opt = optim.Muon(0.02, weight_decay=0)
        >>> w = opt.apply_gradients({"w": mx.eye(2)}, {"w": mx.zeros((2, 2))})["w"]
        >>> -0.03 < w[0, 0].item() < -0.01, w[0, 1].item()
        (True, 0.0)

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """

    momentum = gs.Muon.momentum
    weight_decay = gs.Muon.weight_decay
    nesterov = gs.Muon.nesterov
    ns_steps = gs.Muon.ns_steps
    ns_dtype = gs.Muon.ns_dtype

    def __init__(
        self,
        learning_rate: Rate,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: ProductDtype = None,
    ) -> None:
        definition = gs.Muon(
            STAND_IN,
            momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, ns_steps=ns_steps, ns_dtype=ns_dtype,
        )  # fmt: skip
        super().__init__(definition, learning_rate)
