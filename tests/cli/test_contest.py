"""The runs of a race: the same start for everyone, what is measured, and runs that diverge."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from racing import Bowl

import gradstep as gs
from gradstep.cli.complaint import Complaint
from gradstep.cli.race.contest import CURVE_POINTS, LOST, Heat, Run, plan, run
from gradstep.cli.race.entrants import FACTORS, FAMILIES, Entrant, Optimizer
from gradstep.cli.race.task import Problem


def entrant(build: Callable[[float], Optimizer], name: str = "Mine") -> Entrant:
    return Entrant(name, 0.1, build, name.lower())


def one_run(task: Any, build: Callable[[float], Optimizer], rate: float, steps: int, seed: int = 0) -> Run:
    return run(Problem("task", task), Heat(entrant(build), rate, seed), steps, lambda heat, step: None)


class Counting(Bowl):
    """The loss is the number of the step."""

    def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[float, Any]:
        return float(step), {"w": np.zeros(2)}


def test_final_loss_is_the_mean_of_the_last_tenth():
    assert one_run(Counting(), gs.SGD, 0.1, steps=50).final_loss == np.mean([45, 46, 47, 48, 49])
    assert one_run(Counting(), gs.SGD, 0.1, steps=4).final_loss == 3


def test_curve_is_thinned_to_means_of_equal_windows():
    curve = one_run(Counting(), gs.SGD, 0.1, steps=1001).curve
    assert (curve.window, len(curve.losses)) == (6, 167)
    assert len(curve.losses) <= CURVE_POINTS
    assert curve.losses[:2] == (2.5, 8.5)
    assert curve.losses[-1] == np.mean(range(996, 1001))
    assert one_run(Counting(), gs.SGD, 0.1, steps=CURVE_POINTS).curve.window == 1


def test_losses_are_those_of_gradient_descent_by_hand():
    result = one_run(Bowl(), gs.SGD, 0.1, steps=7, seed=1)
    start = 2.0**2 + 2.0**2
    expected = [start * (1 - 2 * 0.1) ** (2 * step) for step in range(7)]
    np.testing.assert_allclose(result.curve.losses, expected, rtol=1e-12)
    assert result.first_loss == start
    assert result.diverged_at is None


def test_state_is_counted_in_bytes():
    assert one_run(Bowl(), gs.Adam, 0.1, steps=3).state_bytes == 2 * 2 * 8
    assert one_run(Bowl(), gs.SGD, 0.1, steps=3).state_bytes == 0


def test_same_seed_means_same_start_and_same_random_numbers_for_everyone():
    seen: list[tuple[float, ...]] = []

    class Listening(Bowl):
        def loss_and_grads(self, params: Any, step: int, rng: np.random.Generator) -> tuple[float, Any]:
            seen[-1] += (rng.random(),) if step else (float(params["w"][0]), rng.random())
            return super().loss_and_grads(params, step, rng)

    for build, rate, seed in [(gs.SGD, 0.1, 0), (gs.Lion, 1e-3, 0), (gs.SGD, 0.1, 1)]:
        seen.append(())
        one_run(Listening(), build, rate, steps=5, seed=seed)
    assert seen[0] == seen[1]
    assert not set(seen[0][1:]) & set(seen[2][1:])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec)
def test_losses_are_the_same_in_every_race(family: Entrant):
    class Matrix:
        def init(self, seed: int) -> Any:
            rng = np.random.default_rng(seed)
            return {"w": rng.normal(size=(6, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}

        def loss_and_grads(self, params: Any, step: int, rng: np.random.Generator) -> tuple[float, Any]:
            x = (np.eye(8, 6) + 0.01 * rng.normal(size=(8, 6))).astype(np.float32)
            error = x @ params["w"] + params["b"] - 1
            return float((error**2).mean()), {"w": x.T @ error / 8, "b": error.mean(axis=0)}

    problem, heat = Problem("matrix", Matrix()), Heat(family, family.usual, 0)
    first, second = (run(problem, heat, 30, lambda heat, step: None) for _ in range(2))
    assert first.curve == second.curve
    assert first.curve.losses[-1] < first.curve.losses[0]
    assert first.state_bytes > 0


@pytest.mark.parametrize("rate", [3.0, 1.4, 40.0])
def test_divergence_is_reported_at_its_step(rate: float):
    result = one_run(Bowl(), gs.SGD, rate, steps=300)
    growth = (1 - 2 * rate) ** 2
    expected = next(step for step in range(300) if growth**step > LOST)
    assert result.diverged_at == expected
    assert result.final_loss == math.inf
    assert result.metrics == {}
    assert "the loss is" in str(result.diverged_how)


def test_a_loss_that_is_not_finite_is_a_divergence():
    class Breaking(Bowl):
        def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[float, Any]:
            loss, grads = super().loss_and_grads(params, step, rng)
            return (math.nan if step == 4 else loss), grads

    result = one_run(Breaking(), gs.SGD, 0.1, steps=10)
    assert (result.diverged_at, result.diverged_how) == (4, "the loss is nan")
    assert len(result.curve.losses) == 5


def test_an_optimizer_that_refuses_gradients_has_diverged():
    class Poisoned(Bowl):
        def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[float, Any]:
            loss, grads = super().loss_and_grads(params, step, rng)
            return loss, {"w": grads["w"] * (math.inf if step == 3 else 1)}

    result = one_run(Poisoned(), lambda rate: gs.SGD(rate, nonfinite="raise"), 0.1, steps=10)
    assert result.diverged_at == 3
    assert "w" in str(result.diverged_how)


@pytest.mark.parametrize("mistake", [OverflowError("math range error"), np.linalg.LinAlgError("no convergence")])
def test_a_task_that_fails_over_ruined_numbers_has_diverged(mistake: Exception):
    class Fragile(Bowl):
        def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[float, Any]:
            if step == 2:
                params["w"][:] = math.nan
                raise mistake
            return super().loss_and_grads(params, step, rng)

    result = one_run(Fragile(), gs.SGD, 0.1, steps=10)
    assert result.diverged_at == 2
    assert result.diverged_how == f"the task raised {type(mistake).__name__}"


def test_a_task_that_fails_over_good_numbers_is_at_fault():
    class Wrong(Bowl):
        def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[float, Any]:
            if step == 2:
                raise KeyError("labels")
            return super().loss_and_grads(params, step, rng)

    with pytest.raises(Complaint, match=r"task: loss_and_grads raised KeyError"):
        one_run(Wrong(), gs.SGD, 0.1, steps=10)


def test_gradients_that_change_their_names_are_reported_with_step_and_optimizer():
    class Renaming(Bowl):
        def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[float, Any]:
            loss, grads = super().loss_and_grads(params, step, rng)
            return loss, grads if step < 2 else {"v": grads["w"]}

    with pytest.raises(Complaint, match=r"task: step 2 of SGD\(learning_rate=0.1.*'v'"):
        one_run(Renaming(), gs.SGD, 0.1, steps=10)


def test_metrics_that_overflow_do_not_end_the_race():
    class Strict(Bowl):
        def evaluate(self, params: Any) -> dict[str, float]:
            raise OverflowError

    assert one_run(Strict(), gs.SGD, 0.1, steps=3).metrics == {}


def test_every_race_that_is_cut_short_has_something_of_everyone():
    heats = plan(FAMILIES, None, seeds=2)
    count = len(FAMILIES)
    assert len(heats) == len(set(heats)) == count * len(FACTORS) * 2
    for start in range(0, len(heats), count):
        assert [heat.entrant for heat in heats[start : start + count]] == list(FAMILIES)
    assert [heat.seed for heat in heats] == sorted(heat.seed for heat in heats)
    factors = [heat.rate / heat.entrant.usual for heat in heats[: len(heats) // 2 : count]]
    assert factors[0] == pytest.approx(1)
    assert set(np.round(factors[1:3], 6)) == {0.3, 3}
    assert set(np.round(factors[3:], 6)) == {0.1, 10}


def test_tensors_race_like_arrays():
    torch = pytest.importorskip("torch")

    class Tensors:
        def init(self, seed: int) -> Any:
            return {"w": torch.tensor([1.0 + seed, -2.0], dtype=torch.float64, requires_grad=True)}

        def loss_and_grads(self, params: Any, step: int, rng: Any) -> tuple[Any, Any]:
            loss = (params["w"] ** 2).sum()
            (gradient,) = torch.autograd.grad(loss, [params["w"]])
            return loss, {"w": gradient}

    tensors = one_run(Tensors(), gs.Adam, 0.1, steps=20)
    arrays = one_run(Bowl(), gs.Adam, 0.1, steps=20)
    np.testing.assert_allclose(tensors.curve.losses, arrays.curve.losses, rtol=1e-12)
    assert tensors.state_bytes == arrays.state_bytes
