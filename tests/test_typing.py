"""The type hints, as pyright sees them from outside: what is right passes, and what is wrong is found."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradstep as gs

PYRIGHT = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")

pytestmark = pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")

RIGHT = """
from collections.abc import Mapping

import gradstep as gs
import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

Array = npt.NDArray[np.float32]

opt = gs.AdamW(gs.cosine_decay(1e-3, 1000), betas=(0.9, lambda step: 0.99), weight_decay=0.01, bias_correction=True)
params: dict[str, Array] = {"w": np.ones(3, np.float32)}
assert_type(opt.apply_gradients({"w": np.ones(3, np.float32)}, params), dict[str, Array])
nested = {"layers": [{"weight": np.ones(3)}]}
assert opt.apply_gradients({"layers": [None]}, nested) is nested
assert_type(opt.apply_gradients({}, params, grad_scale=0.5), dict[str, Array])
opt.init(params)
opt.preflight()
assert_type(opt.step, int)
assert_type(opt.steps, dict[str, int])
assert_type(opt.learning_rate, float | dict[str, float])
opt.learning_rate = 1e-4
opt.learning_rate = gs.linear_schedule(0.0, 1.0, 10)
opt.learning_rate = lambda step: 1 / (step + 1)
opt.betas = [0.9, gs.exponential_decay(0.9, 0.99)]
assert_type(opt.betas, tuple[float, float] | dict[str, tuple[float, float]])
assert_type(opt.bias_correction, bool)
opt.weight_decay = {"*.bias": 0, "*": 0.1}
opt.betas = {"embed.*": (0.9, gs.exponential_decay(0.9, 0.99)), "*": (0.9, 0.999)}
gs.AdamW({"embed.*": 1e-4, "*": gs.cosine_decay(1e-3, 1000)}, frozen=["embed.*"]).describe(nested)
opt.frozen = ["embed.*"]
assert_type(opt.frozen, tuple[str, ...])
opt.clip_norm = None
opt.nonfinite = "raise"
report = opt.report
if report is not None:
    assert_type(report, gs.Report)
    assert_type(report.grad_norm, float | None)
    assert_type(report.learning_rate, float | dict[str, float | None] | None)
    assert_type(report.culprits, tuple[str, ...])
for name, slots in opt.state.items():
    assert_type(name, str)
    print(slots["m"])
clipped, norm = gs.clip_grad_norm(params, 1.0)
assert_type(clipped, dict[str, Array])
assert_type(norm, float)
gs.SGD(0.1, momentum=0.9, nesterov=True, clip_norm=1.0, nonfinite="skip")
gs.Adafactor()
assert_type(gs.Adafactor().learning_rate, float | dict[str, float | None] | None)
gs.Adafactor({"embed.*": 0.1, "*": None})
gs.Adafactor(None, beta_1=0.9, relative_step=True).learning_rate = None
gs.Muon(np.float32(0.1), ns_steps=5)
multi = gs.MultiOptimizer([gs.Muon(0.02), opt], [lambda name, parameter: parameter.ndim == 2], clip_norm=1.0)
opts: tuple[gs.Optimizer, ...] = multi.optimizers
accumulating = gs.Accumulate(multi, every=4)
assert_type(accumulating.apply_gradients({}, params, grad_scale=0.5), dict[str, Array])
assert_type(accumulating.micro_step, int)
accumulating.clip_norm = 1.0
inner: gs.Optimizer = accumulating.optimizer
assert_type(gs.LearningRate(0.1).try_current(3), float)


@gs.rule
def Signum(w, g, m, *, learning_rate, momentum=0.9):  # type: ignore[no-untyped-def]
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * gs.sign(m), m


own: gs.Optimizer = Signum(1e-3, momentum=0.8)
gs.explain(own)
gs.set_num_threads(2)
"""

# One line each; pyright must find an error in every one of them.
WRONG = [
    'gs.AdamW("x")',
    "gs.AdamW()",
    "gs.AdamW(0.1, momentum=0.9)",
    "gs.AdamW(0.1, 0.9)",
    "gs.AdamW(0.1, betas=0.9)",
    'gs.AdamW(0.1, betas=("a", "b"))',
    "gs.AdamW(0.1, weight_decay=None)",
    'gs.AdamW(0.1, weight_decay={"*": None})',
    'gs.AdamW({"*": "fast"})',
    "gs.AdamW({1: 0.1})",
    'gs.AdamW(0.1, betas={"*": 0.9})',
    'gs.AdamW(0.1, bias_correction={"*": True})',
    "gs.AdamW(0.1, frozen=3)",
    "gs.AdamW(0.1, bias_correction=1.5)",
    'gs.AdamW(0.1, nonfinite="ignore")',
    'gs.AdamW(0.1, clip_norm="1")',
    "gs.AdamW(lambda step: None)",
    "gs.Muon(0.1, ns_steps=2.5)",
    'gs.AdamW(0.1).learning_rate = "fast"',
    "gs.AdamW(0.1).learningrate = 0.1",
    "gs.AdamW(0.1).step = 3",
    'gs.AdamW(0.1).state["w"]["m"] = None',
    "gs.AdamW(0.1).apply_gradients({})",
    'gs.AdamW(0.1).apply_gradients({}, {}, grad_scale="1")',
    "gs.Accumulate(gs.SGD(0.1))",
    "gs.Accumulate(0.1, every=2)",
    'gs.Accumulate(gs.SGD(0.1), every="2")',
    "gs.Accumulate(gs.SGD(0.1), every=2).every = 3",
    "gs.MultiOptimizer([0.1])",
    "gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.2)], [1])",
    'gs.clip_grad_norm({}, "1")',
    "gs.cosine_decay(1.0)",
    'gs.set_num_threads("2")',
    "gs.LearningRate([0.1])",
    "gs.Optimizer()",
]

SETTINGS = {
    "typeCheckingMode": "standard",
    "pythonVersion": "3.11",
    "reportAttributeAccessIssue": "error",
    "extraPaths": [str(Path(gs.__file__).parents[1])],  # the package under test, wherever another one is installed
}


@functools.cache
def errors_in(folder: Path) -> dict[str, dict[int, str]]:
    """Pyright's errors in the Python files of a folder: file name, line from 0, message."""
    (folder / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
    command = [str(PYRIGHT), "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout)
    found: dict[str, dict[int, str]] = {}
    for entry in answer["generalDiagnostics"]:
        if entry["severity"] == "error":
            found.setdefault(Path(entry["file"]).name, {})[entry["range"]["start"]["line"]] = entry["message"]
    assert answer["summary"]["filesAnalyzed"] > 0
    return found


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    folder: Any = tmp_path_factory.mktemp("typing")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text("\n".join(["import gradstep as gs", *WRONG]) + "\n")
    return errors_in(folder)


def test_a_program_that_is_right_passes(errors: dict[str, dict[int, str]]) -> None:
    assert errors.get("right.py", {}) == {}


def test_every_mistake_is_found(errors: dict[str, dict[int, str]]) -> None:
    found = errors.get("wrong.py", {})
    missed = [line for number, line in enumerate(WRONG, start=1) if number not in found]
    assert missed == []
