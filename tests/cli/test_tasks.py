"""Tasks of one's own: how they are found, and what is said when they break the agreement."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradstep.cli.complaint import Complaint
from gradstep.cli.race.task import find_task, try_task

GOOD = """
import numpy as np
class Task:
    def init(self, seed):
        return {"w": np.random.default_rng(seed).normal(size=3)}
    def loss_and_grads(self, params, step, rng):
        return np.sum(params["w"] ** 2), {"w": 2 * params["w"]}
    def evaluate(self, params):
        return {"size": np.abs(params["w"]).max()}
task = Task()
def make():
    return Task()
"""


@pytest.mark.parametrize("name", ["", ":task", ":Task", ":make"])
def test_object_class_and_factory_all_serve(task_file: Callable[[str], Path], name: str):
    problem = find_task(f"{task_file(GOOD)}{name}")
    grads = try_task(problem)
    np.testing.assert_array_equal(grads["w"], 2 * np.random.default_rng(0).normal(size=3))
    assert problem.evaluate({"w": np.array([1.0, -3.0])}) == {"size": 3.0}


def test_a_module_with_functions_and_a_class_with_static_methods_serve(task_file: Callable[[str], Path]):
    text = GOOD.replace("(self, ", "(").replace("    def ", "    @staticmethod\n    def ")
    assert try_task(find_task(f"{task_file(text)}:Task"))["w"].shape == (3,)


def test_files_beside_the_task_can_be_imported(task_file: Callable[[str], Path], tmp_path: Path):
    (tmp_path / "neighbour_of_the_task.py").write_text(GOOD)
    path = task_file("from neighbour_of_the_task import Task as Mine")
    assert find_task(f"{path}:Mine").name == f"{path}:Mine"


def test_nested_parameters_and_absent_gradients_are_fine(task_file: Callable[[str], Path]):
    text = GOOD.replace(
        'return {"w": np.random.default_rng(seed).normal(size=3)}',
        'return {"w": np.ones(3), "frozen": [{"a": np.ones(2)}, np.ones(())]}',
    )
    assert list(try_task(find_task(str(task_file(text))))) == ["w"]


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


INIT = 'return {"w": np.random.default_rng(seed).normal(size=3)}'
LOSS = 'return np.sum(params["w"] ** 2), {"w": 2 * params["w"]}'
METRICS = 'return {"size": np.abs(params["w"]).max()}'
BREAKAGES = {
    "no init": (changed("def init", "def start"), ["has no method init(seed)", "A task is an object with"]),
    "no loss": (changed("def loss_and_grads", "def loss"), ["has no method loss_and_grads(params, step, rng)"]),
    "init is data": (changed("def init(self, seed):\n        return", "init ="), []),
    "init without seed": (changed("(self, seed)", "(self)"), ["init() must take (seed)"]),
    "loss without rng": (changed("params, step, rng", "params, step"), ["must take (params, step, rng)"]),
    "evaluate without params": (changed("evaluate(self, params)", "evaluate(self)"), ["must take (params)"]),
    "no parameters": (changed(INIT, "return {}"), ["params is empty"]),
    "parameters are numbers": (changed(INIT, 'return {"w": 1.5}'), ["init(seed): params['w'] is a plain number"]),
    "parameters are objects": (changed(INIT, 'return {"w": object()}'), ["params 'w' must be an array, got object"]),
    "parameters are an array": (changed(INIT, "return np.ones(3)"), ["init(seed)", "mapping", "ndarray"]),
    "parameters are integers": (changed(INIT, 'return {"w": np.ones(3, int)}'), ["int64"]),
    "unseeded start": (changed("default_rng(seed)", "default_rng()"), ["other values the second time", "new arrays"]),
    "shared start": (changed(INIT, 'return {"w": shared}') + "shared = np.ones(3)", ["new arrays"]),
    "no gradients": (changed(LOSS, "return 1.0"), ["must return (loss, grads), got 1.0"]),
    "three values": (changed(LOSS, "return 1.0, {}, {}"), ["(loss, grads), got tuple of length 3"]),
    "swapped": (changed(LOSS, 'return {"w": params["w"]}, 1.0'), ["the loss", "single number, got dict"]),
    "loss is text": (changed(LOSS, 'return "1.0", {"w": params["w"]}'), ["single number, got '1.0'"]),
    "loss is None": (changed(LOSS, 'return None, {"w": params["w"]}'), ["single number, got None"]),
    "loss per sample": (changed("np.sum(params", "(params"), ["single number, got ndarray of shape (3,)"]),
    "first loss is NaN": (changed("np.sum(params", "np.nan * np.sum(params"), ["before any step, is nan"]),
    "unknown gradient": (changed('{"w": 2 *', '{"v": 2 *'), ["without a parameter: v", "parameters: w"]),
    "empty gradients": (changed('{"w": 2 * params["w"]}', "{}"), ["grads is empty"]),
    "gradient of another shape": (changed('2 * params["w"]', 'params["w"][:2]'), ["'w' has shape (2,)", "(3,)"]),
    "gradient is a number": (changed('2 * params["w"]', "1.0"), ["loss_and_grads: grads['w'] is a plain number"]),
    "gradient is complex": (changed("2 * params", "2j * params"), ["complex128"]),
    "metrics are a number": (changed(METRICS, "return 3"), ["{name: value}, got 3"]),
    "metric is an array": (changed(".max()", ""), ["evaluate's 'size' must be a single number"]),
    "needs arguments": (GOOD + "class task(Task):\n    def __init__(self, size): ...", ["needs arguments"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_agreement_is_explained(task_file: Callable[[str], Path], text: str, expected: list[str]):
    path = task_file(text)
    with pytest.raises(Complaint) as complaint:
        try_task(find_task(f"{path}:task"))
    message = str(complaint.value)
    assert str(path) in message
    for part in expected:
        assert part in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nonesuch_package", ["ModuleNotFoundError", "nonesuch_package", "line 1"]),
        ("x = 1\nx = = 2", ["SyntaxError", "line 2", "x = = 2"]),
        ("def f():\n    return 1 / 0\nf()", ["ZeroDivisionError", "line 3", "line 2, in f"]),
        ("raise SystemExit(3)", ["ended the program", "exit code 3", "__main__"]),
        ("x = 1", ["defines no 'task'", "one of its names: x"]),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(task_file: Callable[[str], Path], text: str, expected: list[str]):
    path = task_file(text)
    with pytest.raises(Complaint) as complaint:
        find_task(f"{path}:task")
    message = str(complaint.value)
    for part in [str(path), *expected]:
        assert part in message
    assert "loading.py" not in message
    assert "importlib" not in message


@pytest.mark.parametrize("method", ["init", "loss_and_grads", "evaluate"])
def test_what_the_task_raises_is_shown_with_its_own_lines_only(task_file: Callable[[str], Path], method: str):
    path = task_file(
        GOOD.replace(f"def {method}(self", f"def {method}(self, *a): np.linalg.inv(np.ones((2, 3)))\n    def _(self")
    )
    with pytest.raises(Complaint) as complaint:
        try_task(find_task(f"{path}:task"))
    message = str(complaint.value)
    assert f"my_task.py:task: {method} raised LinAlgError" in message
    assert f"in {method}\n" in message
    assert message.count("  File ") == 1


def test_missing_files_and_unknown_names_are_explained(tmp_path: Path):
    with pytest.raises(Complaint, match=r"there is no file .*nowhere\.py"):
        find_task(f"{tmp_path}/nowhere.py:task")
    with pytest.raises(Complaint, match="no task 'cifar': the built-in one is digits"):
        find_task("cifar")
