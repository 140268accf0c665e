"""The task of a race: what it must offer, how it is found, and what is said when it breaks the agreement."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, cast

import numpy as np

import gradstep as gs
from gradstep.cli.complaint import Complaint, raised
from gradstep.cli.race.loading import load
from gradstep.tree import flatten

AGREEMENT = """A task is an object with
    init(seed) -> params                                  a dict of arrays, new ones at each call
    loss_and_grads(params, step, rng) -> (loss, grads)    grads with the names of params
    evaluate(params) -> {name: value}                     optional"""


class Task(Protocol):
    """What can be raced; `evaluate(params) -> {name: value}` may come on top."""

    def init(self, seed: int) -> Any:
        """New parameters: a mapping from name to array, nested if need be; the same for the same seed."""
        ...

    def loss_and_grads(self, params: Any, step: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """The loss to minimise, as a number, and its gradients by the names of the parameters."""
        ...


@dataclass(frozen=True)
class Problem:
    """A task under its name; what its methods return is checked, what they raise becomes a complaint.

    `folder` is where the task's file lies, `surroundings` makes the context in which the task runs.
    """

    name: str
    task: Task
    folder: Path | None = None
    surroundings: Callable[[], AbstractContextManager[object]] = nullcontext

    def init(self, seed: int) -> Any:
        """The task's parameters for this seed."""
        return self._call("init", seed)

    def loss_and_grads(self, params: Any, step: int, rng: np.random.Generator) -> tuple[float, Any]:
        """The loss as a float, and the gradients."""
        result = self._call("loss_and_grads", params, step, rng)
        pair = cast("Sequence[object]", result) if isinstance(result, (tuple, list)) else ()
        if len(pair) != 2:
            got = _describe(cast("object", result))
            raise self.complain(f"loss_and_grads must return (loss, grads), got {got}")
        loss, grads = pair
        return self._number(loss, "the loss that loss_and_grads returns first"), grads

    def evaluate(self, params: Any) -> dict[str, float]:
        """The task's metrics; empty when it has none."""
        if not hasattr(self.task, "evaluate"):
            return {}
        metrics = self._call("evaluate", params)
        if not isinstance(metrics, Mapping):
            raise self.complain(f"evaluate must return {{name: value}}, got {_describe(metrics)}")
        named = cast("Mapping[object, object]", metrics)
        return {str(name): self._number(value, f"evaluate's {name!r}") for name, value in named.items()}

    def complain(self, what: str) -> Complaint:
        """A complaint about this task."""
        return Complaint(f"{self.name}: {what}")

    def _call(self, method: str, *args: object) -> object:
        try:
            return getattr(self.task, method)(*args)
        except Exception as error:
            raise TaskError(self, method, error) from error

    def _number(self, value: object, what: str) -> float:
        number = _as_float(value)
        if number is None:
            raise self.complain(f"{what} must be a single number, got {_describe(value)}")
        return number


class TaskError(Complaint):
    """The task's own code raised; `__cause__` is what it raised."""

    def __init__(self, problem: Problem, method: str, error: Exception) -> None:
        super().__init__(str(raised(f"{problem.name}: {method}", error, problem.folder)))


def find_task(spec: str) -> Problem:
    """The built-in task of this name, or the object that `file.py:object` names."""
    if spec == "digits":
        from gradstep.cli.race.digits import Digits, one_blas_thread

        return Problem(spec, Digits(), surroundings=one_blas_thread)
    if ":" not in spec and not spec.endswith(".py"):
        raise Complaint(f"there is no task {spec!r}: the built-in one is digits, your own is written file.py:object")
    found, folder = load(spec, default="task")
    task = found
    if inspect.isclass(found) or (inspect.isroutine(found) and not hasattr(found, "loss_and_grads")):
        task = _make(spec, cast("Callable[[], object]", found), folder)
    for method, arguments in (
        ("init", "(seed)"),
        ("loss_and_grads", "(params, step, rng)"),
        ("evaluate", "(params)"),
    ):
        _require(spec, task, method, arguments)
    return Problem(spec, cast("Task", task), folder)


