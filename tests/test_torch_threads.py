"""Steps on PyTorch's own threads: how many, the same bits, after a fork, and without them."""

import ctypes
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import assert_same_bits
from gradstep.arrays.torch import TORCH
from gradstep.program.threads import pool
from test_threads import in_process

LARGE = (1 << 20) + 4321
needs_team = pytest.mark.skipif(TORCH.team is None, reason="this PyTorch has no OpenMP that can be entered")


@pytest.fixture
def threads(monkeypatch):
    """PyTorch with three threads, and nobody has told gradstep how many."""
    monkeypatch.setattr(pool, "_threads", None)
    monkeypatch.setattr(pool, "_chosen", False)
    monkeypatch.delenv("GRADSTEP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    pool._resize(0)


@pytest.fixture
def joined(monkeypatch):
    """The numbers of threads that the team was called with."""
    calls: list[int] = []
    run = TORCH.team._parallel

    def counted(function: Any, job: Any, count: int, flags: int) -> None:
        calls.append(count)
        run(function, job, count, flags)

    monkeypatch.setattr(TORCH.team, "_parallel", counted)
    return calls


def step(size: int = LARGE, library: Any = torch) -> Any:
    rng = np.random.default_rng(0)
    w, g = (rng.standard_normal(size, np.float32) for _ in range(2))
    params, grads = ({"w": torch.from_numpy(a) if library is torch else a} for a in (w, g))
    opt = gs.AdamW(0.1, clip_norm=1.0)
    for _ in range(3):
        opt.apply_gradients(grads, params)
    return w


@needs_team
class TestHowMany:
    def test_as_many_as_torch_uses(self, threads, joined):
        step()
        torch.set_num_threads(2)
        step()
        assert joined == [3] * 6 + [2] * 6  # the norm, and the step

    def test_small_steps_run_alone(self, threads, joined):
        step(1000)
        assert joined == []

    def test_one_thread_of_torch_is_one_thread_here(self, threads, joined):
        torch.set_num_threads(1)
        step()
        assert joined == []
        assert not any(thread.name == "gradstep" for thread in threading.enumerate())

    def test_another_number_that_was_set_wins(self, threads, joined):
        gs.set_num_threads(2)
        step()
        assert joined == []
        assert sum(thread.name == "gradstep" for thread in threading.enumerate()) == 1

    def test_the_variable_wins(self, threads, joined, monkeypatch):
        monkeypatch.setenv("GRADSTEP_NUM_THREADS", "1")
        step()
        assert joined == []

    def test_the_same_number_that_was_set_joins(self, threads, joined):
        gs.set_num_threads(3)
        step()
        assert joined == [3] * 6

    def test_arrays_of_numpy_stay_on_the_pool(self, threads, joined):
        gs.set_num_threads(3)
        step(library=np)
        assert joined == []


@needs_team
class TestTogether:
    def test_every_thread_of_the_team_makes_the_call(self, threads):
        idents: list[int] = []
        together = threading.Barrier(3)

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def task(job: int) -> None:
            idents.append(threading.get_ident())
            together.wait(30)

        class Counted:
            call = task
            address = ctypes.cast(task, ctypes.c_void_p).value

        pool.run(Counted, 0, pool.threads_for(LARGE, TORCH.team), TORCH.team)
        assert len(set(idents)) == 3
        assert threading.get_ident() in idents

    def test_the_same_bits_as_alone(self, threads, joined):
        together = step()
        gs.set_num_threads(1)
        assert joined
        assert_same_bits(step(), together)

    def test_python_threads_step_at_once(self, threads):
        expected, found = step(), []
        runs = [threading.Thread(target=lambda: found.append(step())) for _ in range(4)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert len(found) == 4
        for w in found:
            assert_same_bits(w, expected)


FORK = """
import warnings, torch
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tried here
def run():
    torch.set_num_threads(1)  # with more, operations of torch itself hang in a child
    w, g = torch.linspace(-1, 1, 1 << 20), torch.ones(1 << 20)
    opt = gs.AdamW(0.1)
    opt.init({"w": w})
    torch.set_num_threads(3)
    for _ in range(3):
        opt.apply_gradients({"w": g}, {"w": w})
    return w.numpy()

expected = run()
child = os.fork()
if child == 0:
    same = (run() == expected).all()
    os._exit(sum(thread.name == "gradstep" for thread in threading.enumerate()) if same else 99)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (run() == expected).all())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_steps_without_the_team():
    assert in_process(FORK, GRADSTEP_NUM_THREADS="") == "2 True"
