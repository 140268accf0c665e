"""Checkpoints of outer steps: each rank's own, from which it goes on bit for bit."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from thread_group import ThreadGroup, group_of_one, run_in_threads

import gradstep as gs
from families import assert_same_bits

SHAPES = {"large": (70, 333), "odd": (1001,), "scalar": (), "empty": (0, 3)}
EVERY = 2


def arrays(seed: Any, dtype: Any = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def make(group: ThreadGroup, wire: Any = "float32", inner: gs.Optimizer | None = None) -> gs.DiLoCo:
    return gs.DiLoCo(inner or gs.Adam(gs.cosine_decay(0.1, 20)), every=EVERY, group=group, wire=wire)


def train(opt: gs.Optimizer, params: Any, rank: int, first: int, last: int, dtype: Any = "float32") -> None:
    for step in range(first, last):
        opt.apply_gradients(arrays((step, rank), dtype), params)


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize(("wire", "dtype"), [("float32", "float64"), ("int8", "float32"), ("bfloat16", "bfloat16")])
def test_every_rank_goes_on_bit_for_bit(wire: str, dtype: str, stop: int, tmp_path: Path) -> None:
    """Within a round and between two; with residuals, which the first outer step after loading adds."""
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)

    def body(group: ThreadGroup) -> tuple[Any, ...]:
        path = tmp_path / f"{group.rank}.safetensors"
        opt, params = make(group, wire), arrays(0, kind)
        train(opt, params, group.rank, 0, stop, kind)
        opt.save(path, params)
        again, copies = make(group, wire), arrays(1, kind)
        assert again.load(path, copies) == []
        assert dict(again.anchors).keys() == SHAPES.keys()
        train(opt, params, group.rank, stop, stop + 3, kind)
        train(again, copies, group.rank, stop, stop + 3, kind)
        return opt, params, again, copies

    for opt, params, again, copies in run_in_threads(3, body):
        assert again.outer_report == opt.outer_report
        assert again.outer_report.round == (stop + 3) // EVERY
        assert (again.step, again.outer.step) == (opt.step, opt.outer.step)
        for name in SHAPES:
            assert_same_bits(copies[name], params[name])
            assert_same_bits(again.anchors[name], opt.anchors[name])
            assert_same_bits(again.outer.state[name]["v"], opt.outer.state[name]["v"])


def test_what_the_wire_owes_is_saved(tmp_path: Path) -> None:
    """The same without it would not end with the same bits."""

    def body(group: ThreadGroup) -> bool:
        path = tmp_path / f"{group.rank}.safetensors"
        opt, params = make(group, "int8"), arrays(0)
        train(opt, params, group.rank, 0, 4)
        opt.save(path, params)
        again, copies = make(group, "bfloat16"), arrays(0)
        again.load(path, copies, hyperparameters="mine")
        again, others = make(group, "int8"), copies
        state = opt.state_dict()
        for owed in ("sent", "averages"):
            state["gradstep"]["optimizer"][owed] = type(state["gradstep"]["optimizer"][owed])()
        again.load_state_dict(state, like=others)
        train(opt, params, group.rank, 4, 6)
        train(again, others, group.rank, 4, 6)
        return bool((params["large"] == others["large"]).all())

    assert run_in_threads(2, body) == [False, False]


def test_ranks_with_older_files_or_none_are_newcomers(tmp_path: Path) -> None:
    def begin(group: ThreadGroup) -> None:
        opt, params = make(group), arrays(0)
        for first in (0, 2):
            train(opt, params, group.rank, first, first + 2)
            opt.save(tmp_path / f"{group.rank}-{first}.safetensors", params)

    def go_on(group: ThreadGroup) -> tuple[Any, Any]:
        opt, params = make(group), arrays(0)
        if group.rank < 2:  # the last file of rank 1 is lost; rank 2 has none
            opt.load(tmp_path / f"{group.rank}-{2 - 2 * group.rank}.safetensors", params)
        train(opt, params, group.rank, 4, 6)
        return opt.outer_report, params

    run_in_threads(2, begin)
    (report, params), *others = run_in_threads(3, go_on)
    assert (report.round, report.members, report.newcomers) == (3, (0,), (1, 2))
    for _, theirs in others:
        for name in SHAPES:
            assert_same_bits(theirs[name], params[name])


def test_wrapped_optimizers(tmp_path: Path) -> None:
    """Micro-batches within, and a state that is spread over a site."""

    def body(group: ThreadGroup) -> None:
        def made() -> gs.DiLoCo:
            return make(group, inner=gs.Accumulate(gs.MultiOptimizer([gs.Lion(0.01), gs.SGD(0.1)], ["large"]), every=2))

        path = tmp_path / f"{group.rank}.safetensors"
        opt, params = made(), arrays(0)
        train(opt, params, group.rank, 0, 7)
        opt.save(path, params)
        again, copies = made(), arrays(1)
        again.load(path, copies)
        for some, its in ((opt, params), (again, copies)):
            train(some, its, group.rank, 7, 12)
        assert again.outer_report == opt.outer_report
        for name in SHAPES:
            assert_same_bits(copies[name], params[name])

    run_in_threads(2, body)


def test_a_spread_state_within(tmp_path: Path) -> None:
    """One site of two ranks, and the outer steps of one site alone."""
    path = tmp_path / "site.safetensors"

    def body(site: ThreadGroup) -> None:
        def made() -> gs.DiLoCo:
            return gs.DiLoCo(gs.Sharded(gs.Adam(0.1), site), every=EVERY, group=group_of_one())

        opt, params = made(), arrays(0)
        train(opt, params, 0, 0, 3)
        opt.save(path, params)
        again, copies = made(), arrays(1)
        again.load(path, copies)
        for some, its in ((opt, params), (again, copies)):
            train(some, its, 0, 3, 6)
        for name in SHAPES:
            assert_same_bits(copies[name], params[name])
            assert_same_bits(again.anchors[name], opt.anchors[name])

    run_in_threads(2, body)


class TestWhatDoesNotFit:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "run.safetensors"

        def body(group: ThreadGroup) -> None:
            opt, params = make(group), arrays(0)
            train(opt, params, 0, 0, 3)
            opt.save(path, params)

        run_in_threads(1, body)
        return path

    def test_another_round_or_wire(self, path: Path) -> None:
        def body(group: ThreadGroup) -> None:
            opt = gs.DiLoCo(gs.Adam(gs.cosine_decay(0.1, 20)), every=5, group=group, wire="int8")
            with pytest.raises(gs.MismatchError) as caught:
                opt.load(path, arrays(0))
            assert [tuple(d) for d in caught.value.differences] == [
                ("different", "opt", "DiLoCo(every=2, wire='float32')", "DiLoCo(every=5, wire='int8')")
            ]
            opt.load(path, arrays(0), hyperparameters="mine")
            assert (opt.every, opt.step, opt.outer.step) == (5, 3, 1)

        run_in_threads(1, body)

    def test_another_outer_optimizer(self, path: Path) -> None:
        def body(group: ThreadGroup) -> None:
            opt = gs.DiLoCo(gs.Adam(gs.cosine_decay(0.1, 20)), gs.Lion(0.1), every=EVERY, group=group)
            before = copy.deepcopy(opt.optimizer.state_dict())
            with pytest.raises(gs.MismatchError, match="SGD in the checkpoint, Lion here"):
                opt.load(path, arrays(0))
            assert opt.optimizer.state_dict() == before
            assert opt.step == 0

        run_in_threads(1, body)

    def test_none_on_one_side(self, path: Path, tmp_path: Path) -> None:
        params = arrays(0)
        with pytest.raises(gs.MismatchError, match="no DiLoCo here"):
            gs.Adam(0.1).load(path, params)
        opt = gs.Adam(0.1)
        opt.load(path, params, strict=False)
        assert (opt.step, set(opt.state)) == (3, set(SHAPES))
        with pytest.raises(gs.ConfigurationError, match="is a DiLoCo, which needs the other ranks: make it with its"):
            gs.load(path, params)

    def test_a_look_into_it(self, path: Path) -> None:
        def run(*arguments: Any) -> str:
            command = [sys.executable, "-c", "import gradstep.cli; gradstep.cli.main()", *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        shown = run("inspect", path, "--verify")
        assert "DiLoCo  1 outer step, 1 of 2 inner ones since, wire 'float32'" in shown
        assert "inner: Adam  step 3" in shown
        assert "outer: SGD  step 1" in shown
        found = json.loads(run("inspect", path, "--json"))
        assert found["tensors"] == 4 * (1 + 2 + 1 + 1)  # parameters, two slots, anchors, the outer momentum
        assert found["optimizer"]["round"] == 1
        assert "Nothing differs: 20 tensors" in run("diff", path, path)
