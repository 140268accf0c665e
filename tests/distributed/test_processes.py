"""Sharded steps in processes, started as people start them."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_checks
import torch
from processes import environment, needs_mpi, run_mpi, run_torch

ROOT = Path(__file__).parents[2]
CHECKS = Path(sharded_checks.__file__)


@pytest.mark.parametrize("size", [2, 4])
def test_gloo(size: int) -> None:
    *survivors, dead = run_torch(size, CHECKS, "gloo")
    for rank in survivors:
        assert rank.code == 0, rank.err
        assert rank.out == "checked\ntold of a death\n"
    assert (dead.code, dead.out) == (7, "checked\n"), dead.err


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_mpi(size: int) -> None:
    for rank in run_mpi(size, CHECKS, "MPI"):
        assert (rank.code, rank.out) == (0, "checked\n"), rank.err


COMMANDS = [
    "torchrun --nproc-per-node 4 examples/sharded_digits.py",
    "mpiexec -n 4 python -m mpi4py examples/sharded_digits.py",
]


def test_the_fsdp_example_keeps_a_part_of_the_state_on_each_rank() -> None:
    command = "torchrun --nproc-per-node 2 examples/fsdp_digits.py"
    assert command.replace("2", "4") in (ROOT / "docs/guide.md").read_text()
    program, *arguments = command.split()
    found = shutil.which(program, path=Path(sys.executable).parent)
    assert found is not None
    ended = subprocess.run(
        [found, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr
    told = re.findall(r"recognised: (\S+)%, state on this rank: (\S+) bytes", ended.stdout)
    assert len(told) == 2
    assert min(float(share) for share, _ in told) > 85
    assert sum(int(number.replace(",", "")) for _, number in told) == 8 * (65 * 256 + 257 * 256 + 257 * 10)


TRAINING = """
import sys
import torch
import several_characters as example
import gradstep as gs

example.STEPS = int(sys.argv[1])
torch.distributed.init_process_group("gloo")
group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
sharded = example.train(gs.Sharded(example.optimizer(), group), rank, 2)
diloco = gs.DiLoCo(example.optimizer(), every=20, group=group, wire="int8")
print(sharded, example.train(diloco, rank, 2), flush=True)
torch.distributed.destroy_process_group()
"""


def test_a_language_model_on_two_ranks_learns_what_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, examples = 400, str(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([examples, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(examples)
    example = importlib.import_module("several_characters")
    monkeypatch.setattr(example, "STEPS", steps)
    first, second = run_torch(2, TRAINING, str(steps))
    assert (first.code, second.code) == (0, 0), first.err
    assert first.out == second.out
    sharded, diloco = map(float, first.out.split())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = example.train(example.optimizer())
    finally:
        torch.set_num_threads(threads)
    assert one < 2.6  # a model that knows how often characters come has 3.2
    assert sharded == pytest.approx(one, rel=1e-4)
    assert diloco == pytest.approx(one, rel=0.05)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "command", [COMMANDS[0], pytest.param(COMMANDS[1], marks=needs_mpi)], ids=["torchrun", "mpiexec"]
)
def test_the_commands_of_the_readme(command: str, size: int) -> None:
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
    program, *arguments = command.replace(" 4 ", f" {size} ").split()
    found = shutil.which(program, path=Path(sys.executable).parent)
    assert found is not None
    ended = subprocess.run(
        [found, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr
    told = re.findall(r"recognised: (\S+)%, state on this rank: (\S+) bytes", ended.stdout)
    assert len(told) == size
    ((recognised),) = {float(share) for share, _ in told}
    assert recognised > 90
    kept = [int(number.replace(",", "")) for _, number in told]
    assert sum(kept) == 8 * (512 * 256 + 256 * 10)
    assert max(kept) < 1.1 * sum(kept) / size
