"""A run that is killed again and again, at any moment, also while it saves, ends with the bits of one left alone."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import gradstep as gs

STEPS = 400


def train(folder: Path, *, aloud: bool = False) -> dict[str, np.ndarray]:
    """Follow a mean through noise, from where the last process stood."""
    params = {"weight": np.zeros(100_000, np.float32), "bias": np.zeros((), np.float32)}
    opt = gs.AdamW(gs.cosine_decay(0.1, STEPS), bias_correction=True, slot_dtype="int8")
    if (path := gs.latest(folder)) is not None:
        opt.load(path, params)

    while opt.step < STEPS:
        noise = np.random.default_rng(opt.step).standard_normal(100_000).astype(np.float32)
        grads = {"weight": params["weight"] - noise, "bias": np.asarray(params["bias"] - noise.mean())}
        opt.apply_gradients(grads, params)
        opt.save(folder / "run.safetensors", params, keep=2)
        if aloud:
            print(opt.step, flush=True)
    return params


def kill_and_resume(folder: Path, seed: int = 0) -> list[int]:
    """Let other processes train, kill them at random, and tell at which steps they were."""
    killed, chance = [], random.Random(seed)
    while True:
        worker = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
        with worker:
            for line in worker.stdout:
                step = int(line)
                if chance.random() < 0.01:
                    time.sleep(chance.random() / 100)
                    worker.kill()
        if worker.returncode == 0:
            return killed
        if worker.returncode != -signal.SIGKILL:
            raise RuntimeError("the worker failed by itself")
        killed.append(step)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), aloud=True)
        sys.exit()
    with tempfile.TemporaryDirectory() as interrupted, tempfile.TemporaryDirectory() as alone:
        print("killed at steps", *kill_and_resume(Path(interrupted)))
        ours, other = train(Path(interrupted)), train(Path(alone))
        print("the same bits:", all(np.array_equal(ours[name], other[name]) for name in other))
