"""Proves that steps may be taken from several threads and after a fork, and how the number of threads is chosen."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from families import assert_same_bits

LARGE = (1 << 20) + 4321  # elements: enough for the pool
SMALL = 1000


def in_threads(*functions: Callable[[], object]) -> None:
    """Run all at once and raise what any of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def gradient(seed: int, size: int) -> Any:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def trained(opt: Any, seed: int, size: int, steps: int) -> Any:
    """The parameter after so many steps with one gradient."""
    params, grads = {"w": gradient(seed, size)}, {"w": gradient(seed + 1, size)}
    for _ in range(steps):
        opt.apply_gradients(grads, params)
    return params["w"]


class TestSeveralPythonThreads:
    @pytest.mark.parametrize("size", [SMALL, LARGE])
    def test_different_optimizers_step_at_once(self, size, default_threads):
        gs.set_num_threads(3)
        makers = [lambda: gs.AdamW(0.1), lambda: gs.SGD(0.1, momentum=0.9), lambda: gs.Lion(0.1), gs.Adafactor]
        expected = [trained(make(), seed, size, 6) for seed, make in enumerate(makers)]
        found: dict[int, Any] = {}

        def run(seed: int) -> Callable[[], object]:
            return lambda: found.__setitem__(seed, trained(makers[seed](), seed, size, 6))

        in_threads(*(run(seed) for seed in range(len(makers))))
        for seed, w in enumerate(expected):
            assert_same_bits(found[seed], w)

    @pytest.mark.parametrize("size", [SMALL, LARGE])
    def test_calls_on_one_optimizer_serialise(self, size, default_threads):
        gs.set_num_threads(2)
        opt, params, grads = gs.AdamW(0.1, bias_correction=True), {"w": gradient(0, size)}, {"w": gradient(1, size)}
        expected = trained(gs.AdamW(0.1, bias_correction=True), 0, size, 4 * 10)

        def run() -> None:
            for _ in range(10):
                opt.apply_gradients(grads, params)

        in_threads(run, run, run, run)
        assert (opt.step, opt.steps) == (40, {"w": 40})
        assert_same_bits(params["w"], expected)

    def test_one_optimizer_with_parameters_of_each_threads_own(self):
        opt = gs.Adam(0.1, bias_correction=True)
        params = {str(i): gradient(i, SMALL) for i in range(4)}

        def run(i: int) -> Callable[[], None]:
            def steps() -> None:
                for _ in range(25):
                    opt.apply_gradients({str(i): gradient(i + 1, SMALL)}, {str(i): params[str(i)]})

            return steps

        in_threads(*(run(i) for i in range(4)))
        assert opt.step == 100
        assert opt.steps == {str(i): 25 for i in range(4)}
        for i in range(4):
            assert_same_bits(params[str(i)], trained(gs.Adam(0.1, bias_correction=True), i, SMALL, 25))

    def test_children_of_two_multi_optimizers_serialise_too(self):
        shared = gs.SGD(1.0)
        outer = [gs.MultiOptimizer([gs.SGD(1.0), shared], ["a"]) for _ in range(2)]
        params = [{"b": np.zeros(SMALL, np.float32)} for _ in outer]

        def run(i: int) -> Callable[[], None]:
            def steps() -> None:
                for _ in range(30):
                    outer[i].apply_gradients({"b": np.ones(SMALL, np.float32)}, params[i])

            return steps

        in_threads(run(0), run(1))
        assert shared.step == 60
        assert [opt.step for opt in outer] == [30, 30]
        assert [(w["b"] == -30).all() for w in params] == [True, True]

    def test_values_may_be_set_and_read_meanwhile(self):
        opt, params, done = gs.SGD(1.0), {"w": np.zeros(SMALL, np.float32)}, threading.Event()

        def step() -> None:
            for _ in range(200):
                opt.apply_gradients({"w": np.ones(SMALL, np.float32)}, params)
            done.set()

        def change() -> None:
            while not done.is_set():
                opt.learning_rate = 2.0
                opt.learning_rate = 1.0
                assert opt.learning_rate in (1.0, 2.0)
                assert opt.report is None or opt.report.learning_rate in (1.0, 2.0)

        in_threads(step, change)
        assert opt.step == 200
        assert (params["w"] == params["w"][0]).all()
        assert -400 <= params["w"][0] <= -200

    def test_the_number_of_threads_may_be_changed_meanwhile(self, default_threads):
        done = threading.Event()

        def step() -> None:
            for _ in range(3):
                assert_same_bits(trained(gs.SGD(0.1, momentum=0.9), 0, LARGE, 5), expected)
            done.set()

        def change() -> None:
            while not done.is_set():
                for count in (1, 4, 2):
                    gs.set_num_threads(count)

        expected = trained(gs.SGD(0.1, momentum=0.9), 0, LARGE, 5)
        in_threads(step, change)


def assert_workers(count: int) -> None:
    """So many threads of the pool are alive; those that have been stopped may still be on their way out."""
    for _ in range(1000):
        alive = sum(thread.name.startswith("gradstep") for thread in threading.enumerate())
        if alive <= count:
            break
        time.sleep(0.01)
    assert alive == count


