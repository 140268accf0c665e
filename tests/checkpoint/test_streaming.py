"""One tensor at a time: how much memory saving and loading take beside the state."""

import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import answer

MIB = 1 << 20
TENSOR = 12 * MIB
SLACK = 8 * MIB

COMMON = """
import importlib, json, os, resource, sys
import numpy as np
import gradstep as gs

library, path = sys.argv[1:3]
torch = importlib.import_module("torch") if library == "torch" else None


def made(size=3 << 20):
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


def check(opt):
    assert all((slots["v"] == int(name[1:])).all() for name, slots in opt.state.items())


def into(path, params):
    opt = gs.SGD(0.1, momentum=0.9)
    opt.load(path, params)
    return opt


def taken(prepare, body, check=lambda found: None):
    \"""The most memory beside what there was, in a process of its own.\"""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            prepared = prepare()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = body(prepared)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            check(found)
            os.write(writing, str((after - before) * 1024).encode())
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    return int(os.read(reading, 100))


small = made(10)
optimizer(small).save(path + ".small", small)  # whatever is imported late
gs.load(path + ".small", small)
"""

EACH = (
    COMMON
    + """
def prepare():
    params = made()
    return params, optimizer(params)


print(json.dumps({
    "save": taken(prepare, lambda found: found[1].save(path, found[0])),
    "late": taken(made, lambda params: gs.load(path), check),
    "like": taken(made, lambda params: gs.load(path, like=params), check),
    "params": taken(made, lambda params: gs.load(path, params), check),
    "into": taken(made, lambda params: into(path, params), check),
}))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_saving_and_loading_take_one_tensor_at_a_time(library: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    taken: dict[str, Any] = answer(EACH, library, path)
    assert path.stat().st_size > 16 * TENSOR
    assert taken.pop("save") < TENSOR + SLACK
    for how, extra in taken.items():
        assert 8 * TENSOR - SLACK < extra < 9 * TENSOR + SLACK, (how, extra)


VERIFY = (
    COMMON
    + """
params = made()
optimizer(params).save(path, params)
os.unlink(path + ".small")
del params
print(json.dumps(taken(lambda: None, lambda _: gs.latest(os.path.dirname(path)))))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_finding_the_newest_takes_no_tensor_at_all(tmp_path: Path) -> None:
    assert answer(VERIFY, "numpy", tmp_path / "a.safetensors") < SLACK