def try_task(problem: Problem) -> Any:
    """Take one step of the task, check everything that it returned, and return the gradients of that step."""
    params = problem.init(0)
    named = _named_arrays(problem, params, "init(seed)", "params")
    before = {name: _values(array) for name, array in named.items()}
    loss, grads = problem.loss_and_grads(params, 0, np.random.default_rng(0))
    if not math.isfinite(loss):
        raise problem.complain(f"the first loss, before any step, is {loss}; it must be finite")
    _check_gradients(problem, named, _named_arrays(problem, grads, "loss_and_grads", "grads"))
    problem.evaluate(params)
    try:
        gs.SGD(1e-3).apply_gradients(grads, params)
    except gs.GradstepError as error:
        raise problem.complain(str(error)) from None
    after = _named_arrays(problem, problem.init(0), "init(seed)", "params")
    if before.keys() != after.keys() or not all(
        np.array_equal(before[name], _values(after[name]), equal_nan=True) for name in before
    ):
        raise problem.complain(
            "init(0) gave other values the second time, so no race would be fair; it must build new arrays "
            "at each call, from the seed alone: rng = np.random.default_rng(seed)"
        )
    return grads


def all_finite(params: object) -> bool:
    """Whether every parameter is free of NaN and infinity."""
    return all(bool(np.isfinite(_values(array)).all()) for array in flatten(params, "params").values())


def _make(spec: str, build: Callable[[], object], folder: Path) -> object:
    try:
        inspect.signature(build).bind()
    except TypeError:
        raise Complaint(f"{spec} needs arguments; name an object, or a class or function without any") from None
    except ValueError:
        pass  # a builtin without a signature
    try:
        return build()
    except Exception as error:
        raise raised(f"{spec}()", error, folder) from None


def _require(spec: str, task: object, method: str, arguments: str) -> None:
    function = getattr(task, method, None)
    if function is None and method == "evaluate":
        return
    if not callable(function):
        raise Complaint(f"{spec} ({_describe(task)}) has no method {method}{arguments}.\n{AGREEMENT}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(*arguments.strip("()").split(", "))
    except TypeError:
        raise Complaint(f"{spec}: {method}{signature} must take {arguments}.\n{AGREEMENT}") from None


def _named_arrays(problem: Problem, tree: object, origin: str, what: str) -> dict[str, Any]:
    try:
        named = flatten(tree, what)
    except gs.GradstepError as error:
        raise problem.complain(f"{origin}: {error}") from None
    if not named:
        raise problem.complain(f"{origin}: {what} is empty; there is nothing to train")
    for name, array in named.items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise problem.complain(f"{origin}: {what} {name!r} must be an array, got {_describe(array)}")
    return named


def _check_gradients(problem: Problem, params: dict[str, Any], grads: dict[str, Any]) -> None:
    if strangers := sorted(grads.keys() - params.keys()):
        raise problem.complain(
            f"loss_and_grads gave gradients without a parameter: {', '.join(strangers)}\n"
            f"gradients:  {', '.join(grads)}\nparameters: {', '.join(params)}"
        )
    for name, gradient in grads.items():
        wanted, got = tuple(params[name].shape), tuple(gradient.shape)
        if wanted != got:
            raise problem.complain(f"the gradient {name!r} has shape {got}, its parameter {wanted}")


def _as_float(value: object) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        item = getattr(value, "item", None)  # a tensor that requires its gradient warns when float() reads it
        return float(cast("SupportsFloat", item() if callable(item) else value))
    except (TypeError, ValueError, RuntimeError):
        return None


def _values(array: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    detached = array.detach().cpu().double() if hasattr(array, "detach") else array
    return np.array(detached, dtype=np.float64)


def _describe(value: object) -> str:
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(cast('Any', value).shape)}"
    text = repr(value)
    if value is None or (isinstance(value, (str, int, float)) and len(text) < 40):
        return text
    if isinstance(value, (tuple, list)):
        return f"{type(cast('object', value)).__name__} of length {len(cast('Sequence[object]', value))}"
    return type(value).__name__
