"""Deep copies and pickles: they go on bit for bit where the original stood, and independently of it."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import configurations

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "oldest pickle that knows new classes": lambda opt: pickle.loads(pickle.dumps(opt, 2)),
}


def numpy_tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((3, 4)),
        "f": np.asfortranarray(rng.standard_normal((4, 3), np.float32)),
        "b": rng.standard_normal(5).astype(np.float32),
        "s": np.array(rng.standard_normal()),
    }


def torch_tree(seed: int) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(array, order="K")) for name, array in numpy_tree(seed).items()}


def bits(tree: Any) -> Any:
    return {name: np.asarray(array).tobytes() for name, array in tree.items()}


def everything(opt: Any) -> Any:
    slots = {name: bits(slots) for name, slots in opt.state.items()}
    children = [everything(child) for child in getattr(opt, "optimizers", ())]
    return repr(opt), opt.step, opt.steps, opt.learning_rate, opt.report, slots, children


def nested(**kwargs: Any) -> Any:
    inner = gs.MultiOptimizer([gs.Muon(0.02), gs.Adafactor(gs.cosine_decay(0.1, 9), beta_1=0.9)], ["w"])
    return gs.MultiOptimizer([gs.SGD(0.1, momentum=0.9), inner], ["[bs]"], **kwargs)


def assert_goes_on(
    make: Callable[[], Any], copied: Callable[[Any], Any], tree: Callable[[int], Any], steps: int
) -> None:
    opt, params = make(), tree(0)
    for seed in range(1, steps + 1):
        opt.apply_gradients(tree(seed), params)
    before = everything(opt)
    twin, others = copied(opt), {name: copy.deepcopy(array) for name, array in params.items()}
    assert everything(twin) == before
    for seed in range(7, 10):
        twin.apply_gradients(tree(seed), others)
    assert everything(opt) == before, "the original moved with its copy"
    for seed in range(7, 10):
        opt.apply_gradients(tree(seed), params)
    assert everything(twin) == everything(opt)
    assert bits(params) == bits(others)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("cls", "kwargs"), configurations())
def test_a_copy_goes_on_bit_for_bit_and_alone(cls: Any, kwargs: Any, how: str) -> None:
    options = {"clip_norm": 1.0, "nonfinite": "skip"}
    assert_goes_on(lambda: cls(**kwargs, **options), COPIES[how], numpy_tree, 2)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("tree", [numpy_tree, torch_tree])
@pytest.mark.parametrize("how", COPIES)
def test_a_nested_optimizer_is_copied_whole(how: str, tree: Any, steps: int) -> None:
    assert_goes_on(lambda: nested(clip_norm=0.5), COPIES[how], tree, steps)


def test_routes_are_copied_with_the_optimizer() -> None:
    asked: list[str] = []
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], [lambda name, _: asked.append(name) or name == "b"])
    opt.apply_gradients(numpy_tree(1), numpy_tree(0))
    twin = copy.deepcopy(opt)
    twin.apply_gradients(numpy_tree(1), numpy_tree(0))
    assert len(asked) == 4
    assert set(twin.optimizers[0].steps) == {"b"}


def test_a_copy_made_between_preflight_and_step_asks_nothing_again() -> None:
    asked: list[int] = []
    opt = gs.SGD(lambda step: asked.append(step) or 0.1 * (step + 1))
    opt.apply_gradients({}, {})
    opt.preflight()
    twin = copy.deepcopy(opt)
    params = {"w": np.ones(1)}
    twin.apply_gradients({"w": np.ones(1)}, params)
    assert asked == [0, 1]
    assert params["w"] == 1 - 0.2


def test_a_copys_hyperparameters_are_its_own() -> None:
    opt = gs.Adam(0.1)
    twin = copy.deepcopy(opt)
    twin.learning_rate = 0.2
    twin.betas = (0.5, 0.5)
    twin.clip_norm = 1.0
    assert (opt.learning_rate, opt.betas, opt.clip_norm) == (0.1, (0.9, 0.999), None)


def test_copies_step_while_others_do() -> None:
    """A copy does not share its original's lock."""
    opt = gs.Adam(0.1)
    opt.apply_gradients(numpy_tree(1), numpy_tree(0))
    inside, go_on = threading.Event(), threading.Event()

    def waits(step: int) -> float:
        inside.set()
        assert go_on.wait(timeout=60)
        return 0.1

    twin = copy.deepcopy(opt)
    thread = threading.Thread(target=setattr, args=(opt, "learning_rate", waits))
    thread.start()
    assert inside.wait(timeout=60)
    twin.apply_gradients(numpy_tree(1), numpy_tree(0))
    go_on.set()
    thread.join(timeout=60)
    assert twin.step == 2
    assert not thread.is_alive()


@gs.rule
def Signum(w: Any, g: Any, m: Any, *, learning_rate: Any, momentum: Any = 0.9) -> Any:
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * gs.sign(m), m


@pytest.mark.parametrize("how", ["deepcopy"])
def test_an_optimizer_of_ones_own_rule_is_copied(how: str) -> None:
    assert_goes_on(lambda: Signum(gs.exponential_decay(0.1, 0.9)), COPIES[how], numpy_tree, 2)


PROGRAM = """
import pickle, sys
import numpy as np
opt, params, grads = pickle.load(sys.stdin.buffer)
opt.apply_gradients(grads, params)
pickle.dump((opt, params), sys.stdout.buffer)
"""


def test_a_pickle_goes_on_in_another_process() -> None:
    opt, params = nested(clip_norm=0.5), numpy_tree(0)
    opt.apply_gradients(numpy_tree(1), params)
    message = pickle.dumps((opt, params, numpy_tree(2)))
    answer = subprocess.run([sys.executable, "-c", PROGRAM], input=message, capture_output=True, check=True).stdout
    twin, others = pickle.loads(answer)
    opt.apply_gradients(numpy_tree(2), params)
    assert everything(twin) == everything(opt)
    assert bits(params) == bits(others)


@pytest.mark.parametrize(
    "value", [gs.LearningRate(0.1), gs.LearningRate(gs.cosine_decay(1.0, 5)), gs.Report(True, 1, 0.1, None, ())]
)
def test_what_an_optimizer_is_made_of_can_be_saved(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
