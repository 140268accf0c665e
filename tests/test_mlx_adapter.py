"""Proves that `gradstep.mlx` takes the place of `mlx.optimizers`: same arguments, same states, same training."""

import copy
import functools
import inspect
import math
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from families import FAMILIES

mx = pytest.importorskip("mlx.core")
theirs = pytest.importorskip("mlx.optimizers")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

import gradstep.mlx as ours  # noqa: E402

SHAPES = [(), (1,), (5,), (0,), (4, 3), (3, 4), (1, 6), (2, 4, 3), (2, 3, 2, 3)]
NAMES = ["SGD", "RMSprop", "Adagrad", "AdaDelta", "Adam", "AdamW", "Adamax", "Lion", "Adafactor", "Muon"]
FLOAT32 = 2.0**-23  # one ulp of 1
SCHEDULES = ["exponential_decay", "step_decay", "cosine_decay", "linear_schedule", "join_schedules"]
ADDED = {"ns_dtype"}  # arguments that MLX does not have
CONFIGURATIONS = [
    pytest.param(name, kwargs, id=f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})")
    for name in NAMES
    for row in [*FAMILIES[name], *([{"learning_rate": 0.5}] if name == "Adafactor" else [])]
    for kwargs in [{k: v for k, v in row.items() if k not in ADDED}]
]


def make(library: Any, name: str, **kwargs: Any) -> Any:
    return getattr(library, name)(**kwargs)


def arrays(seed: int, shapes: Any = None, dtype: Any = None) -> dict[str, Any]:
    """Parameters, or gradients, nested as in a model."""
    rng = np.random.default_rng(seed)
    made = [mx.array(rng.normal(size=shape), dtype or mx.float32) for shape in shapes or SHAPES]
    return {"layers": [{"weight": array} for array in made[1:]], "head": made[0]}


def assert_close(found: Any, expected: Any, ulps: float, ulp: float = FLOAT32) -> None:
    """Equal names, shapes and dtypes; values within so many ulp of themselves, or of 1 where they are smaller."""
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert list(found) == list(expected)
    for name, value in found.items():
        other = expected[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        value, other = (np.array(x.astype(mx.float32)) for x in (value, other))
        np.testing.assert_allclose(value, other, ulps * ulp, ulps * ulp, err_msg=name)


def assert_same(found: Any, expected: Any) -> None:
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert mx.array_equal(value, expected[name], equal_nan=True), name


class TestInPlaceOfMlx:
    def test_everything_that_loops_use_is_there(self):
        for name in NAMES:
            assert issubclass(getattr(ours, name), theirs.Optimizer)
        for name in ["Optimizer", "MultiOptimizer", "clip_grad_norm", *SCHEDULES]:
            assert getattr(ours, name) is getattr(theirs, name)
        assert set(ours.__all__) == {*NAMES, "Optimizer", "MultiOptimizer", "clip_grad_norm", *SCHEDULES}

    def test_every_optimizer_of_mlx_is_there(self):
        classes = [name for name, value in vars(theirs).items() if isinstance(value, type)]
        optimizers = {name for name in classes if issubclass(getattr(theirs, name), theirs.Optimizer)}
        assert optimizers == {*NAMES, "Optimizer", "MultiOptimizer"}

    @pytest.mark.parametrize("name", NAMES)
    def test_arguments_positions_and_defaults_are_those_of_mlx(self, name):
        def arguments(library: Any) -> list[Any]:
            parameters = inspect.signature(getattr(library, name)).parameters.values()
            default = {p.name: tuple(p.default) if isinstance(p.default, list) else p.default for p in parameters}
            return [(p.name, p.kind, default[p.name]) for p in parameters]

        found, expected = arguments(ours), arguments(theirs)
        assert found[: len(expected)] == expected
        assert {argument for argument, *_ in found[len(expected) :]} <= ADDED

    @pytest.mark.parametrize("name", NAMES)
    def test_hyperparameters_are_attributes(self, name):
        opt, other = (make(library, name, learning_rate=0.5) for library in (ours, theirs))
        for argument in list(inspect.signature(getattr(theirs, name)).parameters)[1:]:
            expected = getattr(other, argument)
            assert getattr(opt, argument) == (tuple(expected) if isinstance(expected, list) else expected)
        assert opt.learning_rate.item() == 0.5
        assert opt.step.item() == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_every_optimizer_documents_its_formula_its_arguments_an_example_and_a_source(self, name):
        doc = getattr(ours, name).__doc__
        for part in ("```", "Args:", "Raises:", "Example:", ">>>", "Source:"):
            assert part in doc
        for argument in inspect.signature(getattr(ours, name)).parameters:
            assert f"        {argument}: " in doc

    def test_without_mlx_the_import_names_the_extra(self):
        script = "import sys; sys.modules['mlx'] = None; import gradstep; import gradstep.mlx"
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=False
        )
        assert 'ImportError: gradstep.mlx needs MLX: pip install "gradstep[mlx]"' in done.stderr


