"""Values and gradients of a function, by the array library of its parameters."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from gradstep.arrays.library import recognise
from gradstep.tree import named_arrays

Params = TypeVar("Params")
Value = TypeVar("Value")
Rest = ParamSpec("Rest")


def value_and_grad(
    function: Callable[Concatenate[Params, Rest], Value],
) -> Callable[Concatenate[Params, Rest], tuple[Value, Params]]:
    """A function that returns what `function` returns, and its gradients with respect to the first argument.

    `torch.func.grad_and_value`, `jax.value_and_grad` or `mlx.core.value_and_grad`, by the arrays that it gets.

    Args:
        function: takes parameters (a mapping, or a nested dict, list or tuple of arrays) and whatever else, and
            returns a scalar array, the loss.

    Returns:
        A function of the same arguments that returns `(loss, grads)`, with `grads` nested like the parameters.

    Raises:
        ArgumentTypeError: on the call, for NumPy arrays, which know no gradients.

    Example:
        >>> import gradstep as gs, torch
        >>> loss_and_grads = gs.value_and_grad(lambda params, x: ((params["w"] * x) ** 2).sum())
        >>> loss, grads = loss_and_grads({"w": torch.tensor([3.0])}, 2.0)
        >>> loss, grads
        (tensor(36.), {'w': tensor([24.])})
    """

    def with_gradients(params: Params, /, *args: Rest.args, **kwargs: Rest.kwargs) -> tuple[Value, Params]:
        library = recognise(params=named_arrays(params, "params"))
        transformed: Any = library.value_and_grad(function)
        return transformed(params, *args, **kwargs)

    return with_gradients
