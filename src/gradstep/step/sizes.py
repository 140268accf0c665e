"""How large the buffers are that a step needs beside parameters, gradients and slots."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from gradstep.program.blocks import BLOCK
from gradstep.program.graph import Kind, Symbol
from gradstep.program.kernel import ROWS
from gradstep.program.newton_schulz import count_stacked
from gradstep.program.program import Program


def count_matrices(shape: Sequence[int]) -> int:
    """How many matrices a tensor is a stack of."""
    return math.prod(shape[:-2])


def count_blocks(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)


def small_shape(kind: Kind, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one value per tensor, matrix, row or column."""
    if kind is Kind.WHOLE:
        return ()
    height, width = shape[-2:]
    return (count_matrices(shape), height if kind is Kind.ROW else 1, width if kind is Kind.COLUMN else 1)


def blocks_summed(program: Program, reduction: Symbol, shape: Sequence[int]) -> int:
    """How many partial sums a kernel leaves behind."""
    if not program.factored:
        return count_blocks(math.prod(shape), BLOCK)
    stack, (height, width) = count_matrices(shape), shape[-2:]
    if reduction.kind is Kind.ROW:
        return stack * height
    blocks = stack * count_blocks(height, ROWS)
    return blocks * width if reduction.kind is Kind.COLUMN else blocks


def sums_count(program: Program, reduction: Symbol, shape: Sequence[int]) -> int:
    """The same with the total, which is there once for a whole tensor; the sum of a single block is the total."""
    count = blocks_summed(program, reduction, shape)
    return count if reduction.kind is not Kind.WHOLE else 1 + count * (count > 1)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix as which a tensor is orthogonalized."""
    return (shape[0], math.prod(shape[1:]))


def stack_shapes(shapes: Iterable[Sequence[int]]) -> list[tuple[int, int, int]]:
    """The stacks in which tensors of these shapes are orthogonalized: equal matrices together, if they are small."""
    stacks: list[tuple[int, int, int]] = []
    for (rows, columns), count in Counter(map(matrix_shape, shapes)).items():
        most = count_stacked(rows, columns)
        stacks += [(min(most, count - start), rows, columns) for start in range(0, count, most)]
    return stacks