class TestNumberOfThreads:
    @pytest.mark.parametrize("count", [1, 2, 5, 3])
    def test_a_large_step_uses_as_many_as_were_set(self, count, default_threads):
        gs.set_num_threads(count)
        trained(gs.SGD(0.1), 0, LARGE, 1)
        assert_workers(count - 1)

    def test_a_small_step_wakes_nobody(self, default_threads):
        gs.set_num_threads(3)
        assert_workers(0)
        trained(gs.SGD(0.1), 0, SMALL, 1)
        assert_workers(0)

    def test_several_tensors_count_together(self, default_threads):
        gs.set_num_threads(3)
        params = {str(i): np.ones(LARGE // 50, np.float32) for i in range(51)}
        gs.SGD(0.1).apply_gradients({name: np.ones_like(w) for name, w in params.items()}, params)
        assert_workers(2)

    @pytest.mark.parametrize("count", [0, -1])
    def test_below_one_is_refused(self, count):
        with pytest.raises(gs.OutOfRangeError, match=f"at least 1, got {count}"):
            gs.set_num_threads(count)

    @pytest.mark.parametrize("count", [1.0, "2", None, True, np.float32(2)])
    def test_anything_but_an_integer_is_refused(self, count):
        with pytest.raises(gs.ArgumentTypeError, match="integer"):
            gs.set_num_threads(count)

    def test_a_refused_number_leaves_the_old_one(self, default_threads):
        gs.set_num_threads(3)
        with pytest.raises(gs.OutOfRangeError):
            gs.set_num_threads(0)
        trained(gs.SGD(0.1), 0, LARGE, 1)
        assert_workers(2)

    def test_the_variable_sets_the_default(self):
        assert in_process(COUNT_WORKERS, GRADSTEP_NUM_THREADS="4") == "3"

    def test_set_num_threads_wins_over_the_variable(self):
        assert in_process("gs.set_num_threads(3)\n" + COUNT_WORKERS, GRADSTEP_NUM_THREADS="5") == "2"

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
    def test_the_default_is_the_cpus_that_the_process_is_bound_to(self):
        bind = "import os; os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])\n"
        assert in_process(bind + COUNT_WORKERS, GRADSTEP_NUM_THREADS="") == "0"

    def test_a_bad_variable_is_reported_before_anything_is_written(self):
        script = """
        for value in ("0", "-2", "two", "1.5"):
            os.environ["GRADSTEP_NUM_THREADS"] = value
            params = {"small": np.ones(3, np.float32), "large": np.ones(1 << 20)}
            opt = gs.SGD(0.5)
            try:
                opt.apply_gradients({name: w.copy() for name, w in params.items()}, params)
            except gs.OutOfRangeError as error:
                assert value in str(error) and "GRADSTEP_NUM_THREADS" in str(error)
                print(opt.step, opt.steps, {float(w[0]) for w in params.values()})
        """
        assert in_process(script).splitlines() == ["0 {} {1.0}"] * 4


COUNT_WORKERS = """
gs.SGD(0.1).apply_gradients({"w": np.ones(1 << 20, np.float32)}, {"w": np.ones(1 << 20, np.float32)})
print(sum(thread.name.startswith("gradstep") for thread in threading.enumerate()))
"""

FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tried here

def run(opt, steps):
    params, grads = {"w": np.linspace(-1, 1, LARGE, dtype=np.float32)}, {"w": np.ones(LARGE, np.float32)}
    for _ in range(steps):
        opt.apply_gradients(grads, params)
    return params["w"]

LARGE = (1 << 20) + 4321
gs.set_num_threads(3)
expected = run(gs.AdamW(0.1), 3)

def check_in_child(threads):
    child = os.fork()
    if child == 0:
        try:
            if threads != 3:
                gs.set_num_threads(threads)
            same = (run(gs.AdamW(0.1), 3) == expected).all() and (run(gs.Lion(0.1), 1) != 0).any()
            workers = sum(thread.name.startswith("gradstep") for thread in threading.enumerate())
            os._exit(0 if same and workers == threads - 1 else 1)
        except BaseException as error:
            print(error, flush=True)
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
class TestFork:
    def test_a_child_steps_on_threads_of_its_own_and_the_parent_goes_on(self):
        script = """
        print([check_in_child(threads) for threads in (3, 2)], (run(gs.AdamW(0.1), 3) == expected).all())
        """
        assert in_process(FORK, script) == "[0, 0] True"

    def test_a_fork_while_other_threads_step_harms_neither(self):
        script = """
        done = threading.Event()
        results = []

        def background():
            while not done.is_set():
                results.append((run(gs.AdamW(0.1), 3) == expected).all())

        threads = [threading.Thread(target=background) for _ in range(2)]
        for thread in threads:
            thread.start()
        codes = [check_in_child(3) for _ in range(5)]
        done.set()
        for thread in threads:
            thread.join()
        print(codes, all(results), len(results) > 0)
        """
        assert in_process(FORK, script) == "[0, 0, 0, 0, 0] True True"


def in_process(*scripts: str, **variables: str) -> str:
    """What a new process prints that runs the scripts; a warning or an error there fails the test."""
    imports = "import os, threading\nimport numpy as np\nimport gradstep as gs\n"
    code = imports + "\n".join(textwrap.dedent(script) for script in scripts)
    command: Sequence[str] = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()
