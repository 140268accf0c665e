"""Where PyTorch's objects keep what no published interface tells fast: found by experiment, or not used at all."""

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

from gradstep.arrays.exchange import Offsets

torch: Any = importlib.import_module("torch")

WORD = 8
BODY_SIZE = 176  # bytes of a TensorImpl that are looked through; it has more


def find_offsets() -> Offsets | None:
    """The offsets within a tensor and its TensorImpl; None where the search has not exactly one result."""
    # Many pairs, made in turn, so that addresses and what memory held before agree in no bit by chance.
    pairs = [(tensor, torch._neg_view(tensor)) for _ in range(8) for tensor in _samples()]
    plain, negated = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    both = plain + negated
    try:
        types = _places([id(tensor) for tensor in both], list(map(id, map(type, both))), 4 * WORD)
        size = min(type(tensor).__basicsize__ for tensor in both)
        bodies = _places([id(tensor) for tensor in both], [tensor._cdata for tensor in both], size)
        storages = [tensor.untyped_storage()._cdata for tensor in both]
        storage = _places([tensor._cdata for tensor in both], storages, BODY_SIZE)
    except AttributeError:  # this PyTorch does not tell its addresses
        return None
    flags = _flags([tensor._cdata for tensor in plain], [tensor._cdata for tensor in negated])
    if not len(types) == len(bodies) == len(storage) == len(flags) == 1:
        return None
    return Offsets(type=types[0], body=bodies[0], flags=flags[0][0], refused=flags[0][1], storage=storage[0])


def _samples() -> list[Any]:
    """Tensors that have little in common."""
    base = torch.zeros((3, 4, 5), device="cpu")
    return [
        base, base[1:], base.permute(2, 0, 1), torch.ones((), dtype=torch.float64, device="cpu"),
        torch.nn.Parameter(torch.zeros(7, device="cpu")), torch.zeros(0, device="cpu"),
        torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64, device="cpu"), requires_grad=False),
        torch.zeros((1,) * 9, device="cpu"), (torch.zeros(3, device="cpu").requires_grad_() * 2),
    ]  # fmt: skip


def _places(objects: Sequence[int], values: Sequence[int], size: int) -> list[int]:
    """The offsets at which every object has its value."""
    return [
        offset
        for offset in range(0, size, WORD)
        if all(_word(start, offset) == value for start, value in zip(objects, values, strict=True))
    ]


def _flags(plain: Sequence[int], negated: Sequence[int]) -> list[tuple[int, int]]:
    """The offset and the bit that tell negated tensors from others."""
    found: list[tuple[int, int]] = []
    for offset in range(0, BODY_SIZE, WORD):
        always, ever = -1, 0
        for body in negated:
            always &= _word(body, offset)
        for body in plain:
            ever |= _word(body, offset)
        bits = always & ~ever & (1 << 64) - 1
        found += [(offset, 1 << bit) for bit in range(64) if bits >> bit & 1]
    return found


def _word(start: int, offset: int) -> int:
    return ctypes.c_uint64.from_address(start + offset).value
