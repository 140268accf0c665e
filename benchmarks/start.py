"""How long the start takes: the import, and the first step of a family with an empty and a full kernel cache.

python benchmarks/start.py [--rounds 7]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import machine

IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
FIRST_STEP = """
import time
import numpy as np
import gradstep as gs
w, g = {{"w": np.ones((8, 8), "f")}}, {{"w": np.ones((8, 8), "f")}}
t = time.perf_counter()
gs.{}(1e-3).apply_gradients(g, w)
print(time.perf_counter() - t)
"""


def seconds(program: str, cache: str) -> float:
    """What the program prints, run in a process of its own."""
    environment = {**os.environ, "GRADSTEP_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = range(parser.parse_args().rounds)
    print(machine.describe())
    with tempfile.TemporaryDirectory() as kept:
        for name in ("numpy", "gradstep"):
            median = statistics.median(seconds(IMPORT.format(name), kept) for _ in rounds)
            print(f"import {name:36}{1e3 * median:8.0f} ms")
        for family in ("AdamW", "Adafactor", "Muon"):
            program = FIRST_STEP.format(family)
            empty = []
            for _ in rounds:
                with tempfile.TemporaryDirectory() as fresh:
                    empty.append(seconds(program, fresh))
            seconds(program, kept)
            full = statistics.median(seconds(program, kept) for _ in rounds)
            print(f"first step of {family:12} empty cache      {1e3 * statistics.median(empty):8.0f} ms")
            print(f"first step of {family:12} full cache       {1e3 * full:8.0f} ms")


if __name__ == "__main__":
    main()