class TestTheUpdate:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
    def test_parameters_and_state_follow_mlx(self, name, kwargs, compiled):
        found, expected = arrays(1), arrays(1)
        opt, other = make(ours, name, **kwargs), make(theirs, name, **kwargs)
        for library_opt, params in ((opt, found), (other, expected)):
            library_opt.init(params)
        assert_close(opt.state, other.state, 0)
        step = opt.apply_gradients
        if compiled:
            step = mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state)
        for seed in range(5):
            found = step(arrays(seed + 10), found)
            expected = other.apply_gradients(arrays(seed + 10), expected)
            # Roundings of scalars, means and reciprocal roots, and MLX's 1 - 0.999**t, which is off by 2e-5.
            assert_close(found, expected, 16)
            assert_close(opt.state, other.state, 16)

    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9999), (0.99, 0.95)])
    @pytest.mark.parametrize("t", [1, 2, 3, 7, 30, 100, 300, 1000, 100_000])
    def test_bias_correction_is_accurate_at_every_step(self, t, betas):
        opt = ours.Adam(0.1, betas=betas, eps=0.0, bias_correction=True)
        opt.init({"w": mx.zeros(1)})
        opt.state["step"] = mx.array(t - 1, mx.uint64)
        found = opt.apply_gradients({"w": mx.ones(1)}, {"w": mx.zeros(1)})["w"].item()
        c1, c2 = 0.1 / -math.expm1(t * math.log(betas[0])), 1 / math.sqrt(-math.expm1(t * math.log(betas[1])))
        expected = -c1 * (1 - betas[0]) / (math.sqrt(1 - betas[1]) * c2)
        assert found == pytest.approx(expected, rel=1e-6)
        assert opt.state["w"]["v"].item() == np.float32(1 - betas[1])  # not 1 - float32(beta2)

    @pytest.mark.parametrize("name", NAMES)
    def test_empty_matrices_are_ordinary(self, name):
        opt, w = make(ours, name, learning_rate=0.1), {"w": mx.zeros((0, 3))}
        assert opt.apply_gradients(w, w)["w"].shape == (0, 3)
        for _, value in tree_flatten(opt.state):
            assert mx.all(mx.isfinite(value))  # the column means of Adafactor too, which are NaN in MLX

    def test_a_beta_of_zero_has_nothing_to_correct(self):
        opt = ours.Adam(0.5, betas=(0.0, 0.0), eps=0.0, bias_correction=True)
        assert opt.apply_gradients({"w": mx.ones(1)}, {"w": mx.zeros(1)})["w"].item() == -0.5

    def test_a_rate_that_is_given_counts_for_adafactor_only_without_relative_step(self):
        w, g = {"w": mx.ones((2, 3))}, {"w": mx.ones((2, 3))}
        assert ours.Adafactor(0.5).apply_gradients(g, w)["w"][0, 0].item() == pytest.approx(0.99)
        opt = ours.Adafactor(0.5, relative_step=False)
        assert opt.apply_gradients(g, w)["w"][0, 0].item() == pytest.approx(0.5)
        assert not opt.relative_step
        opt.relative_step = True
        assert opt.apply_gradients(g, w)["w"][0, 0].item() == pytest.approx(0.99)

    def test_only_the_parameters_with_gradients_are_in_the_result(self):
        opt = ours.Adam(0.1)
        params = {"a": mx.ones(2), "b": mx.ones(2)}
        opt.init(params)
        assert list(opt.apply_gradients({"b": mx.ones(2)}, params)) == ["b"]
        assert opt.state["a"]["m"].tolist() == [0, 0]

    def test_a_subclass_sees_the_new_slots_as_it_would_in_mlx(self):
        class Cautious(ours.Lion):
            def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
                new = super().apply_single(gradient, parameter, state)
                return mx.where(state["m"] * gradient > 0, new, parameter)

        new = Cautious(0.5).apply_gradients({"w": mx.array([2.0, 0.0])}, {"w": mx.ones(2)})
        assert new["w"].tolist() == [0.5, 1.0]

    def test_float64_is_computed_in_float64(self):
        with mx.stream(mx.cpu):
            opt = ours.Adam(0.125, betas=(0.9, 0.999), bias_correction=True)
            w = mx.array([1.0], mx.float64)
            new = opt.apply_gradients({"w": mx.array([0.3], mx.float64)}, {"w": w})["w"]
            assert new.dtype == mx.float64
            assert np.array(new)[0] == pytest.approx(1 - 0.125 * 0.3 / (0.3 + 1e-8), rel=1e-14)


