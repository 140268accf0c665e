"""Steps of several ranks against those of one process with the same averaged gradients: with `==` where promised."""

import functools
import pkgutil
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from thread_group import ThreadGroup, group_of_one, run_in_threads

import gradstep as gs
from families import ELEMENTWISE_FAMILIES, MATRIX_FAMILIES, assert_same_bits, configurations, in_both_dtypes
from gradstep.distributed import exchange

# One tensor that is cut, one that is not quite a block, and some with fewer elements than there are ranks.
SHAPES = {"large": (300, 333), "odd": (40_001,), "scalar": (), "empty": (0, 3), "small": (3, 1)}
MATRICES = {"wide": (12, 33), "tall": (40, 8), "deep": (2, 6, 5), "vector": (50,), "scalar": ()}
RANKS = [1, 2, 3, 4]  # for one configuration of each family


def arrays(seed: int, dtype: Any = "float32", shapes: Mapping[str, Any] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def gradients(step: int, rank: int, dtype: Any = "float32", shapes: Mapping[str, Any] = SHAPES) -> dict[str, Any]:
    """Multiples of 1/4, of which any order of adding gives the same sum."""
    rng = np.random.default_rng((step, rank))
    return {name: np.asarray(rng.integers(-8, 9, shape) / 4, dtype) for name, shape in shapes.items()}


def averaged(step: int, ranks: int, dtype: Any = "float32", shapes: Mapping[str, Any] = SHAPES) -> dict[str, Any]:
    kind = np.float64 if dtype == "float64" else np.float32
    parts = [gradients(step, rank, dtype, shapes) for rank in range(ranks)]
    return {
        name: np.asarray(functools.reduce(np.add, [part[name].astype(kind) for part in parts]) / kind(ranks), kind)
        for name in shapes
    }


Make = Callable[[], gs.Optimizer]


@pytest.fixture
def alone_in_group() -> ThreadGroup:
    return group_of_one()


class Outcome:
    """What a rank has after its steps."""

    def __init__(self, opt: Any, params: Mapping[str, Any]) -> None:
        self.params, self.report, self.step, self.steps = dict(params), opt.report, opt.step, opt.steps
        self.starts = starts_of(opt)
        self.state = {
            name: {slot: np.array(value) for slot, value in slots.items()} for name, slots in opt.state.items()
        }


def starts_of(opt: Any) -> dict[str, int]:
    """Where this rank's part of each tensor begins."""
    opt = opt.optimizer if isinstance(opt, gs.Accumulate) else opt
    if not isinstance(opt, gs.Sharded):
        return {}
    return {name: portion.start for name, portion in opt._partition.of_rank(opt.group.rank, opt.state).items()}


def sharded(make: Make, ranks: int, dtype: Any = "float32", shapes: Mapping[str, Any] = SHAPES) -> list[Outcome]:
    def work(group: ThreadGroup) -> Outcome:
        opt, params = gs.Sharded(make(), group), arrays(0, dtype, shapes)
        for step in range(1, 4):
            opt.apply_gradients(gradients(step, group.rank, dtype, shapes), params)
        return Outcome(opt, params)

    return run_in_threads(ranks, work)


def alone(make: Make, ranks: int, dtype: Any = "float32", shapes: Mapping[str, Any] = SHAPES) -> Outcome:
    opt, params = make(), arrays(0, dtype, shapes)
    for step in range(1, 4):
        opt.apply_gradients(averaged(step, ranks, dtype, shapes), params)
    return Outcome(opt, params)


def assert_same(ours: list[Outcome], one: Outcome) -> None:
    """Parameters, report, counters; and the parts of the slots, put together, are the slots."""
    for rank in ours:
        assert (rank.report, rank.step) == (one.report, one.step)
        for name, array in one.params.items():
            assert_same_bits(rank.params[name], array, name)
    for name, slots in one.state.items():
        for slot, value in slots.items():
            owners = sorted((rank for rank in ours if name in rank.state), key=lambda rank: rank.starts[name])
            parts = [rank.state[name][slot].reshape(-1) for rank in owners]
            assert_same_bits(np.concatenate(parts), value.reshape(-1), f"{name} {slot}")
        assert {rank.steps[name] for rank in ours if name in rank.steps} == {one.steps[name]}


@pytest.mark.parametrize(("cls", "kwargs", "dtype"), in_both_dtypes(configurations(*ELEMENTWISE_FAMILIES)))
def test_elementwise_rules_give_the_bits_of_one_process(cls: Any, kwargs: Any, dtype: str) -> None:
    make = functools.partial(cls, **kwargs)
    for ranks in RANKS if dtype == "float64" else [3]:
        assert_same(sharded(make, ranks, dtype), alone(make, ranks, dtype))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.5},
        {"nonfinite": "skip"},
        {"slot_dtype": "int8", "rounding": "stochastic", "clip_norm": 1.0},
        {"slot_dtype": {"m": "bfloat16", "v": "int8"}, "master_weights": True},
        {"frozen": ["odd", "s*"]},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_options_and_storage_are_those_of_one_process(options: Any, dtype: str, ranks: int) -> None:
    make = functools.partial(gs.Adam, 0.1, **options)
    assert_same(sharded(make, ranks, dtype), alone(make, ranks, dtype))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("cls", "kwargs"), configurations(*MATRIX_FAMILIES))
