"""A step of gradstep against the same step of torch.optim, on the CPU.

    python benchmarks/against_torch.py [--elements 20000000] [--rounds 15] [--only adamw small …]

Times are medians in milliseconds; a ratio above 1 means that gradstep is faster.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import machine
import torch

import gradstep as gs

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def same_step(ours: gs.Optimizer, theirs: Callable[[Sequence[Any]], Any], *shapes: tuple[int, ...]) -> Pair:
    """Both sides on equal tensors whose gradients stay where they are."""
    params = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    grads = {name: torch.randn_like(tensor) for name, tensor in params.items()}
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in params.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = grad.clone()
    step = theirs(parameters).step
    return lambda: ours.apply_gradients(grads, params), step


def clipped_step(elements: int) -> Pair:
    """Clipping by the global norm and AdamW."""
    params, grads = {"w": torch.randn(elements)}, {"w": torch.randn(elements)}
    parameter = torch.nn.Parameter(params["w"].clone())
    parameter.grad = grads["w"].clone()
    ours = gs.AdamW(1e-3, bias_correction=True, clip_norm=1.0)
    theirs = torch.optim.AdamW([parameter], 1e-3, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        theirs.step()

    return lambda: ours.apply_gradients(grads, params), clip_and_step


def many_small(count: int, size: int, rounds: int) -> list[float]:
    """Many small tensors whose gradients are new in each step, as after a backward pass."""
    params = {str(i): torch.nn.Parameter(torch.randn(size)) for i in range(count)}
    parameters = [torch.nn.Parameter(torch.randn(size)) for _ in range(count)]
    ours = gs.AdamW(1e-3, bias_correction=True)
    theirs = torch.optim.AdamW(parameters, 1e-3, fused=True)
    grads: dict[str, torch.Tensor] = {}

    def backward() -> None:
        grads.update((name, torch.randn(size)) for name in params)
        for parameter in parameters:
            parameter.grad = torch.randn(size)

    return machine.medians([lambda: ours.apply_gradients(grads, params), theirs.step], rounds, backward)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    n, side = options.elements, int(options.elements**0.5)
    o = torch.optim
    cases: dict[str, Callable[[], list[float]]] = {}

    def case(name: str, make: Callable[[], Pair]) -> None:
        cases[name] = lambda: machine.medians(make(), options.rounds)

    adamw = gs.AdamW(1e-3, bias_correction=True)
    case("AdamW / fused", lambda: same_step(adamw, lambda p: o.AdamW(p, 1e-3, fused=True), (n,)))
    case("RMSprop / default", lambda: same_step(gs.RMSprop(1e-3), lambda p: o.RMSprop(p, 1e-3), (n,)))
    case("AdaDelta / default", lambda: same_step(gs.AdaDelta(1.0), lambda p: o.Adadelta(p, 1.0), (n,)))
    case("Adamax / default", lambda: same_step(gs.Adamax(1e-3), lambda p: o.Adamax(p, 1e-3), (n,)))
    case("clip + AdamW / clip + fused", lambda: clipped_step(n))
    case("Adafactor / default", lambda: same_step(gs.Adafactor(1e-3), lambda p: o.Adafactor(p, 1e-3), (side, side)))
    dtypes: tuple[Literal["bfloat16"] | None, ...] = (None, "bfloat16")
    for name, shapes in (
        ("1024x1024", [(1024, 1024)]),
        ("4096x1024", [(4096, 1024)]),
        ("4 of 500x500", [(500, 500)] * 4),
    ):
        for dtype in dtypes:
            muon = gs.Muon(1e-3, ns_dtype=dtype)
            make = partial(same_step, muon, lambda p: o.Muon(p, 1e-3), *shapes)
            case(f"Muon {name} {dtype or 'float32'} / bfloat16", make)
    cases["500 small tensors / fused"] = lambda: many_small(500, 1000, 40)

    gs.set_num_threads(torch.get_num_threads())
    print(machine.describe("torch"))
    print(f"{n:,} float32 elements, {torch.get_num_threads()} threads each side, median of {options.rounds} rounds\n")
    print(f"{'gradstep / torch':36}{'gradstep ms':>13}{'torch ms':>11}{'ratio':>8}")
    for name, measure in cases.items():
        if not options.only or any(word.lower() in name.lower() for word in options.only):
            ours, theirs = measure()
            print(f"{name:36}{ours:13.2f}{theirs:11.2f}{theirs / ours:8.2f}", flush=True)


if __name__ == "__main__":
    main()