class TestLowPrecision:
    @pytest.mark.parametrize(("dtype", "ulp"), [("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
    @pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
    def test_parameters_and_state_keep_their_dtype_and_follow_mlx(self, name, kwargs, dtype, ulp):
        dtype = getattr(mx, dtype)
        shapes = [shape for shape in SHAPES if 0 not in shape]
        # In float16 MLX's eps is 0 and its Adafactor divides by a mean of 0: only ours is compared with what is right.
        fine = lambda tree: tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, tree)  # noqa: E731
        found, opt, right = arrays(1, shapes, dtype), make(ours, name, **kwargs), make(theirs, name, **kwargs)
        for seed in range(3):
            g = arrays(seed + 10, shapes, dtype)
            right.state = fine(opt.state) if seed else right.state
            expected = right.apply_gradients(fine(g), fine(found))
            found = opt.apply_gradients(g, found)
            for tree, other in ((found, expected), (opt.state, right.state)):
                for place, value in tree_flatten(tree):
                    if place not in ("step", "learning_rate"):
                        assert value.dtype == dtype, place
                rounded = tree_map(lambda a, b: b.astype(a.dtype), tree, other)
                assert_close(tree, rounded, 1, ulp)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_names_and_dtypes_of_the_state_are_those_of_mlx(self, dtype):
        params = arrays(1, dtype=getattr(mx, dtype))
        for name in NAMES:
            states = [make(library, name, learning_rate=0.1) for library in (ours, theirs)]
            for opt in states:
                opt.apply_gradients(params, params)
            found, expected = ([(k, v.dtype, v.shape) for k, v in tree_flatten(opt.state)] for opt in states)
            assert found == expected

    def test_small_gradients_of_float16_do_not_divide_by_zero(self):
        opt, other = ours.Adam(0.1), theirs.Adam(0.1)
        w, g = {"w": mx.ones(3, mx.float16)}, {"w": mx.full(3, 1e-5, mx.float16)}
        for _ in range(3):
            w = opt.apply_gradients(g, w)
        assert mx.all(mx.isfinite(w["w"]))
        assert not mx.all(mx.isfinite(other.apply_gradients(g, {"w": mx.ones(3, mx.float16)})["w"]))

    def test_gradients_may_have_another_dtype_than_their_parameter(self):
        for gradient, parameter in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")):
            opt = ours.AdamW(0.1)
            w = {"w": mx.ones(3, getattr(mx, parameter))}
            opt.init(w)
            new = opt.apply_gradients({"w": mx.ones(3, getattr(mx, gradient))}, w)
            assert new["w"].dtype == opt.state["w"]["m"].dtype == getattr(mx, parameter)


class Network(nn.Module):
    """A small model with parameters of one, two and four dimensions, some of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 4, 3)
        self.layers = [nn.Linear(4 * 36, 16), nn.Linear(16, 3)]

    def __call__(self, x: Any) -> Any:
        x = mx.tanh(self.image(x)).reshape(len(x), -1)
        return self.layers[1](mx.tanh(self.layers[0](x)))


def task() -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(24, 8, 8, 1)).astype(np.float32)
    return mx.array(x), mx.array(np.digitize(x.mean(axis=(1, 2, 3)), [-0.05, 0.05]))


def train(opt: Any, steps: int, *, compiled: bool, model: Any = None) -> tuple[Any, list[float]]:
    """MLX's own training loop."""
    x, y = task()
    if model is None:
        mx.random.seed(3)
        model = Network()
    mx.eval(model.parameters())
    loss_and_grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    state = [model.state, opt.state]

    def step(x: Any, y: Any) -> Any:
        loss, grads = loss_and_grad(x, y)
        opt.update(model, grads)
        return loss

    if compiled:
        opt.init(model.trainable_parameters())
        step = functools.partial(mx.compile, inputs=state, outputs=state)(step)
    losses = []
    for _ in range(steps):
        losses.append(step(x, y).item())
        mx.eval(model.state, opt.state)
    return model, losses


TRAINED = [
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"learning_rate": 0.003}),
    ("Adagrad", {"learning_rate": 0.02}),
    ("AdaDelta", {"learning_rate": 1.0, "eps": 1e-4}),
    ("Adam", {"learning_rate": 0.01}),
    ("AdamW", {"learning_rate": 0.01, "bias_correction": True}),
    ("Adamax", {"learning_rate": 0.01}),
    ("Lion", {"learning_rate": 0.003, "weight_decay": 0.1}),
    ("Adafactor", {"learning_rate": 0.01, "relative_step": False, "scale_parameter": False}),
    ("Adafactor", {"warmup_init": True}),
    ("Muon", {"learning_rate": 0.01}),
]


