"""Proves what schedules give, and that each is resolved at most once per step, whatever happens in between."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import gradstep as gs
from gradstep import cosine_decay, exponential_decay, join_schedules, linear_schedule, step_decay

SCHEDULES = [
    exponential_decay(0.1, 0.9),
    step_decay(0.1, 0.5, 10),
    cosine_decay(0.1, 100),
    cosine_decay(0.1, 100, 0.01),
    linear_schedule(0.0, 0.1, 10),
    join_schedules([linear_schedule(0.0, 0.1, 10), cosine_decay(0.1, 90), exponential_decay(0.1, 0.5)], [10, 100]),
]
finite = st.floats(-1e6, 1e6)
counts = st.integers(1, 1000)


class TestFormulas:
    @given(init=finite, rate=st.floats(0, 1), step=st.integers(0, 1000))
    def test_exponential_decay(self, init, rate, step):
        assert exponential_decay(init, rate)(step) == init * rate**step

    @given(init=finite, rate=st.floats(0, 1), size=counts, step=st.integers(0, 10_000))
    def test_step_decay(self, init, rate, size, step):
        assert step_decay(init, rate, size)(step) == init * rate ** (step // size)

    @given(init=finite, end=finite, steps=counts, step=st.integers(0, 1000))
    def test_cosine_decay(self, init, end, steps, step):
        expected = end + (init - end) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
        assert cosine_decay(init, steps, end)(step) == pytest.approx(expected, rel=1e-12, abs=1e-9)

    @given(init=finite, end=finite, steps=counts, step=st.integers(0, 1000))
    def test_linear_schedule(self, init, end, steps, step):
        expected = init + (end - init) * min(step, steps) / steps
        assert linear_schedule(init, end, steps)(step) == pytest.approx(expected, rel=1e-12, abs=1e-9)

    @given(init=finite, end=finite, steps=counts, beyond=st.integers(0, 10))
    def test_past_its_end_a_schedule_gives_exactly_the_end(self, init, end, steps, beyond):
        assert cosine_decay(init, steps, end)(steps + beyond) == end
        assert linear_schedule(init, end, steps)(steps + beyond) == end

    @given(init=finite, end=finite, steps=counts)
    def test_at_its_start_a_schedule_gives_the_initial_value(self, init, end, steps):
        assert cosine_decay(init, steps, end)(0) == pytest.approx(init, rel=1e-12, abs=1e-9)
        assert linear_schedule(init, end, steps)(0) == init
        assert exponential_decay(init, 0.5)(0) == step_decay(init, 0.5, steps)(0) == init

    def test_step_decay_falls_at_the_step_and_not_before(self):
        assert [step_decay(8.0, 0.5, 3)(step) for step in range(8)] == [8, 8, 8, 4, 4, 4, 2, 2]

    def test_a_later_schedule_takes_over_at_its_boundary_and_counts_from_there(self):
        joined = join_schedules([float, lambda step: 100.0 + step, lambda step: 200.0 + step], [3, 5])
        assert [joined(step) for step in range(8)] == [0, 1, 2, 100, 101, 200, 201, 202]

    def test_only_the_active_schedule_is_called(self):
        calls: list[tuple[int, int]] = []

        def named(number: int) -> Callable[[int], float]:
            return lambda step: calls.append((number, step)) or 1.0

        joined = join_schedules([named(0), named(1), named(2)], [2, 4])
        for step in range(6):
            joined(step)
        assert calls == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]

    def test_a_first_boundary_of_zero_skips_the_first_schedule(self):
        assert join_schedules([lambda step: 1.0, lambda step: 2.0], [0])(0) == 2

    def test_one_schedule_needs_no_boundary(self):
        assert join_schedules([linear_schedule(0.0, 1.0, 4)], [])(2) == 0.5

    def test_values_are_plain_floats(self):
        for schedule in SCHEDULES:
            assert {type(schedule(step)) for step in (0, 5, 10, 99, 1000)} == {float}

    def test_overflow_gives_infinity_for_the_optimizer_to_report(self):
        schedule, params = exponential_decay(1.0, 1e200), {"w": np.zeros(1)}
        assert schedule(2) == math.inf
        opt = gs.SGD(schedule)
        for _ in range(2):
            opt.apply_gradients({"w": np.ones(1)}, params)
        with pytest.raises(gs.NonFiniteScalarError, match=r"SGD's learning_rate: at step 2 .*exponential_decay"):
            opt.apply_gradients({"w": np.ones(1)}, params)


class TestValuesAsObjects:
    @pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
    def test_the_repr_makes_the_schedule_again(self, schedule):
        again = eval(repr(schedule))
        assert again == schedule
        assert [again(step) for step in range(200)] == [schedule(step) for step in range(200)]

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
    def test_copies_are_equal_and_hash_alike(self, schedule, duplicate):
        again = duplicate(schedule)
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert again(7) == schedule(7)

    def test_different_schedules_are_not_equal(self):
        assert len(set(SCHEDULES)) == len(SCHEDULES)
        assert cosine_decay(0.1, 10) != cosine_decay(0.1, 11)
        assert cosine_decay(0.1, 10) != cosine_decay(0.1, 10, 0.1)

    def test_equal_arguments_in_other_forms_make_equal_schedules(self):
        assert step_decay(1, np.float64(0.5), np.int64(3)) == step_decay(1.0, 0.5, 3)
        assert join_schedules([float, abs], (3,)) == join_schedules((float, abs), [np.int32(3)])

    def test_optimizers_show_their_schedules(self):
        assert repr(gs.SGD(cosine_decay(0.1, 10))).startswith(f"SGD(learning_rate={cosine_decay(0.1, 10)!r}")


class TestArguments:
    @pytest.mark.parametrize(
        ("make", "error", "named"),
        [
            (lambda: exponential_decay(math.nan, 0.9), gs.NonFiniteScalarError, "exponential_decay's init"),
            (lambda: exponential_decay(0.1, math.inf), gs.NonFiniteScalarError, "decay_rate"),
            (lambda: exponential_decay("0.1", 0.9), gs.ArgumentTypeError, "init"),
            (lambda: exponential_decay(None, 0.9), gs.ArgumentTypeError, "init"),
            (lambda: step_decay(0.1, 0.9, 0), gs.OutOfRangeError, "step_decay's step_size"),
            (lambda: step_decay(0.1, 0.9, -1), gs.OutOfRangeError, "step_size"),
            (lambda: step_decay(0.1, 0.9, 2.0), gs.ArgumentTypeError, "step_size"),
            (lambda: step_decay(0.1, 0.9, True), gs.ArgumentTypeError, "step_size"),
            (lambda: cosine_decay(0.1, 0), gs.OutOfRangeError, "cosine_decay's decay_steps"),
            (lambda: cosine_decay(0.1, 10, math.nan), gs.NonFiniteScalarError, "end"),
            (lambda: cosine_decay(0.1, "10"), gs.ArgumentTypeError, "decay_steps"),
            (lambda: linear_schedule(0.0, 0.1, 0), gs.OutOfRangeError, "linear_schedule's steps"),
            (lambda: linear_schedule(0.0, -math.inf, 5), gs.NonFiniteScalarError, "end"),
            (lambda: join_schedules([], []), gs.ConfigurationError, "at least one"),
            (lambda: join_schedules([float], [1]), gs.ConfigurationError, "1 schedules need 0 boundaries, got 1"),
            (lambda: join_schedules([float, float], []), gs.ConfigurationError, "need 1 boundaries, got 0"),
            (lambda: join_schedules([float] * 3, [5, 5]), gs.ConfigurationError, "increase"),
            (lambda: join_schedules([float] * 3, [5, 4]), gs.ConfigurationError, "increase"),
            (lambda: join_schedules([0.1, float], [5]), gs.ArgumentTypeError, "functions"),
            (lambda: join_schedules([float, float], [5.0]), gs.ArgumentTypeError, "boundary"),
        ],
    )
    def test_bad_ones_are_refused_by_name(self, make, error, named):
        with pytest.raises(error, match=named):
            make()

    def test_a_result_that_is_no_number_is_refused(self):
        for result in (None, "0.1", [0.1], 1j):
            with pytest.raises(gs.ArgumentTypeError, match="SGD's learning_rate"):
                gs.SGD(lambda step, result=result: result)

    def test_results_go_through_float(self):
        for result in (1, np.float32(0.5), np.array(0.25), np.int64(2)):
            rate = gs.SGD(lambda step, result=result: result).learning_rate
            assert (type(rate), rate) == (float, float(result))


class TestLearningRate:
    def test_it_tells_fixed_rates_from_schedules(self):
        assert repr(gs.LearningRate(0.1)) == "LearningRate(fixed 0.1)"
        assert repr(gs.LearningRate(cosine_decay(0.1, 5))).startswith("LearningRate(schedule cosine_decay(")
        assert (gs.LearningRate(0.1).current(3), gs.LearningRate(float).current(3)) == (0.1, 3.0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_only_try_current_minds_non_finite_rates(self, bad):
        for value in (bad, lambda step: bad):
            rate = gs.LearningRate(value)
            assert math.isnan(rate.current(4)) if math.isnan(bad) else rate.current(4) == bad
            with pytest.raises(gs.NonFiniteScalarError, match="step 4"):
                rate.try_current(4)

    def test_it_refuses_what_is_neither(self):
        for value in (None, "0.1", True, [0.1]):
            with pytest.raises(gs.ArgumentTypeError):
                gs.LearningRate(value)


class Recorder:
    """A schedule that counts its calls, and gives NaN to whoever asks twice in a step or asks again after success."""

    def __init__(self, *, fails: dict[int, int] | None = None, value: float = 0.1) -> None:
        self.calls: list[int] = []
        self.answered: set[int] = set()
        self.fails, self.value = dict(fails or {}), value

    def __call__(self, step: int) -> float:
        self.calls.append(step)
        if self.fails.get(step, 0):
            self.fails[step] -= 1
            raise ConnectionError(f"no value at step {step} yet")
        if step in self.answered:
            return math.nan
        self.answered.add(step)
        return self.value / (1 + step)


def step_once(opt: gs.Optimizer, names: str = "a") -> dict[str, Any]:
    params = {name: np.ones(3, np.float32) for name in names}
    return opt.apply_gradients({name: np.ones(3, np.float32) for name in names}, params)


class TestResolvedOncePerStep:
    def test_the_constructors_call_is_that_of_step_zero(self):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        assert schedule.calls == [0]
        assert opt.learning_rate == 0.1
        step_once(opt)
        assert schedule.calls == [0]
        step_once(opt)
        assert schedule.calls == [0, 1]
        assert opt.learning_rate == 0.05

    def test_a_step_calls_it_with_the_number_of_steps_before(self):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        for step in range(5):
            step_once(opt)
            assert opt.report.learning_rate == opt.learning_rate == 0.1 / (1 + step)
        assert schedule.calls == [0, 1, 2, 3, 4]

    def test_preflight_may_be_called_any_number_of_times(self):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        for step in range(3):
            opt.preflight()
            opt.preflight()
            assert opt.learning_rate == 0.1 / (1 + step)
            step_once(opt)
            assert opt.learning_rate == 0.1 / (1 + step)
        assert schedule.calls == [0, 1, 2]

    def test_empty_steps_and_init_call_it_no_more(self):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        opt.apply_gradients({}, {})
        opt.init({"a": np.ones(3)})
        opt.init({"a": np.ones(3)})
        step_once(opt)
        assert schedule.calls == [0, 1]

    def test_every_scalar_of_every_kind_is_resolved_once(self):
        recorders = [Recorder() for _ in range(5)]
        rate, beta1, beta2, eps, decay = recorders
        opt = gs.AdamW(rate, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        for _ in range(4):
            opt.preflight()
            step_once(opt)
        assert [recorder.calls for recorder in recorders] == [[0, 1, 2, 3]] * 5
        assert opt.betas == (0.025, 0.025)

    def test_reading_values_and_printing_call_nothing(self):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        step_once(opt)
        _ = (opt.learning_rate, opt.hyperparameters, repr(opt), opt.report, opt.state, opt.steps, copy.deepcopy(opt))
        assert schedule.calls == [0]

    def test_many_parameters_of_many_dtypes_share_one_call(self):
        schedule = Recorder()
        opt = gs.Adafactor(schedule)
        params = {f"{ndim} {dtype}": np.ones((2,) * ndim, dtype) for ndim in range(4) for dtype in ("f", "d")}
        for _ in range(2):
            opt.apply_gradients({name: w.copy() for name, w in params.items()}, params)
        assert schedule.calls == [0, 1]

    def test_nested_multi_optimizers_call_each_schedule_once_per_step(self):
        recorders = [Recorder() for _ in range(4)]
        inner = gs.MultiOptimizer([gs.Lion(recorders[1]), gs.SGD(recorders[2], momentum=recorders[3])], ["b"])
        opt = gs.MultiOptimizer([gs.Adam(recorders[0]), inner], ["a"])
        for step in range(4):
            opt.preflight()
            inner.preflight()
            step_once(opt, "a" if step % 2 else "abc")  # the inner ones get nothing at every other step
        assert [recorder.calls for recorder in recorders] == [[0, 1, 2, 3]] * 4
        assert [child.step for child in (opt, *opt.optimizers, *inner.optimizers)] == [4] * 5


class TestRetries:
    def test_only_what_failed_is_called_again(self):
        rate, decay = Recorder(), Recorder(fails={1: 2})
        opt = gs.AdamW(rate, weight_decay=decay)
        step_once(opt)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                step_once(opt)
        step_once(opt)
        assert rate.calls == [0, 1]
        assert decay.calls == [0, 1, 1, 1]
        assert opt.step == 2

    def test_the_resolved_values_stay_those_of_the_last_step_until_a_step_succeeds(self):
        opt = gs.AdamW(Recorder(), weight_decay=Recorder(fails={1: 1}))
        step_once(opt)
        with pytest.raises(ConnectionError):
            step_once(opt)
        assert (opt.learning_rate, opt.weight_decay) == (0.1, 0.1)
        step_once(opt)
        assert (opt.learning_rate, opt.weight_decay) == (0.05, 0.05)

    @pytest.mark.parametrize("wrong", [{"a": np.ones(4, np.float32)}, {"b": np.ones(3)}, {"a": np.ones(3, np.int32)}])
    def test_an_error_after_resolving_costs_no_second_call(self, wrong):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        step_once(opt)
        for _ in range(3):
            with pytest.raises(gs.GradstepError):
                opt.apply_gradients(wrong, {"a": np.ones(3, np.float32)})
        assert opt.learning_rate == 0.1
        step_once(opt)
        assert schedule.calls == [0, 1]
        assert opt.learning_rate == 0.05

    def test_a_skipped_step_uses_its_value_again(self):
        schedule = Recorder()
        opt = gs.SGD(schedule, nonfinite="skip")
        step_once(opt)
        for _ in range(2):
            opt.apply_gradients({"a": np.full(3, np.nan, np.float32)}, {"a": np.ones(3, np.float32)})
            assert (opt.report.applied, opt.step) == (False, 1)
        step_once(opt)
        assert schedule.calls == [0, 1]

    def test_a_failing_child_of_a_nested_multi_optimizer_costs_the_others_no_call(self):
        recorders = [Recorder(), Recorder(fails={2: 1}), Recorder()]
        children = [gs.SGD(recorder, momentum=0.9) for recorder in recorders]
        opt = gs.MultiOptimizer([children[0], gs.MultiOptimizer(children[1:], ["b"])], ["a"])
        for _ in range(2):
            step_once(opt, "abc")
        rates = [child.learning_rate for child in children]
        with pytest.raises(ConnectionError):
            step_once(opt, "abc")
        assert [child.learning_rate for child in children] == rates
        assert [child.step for child in (opt, *opt.optimizers, *children)] == [2] * 6
        step_once(opt, "abc")
        assert [recorder.calls for recorder in recorders] == [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2]]

    def test_a_schedule_that_turns_nan_in_the_second_child_of_a_nested_one_changes_nothing(self):
        turning = gs.SGD(lambda step: math.nan if step == 2 else 0.1)
        opt = gs.MultiOptimizer([gs.Adam(0.1), gs.MultiOptimizer([gs.Lion(0.1), turning], ["b"])], ["a"])
        params = {name: np.ones(3, np.float32) for name in "abc"}
        grads = {name: np.ones(3, np.float32) for name in "abc"}
        for _ in range(2):
            opt.apply_gradients(grads, params)
        before = copy.deepcopy((params, {name: dict(slots) for name, slots in opt.state.items()}, opt.steps))
        with pytest.raises(gs.NonFiniteScalarError, match=r"SGD's learning_rate.*step 2"):
            opt.apply_gradients(grads, params)
        for name, w in params.items():
            np.testing.assert_array_equal(w, before[0][name])
            for slot, value in opt.state[name].items():
                np.testing.assert_array_equal(value, before[1][name][slot])
        assert (opt.step, opt.steps) == (2, before[2])

    def test_a_bad_value_is_asked_for_again(self):
        answers = iter([0.1, math.nan, 2.0, 0.5])
        opt = gs.Lion(0.1, betas=(lambda step: next(answers), 0.9))
        step_once(opt)
        with pytest.raises(gs.NonFiniteScalarError, match=r"betas\[0\]"):
            step_once(opt)
        with pytest.raises(gs.OutOfRangeError, match=r"betas\[0\] must be in \[0, 1\), got 2.0"):
            step_once(opt)
        step_once(opt)
        assert opt.betas == (0.5, 0.9)


class TestSettingValues:
    def test_a_new_schedule_is_resolved_at_once_at_the_current_step(self):
        opt, schedule = gs.SGD(0.1), Recorder(value=1.0)
        for _ in range(3):
            step_once(opt)
        opt.learning_rate = schedule
        assert schedule.calls == [3]
        assert opt.learning_rate == 0.25
        step_once(opt)
        assert schedule.calls == [3]
        step_once(opt)
        assert schedule.calls == [3, 4]

    def test_a_number_replaces_a_schedule_for_good(self):
        schedule = Recorder()
        opt = gs.SGD(schedule)
        opt.learning_rate = 0.5
        for _ in range(3):
            step_once(opt)
        assert schedule.calls == [0]
        assert opt.learning_rate == 0.5

    def test_setting_one_value_calls_no_other_schedule(self):
        rate, decay = Recorder(), Recorder()
        opt = gs.AdamW(rate, weight_decay=decay)
        step_once(opt)
        opt.preflight()
        opt.learning_rate = 0.3
        step_once(opt)
        assert decay.calls == [0, 1]
        assert rate.calls == [0, 1]

    def test_a_schedule_that_fails_when_set_changes_nothing(self):
        opt = gs.SGD(0.1)
        step_once(opt)
        for bad in (lambda step: math.nan, Recorder(fails={1: 1}), "fast"):
            with pytest.raises((gs.GradstepError, ConnectionError)):
                opt.learning_rate = bad
            assert opt.learning_rate == 0.1
            assert opt.hyperparameters["learning_rate"] == 0.1
        step_once(opt)

    def test_the_rate_of_a_multi_optimizer_is_its_first_childs_and_set_there(self):
        schedule = Recorder()
        opt = gs.MultiOptimizer([gs.SGD(schedule), gs.SGD(0.7)], ["a"])
        step_once(opt, "ab")
        step_once(opt, "ab")
        assert opt.learning_rate == opt.report.learning_rate == 0.05
        with pytest.raises(gs.ConfigurationError, match=r"optimizers\[0\].learning_rate"):
            opt.learning_rate = 0.1
        opt.optimizers[0].learning_rate = 0.3
        step_once(opt, "ab")
        assert opt.report.learning_rate == 0.3

    def test_a_copy_has_its_own_stamps(self):
        opt = gs.SGD(cosine_decay(1.0, 4))
        step_once(opt)
        twin = copy.deepcopy(opt)
        step_once(twin)
        step_once(twin)
        assert opt.learning_rate == cosine_decay(1.0, 4)(0)
        assert twin.learning_rate == cosine_decay(1.0, 4)(2)
