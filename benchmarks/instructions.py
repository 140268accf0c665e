"""How many instructions a step takes, counted by callgrind: repeatable where times are not.

    python benchmarks/instructions.py [--against COMMIT] [--only numpy many …]

Counts everything that the process executes during steps of one thread: Python, NumPy or PyTorch, and kernels. With a
commit, both sides run on the same inputs. Needs valgrind, on x86-64.
"""

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trees import ROOT, checked_out, environment

STEPS = 20
LIBRARIES = ("numpy", "torch")

# A request to valgrind: instructions that do nothing elsewhere, with the address of six words in a register.
REQUEST = """
define void @request(ptr %words) {
  %answer = call i64 asm sideeffect
    "rolq $$3, %rdi; rolq $$13, %rdi; rolq $$61, %rdi; rolq $$51, %rdi; xchgq %rbx, %rbx",
    "={rdx},{rax},0,~{memory}"(ptr %words, i64 0)
  ret void
}
"""
CALLGRIND = (ord("C") << 24) + (ord("T") << 16)
START, STOP = CALLGRIND + 4, CALLGRIND + 5


def tensors(library: str, count: int, size: int) -> dict[str, Any]:
    """Parameters or gradients."""
    names = [f"layers.{i}.weight" for i in range(count)]
    if library == "torch":
        import torch

        return {name: torch.ones(size) for name in names}
    import numpy as np

    return {name: np.ones(size, np.float32) for name in names}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The same as dicts within a list."""
    return {"layers": [{"weight": array} for array in flat.values()]}


def steps(case: str, library: str) -> list[Callable[[], object]]:
    """The steps that are counted, made before counting begins; gradients are new in each where the case says so."""
    import gradstep as gs

    optimizer: gs.Optimizer = gs.AdamW(1e-3, bias_correction=True)
    sizes = {"one tensor of 10": (1, 10), "5,000 tensors of 100": (5000, 100), "500 tensors of 100": (500, 100)}
    count, size = sizes[case.partition(", ")[0] if not case.startswith("5,") else case]
    if "MultiOptimizer" in case:
        halves = [gs.SGD(0.1, momentum=0.9), gs.AdamW(1e-3, bias_correction=True)]
        optimizer = gs.MultiOptimizer(halves, ["layers.1*"])
    if "schedule" in case:
        optimizer = gs.AdamW(gs.cosine_decay(1e-3, 1000), bias_correction=True)
    params, number = tensors(library, count, size), STEPS if count < 5000 else 3
    grads = [tensors(library, count, size) for _ in range(1 if "old gradients" in case else number)] * number
    if "nested" in case:
        params, grads = nested(params), [nested(flat) for flat in grads]
    apply = optimizer.apply_gradients
    warm = tensors(library, count, size)
    for _ in range(4):
        apply(nested(warm) if "nested" in case else warm, params)
    return [lambda grads=grads[i]: apply(grads, params) for i in range(number)]


CASES = (
    "one tensor of 10", "one tensor of 10, schedule", "500 tensors of 100", "500 tensors of 100, old gradients",
    "500 tensors of 100, nested", "500 tensors of 100, MultiOptimizer", "5,000 tensors of 100",
)  # fmt: skip


def count_here(case: str, library: str) -> None:
    """Run within valgrind: the steps of one case, and requests around them."""
    import gc

    import llvmlite.binding as llvm

    import gradstep as gs

    if library == "torch":
        import torch

        torch.set_num_threads(1)
    gs.set_num_threads(1)
    todo = steps(case, library)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    target = llvm.Target.from_default_triple().create_target_machine()
    with llvm.create_mcjit_compiler(llvm.parse_assembly(REQUEST), target) as engine:
        engine.finalize_object()
        request = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("request"))
        start, stop = ((ctypes.c_uint64 * 6)(word) for word in (START, STOP))
        gc.collect()
        gc.disable()
        request(ctypes.addressof(start))
        for step in todo:
            step()
        request(ctypes.addressof(stop))
    print(f"steps: {len(todo)}", flush=True)


def instructions(source: Path, case: str, library: str) -> float:
    """Thousands of instructions in one step of this case, by the gradstep whose sources lie there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out",
            sys.executable, __file__, "--count", case, library,
        ]  # fmt: skip
        done = subprocess.run(command, env=environment(source), capture_output=True, text=True, check=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    number = re.search(r"steps: (\d+)", done.stdout)
    if collected is None or number is None:
        raise SystemExit(f"callgrind said nothing that could be read:\n{done.stderr}")
    return int(collected[1]) / int(number[1]) / 1000


def main() -> None:
    """Count and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count_here(*options.count)
        return
    commit = options.against
    with checked_out(commit) as other:
        print("thousands of instructions in a step")
        print(f"{'case':44}{'work tree':>12}" + (f"{commit[:10]:>12}{'ratio':>8}" if commit else ""))
        for library in LIBRARIES:
            for case in CASES:
                name = f"{library}, {case}"
                if options.only and not all(word in name for word in options.only):
                    continue
                ours = instructions(ROOT, case, library)
                line = f"{name:44}{ours:12,.1f}"
                if other:
                    theirs = instructions(other, case, library)
                    line += f"{theirs:12,.1f}{ours / theirs:8.3f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