class TestTrainingAModel:
    @pytest.mark.parametrize(("name", "kwargs"), TRAINED)
    def test_a_compiled_loop_ends_with_the_loss_that_mlx_reaches(self, name, kwargs):
        opt, other = (make(library, name, **kwargs) for library in (ours, theirs))
        _, found = train(opt, 25, compiled=True)
        _, expected = train(other, 25, compiled=True)
        np.testing.assert_allclose(found, expected, 1e-3)
        if "warmup_init" not in kwargs:
            assert found[-1] < 0.8 * found[0]
        assert opt.step.item() == 25

    @pytest.mark.parametrize(("name", "kwargs"), TRAINED)
    def test_eager_and_compiled_loops_agree(self, name, kwargs):
        _, eager = train(make(ours, name, **kwargs), 8, compiled=False)
        _, compiled = train(make(ours, name, **kwargs), 8, compiled=True)
        np.testing.assert_allclose(eager, compiled, 1e-4)

    def test_several_optimizers_in_one_compiled_loop(self):
        def several(library: Any) -> Any:
            matrices = make(library, "Muon", learning_rate=library.cosine_decay(0.02, 20))
            rest = make(library, "AdamW", learning_rate=library.linear_schedule(0.0, 0.02, 5), bias_correction=True)
            return library.MultiOptimizer([matrices, rest], [lambda name, weight: "weight" in name])

        opt, other = several(ours), several(theirs)
        (model, found), (expected_model, expected) = (train(o, 12, compiled=True) for o in (opt, other))
        np.testing.assert_allclose(found, expected, 1e-4)
        assert_close(model.parameters(), expected_model.parameters(), 1000)
        assert [name for name, _ in tree_flatten(opt.state)] == [name for name, _ in tree_flatten(other.state)]
        for i in range(2):
            assert opt.state["states"][i]["learning_rate"].item() == pytest.approx(
                other.state["states"][i]["learning_rate"].item(), rel=1e-6
            )
        assert set(opt.state["states"][0]["layers"][0]) == {"weight"}
        assert set(opt.state["states"][1]["layers"][0]) == {"bias"}

    def test_ours_and_theirs_side_by_side(self):
        def mixed(first: Any, second: Any) -> Any:
            return theirs.MultiOptimizer([first.Lion(0.003), second.Adam(0.01)], [lambda name, _: "weight" in name])

        expected = train(mixed(theirs, theirs), 6, compiled=True)[1]
        for first, second in ((ours, theirs), (theirs, ours)):
            np.testing.assert_allclose(train(mixed(first, second), 6, compiled=True)[1], expected, 1e-4)

    def test_gradients_clipped_in_the_compiled_step(self):
        def step(library: Any) -> Any:
            opt, w = library.SGD(0.5), {"w": mx.ones(2)}
            opt.init(w)

            @functools.partial(mx.compile, inputs=opt.state, outputs=opt.state)
            def run(g: Any) -> Any:
                return opt.apply_gradients(library.clip_grad_norm(g, 1.0)[0], w)

            return run({"w": mx.array([3.0, 4.0])})["w"].tolist()

        assert step(ours) == pytest.approx(step(theirs), rel=1e-6)
        assert step(ours) == pytest.approx([0.7, 0.6], rel=1e-6)