def test_rules_of_whole_tensors_have_one_owner_for_each(cls: Any, kwargs: Any, ranks: int) -> None:
    make = functools.partial(cls, **kwargs, clip_norm=2.0)
    ours, one = sharded(make, ranks, shapes=MATRICES), alone(make, ranks, shapes=MATRICES)
    for rank in ours:
        assert rank.report == one.report
        for name, array in one.params.items():
            np.testing.assert_allclose(rank.params[name], array, 2e-6, 2e-7, err_msg=name)
    owners = [name for rank in ours for name in rank.state if cls is gs.Adafactor or name not in ("vector", "scalar")]
    assert len(owners) == len(set(owners))


def test_several_optimizers_groups_and_schedules_go_together() -> None:
    def make() -> Any:
        adam = gs.AdamW({"o*": gs.cosine_decay(0.1, 5), "*": 0.01}, weight_decay={"small": 0.0, "*": 0.1})
        return gs.MultiOptimizer(
            [gs.SGD(gs.linear_schedule(0.0, 0.1, 3), momentum=0.5), adam], ["large"], clip_norm=1.0
        )

    assert_same(sharded(make, 3), alone(make, 3))


def test_buckets_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BUCKET", 100_000)
    sizes: list[int] = []
    for method in ("gather", "exchange"):
        plain = getattr(ThreadGroup, method)

        def noted(group: Any, values: Any, plain: Any = plain) -> Any:
            sizes.append(values.nbytes * (group.size if plain.__name__ == "gather" else 1))
            return plain(group, values)

        monkeypatch.setattr(ThreadGroup, method, noted)
    make = functools.partial(gs.Adam, 0.1)
    assert_same(sharded(make, 3), alone(make, 3))
    assert 90_000 < max(sizes) <= 100_000


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_keeps_its_part_of_the_state(ranks: int) -> None:
    def work(group: ThreadGroup) -> tuple[int, int]:
        opt, params = gs.Sharded(gs.Adam(0.1), group), {"w": np.zeros((1 << 10, 1 << 10), np.float32)}
        predicted, buckets = opt.memory(params).slots, 3 * (4 << 20)
        assert opt.memory(params).scratch == (4 << 20) // ranks + buckets
        assert opt.memory({"w": params["w"].astype(np.float64)}).scratch == 2 * ((4 << 20) // ranks + buckets)
        opt.apply_gradients({"w": np.ones((1 << 10, 1 << 10), np.float32)}, params)
        return predicted, sum(slot.nbytes for slots in opt.state.values() for slot in slots.values())

    assert run_in_threads(ranks, work) == [((8 << 20) // ranks,) * 2] * ranks


@pytest.mark.parametrize("ranks", [1, 3])
def test_tensors_of_torch_and_other_layouts(ranks: int) -> None:
    def torches(tree: Any) -> Any:
        return {name: torch.from_numpy(array.copy()) for name, array in tree.items()}

    def turned(tree: Any) -> Any:
        return {**tree, "turned": torch.from_numpy(np.ascontiguousarray(tree["large"].T)).T.to(torch.float32)}

    def work(group: ThreadGroup) -> Any:
        opt, params = gs.Sharded(gs.Adam(0.1, clip_norm=1.0), group), turned(torches(arrays(0)))
        assert not params["turned"].is_contiguous()
        params["odd"].requires_grad_()
        version = params["odd"]._version
        for step in range(1, 4):
            grads = turned(torches(gradients(step, group.rank)))
            grads["large"] = grads["large"].to(torch.float64).T.contiguous().T
            opt.apply_gradients(grads, params)
        assert params["odd"]._version > version
        return {name: tensor.detach().numpy() for name, tensor in params.items()}

    opt, expected = gs.Adam(0.1, clip_norm=1.0), {**arrays(0), "turned": arrays(0)["large"].copy()}
    for step in range(1, 4):
        grads = averaged(step, ranks)
        opt.apply_gradients({**grads, "turned": grads["large"]}, expected)
    for params in run_in_threads(ranks, work):
        for name, array in expected.items():
            assert_same_bits(params[name], array, name)


def test_parameters_may_come_late_and_gradients_may_be_absent() -> None:
    wanted = [["odd", "small"], ["large", "odd"], ["small"], [], ["small", "scalar", "large", "odd", "empty"]]

    def run(opt: Any, gradient: Callable[[int], Any]) -> Outcome:
        params = arrays(0)
        for step, names in enumerate(wanted):
            opt.apply_gradients({name: gradient(step)[name] for name in names} | {"no": None}, params)
        return Outcome(opt, params)

    make = functools.partial(gs.Adam, 0.1, bias_correction=True, clip_norm=1.0)
    ours = run_in_threads(3, lambda group: run(gs.Sharded(make(), group), lambda step: gradients(step, group.rank)))
    assert_same(ours, run(make(), lambda step: averaged(step, 3)))


def test_rounds_of_micro_batches_end_in_a_sharded_step() -> None:
    def run(opt: Any, gradient: Callable[[int], Any]) -> Outcome:
        params = arrays(0)
        for step in range(4):
            grads = gradient(step)
            if step % 2:
                del grads["small"]
            opt.apply_gradients(grads, params, grad_scale=0.5)
        return Outcome(opt, params)

    def accumulated(opt: gs.Optimizer) -> gs.Optimizer:
        return gs.Accumulate(opt, every=2)

    make = functools.partial(gs.Adam, 0.1, clip_norm=1.0)
    ours = run_in_threads(
        2, lambda group: run(accumulated(gs.Sharded(make(), group)), lambda step: gradients(step, group.rank))
    )
    assert_same(ours, run(accumulated(make()), lambda step: averaged(step, 2)))


def test_init_begins_anew_on_all_ranks() -> None:
    def work(group: ThreadGroup) -> Outcome:
        opt, params = gs.Sharded(gs.Adam(0.1), group), arrays(5)
        opt.apply_gradients(gradients(9, group.rank), params)
        opt.init(params)
        assert opt.steps == {}
        params = arrays(0)
        for step in range(1, 4):
            opt.apply_gradients(gradients(step, group.rank), params)
        return Outcome(opt, params)

    one = alone(functools.partial(gs.Adam, 0.1), 2)
    for rank in run_in_threads(2, work):
        for name, array in one.params.items():
            assert_same_bits(rank.params[name], array)
        assert set(rank.steps.values()) == {3}


class TestWhatOneRankFinds:
    """Every rank raises the same error, nothing has changed, and the next step is like any other."""

    RANKS = 3

    def outcomes(self, make: Make, spoil: Callable[[Any, int, Any, Any], Any]) -> tuple[list[str], list[Outcome]]:
        """`spoil(opt, rank, grads, params)` changes what one rank brings to the second step, and may undo it."""

        def work(group: ThreadGroup) -> tuple[str, Outcome]:
            opt, params = gs.Sharded(make(), group), arrays(0)
            opt.apply_gradients(gradients(1, group.rank), params)
            before, slots = {name: array.copy() for name, array in params.items()}, Outcome(opt, {}).state
            grads = gradients(2, group.rank)
            undo = spoil(opt, group.rank, grads, params)
            try:
                opt.apply_gradients(grads, params)
                said = "nothing"
            except (gs.GradstepError, MemoryError) as error:
                said = f"{type(error).__name__}: {error}"
            assert opt.step == 1
            for name, array in before.items():
                assert_same_bits(params[name], array)
            for name, values in Outcome(opt, {}).state.items():
                for slot, value in values.items():
                    assert_same_bits(value, slots[name][slot])
            if undo:
                undo()
            for step in (2, 3):
                opt.apply_gradients(gradients(step, group.rank), params)
            return said, Outcome(opt, params)

        results = run_in_threads(self.RANKS, work)
        return [said for said, _ in results], [outcome for _, outcome in results]

    def check(self, spoil: Callable[[Any, int, Any, Any], Any], expected: str, **options: Any) -> None:
        make = functools.partial(gs.Adam, 0.1, **options)
        said, ours = self.outcomes(make, spoil)
        assert set(said) == {said[0]}
        assert expected in said[0]
        assert_same(ours, alone(make, self.RANKS))

    def test_a_wrong_shape(self) -> None:
        def spoil(_: Any, rank: int, grads: Any, __: Any) -> None:
            if rank == 1:
                grads["odd"] = np.ones(3, np.float32)

        self.check(spoil, "ShapeError: rank 1: grads['odd'] has shape (3,), but params['odd'] has (40001,)")

    def test_a_name_that_only_some_have(self) -> None:
        def spoil(_: Any, rank: int, grads: Any, __: Any) -> None:
            if rank == 2:
                del grads["small"]

        self.check(spoil, "grads['small']: of shape (3, 1) on rank 0, but there is none on rank 2")

    def test_another_rate(self) -> None:
        def spoil(opt: Any, rank: int, _: Any, __: Any) -> Any:
            if rank:
                opt.learning_rate = 0.2
            return lambda: setattr(opt, "learning_rate", 0.1)

        self.check(spoil, "learning_rate of params['empty']: 0.1 on rank 0, but 0.2 on rank 1")

    def test_a_schedule_that_fails(self) -> None:
        def work(group: ThreadGroup) -> tuple[str, Outcome]:
            values = iter([1e-8, float("nan") if group.rank == 1 else 1e-8, 1e-8, 1e-8])
            opt, params = gs.Sharded(gs.Adam(0.1, eps=lambda _: next(values)), group), arrays(0)
            opt.apply_gradients(gradients(1, group.rank), params)
            with pytest.raises(gs.NonFiniteScalarError) as caught:
                opt.apply_gradients(gradients(2, group.rank), params)
            for step in (2, 3):
                opt.apply_gradients(gradients(step, group.rank), params)
            return str(caught.value), Outcome(opt, params)

        results = run_in_threads(self.RANKS, work)
        (said,) = {said for said, _ in results}
        assert said.startswith("rank 1: Adam's eps: at step 1 the schedule")
        assert_same([outcome for _, outcome in results], alone(functools.partial(gs.Adam, 0.1), self.RANKS))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_gradient_that_is_not_finite(self, value: float) -> None:
        def spoil(_: Any, rank: int, grads: Any, __: Any) -> None:
            if rank == 1:
                grads["large"][200, 7] = value

        self.check(
            spoil, "NonFiniteGradientError: these gradients hold NaN or infinity: large (on rank 1);", nonfinite="raise"
        )

        make = functools.partial(gs.Adam, 0.1, nonfinite="skip")
        said, ours = self.outcomes(make, spoil)
        assert said == ["nothing"] * self.RANKS
        assert_same(ours, alone(make, self.RANKS))

    def test_who_has_brought_it_in_an_earlier_micro_batch(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt, params = gs.Accumulate(gs.Sharded(gs.SGD(0.1, nonfinite="raise"), group), every=2), arrays(0)
            first, second = gradients(1, group.rank), gradients(2, group.rank)
            if group.rank != 1:
                first["odd"][0] = np.nan
            opt.apply_gradients(first, params)
            with pytest.raises(gs.NonFiniteGradientError) as caught:
                opt.apply_gradients(second, params)
            return str(caught.value)

        (said,) = set(run_in_threads(3, work))
        assert said.startswith("these gradients hold NaN or infinity: odd (on rank 0, 2); nothing was changed")

    def test_a_factor_that_is_not_finite(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt, params = gs.Sharded(gs.SGD(0.1), group), arrays(0)
            with pytest.raises(gs.NonFiniteScalarError) as caught:
                opt.apply_gradients(gradients(1, group.rank), params, grad_scale=np.nan if group.rank else 1.0)
            return str(caught.value)

        (said,) = set(run_in_threads(2, work))
        assert said.startswith("rank 1: grad_scale must be a finite number, got nan")

    def test_parameters_that_do_not_begin_with_the_same_values(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt, params = gs.Sharded(gs.SGD(0.1), group), arrays(0)
            params["odd"][17] *= -1 if group.rank == 2 else 1
            with pytest.raises(gs.ConfigurationError) as caught:
                opt.apply_gradients(gradients(1, group.rank), params)
            params["odd"][17] *= -1 if group.rank == 2 else 1
            opt.apply_gradients(gradients(1, group.rank), params)
            return str(caught.value)

        (said,) = set(run_in_threads(3, work))
        assert said.startswith(
            "the values of params['odd'] by their CRC-32 (seed all ranks alike, or send those of rank 0"
        )
        assert re.search(r"\): \w{8} on rank 0, but \w{8} on rank 2;", said)

    def test_a_read_only_array(self) -> None:
        def spoil(_: Any, rank: int, __: Any, params: Any) -> Any:
            params["odd"].setflags(write=rank != 2)
            return lambda: params["odd"].setflags(write=True)

        self.check(spoil, "ReadOnlyError: rank 2: params['odd'] is read-only")

    @pytest.mark.parametrize("where", ["step.plan.Plan.prepare", "distributed.sharded_step.widened"])
    def test_memory_that_runs_out(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        failing: set[int] = set()
        plain = pkgutil.resolve_name(f"gradstep.{where}")

        def fail(*arguments: Any) -> Any:
            if threading.get_ident() in failing:
                raise MemoryError("no more")
            return plain(*arguments)

        monkeypatch.setattr(f"gradstep.{where}", fail)

        def spoil(_: Any, rank: int, __: Any, ___: Any) -> Any:
            if rank == 2:
                failing.add(threading.get_ident())
            return failing.clear

        make = functools.partial(gs.Adam, 0.1)
        said, ours = self.outcomes(make, spoil)
        assert set(said) == {"MemoryError: rank 2: no more"}
        assert_same(ours, alone(make, self.RANKS))

    def test_another_rule(self) -> None:
        def said_of(here: Make, there: Make) -> str:
            def work(group: ThreadGroup) -> str:
                opt = gs.Sharded(there() if group.rank else here(), group)
                with pytest.raises(gs.ConfigurationError) as caught:
                    opt.apply_gradients(gradients(1, group.rank), arrays(0))
                return str(caught.value).partition(";")[0]

            (said,) = set(run_in_threads(2, work))
            return said

        adamw = functools.partial(gs.AdamW, 0.1)
        assert said_of(adamw, functools.partial(adamw, weight_decay=0)) == (
            "weight_decay in the rule of params['empty']: kept on rank 0, but 0, which leaves it out on rank 1"
        )
        assert said_of(adamw, functools.partial(adamw, bias_correction=True)) == (
            "bias_correction in the rule of params['empty']: False on rank 0, but True on rank 1"
        )
        assert said_of(adamw, functools.partial(adamw, frozen=["small"])).startswith(
            "frozen: () on rank 0, but ('small',)"
        )
        assert said_of(adamw, functools.partial(gs.Lion, 0.1)).startswith("eps in the rule of params['empty']: kept on")
        assert "the storage of params['empty']: StorageOptions(" in said_of(adamw, functools.partial(adamw, seed=3))

    def test_another_pattern(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt = gs.Sharded(gs.SGD({"[sl]*" if group.rank else "l*": 1.0, "*": 0.5}), group)
            with pytest.raises(gs.ConfigurationError) as caught:
                opt.apply_gradients(gradients(1, group.rank), arrays(0))
            return str(caught.value)

        (said,) = set(run_in_threads(2, work))
        assert said.startswith("the patterns that params['large'] matches: ('l*',) on rank 0, but ('[sl]*',) on rank 1")

    def test_errors_that_no_text_makes_again(self) -> None:
        class SilentError(Exception):
            def __str__(self) -> str:
                raise ValueError

        def raises(error: BaseException) -> list[BaseException]:
            def rate(_: int) -> float:
                if error and late:
                    raise error
                return 0.1

            def work(group: ThreadGroup) -> BaseException:
                opt, params = gs.Sharded(gs.SGD(rate if group.rank == 1 else 0.1), group), {"w": np.ones(3, np.float32)}
                opt.apply_gradients({"w": np.ones(3, np.float32)}, params)
                late.append(True)
                with pytest.raises(BaseException) as caught:  # noqa: PT011
                    opt.apply_gradients({"w": np.ones(3, np.float32)}, params)
                late.clear()
                opt.apply_gradients({"w": np.ones(3, np.float32)}, params)
                assert opt.step == 2
                return caught.value

            late: list[bool] = []
            return run_in_threads(2, work)

        for error in raises(KeyError("x")):
            assert str(error).startswith("rank 1: KeyError: 'x'; raised by the schedule of SGD's learning_rate")
        for error in raises(SilentError()):
            assert str(error) == "rank 1: SilentError: which does not say more"
        assert [type(error) for error in raises(KeyboardInterrupt())] == [RuntimeError, KeyboardInterrupt]

    def test_infinities_of_both_signs_where_numpy_is_told_to_raise(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt, params = gs.Sharded(gs.SGD(1.0, nonfinite="skip"), group), {"w": np.ones(3, np.float32)}
            with np.errstate(all="raise"):
                opt.apply_gradients({"w": np.full(3, [np.inf, -np.inf][group.rank], np.float32)}, params)
            return opt.report.culprits

        assert run_in_threads(2, work) == [("w",)] * 2

    def test_parameters_that_cannot_be_brought_to_all_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(exchange.Spreading, "spread", fail)

        def work(group: ThreadGroup) -> str:
            with pytest.raises(gs.CommunicationError) as caught:
                gs.Sharded(gs.SGD(0.1), group).apply_gradients(gradients(1, group.rank), arrays(0))
            return str(caught.value)

        for said in run_in_threads(2, work):
            assert "the step has been taken" in said
            assert "(MemoryError: no more); start again from the last checkpoint" in said


class TestRoundsOfMicroBatches:
    """Every call is agreed on, not only the one that steps."""

    def outcomes(self, spoil: Callable[[int, int, Any], dict[str, Any]]) -> tuple[list[str], Any]:
        def work(group: ThreadGroup) -> tuple[list[str], Any]:
            opt, params = gs.Accumulate(gs.Sharded(gs.SGD(1.0), group), every=2), arrays(0)
            said: list[str] = []
            for call in range(4):
                grads = gradients(call, group.rank)
                options = spoil(call, group.rank, grads)
                before = opt.micro_step
                try:
                    opt.apply_gradients(grads, params, **options)
                except gs.GradstepError as error:
                    said.append(f"{call} {type(error).__name__}: {error}")
                    assert opt.micro_step == before
                    opt.apply_gradients(gradients(call, group.rank), params)
            return said, params

        results = run_in_threads(2, work)
        assert results[0][0] == results[1][0]
        return results[0][0], results[0][1]

    def test_what_one_rank_finds_stops_all_and_adds_nothing(self) -> None:
        def shapes(call: int, rank: int, grads: Any) -> dict[str, Any]:
            if rank == 1 and call in (0, 3):
                grads["odd"] = np.ones(3, np.float32)
            return {}

        def factors(call: int, rank: int, _: Any) -> dict[str, Any]:
            return {"grad_scale": np.nan} if rank == 0 and call in (2, 3) else {}

        _, expected = self.outcomes(lambda *_: {})
        said, params = self.outcomes(shapes)
        assert [line.partition(" has shape")[0] for line in said] == [
            "0 ShapeError: rank 1: grads['odd']",
            "3 ShapeError: rank 1: grads['odd']",
        ]
        assert all((params[name] == array).all() for name, array in expected.items())
        said, params = self.outcomes(factors)
        assert [line[:40] for line in said] == [
            f"{call} NonFiniteScalarError: rank 0: grad_scale"[:40] for call in (2, 3)
        ]
        assert all((params[name] == array).all() for name, array in expected.items())

    def test_a_rank_that_steps_while_others_add(self) -> None:
        def work(group: ThreadGroup) -> str:
            inner = gs.Sharded(gs.SGD(1.0), group)
            opt = gs.Accumulate(inner, every=2) if group.rank else inner
            with pytest.raises(gs.ConfigurationError) as caught:
                opt.apply_gradients(gradients(0, group.rank), arrays(0))
            return str(caught.value)

        (said,) = set(run_in_threads(2, work))
        assert "on rank 0, but there is none on rank 1; the ranks of a Sharded optimizer take the same step" in said


class TestWhatHasBeenSharedOut:
    def refused(self, change: Callable[[dict[str, Any]], None], make: Make = lambda: gs.SGD(0.1)) -> str:
        """What two ranks say to a step after this change; they can then begin anew."""

        def work(group: ThreadGroup) -> str:
            opt, params = gs.Sharded(make(), group), {"w": np.ones((300, 333), np.float32)}
            opt.apply_gradients({"w": params["w"]}, params)
            change(params)
            before = params["w"].copy()
            with pytest.raises(gs.GradstepError, match=r"opt\.init\(params\) begins anew") as caught:
                opt.apply_gradients({"w": np.ones_like(before)}, params)
            assert_same_bits(params["w"], before)
            opt.init(params)
            opt.apply_gradients({"w": np.ones_like(before)}, params)
            np.testing.assert_allclose(params["w"], before - 0.1, 1e-6)
            return f"{type(caught.value).__name__}: {caught.value}"

        said = run_in_threads(2, work)
        assert said[0] == said[1]
        return said[0]

    def test_parameters_of_another_shape(self) -> None:
        for shape in ((300, 666), (3, 3), (333, 300)):
            said = self.refused(lambda params, shape=shape: params.update(w=np.ones(shape, np.float32)))
            assert said.startswith(f"ShapeError: rank 0: params['w'] has shape {shape}, but (300, 333) when")

    def test_parameters_in_another_order(self) -> None:
        said = self.refused(lambda params: params.update(w=np.asfortranarray(params["w"])))
        assert said.startswith("ConfigurationError: rank 0: params['w'] has been cut among the ranks")

    def test_rules_that_come_to_look_at_whole_tensors(self) -> None:
        @gs.rule
        def Normed(w: Any, g: Any, *, learning_rate: Any, normed: bool = False) -> Any:
            return w - learning_rate * (g / gs.norm(g) if normed else g)

        def work(group: ThreadGroup) -> str:
            opt, params = gs.Sharded(Normed(0.1), group), {"w": np.ones(100_000, np.float32)}
            opt.apply_gradients({"w": np.ones(100_000, np.float32)}, params)
            opt.normed = True
            with pytest.raises(gs.ConfigurationError) as caught:
                opt.apply_gradients({"w": np.ones(100_000, np.float32)}, params)
            return str(caught.value)

        for said in run_in_threads(2, work):
            assert "or its rule looks at more than one element; opt.init(params) begins anew" in said

    def test_late_parameters_go_to_who_has_least(self) -> None:
        def work(group: ThreadGroup) -> int:
            opt, params = gs.Sharded(gs.SGD(0.1, momentum=0.9), group), {f"w{i}": np.ones(1000) for i in range(8)}
            for i in range(8):
                opt.apply_gradients({f"w{i}": np.ones(1000)}, params)
            return len(opt.state)

        assert run_in_threads(4, work) == [2] * 4

    def test_init_that_fails_changes_nothing(self, alone_in_group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.Adam({"w": 0.1}), alone_in_group), {"w": np.ones(3)}
        opt.apply_gradients({"w": np.ones(3)}, params)
        for spoilt in ({"strange": np.ones(3)}, {"w": np.ones(3, int)}):
            with pytest.raises(gs.GradstepError):
                opt.init(spoilt)
        assert opt.steps == {"w": 1}
        assert set(opt.state) == {"w"}

    def test_init_on_one_rank_alone_is_noticed(self) -> None:
        def work(group: ThreadGroup) -> str:
            opt, params = gs.Sharded(gs.SGD(0.1), group), arrays(0)
            if group.rank:
                opt.init(params)
            with pytest.raises(gs.ConfigurationError) as caught:
                opt.apply_gradients(gradients(1, group.rank), params)
            return str(caught.value)

        (said,) = set(run_in_threads(2, work))
        assert said.startswith("how often init was called: 0 on rank 0, but 1 on rank 1;")

    def test_parameters_that_come_to_lie_on_others(self, alone_in_group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.SGD(0.1), alone_in_group), {"w": np.ones(3), "kept": np.ones(3)}
        opt.apply_gradients({"w": np.ones(3)}, params)
        params["kept"] = params["w"][1:]
        with pytest.raises(gs.AliasedParametersError):
            opt.apply_gradients({"w": np.ones(3)}, params)

    def test_the_order_of_names_does_not_matter(self) -> None:
        def work(group: ThreadGroup) -> Any:
            opt, params = gs.Sharded(gs.Adam({"s*": 0.1, "*": 0.2}), group), arrays(0)
            for step in range(1, 4):
                grads = gradients(step, group.rank)
                if group.rank == step % 2:
                    grads, params = dict(reversed(grads.items())), dict(reversed(params.items()))
                opt.apply_gradients(grads, params)
            return Outcome(opt, params)

        assert_same(run_in_threads(2, work), alone(functools.partial(gs.Adam, {"s*": 0.1, "*": 0.2}), 2))


@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_of_float64_beyond_its_squares(ranks: int) -> None:
    def work(group: ThreadGroup) -> Any:
        opt, params = gs.Sharded(gs.SGD(1.0, clip_norm=1.0), group), {"w": np.zeros(40_000), "b": np.zeros(1)}
        opt.apply_gradients({"w": np.full(40_000, 1e200), "b": np.zeros(1)}, params)
        return opt.report.grad_norm, opt.report.culprits, params["w"][0]

    for norm, culprits, w in run_in_threads(ranks, work):
        assert norm == pytest.approx(2e202, rel=1e-14)
        assert culprits == ()
        assert w == pytest.approx(-1 / 200, rel=1e-9)


class TestWhatIsRefused:
    def test_arrays_that_never_change(self, alone_in_group: ThreadGroup) -> None:
        with pytest.raises(gs.ArgumentTypeError, match="not of JAX, whose arrays never change"):
            gs.Sharded(gs.SGD(0.1), alone_in_group).apply_gradients({"w": jnp.ones(3)}, {"w": jnp.ones(3)})

    def test_what_cannot_be_inside_of_what(self, alone_in_group: ThreadGroup) -> None:
        opt = gs.Sharded(gs.SGD(0.1), alone_in_group)
        with pytest.raises(gs.ConfigurationError, match=r"Sharded\(MultiOptimizer"):
            gs.MultiOptimizer([opt, gs.Adam(0.1)], ["*.w"])
        with pytest.raises(gs.ConfigurationError, match="is sharded already"):
            gs.Sharded(opt, alone_in_group)
        with pytest.raises(gs.ConfigurationError, match=r"Accumulate\(Sharded\(…\), every=2\)"):
            gs.Sharded(gs.Accumulate(gs.SGD(0.1), every=2), alone_in_group)

    def test_what_runs_inside_of_compiled_functions(self, alone_in_group: ThreadGroup) -> None:
        from gradstep.optax import from_optimizer

        with pytest.raises(gs.ConfigurationError, match=r"takes steps of its own; pass .*opt\.optimizer"):
            from_optimizer(gs.Sharded(gs.SGD(0.1), alone_in_group))

    def test_what_is_no_group(self, alone_in_group: ThreadGroup) -> None:
        with pytest.raises(gs.ArgumentTypeError, match=r"group must be a process group of torch\.distributed or"):
            gs.Sharded(gs.SGD(0.1), 4)
        with pytest.raises(gs.ArgumentTypeError, match="Sharded takes an optimizer of gradstep, got 3"):
            gs.Sharded(3, alone_in_group)

    def test_checkpoints_of_the_optimizer_inside(self, alone_in_group: ThreadGroup) -> None:
        opt = gs.Sharded(gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], ["v"]), alone_in_group)
        opt.optimizer.state_dict()
        opt.apply_gradients({"w": np.ones(3)}, {"w": np.ones(3)})
        with pytest.raises(gs.ConfigurationError, match="holds this rank's parts of the state of a Sharded optimizer"):
            opt.optimizer.state_dict()
        opt.init({"w": np.ones(3)})
        assert opt.optimizer.state_dict()

    def test_state_of_whole_parameters(self, alone_in_group: ThreadGroup) -> None:
        opt = gs.Adam(0.1)
        opt.apply_gradients({"w": np.ones(3)}, {"w": np.ones(3)})
        with pytest.raises(gs.ConfigurationError, match=r"or begin anew: optimizer\.init\(\{\}\)"):
            gs.Sharded(opt, alone_in_group)
        opt.init({})
        assert gs.Sharded(opt, alone_in_group).step == 1

    def test_a_timeout_where_there_is_one(self, alone_in_group: ThreadGroup) -> None:
        with pytest.raises(gs.ConfigurationError, match=r"has its own: init_process_group\(…, timeout=…\)"):
            gs.Sharded(gs.SGD(0.1), alone_in_group, timeout=3.0)


def test_bfloat16_gradients_are_averaged_in_float32() -> None:
    def work(group: ThreadGroup) -> Any:
        opt, params = gs.Sharded(gs.SGD(1.0), group), {"w": np.zeros(1, np.float32)}
        value = [1.0, 2.0**-9][group.rank]  # whose sum bfloat16 does not hold
        opt.apply_gradients({"w": np.full(1, value, ml_dtypes.bfloat16)}, params)
        return float(params["w"][0])

    assert run_in_threads(2, work) == [-(1 + 2.0**-9) / 2] * 2
