"""AdamW with narrow numbers: gradstep against torch's fused step, and against the 8-bit optimizers of other packages.

    python benchmarks/against_low_precision.py [--elements 20000000] [--rounds 15] [--only bfloat16 8-bit]

Times are medians in milliseconds, of sides that take turns. Packages that are not installed are left out, with a line
that says so; those that compile do it before the first round.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import machine
import torch

import gradstep as gs

Step = Callable[[], Any]
RATE = 1e-3
PACKAGES = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}


def ours(elements: int, dtype: torch.dtype, **options: Any) -> Step:
    """A step of gradstep on one tensor."""
    params, grads = {"w": torch.randn(elements).to(dtype)}, {"w": torch.randn(elements).to(dtype)}
    opt = gs.AdamW(RATE, bias_correction=True, **options)
    return lambda: opt.apply_gradients(grads, params)


def theirs(elements: int, dtype: torch.dtype, make: Callable[[Any], Any]) -> Step:
    """A step of an optimizer with torch's interface on such a tensor."""
    parameter = torch.nn.Parameter(torch.randn(elements).to(dtype))
    parameter.grad = torch.randn(elements).to(dtype)
    return make([parameter]).step


def bfloat16(elements: int) -> dict[str, Step]:
    """Everything in bfloat16, and bfloat16 with slots of float32."""
    fused = theirs(elements, torch.bfloat16, lambda p: torch.optim.AdamW(p, RATE, fused=True))
    narrow = {"slot_dtype": "bfloat16"}
    return {
        "torch fused, all bfloat16": fused,
        "gradstep, all bfloat16": ours(elements, torch.bfloat16, **narrow),
        "gradstep, all bfloat16, stochastic": ours(elements, torch.bfloat16, rounding="stochastic", **narrow),
        "gradstep, bfloat16 and float32 slots": ours(elements, torch.bfloat16),
        "gradstep, bfloat16 and float32 copies": ours(elements, torch.bfloat16, master_weights=True, **narrow),
    }


def eight_bit(elements: int) -> dict[str, Step]:
    """Parameters of float32, slots of 8 bits."""
    sides: dict[str, Step] = {}
    for package, module in PACKAGES.items():
        try:
            family = importlib.import_module(module).AdamW8bit
        except ImportError:
            print(f"{package} is not installed and left out")
            continue
        step = theirs(elements, torch.float32, lambda p, family=family: family(p, lr=RATE))
        start = time.perf_counter()
        step()
        print(f"{package}: first step {time.perf_counter() - start:.1f} s")
        sides[f"{package} AdamW8bit"] = step
    return {
        **sides,
        "gradstep, int8": ours(elements, torch.float32, slot_dtype="int8"),
        "gradstep, int8 on bfloat16": ours(elements, torch.bfloat16, slot_dtype="int8"),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=["bfloat16", "8-bit"], choices=["bfloat16", "8-bit"])
    options = parser.parse_args()
    elements = options.elements // 256 * 256  # other sizes are kept in full precision by some
    gs.set_num_threads(torch.get_num_threads())
    print(machine.describe("torch"))
    print(f"{elements:,} elements, {torch.get_num_threads()} threads each side, median of {options.rounds} rounds\n")
    for name, make in {"bfloat16": bfloat16, "8-bit": eight_bit}.items():
        if name in options.only:
            sides = make(elements)
            for side, milliseconds in zip(
                sides, machine.medians(list(sides.values()), options.rounds, warm=2), strict=True
            ):
                print(f"{side:40}{milliseconds:10.2f} ms", flush=True)
            print()


if __name__ == "__main__":
    main()