def warmup(library: Any, join: Any = None) -> Any:
    return (join or library).join_schedules(
        [
            library.linear_schedule(0.0, 0.1, 4),
            library.cosine_decay(0.1, 6, 0.02),
            library.step_decay(0.02, 0.5, 3),
            library.exponential_decay(0.01, 0.5),
        ],
        [4, 10, 15],
    )


def halving(step: Any) -> Any:
    return 0.1 * 0.5 ** (step // 3)


def by_hand(step: Any) -> Any:
    return mx.where(step < 3, 0.1, 0.1 * mx.cos(step / 20))


RATES = {
    "gradstep's": (lambda: warmup(gs), warmup(gs)),
    "MLX's": (lambda: warmup(theirs), warmup(gs)),
    "gradstep's in MLX's": (lambda: warmup(gs, theirs), warmup(gs)),
    "MLX's in gradstep's": (lambda: warmup(theirs, gs), warmup(gs)),
    "LearningRate": (lambda: gs.LearningRate(warmup(gs)), warmup(gs)),
    "arithmetic": (lambda: halving, halving),
    "operations": (lambda: by_hand, lambda step: 0.1 if step < 3 else 0.1 * math.cos(step / 20)),
    "a plain number": (lambda: lambda step: 0.25, lambda step: 0.25),
}


class TestTheRate:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize(("schedule", "expected"), RATES.values(), ids=RATES)
    def test_a_schedule_of_either_library_is_followed(self, schedule, expected, compiled):
        opt = ours.SGD(schedule())
        assert opt.learning_rate.item() == pytest.approx(float(expected(0)), rel=2e-6)
        w = {"w": mx.zeros(1)}
        opt.init(w)
        step = mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state) if compiled else opt.apply_gradients
        for i in range(20):
            moved = -step({"w": mx.ones(1)}, w)["w"].item()
            assert moved == opt.learning_rate.item()
            assert moved == pytest.approx(float(expected(i)), rel=2e-6, abs=1e-9), i

    def test_the_schedules_of_gradstep_serve_the_optimizers_of_mlx_too(self):
        opt = theirs.SGD(warmup(gs))
        opt.init({"w": mx.zeros(1)})
        step = mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state)
        for i in range(20):
            step({"w": mx.ones(1)}, {"w": mx.zeros(1)})
            assert opt.learning_rate.item() == pytest.approx(warmup(gs)(i), rel=2e-6, abs=1e-9)

    def test_schedules_give_numbers_for_numbers_and_arrays_for_arrays(self):
        for schedule in [*warmup(gs).schedules, warmup(gs)]:
            assert isinstance(schedule(3), float)
            assert isinstance(schedule(np.int64(3)), float)
            assert isinstance(schedule(mx.array(3)), mx.array)

    def test_a_schedule_that_asks_for_the_value_serves_eagerly_only(self):
        opt = ours.SGD(lambda step: 0.5 if step < 2 else 0.25)
        w = {"w": mx.zeros(1)}
        rates = [-opt.apply_gradients({"w": mx.ones(1)}, w)["w"].item() for _ in range(3)]
        assert rates == [0.5, 0.5, 0.25]
        step = mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state)
        with pytest.raises(gs.TracingError, match=r"mx\.where for if"):
            step({"w": mx.ones(1)}, w)

    def test_math_functions_of_the_step_are_refused_in_compile(self):
        opt = ours.SGD(lambda step: math.cos(step))
        step = mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state)
        with pytest.raises(gs.TracingError, match=r"mx\.cos for math\.cos"):
            step({"w": mx.ones(1)}, {"w": mx.ones(1)})

    def test_a_rate_that_is_set_replaces_a_schedule_and_reaches_compiled_steps(self):
        opt, w = ours.SGD(gs.exponential_decay(0.5, 0.5)), {"w": mx.zeros(1)}
        opt.init(w)
        opt.learning_rate = 0.125
        step = mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state)
        assert step({"w": mx.ones(1)}, w)["w"].item() == -0.125
        opt.learning_rate = 0.75
        assert step({"w": mx.ones(1)}, w)["w"].item() == -0.75
        opt.learning_rate = gs.step_decay(1.0, 0.5, 1)
        assert opt.learning_rate.item() == 0.25

    @pytest.mark.parametrize(
        "rate", [1, 0.5, np.float32(0.5), gs.LearningRate(0.5), mx.array(0.5), mx.array([0.5]), mx.array([1])]
    )
    def test_a_rate_may_be_any_number(self, rate):
        opt = ours.SGD(rate)
        assert (opt.learning_rate.shape, opt.learning_rate.dtype) == ((), mx.float32)
        assert ours.SGD(0.1).learning_rate.item() == np.float32(0.1)

    def test_what_is_no_rate_is_refused(self):
        with pytest.raises(gs.ArgumentTypeError, match="a number, an array or a schedule, got 'fast'"):
            ours.SGD("fast")
        with pytest.raises(gs.NonFiniteScalarError):
            ours.SGD(math.nan)
        with pytest.raises(gs.NonFiniteScalarError):
            ours.SGD(lambda step: math.inf)
        with pytest.raises(gs.ShapeError, match="one number"):
            ours.SGD(mx.ones(3))
        with pytest.raises(gs.ConfigurationError, match="needs a learning rate"):
            ours.Adafactor(relative_step=False)
        opt = ours.SGD(0.1)
        with pytest.raises(gs.ArgumentTypeError):
            opt.learning_rate = None
        assert opt.learning_rate.item() == np.float32(0.1)


