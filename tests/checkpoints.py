"""Optimizers worth saving in every array library, what is compared of them, and processes that load them."""

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import gradstep as gs
from families import FAMILIES

Tree = dict[str, Any]

LIBRARIES = ("numpy", "torch", "jax", "mlx")
IN_PLACE = ("numpy", "torch")
DTYPES: dict[str, Any] = {
    "float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip


# Arrays


def held(library: str, array: Any) -> Any:
    """A copy of a NumPy array in a library; in memory in the same order of axes."""
    array = np.array(array, order="K")
    if library == "numpy":
        return array
    narrow = array.dtype == ml_dtypes.bfloat16
    if library == "torch":
        torch = importlib.import_module("torch")
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if narrow else torch.from_numpy(array)
    if library == "jax":
        return importlib.import_module("jax.numpy").asarray(array)
    mx = importlib.import_module("mlx.core")
    if narrow:
        return mx.array(np.ascontiguousarray(array).view(np.uint16).reshape(array.shape)).view(mx.bfloat16)
    return mx.array(array, mx.bool_ if array.dtype == bool else getattr(mx, str(array.dtype)))


def library_of(array: Any) -> str:
    return type(array).__module__.partition(".")[0].replace("jaxlib", "jax")


def seen(array: Any) -> Any:
    """An array of any library as NumPy's."""
    library = library_of(array)
    if library == "torch":
        torch = importlib.import_module("torch")
        array = array.detach()
        return (
            array.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            if array.dtype is torch.bfloat16
            else array.numpy()
        )
    if library == "mlx":
        mx = importlib.import_module("mlx.core")
        if array.dtype == mx.bfloat16:
            return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.asarray(array)


def bits(array: Any) -> list[Any]:
    """Dtype, shape and bytes in C order."""
    array = seen(array)
    return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


def bits_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: bits(array) for name, array in sorted(tree.items())}


def everything(opt: Any, *, report: bool = False) -> dict[str, Any]:
    """All that one can know of an optimizer, as JSON holds it."""
    found: dict[str, Any] = {
        "type": type(opt).__name__, "step": opt.step, "steps": dict(sorted(opt.steps.items())),
        "state": {name: bits_of(slots) for name, slots in sorted(opt.state.items())},
        "learning_rate": opt.learning_rate, "options": [opt.clip_norm, opt.nonfinite, list(opt.frozen)],
    }  # fmt: skip
    if report:
        found["report"] = repr(opt.report)
    if isinstance(opt, gs.Accumulate):
        found |= {"every": opt.every, "micro_step": opt.micro_step, "sums": bits_of(opt.sums)}
        found["optimizer"] = everything(opt.optimizer)
    elif isinstance(opt, gs.MultiOptimizer):
        found["optimizers"] = [everything(child) for child in opt.optimizers]
    else:
        found["values"] = {name: getattr(opt, name) for name in opt.hyperparameters}
        storage = {name: getattr(opt, name) for name in ("slot_dtype", "rounding", "master_weights", "seed")}
        found["storage"] = {
            name: dict(value) if isinstance(value, Mapping) else value for name, value in storage.items()
        }
    return json.loads(json.dumps(found))


# Optimizers


@gs.rule
def Signum(w: Any, g: Any, m: Any, *, learning_rate: Any, momentum: Any = 0.9) -> Any:
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * gs.sign(m), m


@gs.rule(static=["shape"])
def Timed(w: Any, g: Any, m: Any, *, learning_rate: Any, nesterov: bool = False, shape: Any = None, t: Any) -> Any:
    m = m + g / t
    return w - learning_rate * (m + g if nesterov else m), m


