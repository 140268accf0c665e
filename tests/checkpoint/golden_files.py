"""Files of every format version, as they were written: what each must still mean.

    python tests/checkpoint/golden_files.py

writes those of the present format anew; do that only before a version is released.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import gradstep as gs

FOLDER = Path(__file__).parent / "golden"
SHAPES = {
    "embed": (5, 3),
    "layers.0.weight": (4, 300),
    "layers.0.bias": (4,),
    "scale": (),
    "schön/名": (2,),
    "": (0, 3),
}


@gs.rule(static=["mode"])
def Golden(w: Any, g: Any, m: Any, *, learning_rate: Any, momentum: Any = 0.5, mode: Any = ("a", None)) -> Any:
    m = momentum * m + g
    return w - learning_rate * m, m


def halves(step: int) -> float:
    """A schedule that a file can only name."""
    return 0.5 ** (step + 1)


def optimizers() -> dict[str, tuple[gs.Optimizer, str]]:
    """Each optimizer, and the dtype of its parameters."""
    warmup = gs.join_schedules([gs.linear_schedule(0.0, 0.1, 3), gs.cosine_decay(0.1, 20)], [3])
    tree = gs.MultiOptimizer(
        [
            gs.Lion({"*.bias": 0.01, "*": gs.step_decay(0.1, 0.5, 2)}),
            gs.Adafactor(beta_1=0.9),
            gs.SGD(0.1, momentum=0.9),
        ],
        ["layers.*", "embed"],
        clip_norm=1.0,
        frozen=["scale"],
    )
    return {
        "adamw": (gs.AdamW(warmup, bias_correction=True, nonfinite="skip"), "float32"),
        "int8": (gs.Adam(0.1, slot_dtype={"m": "int8"}, seed=7), "float32"),
        "bfloat16": (gs.AdamW(0.1, slot_dtype="float16", rounding="stochastic", master_weights=True), "bfloat16"),
        "float64": (gs.AdaDelta(gs.exponential_decay(1.0, 0.9)), "float64"),
        "tree": (gs.Accumulate(tree, every=2), "float32"),
        "own": (Golden(halves), "float32"),
    }


def parameters(dtype: str) -> dict[str, Any]:
    """Numbers of few digits, the same everywhere."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    return {n: np.asarray(np.arange(sizes[n]).reshape(shape) % 7 / 4 - 1).astype(kind) for n, shape in SHAPES.items()}


def steps(opt: gs.Optimizer, params: dict[str, Any], first: int, count: int) -> None:
    """Steps with gradients that depend on their number."""
    for number in range(first, first + count):
        grads = {name: np.asarray((number + 1) * 0.25 - array).astype(array.dtype) for name, array in params.items()}
        opt.apply_gradients(grads, params)


def meaning(opt: gs.Optimizer, params: dict[str, Any]) -> dict[str, Any]:
    """All that a file must give back, and what the next steps make of it, as JSON."""
    found = {"before": _facts(opt, params)}
    steps(opt, params, 3, 2)
    return {**found, "after": _facts(opt, params)}


def _facts(opt: gs.Optimizer, params: dict[str, Any]) -> dict[str, Any]:
    arrays = {f"params {name}": array for name, array in params.items()}
    arrays |= {f"state {name} {slot}": array for name, slots in opt.state.items() for slot, array in slots.items()}
    arrays |= {f"sum {name}": total for name, total in getattr(opt, "sums", {}).items()}
    digests = {
        name: f"{array.dtype.name} {array.shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
        for name, array in sorted(arrays.items())
    }
    described = repr(opt).partition(" at 0x")[0]
    rate = repr(opt.learning_rate)  # type: ignore[attr-defined]
    return {"arrays": digests, "steps": opt.steps, "step": opt.step, "rate": rate, "optimizer": described}


def load(path: Path) -> tuple[gs.Optimizer, dict[str, Any]]:
    """What a file holds, with parameters that it must overwrite."""
    name = path.name.partition(".")[0]
    params = {key: np.zeros_like(array) for key, array in parameters(optimizers()[name][1]).items()}
    return gs.load(path, params, rules=[Golden], functions={"halves": halves}), params


def main() -> None:
    """Write the files and what they mean."""
    version = gs.SGD(0.1).state_dict()["gradstep"]["format"]
    expected: dict[str, Any] = {}
    FOLDER.mkdir(exist_ok=True)
    for name, (opt, dtype) in optimizers().items():
        params = parameters(dtype)
        steps(opt, params, 0, 3)
        path = FOLDER / f"{name}.format{version}.safetensors"
        opt.save(path, params)
        expected[path.name] = meaning(*load(path))
    text = json.dumps(expected, indent=1, sort_keys=True)
    (FOLDER / f"format{version}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