class TestTheState:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize(("name", "kwargs"), TRAINED)
    def test_saved_and_loaded_it_resumes_bit_for_bit(self, name, kwargs, compiled, tmp_path):
        kwargs = {**kwargs, "learning_rate": warmup(gs)} if "learning_rate" in kwargs else kwargs
        opt = make(ours, name, **kwargs)
        model, _ = train(opt, 4, compiled=compiled)
        mx.savez(str(tmp_path / "opt.npz"), **dict(tree_flatten(opt.state)))
        mx.savez(str(tmp_path / "model.npz"), **dict(tree_flatten(model.parameters())))
        _, expected = train(opt, 4, compiled=compiled, model=model)

        resumed, copied = make(ours, name, **kwargs), Network()
        resumed.state = tree_unflatten(list(mx.load(str(tmp_path / "opt.npz")).items()))
        copied.load_weights(str(tmp_path / "model.npz"))
        _, losses = train(resumed, 4, compiled=compiled, model=copied)
        assert losses == expected
        assert dict(tree_flatten(resumed.state)).keys() == dict(tree_flatten(opt.state)).keys()
        assert_same(sorted_tree(resumed.state), sorted_tree(opt.state))
        assert_same(copied.parameters(), model.parameters())

    @pytest.mark.parametrize(("first", "second"), [(ours, theirs), (theirs, ours)], ids=["to MLX", "from MLX"])
    @pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
    def test_it_goes_from_one_library_to_the_other_within_a_training(self, name, kwargs, first, second):
        expected, found = arrays(1), arrays(1)
        straight, before, after = make(first, name, **kwargs), make(first, name, **kwargs), make(second, name, **kwargs)
        for seed in range(6):
            expected = straight.apply_gradients(arrays(seed + 10), expected)
            if seed == 3:
                after.state = tree_unflatten(tree_flatten(before.state))
            opt = before if seed < 3 else after
            found = opt.apply_gradients(arrays(seed + 10), found)
        assert_close(found, expected, 16)
        assert_close(sorted_tree(after.state), sorted_tree(straight.state), 16)

    def test_what_belongs_to_another_optimizer_is_refused_whole(self):
        other, opt = theirs.SGD(0.5, momentum=0.9), ours.Adam(0.1)
        w = {"w": mx.ones(2)}
        other.apply_gradients(w, w)
        opt.state = other.state
        with pytest.raises(gs.UnknownParameterError, match="has 'v', but Adam needs 'm'"):
            opt.apply_gradients(w, w)
        assert opt.step.item() == 1

    def test_slots_of_another_shape_are_refused(self):
        opt, w = ours.Adam(0.1), {"w": mx.ones((2, 2))}
        opt.init({"w": mx.ones(2)})
        with pytest.raises(gs.ShapeError, match=r"'m' has shape \(2,\) in the state, but its parameter needs \(2, 2\)"):
            opt.apply_gradients(w, w)

    def test_it_may_be_copied_and_pickled(self):
        opt, w = ours.AdamW(gs.cosine_decay(0.1, 10), bias_correction=True), {"w": mx.array([1.0, 2.0])}
        opt.apply_gradients(w, w)
        twins = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        expected = [opt.apply_gradients(w, w) for _ in range(2)]
        for twin in twins:
            assert twin.step.item() == 1
            for new in expected:
                assert_same(twin.apply_gradients(w, w), new)


