"""Outer steps against a simulation in float64, whose ranks are rows; membership, narrow wires, and what goes wrong."""

import copy
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diloco_checks
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from processes import needs_mpi, run_mpi, run_torch
from thread_group import ThreadGroup, group_of_one, run_in_threads

import gradstep as gs
from families import assert_same_bits
from gradstep.distributed import exchange
from gradstep.distributed.changes import spread
from gradstep.distributed.wire import WIRES

SHAPES = {"large": (70, 333), "odd": (1001,), "scalar": (), "empty": (0, 3)}
Make = Callable[[], gs.Optimizer]


def arrays(seed: Any, dtype: Any = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def alone() -> ThreadGroup:
    return group_of_one()


def copied(params: Any) -> dict[str, Any]:
    return {name: np.array(array) for name, array in params.items()}


def assert_equal(found: Any, expected: Any) -> None:
    for name, array in expected.items():
        assert_same_bits(np.asarray(found[name]), np.asarray(array), name)


class Simulation:
    """DiLoCo as the paper has it, with momentum SGD inside and out, in float64 and in one process."""

    def __init__(self, ranks: int, rate: float, momentum: float, outer_rate: float, outer_momentum: float) -> None:
        self.rate, self.momentum = rate, momentum
        self.outer_rate, self.outer_momentum = outer_rate, outer_momentum
        self.anchor = arrays(0, "float64")
        self.w = [arrays(0, "float64") for _ in range(ranks)]
        self.v = [dict.fromkeys(SHAPES, 0.0) for _ in range(ranks)]
        self.outer_v = dict.fromkeys(SHAPES, 0.0)

    def inner(self, step: int) -> None:
        for rank, (w, v) in enumerate(zip(self.w, self.v, strict=True)):
            for name, g in arrays((step, rank), "float64").items():
                v[name] = self.momentum * v[name] + g
                w[name] = w[name] - self.rate * v[name]

    def outer(self) -> float:
        total = 0.0
        for name in SHAPES:
            g = np.mean([self.anchor[name] - w[name] for w in self.w], axis=0)
            total += float((g**2).sum())
            self.outer_v[name] = self.outer_momentum * self.outer_v[name] + g
            step = g + self.outer_momentum * self.outer_v[name]  # Nesterov's
            self.anchor[name] = self.anchor[name] - self.outer_rate * step
            for w in self.w:
                w[name] = self.anchor[name].copy()
        return total**0.5


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_simulation_in_float64(ranks: int, dtype: str) -> None:
    simulated, norms = Simulation(ranks, 0.1, 0.5, 0.7, 0.9), []
    for step in range(9):
        simulated.inner(step)
        if step % 3 == 2:
            norms.append(simulated.outer())

    def work(group: ThreadGroup) -> Any:
        opt = gs.DiLoCo(gs.SGD(0.1, momentum=0.5), every=3, group=group)
        params, found = arrays(0, dtype), []
        for step in range(9):
            opt.apply_gradients(arrays((step, group.rank), dtype), params)
            assert (opt.step, opt.outer_due) == (step + 1, False)
            if step % 3 == 2:
                found.append(opt.outer_report.norm)
                assert_equal(params, opt.anchors)
        assert opt.outer_report[:4] == (True, 3, tuple(range(ranks)), ())
        return params, found

    results = run_in_threads(ranks, work)
    for params, found in results:
        assert_equal(params, results[0][0])
        assert found == results[0][1]
        tolerance = 1e-12 if dtype == "float64" else 2e-6
        np.testing.assert_allclose(found, norms, tolerance)
        for name, array in simulated.anchor.items():
            np.testing.assert_allclose(params[name], array, tolerance, 2 * tolerance, err_msg=name)


def test_one_inner_step_and_no_outer_momentum_is_data_parallel_training() -> None:
    def work(group: ThreadGroup) -> Any:
        opt, params = gs.DiLoCo(gs.SGD(0.1), gs.SGD(1.0), every=1, group=group), arrays(0)
        same, expected = gs.Sharded(gs.SGD(0.1), group), arrays(0)
        for step in range(5):
            grads = arrays((step, group.rank))
            opt.apply_gradients(grads, params)
            same.apply_gradients(grads, expected)
        return params, expected

    for params, expected in run_in_threads(3, work):
        for name, array in expected.items():
            np.testing.assert_allclose(params[name], array, 1e-6, 1e-6)


class TestNarrowWires:
    @pytest.mark.parametrize("wire", ["bfloat16", "int8"])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_what_is_rounded_away_comes_later(self, wire: Any, dtype: str) -> None:
        rounds, ranks = 40, 3

        def work(group: ThreadGroup) -> Any:
            opt = gs.DiLoCo(gs.SGD(1.0), gs.SGD(1.0), every=1, wire=wire, group=group)
            params, true = {"w": np.zeros(1500, dtype)}, np.zeros(1500)
            for step in range(rounds):
                every = [np.random.default_rng((step, rank)).standard_normal(1500) for rank in range(ranks)]
                true -= np.mean(every, axis=0)
                opt.apply_gradients({"w": every[group.rank].astype(dtype)}, params)
            return params["w"], true

        results = run_in_threads(ranks, work)
        for w, true in results:
            assert_same_bits(w, results[0][0])
            # Changes are below 5: half a quantum of theirs is lost, and half of one of their average.
            quantum = 5.0 / 127 if wire == "int8" else 4 * 2.0**-8
            assert np.abs(w - true).max() <= quantum
            assert np.abs(w - true).max() > quantum / 100

    @pytest.mark.parametrize("wire", ["bfloat16", "int8"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_each_number_is_rounded_to_nearest(self, wire: str, dtype: Any) -> None:
        values = np.random.default_rng(1).standard_normal((3, 512)).astype(dtype)
        values[1, :256] = 0
        values[2, 256:] *= 1e-30
        there = WIRES[wire]
        found = there.decode(there.encode(values), dtype)
        assert (found.shape, found.dtype) == (values.shape, dtype)
        if wire == "bfloat16":
            expected = values.astype(ml_dtypes.bfloat16).astype(dtype)
            assert_same_bits(found, expected)
        else:
            quanta = np.abs(values.reshape(3, 2, 256)).max(axis=2, keepdims=True) / 127
            errors = np.abs(found - values).reshape(3, 2, 256)
            assert (errors <= quanta * 0.5001).all()
            assert (errors.max(axis=2) >= 0.4 * quanta[..., 0]).all()

    @pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
    def test_what_is_not_finite_arrives_as_such(self, wire: str) -> None:
        values = np.ones((1, 512), np.float32)
        values[0, 3], values[0, 300] = np.nan, np.inf
        with np.errstate(all="ignore"):
            found = WIRES[wire].decode(WIRES[wire].encode(values), np.float32)
        assert not np.isfinite(found[0, [3, 300]]).any()

    def test_numbers_too_small_for_a_scale_become_zero(self) -> None:
        values = np.full((1, 256), 1e-40, np.float32)
        assert not WIRES["int8"].decode(WIRES["int8"].encode(values), np.float32).any()

    @pytest.mark.parametrize(("wire", "width"), [("float32", 4.0), ("bfloat16", 2.0), ("int8", 1 + 4 / 256)])
    def test_bytes_sent_are_those_of_the_formula(self, wire: Any, width: float) -> None:
        elements = 1 << 18

        def work(group: ThreadGroup) -> int:
            opt, params = gs.DiLoCo(gs.SGD(0.1), every=1, wire=wire, group=group), {"w": np.zeros(elements, np.float32)}
            opt.apply_gradients({"w": np.ones(elements, np.float32)}, params)
            return opt.outer_report.sent

        for ranks in (1, 2, 4):
            expected = 2 * (ranks - 1) / ranks * elements * width
            for sent in run_in_threads(ranks, work):
                assert expected <= sent <= expected + 1000

    def test_buckets_are_bounded_and_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(group: ThreadGroup) -> Any:
            opt, params = gs.DiLoCo(gs.SGD(0.1), every=1, wire="int8", group=group), arrays(0)
            for step in range(3):
                opt.apply_gradients(arrays((step, group.rank)), params)
            return params

        expected = run_in_threads(3, work)
        sizes: list[int] = []
        plain = ThreadGroup.exchange

        def noted(group: Any, parts: Any) -> Any:
            sizes.append(parts.nbytes)
            return plain(group, parts)

        monkeypatch.setattr(ThreadGroup, "exchange", noted)
        monkeypatch.setattr(exchange, "BUCKET", 40_000)
        for params, one in zip(run_in_threads(3, work), expected, strict=True):
            assert_equal(params, one)
        assert 5_000 < max(sizes) <= 40_000


def train(opt: Any, params: Any, steps: range, seed: int) -> None:
    for step in steps:
        opt.apply_gradients(arrays((step, seed)), params)


class TestMembership:
    def test_a_rank_that_begins_late_is_taken_in(self) -> None:
        rate = gs.linear_schedule(0.1, 0.0, 20)

        def make(group: Any) -> Any:
            return gs.DiLoCo(gs.SGD(rate, momentum=0.9), gs.SGD(0.5, momentum=0.9), every=2, wire="int8", group=group)

        pairs, late = [None, None], threading.Barrier(2, timeout=20)

        def work(group: ThreadGroup) -> Any:
            if group.rank < 2:
                opt, params = make(ThreadGroup(group.rank, pairs, late)), arrays(0)
                train(opt, params, range(4), group.rank)
                opt.group = group
                train(opt, params, range(4, 6), group.rank)
            else:
                opt, params = make(group), arrays(9)
                opt.outer_step(params)
                assert opt.optimizer.learning_rate == pytest.approx(0.1)
            report = opt.outer_report
            assert report[:4] == (True, 3, (0, 1), (2,))
            assert opt.step == 6
            momentum, first = opt.outer.state["large"]["v"].copy(), copied(params)
            train(opt, params, range(6, 8), group.rank)
            assert opt.outer_report[1:4] == (4, (0, 1, 2), ())
            assert opt.learning_rate == pytest.approx(0.1 - 0.1 * 7 / 20)
            return first, momentum, opt.outer.steps, copied(params), report.norm

        def without(group: ThreadGroup) -> Any:
            opt, params = make(group), arrays(0)
            train(opt, params, range(6), group.rank)
            return params, opt.outer.state["large"]["v"], opt.outer.steps, opt.outer_report.norm

        results = run_in_threads(3, work)
        for first, momentum, _, _, norm in results:
            assert_equal(first, results[0][0])
            assert_same_bits(momentum, results[0][1])
            assert norm == results[0][4]
        for _, _, steps, last, _ in results:
            assert steps == dict.fromkeys(SHAPES, 4)
            assert_equal(last, results[0][3])
        params, momentum, *_ = run_in_threads(2, without)[0]  # ranges of narrow averages differ, and so do their errors
        for name, array in params.items():
            np.testing.assert_allclose(results[0][0][name], array, 0, 0.05)

    def test_the_mean_is_that_of_the_members(self) -> None:
        def work(group: ThreadGroup) -> Any:
            alone = ThreadGroup(0, [None], threading.Barrier(1))
            opt, params = gs.DiLoCo(gs.SGD(1.0), gs.SGD(1.0), every=1, group=alone), {"w": np.zeros(3, np.float32)}
            if group.rank == 1:
                opt.apply_gradients({"w": np.full(3, 4, np.float32)}, params)
            opt.group = group
            opt.apply_gradients({"w": np.full(3, [np.nan, 2, 1][group.rank], np.float32)}, params)
            assert opt.outer_report[:4] == (True, 2, (1,), (0, 2))
            return params["w"].tolist(), opt.step

        assert run_in_threads(3, work) == [([-6.0] * 3, 2)] * 3

    def test_other_anchors_of_the_same_round_are_newcomers_too(self) -> None:
        def work(group: ThreadGroup) -> Any:
            alone = ThreadGroup(0, [None], threading.Barrier(1))
            opt, params = gs.DiLoCo(gs.SGD(1.0), gs.SGD(1.0), every=1, group=alone), {"w": np.zeros(3)}
            opt.apply_gradients({"w": np.full(3, [1.0, 2.0, 1.0][group.rank])}, params)
            opt.group = group
            opt.apply_gradients({"w": np.full(3, 1.0)}, params)
            assert opt.outer_report[1:4] == (2, (0, 2), (1,))
            return params["w"].tolist()

        assert run_in_threads(3, work) == [[-2.0] * 3] * 3

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_rank_falls_out_and_the_others_go_on(self, dtype: str) -> None:
        smaller, fewer, arrived = [None, None], threading.Barrier(2, timeout=20), threading.Barrier(3, timeout=20)

        def work(group: ThreadGroup) -> Any:
            opt = gs.DiLoCo(gs.SGD(0.1), every=2, group=group, wire="bfloat16")
            params = arrays(0, dtype)
            for step in range(2):
                opt.apply_gradients(arrays((step, group.rank)), params)
            arrived.wait()
            if group.rank == 2:
                opt.apply_gradients(arrays((2, group.rank)), params)
                group._barrier.abort()
                return None
            opt.apply_gradients(arrays((2, group.rank)), params)
            anchors, momentum = copied(opt.anchors), opt.outer.state["large"]["v"].copy()
            twin, expected = gs.SGD(0.1), copied(params)
            with pytest.raises(gs.CommunicationError, match="^the inner step has been taken, the outer step is due: .*"
                               r"set opt\.group to a group of the ranks that are left") as caught:  # fmt: skip
                opt.apply_gradients(arrays((3, group.rank)), params)
            assert "start again" not in str(caught.value)
            twin.apply_gradients(arrays((3, group.rank)), expected)
            assert_equal(params, expected)
            assert_equal(opt.anchors, anchors)
            assert_same_bits(opt.outer.state["large"]["v"], momentum)
            assert (opt.outer_due, opt.step, opt.outer_report.round) == (True, 4, 1)
            before = copied(params)
            with pytest.raises(gs.CommunicationError, match="no outer step has been taken"):
                opt.apply_gradients(arrays((4, group.rank)), params)
            assert_equal(params, before)
            opt.group = ThreadGroup(group.rank, smaller, fewer)
            opt.apply_gradients(arrays((4, group.rank)), params)  # the outer step that was due, and an inner step
            assert (opt.outer_due, opt.step, opt.outer_report[1:4]) == (False, 5, (2, (0, 1), ()))
            opt.apply_gradients(arrays((5, group.rank)), params)
            assert opt.outer_report.round == 3
            return params

        first, second, _ = run_in_threads(3, work)
        assert_equal(first, second)

    def test_a_newcomer_whose_step_fails_is_what_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        averaged, failed = gs.DiLoCo._averaged, threading.local()

        def fail_once(opt: Any, *arguments: Any) -> Any:
            losses = averaged(opt, *arguments)
            if opt.group.size == 2 and not hasattr(failed, "yes"):
                failed.yes = True
                raise ZeroDivisionError
            return losses

        def work(group: ThreadGroup) -> Any:
            alone = ThreadGroup(0, [None], threading.Barrier(1))
            opt, params = gs.DiLoCo(gs.SGD(1.0), every=1, group=group if group.rank else alone), arrays(group.rank)
            if group.rank == 0:
                opt.apply_gradients(arrays(7), params)
                opt.group = group
            before, anchors = copied(params), copied(opt.anchors)
            steps, count = opt.outer.steps, opt.outer.step
            with pytest.raises(ZeroDivisionError):
                opt.outer_step(params)
            assert_equal(params, before)
            assert_equal(opt.anchors, anchors)
            assert (opt.outer.steps, opt.outer.step, opt.step) == (steps, count, 1 - group.rank)
            opt.outer_step(params)
            assert (opt.outer_report[1:4], opt.outer.step, opt.step) == ((2, (0,), (1,)), 2, 1)
            return params

        monkeypatch.setattr(gs.DiLoCo, "_averaged", fail_once)
        first, second = run_in_threads(2, work)
        assert_equal(first, second)

    def test_pieces_come_from_all_members(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exchange, "BUCKET", 1000)

        def work(group: ThreadGroup) -> Any:
            members = [0, 2]
            mine = arrays(0) if group.rank in members else {n: np.zeros_like(a) for n, a in arrays(0).items()}
            spread(group, members, list(mine.values()))
            return mine

        for found in run_in_threads(4, work):
            assert_equal(found, arrays(0))


class TestWhatOneRankFinds:
    """Every rank raises the same error, and only the inner step has been taken."""

    def said(self, make: Callable[[ThreadGroup], Any], spoil: Callable[[Any, int, Any], Any] = lambda *_: None) -> str:
        def work(group: ThreadGroup) -> str:
            opt, params = make(group), arrays(0)
            spoil(opt, group.rank, params)
            twin, expected = gs.SGD(0.1), copied(params)
            with pytest.raises(gs.GradstepError) as caught:
                opt.apply_gradients(arrays((1, group.rank)), params)
            twin.apply_gradients(arrays((1, group.rank)), expected)
            assert_equal(params, expected)
            assert (opt.step, opt.outer_due, opt.outer_report, opt.outer.step) == (1, True, None, 0)
            assert caught.value.__notes__ == ["the inner step has been taken, the outer step is due"]
            return f"{type(caught.value).__name__}: {caught.value}"

        (found,) = set(run_in_threads(3, work))
        return found

    def make(self, group: ThreadGroup, **options: Any) -> Any:
        return gs.DiLoCo(gs.SGD(0.1), **{"every": 1, "group": group, **options})

    def test_other_values_to_begin_with(self) -> None:
        def spoil(_: Any, rank: int, params: Any) -> None:
            params["odd"][3] += rank == 1

        said = self.said(self.make, spoil)
        assert re.match(
            r"ConfigurationError: the values of params\['odd'\] by their CRC-32 \(seed all ranks alike, or send those "
            r"of rank 0 to the others\): \w{8} on rank 0, but \w{8} on rank 1; the ranks of a DiLoCo optimizer take",
            said,
        )

    def test_another_wire_and_another_outer_optimizer(self) -> None:
        said = self.said(lambda group: self.make(group, wire="int8" if group.rank == 2 else "float32"))
        assert "wire: float32 on rank 0, but int8 on rank 2" in said
        said = self.said(lambda group: self.make(group, outer=gs.SGD(0.7 + group.rank)))
        assert "the outer optimizer: SGD(learning_rate=0.7, " in said
        assert "but SGD(learning_rate=1.7, " in said

    def test_other_values_of_a_schedule(self) -> None:
        def rate(rank: int) -> Callable[[int], float]:
            return lambda step: 0.5 + rank

        said = self.said(lambda group: self.make(group, outer=gs.SGD(rate(group.rank))))
        assert "the outer optimizer's learning_rate: 0.5 on rank 0, but 1.5 on rank 1" in said

    def test_a_schedule_that_fails(self) -> None:
        def work(group: ThreadGroup) -> str:
            rate = [0.5, float("nan") if group.rank == 1 else 0.5]
            opt, params = self.make(group, outer=gs.SGD(lambda step: rate[step])), arrays(0)
            opt.apply_gradients(arrays((0, group.rank)), params)
            anchors = copied(opt.anchors)
            with pytest.raises(gs.NonFiniteScalarError) as caught:
                opt.apply_gradients(arrays((1, group.rank)), params)
            assert_equal(opt.anchors, anchors)
            rate[1] = 0.5
            opt.outer_step(params)
            assert_equal(params, opt.anchors)
            return re.sub(" at 0x.*?>", ">", str(caught.value))

        (said,) = set(run_in_threads(3, work))
        assert said.startswith("rank 1: SGD's learning_rate: at step 1 the schedule")

    def test_a_parameter_that_only_some_have(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt, params = self.make(group), arrays(0)
            if group.rank == 1:
                del params["odd"]
            with pytest.raises(gs.ConfigurationError) as caught:
                opt.outer_step(params)
            return str(caught.value)

        (said,) = set(run_in_threads(2, work))
        assert said.startswith(
            "params['odd']: float32 of shape (1001,) on rank 0, but there is none on rank 1; the ranks"
        )

    def test_a_parameter_of_another_shape_than_its_anchor(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt, params = self.make(group, every=2), arrays(0)
            opt.apply_gradients(arrays((1, group.rank)), params)
            if group.rank:
                params["odd"] = params["odd"][:5]
            with pytest.raises(gs.ShapeError) as caught:
                opt.outer_step(params)
            return str(caught.value)

        (said,) = set(run_in_threads(2, work))
        assert said == (
            "rank 1: params['odd'] is float32 of shape (5,), but its anchor is float32 of shape (1001,); "
            "opt.init(params) begins anew"
        )

    @pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
    def test_changes_that_are_not_finite(self, wire: Any) -> None:
        def spoil(opt: Any, rank: int, params: Any) -> None:
            opt.apply_gradients({"odd": np.full(1001, np.nan if rank == 1 else 0, np.float32)}, params)

        def work(group: ThreadGroup) -> str:
            opt, params = self.make(group, every=2, wire=wire, outer=gs.SGD(1.0, nonfinite="raise")), arrays(0)
            spoil(opt, group.rank, params)
            with pytest.raises(gs.NonFiniteGradientError, match=r"hold NaN or infinity: .*odd"):
                opt.apply_gradients({"odd": np.zeros(1001, np.float32)}, params)
            assert opt.outer_due and opt.outer_report is None
            assert_equal(opt.anchors, arrays(0))
            params["odd"][:] = arrays(0)["odd"]
            opt.outer_step(params)
            assert_equal(params, arrays(0))
            return ""

        run_in_threads(3, work)

    def test_an_outer_step_that_is_left_out_goes_back_to_the_anchors(self) -> None:
        def work(group: ThreadGroup) -> None:
            opt, params = self.make(group, wire="int8", outer=gs.SGD(1.0, nonfinite="skip")), arrays(0)
            opt.apply_gradients({"odd": np.full(1001, [1, np.inf][group.rank], np.float32)}, params)
            assert_equal(params, arrays(0))
            assert (opt.outer_report[:2], opt.outer.step) == ((False, 1), 0)
            opt.apply_gradients({"odd": np.full(1001, 1, np.float32)}, params)
            np.testing.assert_allclose(params["odd"], arrays(0)["odd"] - 0.1, 1e-4, 1e-4)

        run_in_threads(2, work)

    def test_the_outer_optimizer_clips_the_averaged_change(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt = self.make(group, outer=gs.SGD(1.0, clip_norm=0.5))
            params = {"w": np.zeros(4)}
            opt.apply_gradients({"w": np.full(4, 10.0 * group.rank)}, params)
            return params["w"].tolist(), opt.outer_report.norm, opt.outer.report.grad_norm

        for w, norm, seen in run_in_threads(2, work):
            np.testing.assert_allclose(w, -0.25, 1e-5)
            assert norm == pytest.approx(1.0)
            assert seen == pytest.approx(1.0)


class TestWhatIsInside:
    def trained(self, make: Make, calls: int = 4, every: int = 1, ranks: int = 2, **options: Any) -> tuple[Any, Any]:
        def work(group: ThreadGroup) -> Any:
            opt = gs.DiLoCo(make(), gs.SGD(1.0), every=every, group=group, **options)
            params = arrays(0)
            for call in range(calls):
                opt.apply_gradients(arrays((call, group.rank)), params)
            return opt, params

        (opt, params), *others = run_in_threads(ranks, work)
        for _, there in others:
            assert_equal(there, params)
        return opt, params

    def test_rounds_of_micro_batches_count_when_they_end(self) -> None:
        opt, params = self.trained(lambda: gs.Accumulate(gs.SGD(0.1), every=2), calls=4)
        assert (opt.step, opt.outer_report.round, opt.micro_step) == (2, 2, 0)
        gradients = [np.mean([arrays((call, rank))["odd"] for rank in (0, 1)], axis=0) for call in range(4)]
        np.testing.assert_allclose(params["odd"], arrays(0)["odd"] - 0.05 * np.sum(gradients, axis=0), 1e-5, 1e-6)

    def test_steps_that_are_left_out_count(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt, params = gs.DiLoCo(gs.SGD(0.1, nonfinite="skip"), gs.SGD(1.0), every=2, group=group), arrays(0)
            for call in range(2):
                spoilt = np.full(1001, np.nan if call and group.rank else 1, np.float32)
                opt.apply_gradients({"odd": spoilt}, params)
            return opt.step, opt.outer_report.round, params

        (first, _, params), (second, _, there) = run_in_threads(2, work)
        assert (first, second) == (2, 1)
        assert_equal(params, there)
        np.testing.assert_allclose(params["odd"], arrays(0)["odd"] - 0.15, 1e-5, 1e-6)

    def test_several_optimizers(self) -> None:
        opt, _ = self.trained(lambda: gs.MultiOptimizer([gs.Adam(0.01), gs.SGD(0.1)], ["odd"]), every=2)
        assert (opt.step, opt.outer_report.round) == (4, 2)

    def test_several_outer_optimizers(self) -> None:
        def work(group: ThreadGroup) -> Any:
            outer = gs.MultiOptimizer([gs.SGD(0.5), gs.Adam(0.01)], ["odd"], clip_norm=10.0)
            late = ThreadGroup(0, [None], threading.Barrier(1))
            opt, params = gs.DiLoCo(gs.SGD(0.1), outer, every=1, group=group if group.rank else late), arrays(0)
            if group.rank == 0:
                opt.apply_gradients(arrays(3), params)
                opt.group = group
            opt.outer_step(params)
            opt.apply_gradients(arrays((4, group.rank)), params)
            assert opt.outer_report.members == (0, 1)
            return params, opt.outer.steps, opt.outer.step, copied(opt.outer.state["large"])

        first, second = run_in_threads(2, work)
        assert_equal(first[0], second[0])
        assert_equal(first[3], second[3])
        assert first[1:3] == second[1:3] == (dict.fromkeys(SHAPES, 3) | {"large": 3}, 3)

    def test_ranks_that_share_state_within_a_site(self) -> None:
        """Four ranks at two sites: 0 and 1, 2 and 3; those at the same place of their sites exchange changes."""
        sites = [([None] * 2, threading.Barrier(2, timeout=20)) for _ in range(2)]
        across = [([None] * 2, threading.Barrier(2, timeout=20)) for _ in range(2)]
        arrived = threading.Barrier(4, timeout=20)

        def work(group: ThreadGroup) -> Any:
            site, place = divmod(group.rank, 2)
            inside, outside = ThreadGroup(place, *sites[site]), ThreadGroup(site, *across[place])
            opt, params = gs.DiLoCo(gs.Sharded(gs.SGD(0.1, momentum=0.9), inside), every=2, group=outside), arrays(0)
            for step in range(4):
                opt.apply_gradients(arrays((step, group.rank)), params)
            last = copied(params)
            opt.apply_gradients(arrays((9, group.rank)), params)
            arrived.wait()
            if group.rank == 1:
                across[1][1].abort()
            before = copied(opt.anchors)
            with pytest.raises(gs.CommunicationError) as caught:
                opt.apply_gradients(arrays((9, group.rank)), params)
            assert_equal(opt.anchors, before)
            assert opt.outer_due and opt.outer_report.round == 2
            return last, str(caught.value)

        def averaged(group: ThreadGroup) -> Any:
            opt, params = gs.DiLoCo(gs.SGD(0.1, momentum=0.9), every=2, group=group), arrays(0)
            for step in range(4):
                both = [arrays((step, 2 * group.rank + place)) for place in (0, 1)]
                opt.apply_gradients({n: np.asarray((both[0][n] + both[1][n]) / np.float32(2)) for n in SHAPES}, params)
            return params

        expected = run_in_threads(2, averaged)[0]
        results = run_in_threads(4, work)
        for last, _ in results:
            assert_equal(last, expected)
        assert "rank 1 of the ranks that share one state could not reach the others" in results[0][1]
        assert "another one failed or is late" in results[1][1]


class TestParameters:
    def test_small_changes_of_narrow_parameters_add_up(self) -> None:
        """Half of the ranks move by a unit of bfloat16 each time: the mean is half of a unit, which `w` cannot hold."""

        def work(group: ThreadGroup) -> Any:
            opt = gs.DiLoCo(gs.SGD(1.0), gs.SGD(1.0), every=1, group=group)
            params = {"w": np.ones(300, ml_dtypes.bfloat16)}
            for _ in range(8):
                opt.apply_gradients({"w": np.full(300, -(2.0**-7) * group.rank, np.float32)}, params)
            assert params["w"].dtype == ml_dtypes.bfloat16
            return float(params["w"][0]), float(opt.anchors["w"][0])

        assert run_in_threads(2, work) == [(1 + 4 * 2.0**-7,) * 2] * 2

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_float32_copies_of_narrow_parameters_take_the_anchor(self, dtype: str) -> None:
        """Steps of 2**-12, far below a unit, on either rank; only the copies hold them."""

        def work(group: ThreadGroup) -> Any:
            inner = gs.SGD(1.0, master_weights=True)
            opt = gs.DiLoCo(inner, gs.SGD(1.0), every=2, group=group)
            params = {"w": np.ones(300, dtype)}
            for _ in range(32):
                opt.apply_gradients({"w": np.full(300, -(2.0**-12) * (1 + group.rank), np.float32)}, params)
            assert inner.state["w"]["w.master"][0] == opt.anchors["w"][0]
            return float(opt.anchors["w"][0])

        assert run_in_threads(2, work) == [1 + 48 * 2.0**-12] * 2

    def test_tensors_of_torch_in_any_layout(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt = gs.DiLoCo(gs.Adam(0.1), every=2, wire="bfloat16", group=group)
            params = {
                "turned": torch.zeros(30, 40).T.requires_grad_(),
                "narrow": torch.ones(9, dtype=torch.bfloat16),
                "spread": torch.ones(10, 2, dtype=torch.float16)[:, 0],
                "count": torch.zeros(3, dtype=torch.int64),
            }
            rng = np.random.default_rng(group.rank)
            for step in range(4):
                grads = {n: torch.from_numpy(rng.standard_normal(p.shape)) for n, p in params.items() if n != "count"}
                version = params["turned"]._version
                opt.apply_gradients(grads, params)
                assert params["turned"]._version == version + 1 + step % 2
            assert set(opt.anchors) == {"turned", "narrow", "spread"}
            return {name: p.detach().to(torch.float64).numpy().copy() for name, p in params.items()}

        first, second = run_in_threads(2, work)
        assert_equal(first, second)
        assert (first["spread"] != 1).all()

    def test_what_is_frozen_stays(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt, params = gs.DiLoCo(gs.SGD(0.1, frozen=["o*"]), every=1, group=group), arrays(0)
            params["odd"][:] = group.rank
            opt.apply_gradients(arrays((1, group.rank)), params)
            assert "odd" not in opt.anchors
            assert (params["odd"] == group.rank).all()
            return params["large"]

        assert_same_bits(*run_in_threads(2, work))

    def test_parameters_may_come_late(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt, params = gs.DiLoCo(gs.SGD(0.1), gs.SGD(1.0), every=2, wire="int8", group=group), arrays(0)
            late = params.pop("odd")
            for step in range(3):
                opt.apply_gradients({"large": arrays((step, group.rank))["large"]}, params)
            params["odd"] = late
            opt.apply_gradients({"odd": np.full(1001, 1.0 + group.rank, np.float32)}, params)
            assert opt.outer_report[1:4] == (2, (0, 1), ())
            return params

        first, second = run_in_threads(2, work)
        assert_equal(first, second)
        np.testing.assert_allclose(first["odd"], arrays(0)["odd"] - 0.15, 0, 0.002)

    def test_init_begins_anew_on_all_ranks(self) -> None:
        def run(group: ThreadGroup, opt: Any) -> Any:
            params = arrays(0)
            for step in range(4):
                opt.apply_gradients(arrays((step, group.rank)), params)
            return params, opt.outer_report[1:4], opt.outer.steps

        def work(group: ThreadGroup) -> Any:
            opt = gs.DiLoCo(gs.SGD(0.1, momentum=0.5), every=2, wire="int8", group=group)
            first = run(group, opt)
            opt.init(arrays(0))
            assert not opt.anchors
            second = run(group, opt)
            assert first[1:] == second[1:]
            assert (opt.step, opt.outer.step) == (8, 4)
            return first[0], second[0]

        for first, second in run_in_threads(2, work):
            assert_equal(first, second)

    def test_a_first_step_that_fails_keeps_no_anchor(self, alone: ThreadGroup) -> None:
        opt, params = gs.DiLoCo(gs.SGD(0.1), gs.SGD(1.0), every=1, group=alone), {"w": np.zeros(3)}
        with pytest.raises(gs.ShapeError):
            opt.apply_gradients({"w": np.ones(4)}, params)
        assert not opt.anchors
        params["w"][:] = 5
        opt.apply_gradients({"w": np.ones(3)}, params)
        np.testing.assert_allclose(params["w"], 4.9)

    def test_what_lies_on_others_or_cannot_be_written(self, alone: ThreadGroup) -> None:
        opt, base = gs.DiLoCo(gs.SGD(0.1), group=alone), np.zeros(4)
        with pytest.raises(gs.AliasedParametersError):
            opt.apply_gradients({}, {"v": base[1:], "w": base[:3]})
        base.setflags(write=False)
        with pytest.raises(gs.ReadOnlyError):
            opt.apply_gradients({}, {"w": base})
        assert opt.step == 0


class TestWhatIsRefused:
    def test_arrays_that_never_change(self, alone: ThreadGroup) -> None:
        with pytest.raises(gs.ArgumentTypeError, match="not of JAX, whose arrays never change"):
            gs.DiLoCo(gs.SGD(0.1), group=alone).apply_gradients({"w": jnp.ones(3)}, {"w": jnp.ones(3)})

    def test_arguments(self, alone: ThreadGroup) -> None:
        inner = gs.SGD(0.1)
        stateful = gs.Adam(0.1)
        stateful.init({"w": np.ones(3)})
        for error, match, arguments in [
            (gs.ArgumentTypeError, "DiLoCo takes an optimizer of gradstep, got 3", {"inner": 3}),
            (gs.ArgumentTypeError, "outer must be an optimizer of gradstep, got 3", {"outer": 3}),
            (
                gs.ConfigurationError,
                r"steps alone, got Accumulate.*opt\.optimizer",
                {"outer": gs.Accumulate(inner, every=2)},
            ),
            (gs.ConfigurationError, r"without state, got Adam.*outer\.init\(\{\}\)", {"outer": stateful}),
            (gs.ConfigurationError, "another optimizer than the inner one", {"outer": inner}),
            (gs.OutOfRangeError, "every must be at least 1, got 0", {"every": 0}),
            (gs.ArgumentTypeError, "the number of inner steps in a round, got 1.5", {"every": 1.5}),
            (gs.ConfigurationError, "wire must be one of 'float32', 'bfloat16', 'int8', got 'int4'", {"wire": "int4"}),
            (gs.ArgumentTypeError, "group must be a process group", {"group": 4}),
            (gs.ConfigurationError, "has its own: init_process_group", {"timeout": 3.0}),
            (gs.ConfigurationError, "takes outer steps already", {"inner": gs.DiLoCo(gs.SGD(0.1), group=alone)}),
        ]:
            with pytest.raises(error, match=match):
                gs.DiLoCo(**{"inner": inner, "group": alone, **arguments})
        opt = gs.DiLoCo(inner, group=alone)
        with pytest.raises(gs.ArgumentTypeError, match="group must be a process group"):
            opt.group = 4
        assert opt.group is alone

    def test_what_cannot_be_around_it(self, alone: ThreadGroup) -> None:
        opt = gs.DiLoCo(gs.SGD(0.1), group=alone)
        for around, match in [
            (lambda: gs.Accumulate(opt, every=2), r"inside of a Accumulate; .*DiLoCo\(Accumulate\("),
            (lambda: gs.MultiOptimizer([opt]), r"DiLoCo\(MultiOptimizer\("),
            (lambda: gs.Sharded(opt, alone), r"DiLoCo\(Sharded\("),
        ]:
            with pytest.raises(gs.ConfigurationError, match=match):
                around()

    def test_copies(self, alone: ThreadGroup) -> None:
        with pytest.raises(gs.ConfigurationError, match="cannot be copied, as its group cannot; make another one"):
            copy.deepcopy(gs.DiLoCo(gs.SGD(0.1), group=alone))


def test_memory_counts_anchors_and_what_the_wire_owes(alone: ThreadGroup) -> None:
    params = {"w": np.zeros((1 << 10, 1 << 10), np.float32), "narrow": np.zeros(1 << 20, ml_dtypes.bfloat16)}
    size = 8 << 20
    exact = gs.DiLoCo(gs.Adam(0.1), gs.SGD(0.7, momentum=0.9), group=alone).memory(params)
    assert (exact.slots, exact.anchors, exact.scratch) == (3 * size, size, 4 * size)
    narrow = gs.DiLoCo(gs.Adam(0.1), gs.SGD(0.7), group=alone, wire="int8").memory(params)
    assert (narrow.slots, narrow.anchors, narrow.scratch) == (2 * size, 3 * size, 6 * size)


def test_it_shows_everything(alone: ThreadGroup) -> None:
    opt = gs.DiLoCo(gs.SGD(0.1), gs.SGD(0.5), every=3, wire="int8", group=alone)
    assert repr(opt) == (f"DiLoCo({opt.optimizer!r}, {opt.outer!r}, every=3, wire='int8', rank 0 of 1 by threads)")
    assert (opt.every, opt.wire, opt.outer_due, opt.outer_report) == (3, "int8", False, None)
    assert gs.DiLoCo(gs.SGD(0.1), group=alone).every == 500
    assert opt.learning_rate == 0.1
    opt.learning_rate = 0.2
    assert opt.optimizer.learning_rate == 0.2


CHECKS = Path(diloco_checks.__file__)


def test_gloo() -> None:
    *survivors, dead = run_torch(3, CHECKS, "gloo")
    for rank in survivors:
        assert (rank.code, rank.out) == (0, "checked\ngoes on\n"), rank.err
    assert (dead.code, dead.out) == (7, "checked\n"), dead.err


@needs_mpi
def test_mpi() -> None:
    for rank in run_mpi(3, CHECKS, "MPI"):
        assert (rank.code, rank.out) == (0, "checked\n"), rank.err


@pytest.mark.parametrize("wire", ["int8", "bfloat16"])
class TestWhatIsOwed:
    """Changes of one coordinate after another, then none: what the wire owed must have come, where it belongs."""

    @staticmethod
    def grads(rank: int, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((step, rank))
        return {"w": np.asarray(rng.standard_normal(1024) * np.repeat([1.0, 1e-4], 512), np.float32)}

    @staticmethod
    def settle(opt: Any, params: Any, calls: int = 8) -> Any:
        for _ in range(calls):
            opt.apply_gradients({name: np.zeros_like(array) for name, array in params.items()}, params)
        return params["w"]

    def expected(self, ranks: int, steps: int) -> Any:
        return -sum(self.grads(rank, step)["w"].astype(float) for rank in range(ranks) for step in range(steps)) / ranks

    def made(self, group: ThreadGroup, wire: Any) -> gs.DiLoCo:
        return gs.DiLoCo(gs.SGD(1.0), gs.SGD(1.0), every=1, group=group, wire=wire)

    def close(self, found: Any, expected: Any) -> None:
        """Within the rounding of float32, which is far below what one step of a wire rounds away."""
        np.testing.assert_allclose(found[:512], expected[:512], atol=2e-6)
        np.testing.assert_allclose(found[512:], expected[512:], atol=2e-7)

    def test_ranks_that_change_places(self, wire: str) -> None:
        optimizers: dict[int, Any] = {}

        def begin(group: ThreadGroup) -> None:
            opt, params = self.made(group, wire), {"w": np.zeros(1024, np.float32)}
            for step in range(3):
                opt.apply_gradients(self.grads(group.rank, step), params)
            optimizers[group.rank] = opt, params

        def swapped(group: ThreadGroup) -> Any:
            opt, params = optimizers[1 - group.rank]
            opt.group = group
            return self.settle(opt, params)

        run_in_threads(2, begin)
        for found in run_in_threads(2, swapped):
            self.close(found, self.expected(2, 3))

    def test_parameters_that_come_late_and_other_sizes_of_the_group(self, wire: str) -> None:
        optimizers: dict[int, Any] = {}

        def begin(group: ThreadGroup) -> None:
            opt, params = self.made(group, wire), {"w": np.zeros(1024, np.float32)}
            for step in range(3):
                opt.apply_gradients(self.grads(group.rank, step), params)
            params["late"] = np.zeros(700, np.float32)
            self.settle(opt, params, 1)
            optimizers[group.rank] = opt, params

        def fewer(group: ThreadGroup) -> Any:
            opt, params = optimizers[group.rank]
            opt.group = group
            return self.settle(opt, params)

        run_in_threads(3, begin)
        owed = [opt._losses for opt, _ in optimizers.values()]
        assert any(np.abs(array).max() > 1e-6 for each in owed for array in each.averages.values())
        # What rank 2 owes leaves with it; of the others nothing may be lost.
        gone = owed[2].sent["w"].astype(float)
        for (layout, rank), array in owed[2].averages.items():
            rows = layout.zeros()
            rows[rank] = array * 3
            gone = gone + layout.by_name(rows)["w"]
        sent = sum(each.sent["w"].astype(float) for each in owed[:2])
        for found in run_in_threads(2, fewer):
            assert np.isfinite(sent).all()
            error = np.abs(found - self.expected(3, 3)).max()
            assert error <= np.abs(gone).max() / 3 + np.abs(sent).max() / 3 + 1e-5

    @pytest.mark.parametrize("last", range(1, 9))
    def test_a_rank_that_is_lost_at_any_moment_pays_once(self, wire: str, last: int) -> None:
        optimizers: dict[int, Any] = {}

        class Failing(ThreadGroup):
            calls = 0

            def _exchange(self, mine: Any) -> Any:
                found = super()._exchange(mine)
                self.calls += 1
                if self.calls == last:
                    raise gs.CommunicationError("lost")
                return found

        def begin(group: ThreadGroup) -> None:
            opt, params = self.made(group, wire), {"w": np.zeros(1024, np.float32)}
            for step in range(3):
                opt.apply_gradients(self.grads(group.rank, step), params)
            optimizers[group.rank] = opt, params

        def lose(group: ThreadGroup) -> None:
            opt, params = optimizers[group.rank]
            opt.group = Failing(group.rank, group._places, group._barrier) if group.rank == 1 else group
            try:
                self.settle(opt, params, 1)
            except gs.CommunicationError:
                group._barrier.abort()

        def together(group: ThreadGroup) -> Any:
            opt, params = optimizers[group.rank]
            opt.group = group
            opt.outer_step(params)
            return self.settle(opt, params), opt.outer_report

        run_in_threads(3, begin)
        step = max(np.abs(array).max() for opt, _ in optimizers.values() for array in opt._losses.sent.values())
        run_in_threads(3, lose)
        found = run_in_threads(3, together)
        for w, _ in found:
            assert_same_bits(w, found[0][0])
            # A newcomer takes what it owed with it: at most its part of one step of the wire, and never twice.
            assert np.abs(w - self.expected(3, 3)).max() <= step + 1e-5


def test_parameters_that_come_late_must_begin_alike() -> None:
    def body(group: ThreadGroup) -> str:
        opt, params = gs.DiLoCo(gs.SGD(0.1), every=1, group=group), {"w": np.zeros(3, np.float32)}
        opt.apply_gradients({"w": np.ones(3, np.float32)}, params)
        params["late"] = np.full(2, group.rank, np.float32)
        with pytest.raises(gs.ConfigurationError) as caught:
            opt.apply_gradients({name: np.ones_like(array) for name, array in params.items()}, params)
        params["late"][:] = 0
        opt._anchors["late"][:] = 0
        opt.outer_step(params)
        assert opt.outer_report.members == (0, 1)
        return str(caught.value)

    (error,) = set(run_in_threads(2, body))
    assert error.startswith("the values of params['late'] by their CRC-32 (seed all ranks alike")


def test_changes_that_a_narrow_wire_cannot_carry() -> None:
    def body(group: ThreadGroup) -> None:
        opt, params = gs.DiLoCo(gs.SGD(1.0), every=1, group=group, wire="int8"), {"w": np.zeros(3)}
        with pytest.raises(
            gs.OutOfRangeError, match=r"params\['w'\] reaches 1e\+39, and a narrow wire carries what float32"
        ):
            opt.apply_gradients({"w": np.full(3, 1e39)}, params)

    run_in_threads(2, body)


def test_a_newcomer_with_nothing_but_empty_parameters() -> None:
    def body(group: ThreadGroup) -> Any:
        opt, params = gs.DiLoCo(gs.SGD(1.0), gs.SGD(1.0), every=1, group=group), {"w": np.zeros((0, 3), np.float32)}
        opt._round = 1 - group.rank
        return opt.outer_step(params) and opt.outer_report.newcomers

    assert run_in_threads(2, body) == [(1,), (1,)]
