"""One tensor at a time: how much memory saving and loading take beside the state."""

import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import answer

MIB = 1 << 20
TENSOR = 24 * MIB
SLACK = 12 * MIB

COMMON = """
import importlib, json, resource, sys
import numpy as np
import gradstep as gs

library, path = sys.argv[1:3]
torch = importlib.import_module("torch") if library == "torch" else None


def made(size=6 << 20):
    zeros = (lambda: np.zeros(size, np.float32)) if torch is None else (lambda: torch.zeros(size))
    params = {f"w{n}": zeros() for n in range(8)}
    for array in params.values():
        array[:] = 1  # until it is written it takes no memory
    return params


def optimizer(params):
    opt = gs.SGD(0.1, momentum=0.9)
    opt.init(params)
    for name, slots in opt.state.items():
        slots["v"][:] = int(name[1:])
    return opt


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


small = made(10)
optimizer(small).save(path + ".small", small)  # whatever is imported late
gs.load(path + ".small", small)
"""

SAVE = (
    COMMON
    + """
params = made()
opt = optimizer(params)
before = peak()
opt.save(path, params)
print(json.dumps(peak() - before))
"""
)

LOAD = (
    COMMON
    + """
how = sys.argv[3]
params = made()
before = peak()
if how == "late":
    opt = gs.load(path)
elif how == "like":
    opt = gs.load(path, like=params)
elif how == "params":
    opt = gs.load(path, params)
else:
    opt = gs.SGD(0.1, momentum=0.9)
    opt.load(path, params)
after = peak()
assert all((slots["v"] == int(name[1:])).all() for name, slots in opt.state.items())
print(json.dumps(after - before))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_saving_and_loading_take_one_tensor_at_a_time(library: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    taken: dict[str, Any] = {"save": answer(SAVE, library, path)}
    assert path.stat().st_size > 16 * TENSOR
    for how in ("late", "like", "params", "into"):
        taken[how] = answer(LOAD, library, path, how) - 8 * TENSOR
    assert all(extra < TENSOR + SLACK for extra in taken.values()), taken


VERIFY = (
    COMMON
    + """
before = peak()
assert gs.latest(sys.argv[3]).name == "a.safetensors"
print(json.dumps(peak() - before))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_finding_the_newest_takes_no_tensor_at_all(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "files").mkdir()
    answer(SAVE, "numpy", tmp_path / "files" / "a.safetensors")
    (tmp_path / "files" / "a.safetensors.small").unlink()
    assert answer(VERIFY, "numpy", tmp_path / "small" / "s", tmp_path / "files") < SLACK