class TestAllOrNothing:
    def bad_steps(self) -> Any:
        def fails(step: Any) -> float:
            raise OSError("no disk")

        good, params = {"a": mx.ones(2), "b": mx.ones(3)}, {"a": mx.ones(2), "b": mx.ones(3)}
        yield None, {**good, "b": mx.ones(2)}, params, gs.ShapeError
        yield None, {**good, "b": mx.ones(3, mx.int32)}, params, gs.DtypeError
        yield None, good, {**params, "b": mx.ones(3, mx.complex64)}, gs.DtypeError
        yield None, good, {"a": mx.ones(2)}, KeyError
        yield fails, good, params, OSError

    @pytest.mark.parametrize("name", NAMES)
    def test_a_step_that_raises_leaves_state_and_rate(self, name):
        for schedule, grads, params, expected in self.bad_steps():
            opt = make(ours, name, learning_rate=gs.exponential_decay(0.1, 0.5))
            opt.init({"a": mx.ones(2), "b": mx.ones(3)})
            for _ in range(2):
                opt.apply_gradients({"a": mx.ones(2), "b": mx.ones(3)}, {"a": mx.ones(2), "b": mx.ones(3)})
            before = tree_map(lambda x: x, opt.state)
            if schedule:
                opt._schedulers["learning_rate"] = schedule
            with pytest.raises(expected):
                opt.apply_gradients(grads, params)
            assert_same(opt.state, before)

    def test_gradients_and_parameters_are_never_written(self):
        for name in NAMES:
            params, grads = arrays(1), arrays(2)
            opt = make(ours, name, learning_rate=0.1)
            opt.apply_gradients(grads, params)
            mx.eval(opt.state)
            assert_same(params, arrays(1))
            assert_same(grads, arrays(2))


