"""Proves what is imported, and when: no array library but NumPy, and LLVM only for the first kernel."""

import os
import subprocess
import sys
import textwrap

import gradstep as gs

FOREIGN = {"torch", "jax", "mlx", "tensorflow", "cupy", "mpi4py", "scipy", "pandas", "sklearn"}
FOR_LATER = {"llvmlite", "platformdirs", "typer", "rich", "matplotlib"}
SLOW = {
    "copy", "ctypes.util", "dataclasses", "difflib", "hashlib", "importlib.resources", "json", "numpy.ma",
    "numpy.random", "pathlib", "shutil", "signal", "subprocess", "tempfile", "urllib", "zipfile",
}  # fmt: skip
OWN_FOR_LATER = {
    f"gradstep.{name}"
    for name in (
        "accumulate", "arrays.exchange", "arrays.jax", "arrays.mlx", "arrays.numpy", "arrays.torch", "bridges",
        "checkpoint", "cli", "clip", "describe", "mlx", "multi", "optax", "program.kernel", "program.threads",
        "schedules", "step.batch", "step.bill", "step.functional", "step.inspection", "step.plan", "torch",
    )
}  # fmt: skip


def modules_after(script: str) -> set[str]:
    """The names of the modules that a new process has imported after the script."""
    code = textwrap.dedent(script) + "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(done.stdout.split())


def test_importing_gradstep_imports_only_numpy():
    modules = modules_after("import gradstep")
    assert {"gradstep", "numpy"} <= modules
    assert not modules & (FOREIGN | FOR_LATER)


def test_importing_gradstep_loads_little_that_numpy_has_not():
    loaded = modules_after("import gradstep") - modules_after("import numpy")
    assert not loaded & (SLOW | OWN_FOR_LATER)
    assert len(loaded) < 60


def test_llvm_is_imported_at_the_first_kernel_and_no_sooner():
    before = modules_after("""
        import gradstep as gs, numpy as np
        params = {"w": np.ones(3, np.float32)}
        opt = gs.MultiOptimizer([gs.AdamW(gs.cosine_decay(0.1, 10)), gs.Muon(0.1)], ["*.bias"])
        opt.init(params)
        opt.preflight()

        @gs.rule
        def Mine(w, g, *, learning_rate):
            return w - learning_rate * g

        Mine(0.1).init(params)
    """)
    assert "llvmlite" not in before
    after = modules_after("""
        import gradstep as gs, numpy as np
        gs.SGD(0.1).apply_gradients({"w": np.ones(3)}, {"w": np.ones(3)})
    """)
    assert "llvmlite" in after
    assert not after & (FOREIGN | {"numpy.ma", "gradstep.step.functional"})


def test_every_public_name_is_there_and_documented():
    for name in gs.__all__:
        assert getattr(gs, name).__doc__, name
    assert sorted(gs.__all__) == sorted(set(gs.__all__))
    assert gs.__version__
