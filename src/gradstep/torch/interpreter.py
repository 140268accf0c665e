"""A program run by torch's own operations, for tensors that no kernel reaches: on any device, in any dtype."""

from collections.abc import Mapping
from typing import Any

import torch

from gradstep.arrays.torch import TORCH
from gradstep.program.graph import REDUCTIONS, Kind, Symbol
from gradstep.program.newton_schulz import Iteration
from gradstep.program.operators import OPERATORS
from gradstep.program.program import Program

Coefficients = tuple[float, float, float]


def interpret(
    program: Program, arrays: Mapping[str, Any], known: Mapping[str, float], dtype: str, coefficients: Coefficients
) -> dict[str, Any]:
    """The new parameter and slots, by place; nothing is written.

    Args:
        program: the traced rule.
        arrays: `w`, `g` and the slots, in the compute dtype; row and column means with a length of 1 where they
            have been reduced.
        known: the hyperparameters, and `t`.
        dtype: the compute dtype.
        coefficients: of the polynomial that orthogonalizes.
    """
    shape = {axis: length or 1 for axis, length in enumerate(arrays["w"].shape, start=-arrays["w"].ndim)}
    scalars = program.scalars.evaluate(known, shape, dtype)
    values: dict[int, Any] = {index: scalars[place] for index, place in program.scalar_places.items()}
    results = {place: output.index for place, output in program.outputs.items()}
    last_uses = _last_uses(program)
    for symbol in program.symbols:
        if symbol.op == "constant":
            values[symbol.index] = symbol.attribute
        elif symbol.op == "array":
            values[symbol.index] = arrays[symbol.attribute]
        elif symbol.kind is not Kind.HOST:
            values[symbol.index] = _compute(symbol, [values[arg.index] for arg in symbol.args], coefficients)
        for index in last_uses.get(symbol.index, ()):  # temporaries are as large as the parameter
            if index not in results.values():
                values.pop(index, None)
    return {place: values[index] for place, index in results.items()}


def _last_uses(program: Program) -> dict[int, list[int]]:
    last = {arg.index: symbol.index for symbol in program.symbols for arg in symbol.args}
    uses: dict[int, list[int]] = {}
    for index, user in last.items():
        uses.setdefault(user, []).append(index)
    return uses


def _compute(symbol: Symbol, args: list[Any], coefficients: Coefficients) -> Any:
    if symbol.op in OPERATORS:
        return OPERATORS[symbol.op](*args)
    if symbol.op == "mean":
        return TORCH.mean(args[0], symbol.attribute)
    if symbol.op in REDUCTIONS:
        return getattr(TORCH, symbol.op)(args[0])
    if symbol.op == "orthogonalize":
        return orthogonalize(args[0], symbol.attribute, coefficients)
    return TORCH.call(symbol.op, *args)


def orthogonalize(x: Any, iteration: Iteration, coefficients: Coefficients) -> Any:
    """The Newton-Schulz iteration on a matrix whose norm is 1, formed on its shorter side."""
    a, b, c = coefficients
    steps, dtype = iteration
    if dtype is not None:
        return orthogonalize(x.to(getattr(torch, dtype)), Iteration(steps), coefficients).to(x.dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