class TestHyperparameters:
    @pytest.mark.parametrize(
        ("name", "kwargs", "error"),
        [
            ("SGD", {"momentum": -1.0}, gs.OutOfRangeError),
            ("SGD", {"nesterov": True}, gs.ConfigurationError),
            ("SGD", {"momentum": 0.9, "nesterov": True, "dampening": 0.1}, gs.ConfigurationError),
            ("RMSprop", {"eps": 0.0}, gs.OutOfRangeError),
            ("RMSprop", {"eps": 1e-50}, gs.OutOfRangeError),
            ("Adam", {"betas": (0.9, 1.0)}, gs.OutOfRangeError),
            ("Adam", {"betas": (0.9, math.nan)}, gs.NonFiniteScalarError),
            ("Adam", {"betas": 0.9}, gs.ArgumentTypeError),
            ("Adam", {"betas": (0.9, lambda step: 0.9)}, gs.ArgumentTypeError),
            ("AdamW", {"weight_decay": gs.linear_schedule(0, 1, 2)}, gs.ArgumentTypeError),
            ("AdamW", {"bias_correction": "yes"}, gs.ArgumentTypeError),
            ("Adafactor", {"decay_rate": 0.8}, gs.OutOfRangeError),
            ("Adafactor", {"relative_step": "yes"}, gs.ArgumentTypeError),
            ("Muon", {"ns_steps": 0}, gs.OutOfRangeError),
        ],
    )
    def test_what_cannot_be_is_refused(self, name, kwargs, error):
        with pytest.raises(error):
            make(ours, name, learning_rate=0.1, **kwargs)

    def test_attributes_may_be_set_and_are_checked(self):
        opt, w = ours.AdamW(0.5, weight_decay=0.0), {"w": mx.ones(1)}
        opt.betas = [0.0, 0.0]
        opt.weight_decay = 0.5
        assert opt.betas == (0.0, 0.0)
        assert opt.apply_gradients(w, w)["w"].item() == pytest.approx(0.25)
        with pytest.raises(gs.OutOfRangeError, match="AdamW's betas"):
            opt.betas = (0.0, 2.0)
        assert opt.betas == (0.0, 0.0)
        opt = ours.RMSprop(0.1)
        with pytest.raises(gs.OutOfRangeError, match="float32"):
            opt.eps = 1e-50
        assert opt.eps == 1e-8

    def test_several_may_be_set_at_once(self):
        opt = ours.SGD(0.5)
        opt.set_hyperparameters({"learning_rate": 0.25, "momentum": 0.5, "nesterov": True})
        assert (opt.get_hyperparameter("learning_rate").item(), opt.momentum, opt.nesterov) == (0.25, 0.5, True)


def sorted_tree(tree: Any) -> Any:
    """Dictionaries in the order of their keys: loading may change it."""
    if isinstance(tree, dict):
        return {key: sorted_tree(tree[key]) for key in sorted(tree)}
    return [sorted_tree(value) for value in tree] if isinstance(tree, list) else tree
