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
# A full collection of all that the libraries have made comes at some time or other, and is no part of a step.
FIRST_STEP = """
import gc, time
import numpy, {0}
import gradstep as gs
w, g = ({{"w": {0}.ones((8, 8), dtype={0}.float32)}} for _ in range(2))
gc.collect()
t = time.perf_counter()
gs.{1}(1e-3).apply_gradients(g, w)
print(time.perf_counter() - t)
"""
FAMILIES = (("SGD", "numpy"), ("AdamW", "numpy"), ("Adafactor", "numpy"), ("Muon", "numpy"), ("AdamW", "torch"))


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
            print(f"import {name:44}{1e3 * median:8.0f} ms")
        for family, library in FAMILIES:
            program = FIRST_STEP.format(library, family)
            empty = []
            for _ in rounds:
                with tempfile.TemporaryDirectory() as fresh:
                    empty.append(seconds(program, fresh))
            seconds(program, kept)
            full = statistics.median(seconds(program, kept) for _ in rounds)
            print(f"first step of {family:9} on {library:5} empty cache      {1e3 * statistics.median(empty):8.0f} ms")
            print(f"first step of {family:9} on {library:5} full cache       {1e3 * full:8.0f} ms")


if __name__ == "__main__":
    main()