class Counting:
    """A schedule with a state of its own, which shows in its values when a call is lost or made twice."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def __repr__(self) -> str:
        return "Counting()"

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.01 * self.calls + 0.001 * step


def halves(step: int) -> float:
    return 0.1 * 0.5**step


def short(name: str, parameter: Any) -> bool:
    return parameter.ndim < 2


RULES = [Signum, Timed]
FUNCTIONS: dict[str, Any] = {"halves": halves, "short": short}


def nested(**kwargs: Any) -> Any:
    deep = gs.MultiOptimizer([gs.Lion(halves), gs.Adafactor(gs.cosine_decay(0.1, 9), beta_1=0.9)], ["s"])
    inner = gs.MultiOptimizer([gs.Muon(0.02), deep, gs.Adam(0.01, bias_correction=True)], ["w", short])
    return gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), inner], ["b"], **kwargs)


SCHEDULE = gs.join_schedules([gs.linear_schedule(0.0, 0.1, 2), gs.step_decay(0.1, 0.5, 2)], [2])

SHAPES: dict[str, tuple[int, ...]] = {"w": (12, 33), "t": (3, 5), "b": (7,), "s": (), "e": (0, 3)}


def tree(seed: int, dtype: str = "float32") -> Tree:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape)).astype(DTYPES[dtype]) for name, shape in SHAPES.items()}


def few_of(arrays: Callable[[int], Tree]) -> Callable[[int], Tree]:
    """Two of the parameters: XLA compiles each anew."""
    return lambda seed: {name: array for name, array in arrays(seed).items() if name in "wb"}


few = few_of(tree)


def strange_layouts(seed: int) -> Tree:
    """Fortran order, axes in disorder, and every other element, where the library has such a thing."""
    rng = np.random.default_rng(seed)
    return {
        "w": np.asfortranarray(rng.standard_normal((12, 33), np.float32)),
        "b": rng.standard_normal((4, 5, 3), np.float32).transpose(2, 0, 1),
        "s": rng.standard_normal((6, 4), np.float32)[::2],
    }


def some(seed: int) -> Tree:
    """Other gradients are absent each time."""
    return {
        name: None if (seed + place) % 3 == 0 else array
        for place, (name, array) in enumerate(tree(seed).items())
        if (seed + place) % 4
    }


def sometimes_infinite(seed: int) -> Tree:
    grads = tree(seed)
    if seed % 3 == 0:
        grads["b"][2] = np.inf
    return grads


class Case(NamedTuple):
    """An optimizer, its parameters, gradients by number, and how many steps come before and after saving."""

    make: Callable[[], Any]
    params: Callable[[int], Tree] = tree
    grads: Callable[[int], Tree] = tree
    before: int = 3
    after: int = 3


# What JAX and MLX compile for a second each; the rest of what is composed is not a library's business.
COMPILED = (
    "everything of float32", "everything of bfloat16", "masters of float16", "bfloat16 slots of float64",
    "nested, clipped", "in a nested round", "in a round of bfloat16", "nested, skipping", "a rule with t",
    "groups", "frozen", "some gradients",
)  # fmt: skip


def cases(library: str) -> dict[str, Case]:
    """By name, in the same order in every process."""
    found: dict[str, Case] = {}
    for family, rows in FAMILIES.items():
        for kwargs in rows if library in IN_PLACE else rows[-1:]:
            make = lambda family=family, kwargs=kwargs: getattr(gs, family)(**kwargs)  # noqa: E731
            found[f"{family}({kwargs})"] = Case(make) if library in IN_PLACE else Case(make, few, few, 2, 2)
    stored, composed = _stored(), _composed()
    if library in IN_PLACE:
        found |= stored | composed
    else:
        stored = {
            name: case._replace(params=few_of(case.params), grads=few_of(case.grads)) for name, case in stored.items()
        }
        found |= {name: (stored | composed)[name] for name in COMPILED}
    if library == "numpy":
        found["strange layouts, stochastic"] = Case(
            lambda: gs.Adam(0.01, slot_dtype="bfloat16", rounding="stochastic"), strange_layouts, strange_layouts
        )
        found["strange layouts, Adafactor"] = Case(lambda: gs.Adafactor(beta_1=0.9), strange_layouts, strange_layouts)
        found["strange layouts, a round"] = Case(
            lambda: gs.Accumulate(gs.Lion(0.1, slot_dtype="int8"), every=4), strange_layouts, strange_layouts
        )
    if library == "torch":
        found["strange layouts"] = Case(lambda: gs.AdamW(0.01), strange_layouts, strange_layouts)
    return found


def _stored() -> dict[str, Case]:
    """Every way of storage."""
    options: dict[str, dict[str, Any]] = {
        "bfloat16 slots": {"slot_dtype": "bfloat16"}, "int8 slots": {"slot_dtype": "int8"},
        "float16 slots": {"slot_dtype": "float16"},
        "stochastic": {"slot_dtype": "bfloat16", "rounding": "stochastic", "seed": 7},
        "masters": {"master_weights": True},
        "everything": {"slot_dtype": "int8", "rounding": "stochastic", "master_weights": True, "seed": 2**40},
    }  # fmt: skip
    found: dict[str, Case] = {}
    for name, kwargs in options.items():
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            params = lambda seed, dtype=dtype: tree(seed, dtype)  # noqa: E731
            found[f"{name} of {dtype}"] = Case(lambda kwargs=kwargs: gs.Adam(0.01, **kwargs), params, params)
    makers: dict[str, Callable[[], Any]] = {
        "mixed slots": lambda: gs.AdamW(0.01, slot_dtype={"m": "int8", "v": "bfloat16"}, rounding="stochastic"),
        "Muon in int8": lambda: gs.Muon(0.02, slot_dtype="int8"),
        "Adafactor in bfloat16": lambda: gs.Adafactor(beta_1=0.9, slot_dtype="bfloat16"),
        "Adafactor's m in int8": lambda: gs.Adafactor(beta_1=0.9, slot_dtype={"m": "int8"}),
        "a rule in int8": lambda: Signum(0.1, slot_dtype="int8", rounding="stochastic", seed=3),
    }  # fmt: skip
    return found | {name: Case(make) for name, make in makers.items()}


def _composed() -> dict[str, Case]:
    """Trees, rounds, rules, groups, options, schedules and gradients that are absent or not finite."""
    groups = {"learning_rate": {"b": 0.1, "[ws]": halves, "*": SCHEDULE}, "momentum": {"b": 0, "*": 0.9}}
    return {
        "without a step": Case(lambda: gs.Adam(0.1), before=0),
        "nested": Case(nested),
        "nested, clipped": Case(lambda: nested(clip_norm=0.5)),
        "nested, skipping": Case(lambda: nested(nonfinite="skip"), grads=sometimes_infinite),
        "in a round": Case(lambda: gs.Accumulate(gs.Adam(0.1), every=4), before=6, after=5),
        "in a nested round": Case(lambda: gs.Accumulate(nested(clip_norm=0.5), every=2), before=3, after=4),
        "in a round of bfloat16": Case(
            lambda: gs.Accumulate(gs.SGD(0.1, momentum=0.9, rounding="stochastic"), every=3),
            lambda seed: tree(seed, "bfloat16"), lambda seed: tree(seed, "bfloat16"), 4, 4,
        ),
        "in a round of some": Case(lambda: gs.Accumulate(gs.Adam(halves), every=3), grads=some, before=4, after=5),
        "in a skipped round": Case(
            lambda: gs.Accumulate(gs.Adam(halves, nonfinite="skip"), every=2), grads=sometimes_infinite, before=3
        ),
        "after a round": Case(lambda: gs.Accumulate(gs.Adam(0.1), every=2), before=4, after=4),
        "rounds of one": Case(lambda: gs.Accumulate(gs.Adam(0.1), every=1)),
        "a rule": Case(lambda: Signum(gs.exponential_decay(0.1, 0.9))),
        "a rule with t": Case(lambda: Timed(halves, nesterov=True, shape=("a", 1, None, 0.5)), grads=some, before=4),
        "groups": Case(lambda: gs.SGD(**groups)),
        "pairs by name": Case(lambda: gs.Adam(0.1, betas={"b": (0.5, SCHEDULE), "*": (halves, 0.9)})),
        "frozen": Case(lambda: gs.Adam(0.1, frozen=["w", "[bt]"])),
        "clipped": Case(lambda: gs.AdamW(0.1, clip_norm=0.3, nonfinite="raise")),
        "skipped just before": Case(lambda: gs.Adam(halves, nonfinite="skip"), grads=sometimes_infinite),
        "a schedule": Case(lambda: gs.AdamW(SCHEDULE, weight_decay=gs.cosine_decay(0.1, 5), bias_correction=True)),
        "some gradients": Case(lambda: gs.Adam(0.1, bias_correction=True), grads=some, before=5, after=5),
    }  # fmt: skip


def held_tree(library: str, arrays: Mapping[str, Any]) -> Tree:
    return {name: None if array is None else held(library, array) for name, array in arrays.items()}


def take_steps(case: Case, library: str, opt: Any, params: Tree, numbers: range) -> None:
    for number in numbers:
        opt.apply_gradients(held_tree(library, case.grads(number + 1)), params)


def outcome(case: Case, library: str, opt: Any, params: Tree) -> dict[str, Any]:
    """What the last steps lead to."""
    take_steps(case, library, opt, params, range(case.before, case.before + case.after))
    return {"params": bits_of(params), "opt": everything(opt, report=True)}


def ready(library: str) -> None:
    """Let a library have float64, in a process of its own."""
    if library == "jax":
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    if library == "mlx":
        mx = importlib.import_module("mlx.core")
        mx.set_default_device(mx.cpu)


# Processes


def python(program: str, *arguments: object, **kwargs: Any) -> Any:
    """Run a program in a process of its own that can import what tests can."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    silent = "ignore::UserWarning"  # of parameters that are left alone
    command = [sys.executable, "-W", "error", "-W", silent, "-c", start + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **kwargs)


def answer(program: str, *arguments: object, **kwargs: Any) -> Any:
    """What it prints, which is JSON."""
    done = python(program, *arguments, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
