"""How long it takes to save and load the state of AdamW, against torch.save and safetensors.

    python benchmarks/checkpoints.py [--elements 20000000] [--rounds 5]

gradstep hashes every byte, and waits until the file is on the disk; the others do neither. The last line writes the
same bytes and waits for the disk: what any way of saving must take.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import safetensors.numpy
import torch

import gradstep as gs


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    params = {f"w{i}": np.ones(options.elements // 4, np.float32) for i in range(4)}
    opt = gs.AdamW(1e-3)
    opt.init(params)
    state = {f"{name}.{slot}": array for name, slots in opt.state.items() for slot, array in slots.items()}
    for array in state.values():
        array[:] = np.random.default_rng(0).random(len(array), np.float32)
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    size = sum(array.nbytes for array in state.values())
    print(machine.describe("torch", "safetensors"))
    print(f"{size / 1e6:,.0f} MB of state, medians of {options.rounds} rounds in turns\n")

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, plain, raw = (Path(folder) / name for name in ("a.safetensors", "b.safetensors", "c.pt", "d"))

        def write() -> None:
            with raw.open("wb") as file:
                for array in state.values():
                    file.write(array.data)
                file.flush()
                os.fsync(file.fileno())

        sides: dict[str, Callable[[], object]] = {
            "gradstep save": lambda: opt.save(ours),
            "safetensors save": lambda: safetensors.numpy.save_file(state, theirs),
            "torch.save": lambda: torch.save(tensors, plain),
            "gradstep load, verified": lambda: gs.load(ours),
            "safetensors load": lambda: safetensors.numpy.load_file(theirs),
            "torch.load": lambda: torch.load(plain),
            "the bytes alone, synced": write,
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds + 1):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            median = statistics.median(seconds[1:])
            print(f"{name:26}{1e3 * median:8.0f} ms{size / median / 1e9:8.2f} GB/s")


if __name__ == "__main__":
    main()
