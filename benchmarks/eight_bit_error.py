"""How far 8-bit moments move Adam's update: gradstep's codes beside those of other packages.

    python benchmarks/eight_bit_error.py [--steps 1000] [--elements 16384]

For four kinds of gradients, the root mean square error of the update against float64 moments, relative to the root mean
square of the exact update, averaged over the last 100 steps. Packages that are not installed are left out.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import machine
import numpy as np
import torch

import gradstep as gs

Array = np.ndarray[Any, Any]
Side = Callable[[torch.Tensor], torch.Tensor]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
PACKAGES = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}


def gradients(kind: str, elements: int, steps: int) -> Iterator[Array]:
    """Standard normal numbers, scaled in one of four manners."""
    rng = np.random.default_rng(0)
    spread = 10 ** rng.uniform(-6, 0, elements)
    for step in range(steps):
        g = rng.standard_normal(elements)
        if kind == "spread over decades":
            g *= spread
        elif kind == "decaying":
            g *= 10 ** (-3 * step / steps)
        elif kind == "sparse":
            g *= rng.random(elements) < 0.03
        yield g.astype(np.float32)


def exact() -> Callable[[Array], Array]:
    """Adam's update in float64."""
    m = v = np.zeros(1)
    step = 0

    def update(g: Array) -> Array:
        nonlocal m, v, step
        step += 1
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g.astype(np.float64) ** 2
        return m / (1 - BETA1**step) / (np.sqrt(v / (1 - BETA2**step)) + EPS)

    return update


def ours(elements: int) -> Side:
    """The update of gradstep: what a weight of 0 becomes, negated."""
    opt = gs.Adam(1.0, betas=(BETA1, BETA2), eps=EPS, bias_correction=True, slot_dtype="int8")
    w = torch.zeros(elements)

    def update(g: torch.Tensor) -> torch.Tensor:
        w.zero_()
        opt.apply_gradients({"w": g}, {"w": w})
        return -w

    return update


def theirs(elements: int, family: Any) -> Side:
    """The same of an optimizer with torch's interface."""
    parameter = torch.nn.Parameter(torch.zeros(elements))
    opt = family([parameter], lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)

    def update(g: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = g
        opt.step()
        return -parameter.detach().clone()

    return update


def sides(elements: int) -> dict[str, Side]:
    """Everybody who is there."""
    found = {"gradstep": ours(elements)}
    for package, module in PACKAGES.items():
        try:
            found[package] = theirs(elements, importlib.import_module(module).AdamW8bit)
        except ImportError:
            print(f"{package} is not installed and left out")
    return found


def measure(kind: str, elements: int, steps: int) -> dict[str, float]:
    """The error of each side, in percent."""
    everybody, reference = sides(elements), exact()
    errors: dict[str, list[float]] = {name: [] for name in everybody}
    for step, g in enumerate(gradients(kind, elements, steps)):
        right = reference(g)
        for name, update in everybody.items():
            wrong = update(torch.from_numpy(g.copy())).numpy() - right
            if step >= steps - 100:
                errors[name].append(float(np.sqrt(np.mean(wrong**2) / np.mean(right**2))))
    return {name: 100 * float(np.mean(each)) for name, each in errors.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--elements", type=int, default=16_384)
    options = parser.parse_args()
    print(machine.describe("torch"))
    for kind in ("even scales", "spread over decades", "decaying", "sparse"):
        errors = measure(kind, options.elements, options.steps)
        print(f"{kind:22}" + "".join(f"{name:>14} {error:9.1f}%" for name, error in errors.items()), flush=True)


if __name__ == "__main__":
    main()
