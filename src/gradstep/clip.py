"""Clipping gradients by their global norm."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np

from gradstep.arrays.library import FunctionalLibrary, MemoryLibrary, recognise
from gradstep.arrays.memory import axis_order, element_strides, strides_in_order
from gradstep.errors import OutOfRangeError
from gradstep.learning_rate import to_float
from gradstep.program.formats import compute_dtype
from gradstep.program.rounding import widened
from gradstep.step import forms
from gradstep.step.inspection import Inspector, global_norm
from gradstep.step.look import look_at
from gradstep.step.match import describe_floats
from gradstep.step.scalars import clip_scale
from gradstep.tree import flatten

Grads = TypeVar("Grads")


def clip_grad_norm(grads: Grads, max_norm: float) -> tuple[Grads, float]:
    """Scale gradients so that their global norm is at most `max_norm`.

    `scale = min(max_norm / (norm + 1e-6), 1)`, with the norm accumulated in float64, or, on JAX and MLX arrays,
    in the widest dtype of the gradients. A norm that is not finite makes every gradient NaN. To clip within a step,
    and faster, give the optimizer `clip_norm=` instead.

    Args:
        grads: arrays by name: a mapping, or a nested dict, list or tuple. Never written.
        max_norm: the largest norm allowed, finite and >= 0.

    Returns:
        New arrays in a tree like `grads`, and the norm before clipping.

    Raises:
        OutOfRangeError: `max_norm` is negative or not finite.
        DtypeError, ArgumentTypeError: an entry is not an array of real floating numbers.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> clipped, norm = gs.clip_grad_norm({"w": np.array([3.0, 4.0])}, 1.0)
        >>> norm, clipped["w"].round(3)
        (5.0, array([0.6, 0.8]))
    """
    max_norm = to_float(max_norm, "max_norm")
    if not 0 <= max_norm < math.inf:
        raise OutOfRangeError(f"max_norm must be finite and >= 0, got {max_norm}")
    named = flatten(grads, "grads")
    library = recognise(grads=named)
    if library.in_place is True:
        norm = _norm(library, named)
        scale = clip_scale(norm, max_norm)
        clipped = {name: _scaled(array, scale) for name, array in named.items()}
    else:
        forms.refuse_tracing(library, list(named.values()))
        dtypes = {name: forms.describe_floats(library, x, f"grads[{name!r}]").dtype for name, x in named.items()}
        look = look_at(library, list(named.values()), max_norm)
        clipped = {name: _scaled_anew(library, array, look.scale, dtypes[name]) for name, array in named.items()}
        norm = float(library.read(look.norm))
    return cast("Grads", _rebuild(grads, clipped, "")), norm


def _norm(library: MemoryLibrary, named: Mapping[str, object]) -> float:
    by_dtype: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, array in named.items():
        memory = describe_floats(library, array, f"grads[{name!r}]")
        view = library.as_numpy(array)
        dense = element_strides(memory) == strides_in_order(memory.shape, axis_order(memory))
        by_dtype.setdefault(memory.dtype, []).append(view if dense else view.copy())
    sums: list[float] = []
    for dtype, arrays in by_dtype.items():
        addresses = np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)
        sums += Inspector(dtype, [array.size for array in arrays], team=library.team).inspect(addresses)[0]
    if "float64" not in by_dtype:
        return global_norm(sums, list, exact=True)
    every = [(array, dtype) for dtype, arrays in by_dtype.items() for array in arrays]
    return global_norm(sums, lambda: (widened(array, dtype, "float64") for array, dtype in every), exact=False)


def _scaled(array: Any, scale: float) -> Any:
    if hasattr(array, "detach"):
        return array.detach() * scale
    dtype = compute_dtype(array.dtype.name)
    with np.errstate(all="ignore"):
        scaled = np.asarray(array, dtype) * np.dtype(dtype).type(scale)
        return np.asarray(scaled).astype(array.dtype, copy=False)


def _scaled_anew(library: FunctionalLibrary, array: Any, scale: Any, dtype: str) -> Any:
    wide = compute_dtype(dtype)
    return library.cast(library.cast(array, wide) * library.cast(scale, wide), dtype)


def _rebuild(tree: object, arrays: Mapping[str, Any], prefix: str) -> object:
    """A tree like `tree` with other leaves."""
    if isinstance(tree, Mapping):
        items = cast("Mapping[Any, object]", tree).items()
        return {key: _rebuild(value, arrays, f"{prefix}{key}.") for key, value in items}
    if isinstance(tree, (list, tuple)):
        parts = [_rebuild(value, arrays, f"{prefix}{i}.") for i, value in enumerate(cast("list[object]", tree))]
        make = getattr(cast("object", tree), "_make", None)  # of a NamedTuple
        if make is not None:
            return make(parts)
        return tuple(parts) if isinstance(tree, tuple) else parts
    return arrays[prefix[:-1]] if tree is not None else None
