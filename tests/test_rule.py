"""Proves that `@gs.rule` makes full optimizers of functions, and refuses what cannot become one with advice."""

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import Reference, assert_same_bits


@gs.rule
def Signum(w, g, m, *, learning_rate, momentum=0.9, weight_decay=0.0):
    """The sign of the momentum."""
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * (gs.sign(m) + weight_decay * w), m


@gs.rule
def Lamb(w, g, m, v, *, learning_rate, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01, t):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    update = m / (1 - beta1**t) / (gs.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * w
    trust = gs.where(gs.norm(w) > 0, gs.norm(w) / gs.norm(update), 1.0)
    return w - learning_rate * trust * update, m, v


@gs.rule
def Centered(w, g, *, learning_rate):
    return w - learning_rate * (g - gs.mean(g)) / (gs.rms(g) + 1e-8)


@gs.rule
def Shrink(w, g, *, factor):
    return factor * w


@gs.rule
def Harmonic(w, g, *, learning_rate, t):
    return w - learning_rate / t * g


@gs.rule(static=["repeats"])
def Repeated(w, g, m, *, learning_rate, repeats=2, mode="plain", keep=True):
    for _ in range(repeats):
        w = w - learning_rate * (gs.sign(g) if mode == "sign" else g)
    return w, m + g if keep else None


RULES = [
    pytest.param(Signum(0.1, weight_decay=0.2), id="Signum"),
    pytest.param(Lamb(0.1), id="Lamb"),
    pytest.param(Centered(0.1), id="Centered"),
    pytest.param(Shrink(factor=0.7), id="Shrink"),
    pytest.param(Harmonic(0.1), id="Harmonic"),
    pytest.param(Repeated(0.1, mode="sign"), id="Repeated"),
    pytest.param(Signum(lambda step: 0.1 / (1 + step), momentum=gs.linear_schedule(0.5, 0.9, 3)), id="scheduled"),
]


def arrays(seed: int, shapes: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape).astype(dtype)) for name, shape in shapes.items()}


SHAPES = {"scalar": (), "vector": (17,), "matrix": (33, 70), "large": (1 << 15) + 3}


class TestSteps:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("library", ["numpy", "torch"])
    @pytest.mark.parametrize("template", RULES)
    def test_they_equal_the_function_on_plain_numpy(self, template, library, dtype):
        opt, params = copy.deepcopy(template), arrays(1, SHAPES, dtype)
        references = {name: Reference(opt, w) for name, w in params.items()}
        wrap = torch.from_numpy if library == "torch" else np.asarray
        params = {name: wrap(w) for name, w in params.items()}
        for step in range(3):
            grads = arrays(2 + step, SHAPES, dtype)
            opt.apply_gradients({name: wrap(g) for name, g in grads.items()}, params)
            for name, g in grads.items():
                references[name].step(g)
                assert_same_bits(params[name], references[name].w, name)
                kept = {slot: value for slot, value in references[name].slots.items() if value is not None}
                assert opt.state[name].keys() == kept.keys()
                for slot, value in kept.items():
                    assert_same_bits(opt.state[name][slot], value, f"{name} {slot}")

    def test_lamb_follows_its_formula_in_float64(self):
        w, m, v = np.arange(1.0, 7.0), np.zeros(6), np.zeros(6)
        opt, params = Lamb(0.1), {"w": w.copy()}
        for t in (1, 2, 3):
            g = np.cos(np.arange(6.0) * t)
            opt.apply_gradients({"w": g}, params)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + 0.01 * w
            w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(update) * update
            np.testing.assert_allclose(params["w"], w, 1e-12)

    def test_t_is_the_parameters_own_count_from_one(self):
        opt, params = Harmonic(1.0), {"a": np.zeros(1), "b": np.zeros(1)}
        opt.apply_gradients({"a": np.ones(1)}, params)
        assert params["a"][0] == -1
        opt.apply_gradients({"a": np.ones(1), "b": np.ones(1)}, params)
        assert (params["a"][0], params["b"][0]) == (-1.5, -1)

    @pytest.mark.parametrize("slots", ["b, a", "g, a", "a + g, a", "w, g", "a, b", "b, b", "w - g, w + g"])
    def test_slots_may_be_passed_on(self, slots):
        names: dict[str, Any] = {}
        exec(f"def Passing(w, g, a, b, *, x):\n    return w - x * g, {slots}", names)
        opt, params = gs.rule(names["Passing"])(x=0.7), arrays(1, {"w": 100})
        reference = Reference(opt, params["w"])
        for step in range(3):
            g = arrays(2 + step, {"w": 100})["w"]
            opt.apply_gradients({"w": g}, params)
            reference.step(g)
            assert_same_bits(params["w"], reference.w)
            for slot in "ab":
                assert_same_bits(opt.state["w"][slot], reference.slots[slot], slot)

    def test_a_rule_may_leave_the_parameter_as_it_is(self):
        @gs.rule
        def Watch(w, g, seen):
            return w, seen + g

        opt, w = Watch(), np.ones(3)
        for _ in range(2):
            opt.apply_gradients({"w": np.full(3, 2.0)}, {"w": w})
        assert (w == 1).all()
        assert (opt.state["w"]["seen"] == 4).all()

    def test_a_rule_may_depend_on_the_shape(self):
        @gs.rule
        def Shaped(w, g, *, learning_rate):
            return w - learning_rate * g / w.shape[-1] if w.ndim == 2 else w + g

        params = {"a": np.zeros((2, 4)), "b": np.zeros((3, 5)), "c": np.zeros(3)}
        Shaped(1.0).apply_gradients({name: np.ones(w.shape) for name, w in params.items()}, params)
        assert [w.flat[0] for w in params.values()] == [-1 / 4, -1 / 5, 1]

    def test_positional_only_slots_are_slots(self):
        @gs.rule
        def Strict(w, g, m, /, *, learning_rate):
            return w - learning_rate * g, m + g

        opt, params = Strict(0.5), {"w": np.zeros(2)}
        opt.apply_gradients({"w": np.ones(2)}, params)
        assert (params["w"] == -0.5).all()
        assert (opt.state["w"]["m"] == 1).all()

    @pytest.mark.parametrize("name", ["sqrt", "minimum", "where", "shape", "inf", "nan", "s1", "mean"])
    def test_hyperparameters_may_be_named_like_anything(self, name):
        names: dict[str, Any] = {"gs": gs, "infinity": math.inf}
        exec(
            f"def Named(w, g, *, rate, {name}=2.0):\n"
            f"    return w - gs.sqrt(rate * {name}) * gs.minimum(rate, infinity) * g * (gs.mean(g) + w.shape[0])",
            names,
        )
        params = {"w": np.zeros(3)}
        gs.rule(names["Named"])(rate=8.0).apply_gradients({"w": np.ones(3)}, params)
        assert (params["w"] == -128).all()

    def test_options_of_the_step_work_on_rules(self):
        opt, params = Centered(0.1, clip_norm=1.0, nonfinite="skip"), {"w": np.ones(2)}
        opt.apply_gradients({"w": np.array([np.nan, 1.0])}, params)
        assert (params["w"] == 1).all()
        assert (opt.report.applied, opt.report.culprits, opt.step) == (False, ("w",), 0)


class TestOptimizersOfRules:
    def test_they_look_like_any_optimizer(self):
        assert issubclass(Signum, gs.Optimizer)
        assert (Signum.__name__, Signum.__module__, Signum.__doc__) == ("Signum", __name__, "The sign of the momentum.")
        assert list(inspect.signature(Signum).parameters)[:3] == ["learning_rate", "momentum", "weight_decay"]
        opt = Signum(0.1, momentum=0.5)
        assert repr(opt) == "Signum(learning_rate=0.1, momentum=0.5, weight_decay=0.0)"
        assert opt.hyperparameters == {"learning_rate": 0.1, "momentum": 0.5, "weight_decay": 0.0}
        assert (opt.learning_rate, opt.momentum) == (0.1, 0.5)

    def test_the_rule_is_the_function(self):
        def Plain(w, g, *, learning_rate):
            return w - learning_rate * g

        assert gs.rule(Plain).rule is Plain
        assert Signum.rule(2.0, 3.0, 0.0, learning_rate=0.5, momentum=0.0, weight_decay=0.0) == (1.5, 3.0)

    def test_the_function_runs_on_torch_tensors_too(self):
        w, g, m, v = (torch.from_numpy(a) for a in arrays(1, dict.fromkeys("wgmv", 40)).values())
        v = v * v
        found = Lamb.rule(w, g, m, v, learning_rate=0.1, beta1=0.9, beta2=0.99, eps=0.1, weight_decay=0.1, t=3)
        expected = Lamb.rule(
            *(a.numpy() for a in (w, g, m, v)),
            learning_rate=0.1, beta1=0.9, beta2=0.99, eps=0.1, weight_decay=0.1, t=3,
        )  # fmt: skip
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, 1e-6)

    def test_without_a_learning_rate_it_is_none(self):
        opt, params = Shrink(factor=0.5), {"w": np.ones(2)}
        opt.apply_gradients({"w": np.ones(2)}, params)
        assert (params["w"] == 0.5).all()
        assert opt.learning_rate is None
        assert opt.report.learning_rate is None

    def test_only_the_learning_rate_is_positional(self):
        with pytest.raises(gs.ArgumentTypeError):
            Signum(0.1, 0.9)
        with pytest.raises(gs.ArgumentTypeError):
            Shrink(0.5)
        with pytest.raises(gs.ArgumentTypeError, match="learning_rate"):
            Signum()
        with pytest.raises(gs.ArgumentTypeError, match="speed"):
            Signum(0.1, speed=1)

    def test_hyperparameters_are_checked_when_made_and_when_set(self):
        with pytest.raises(gs.NonFiniteScalarError, match="Signum's momentum"):
            Signum(0.1, momentum=float("nan"))
        opt = Signum(0.1)
        with pytest.raises(gs.NonFiniteScalarError, match="Signum's weight_decay"):
            opt.weight_decay = float("inf")
        assert opt.weight_decay == 0
        opt.momentum = lambda step: 0.25
        assert opt.momentum == 0.25

    def test_static_hyperparameters_choose_the_program(self):
        for repeats in (1, 3):
            params = {"w": np.zeros(2)}
            Repeated(1.0, repeats=repeats).apply_gradients({"w": np.ones(2)}, params)
            assert (params["w"] == -repeats).all()

    def test_static_hyperparameters_can_be_changed_between_steps(self):
        opt, params = Repeated(1.0), {"w": np.zeros(2)}
        opt.apply_gradients({"w": np.full(2, 3.0)}, params)
        opt.repeats, opt.mode = 1, "sign"
        opt.apply_gradients({"w": np.full(2, 3.0)}, params)
        assert (params["w"] == -7).all()
        opt.keep = False
        opt.apply_gradients({"w": np.full(2, 3.0)}, params)
        assert (params["w"] == -8).all()
        assert opt.state["w"].keys() == set()

    @pytest.mark.parametrize("library", ["numpy", "torch"])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Signum(gs.cosine_decay(0.1, 10), momentum=0.5),
            lambda: Lamb(0.1),
            lambda: Repeated(0.1, repeats=3),
            lambda: gs.MultiOptimizer([Signum(0.1), gs.MultiOptimizer([Lamb(0.1), gs.Adafactor()], ["b"])], ["a"]),
        ],
    )
    def test_copies_go_on_like_the_original_and_apart_from_it(self, make, duplicate, library):
        wrap = torch.from_numpy if library == "torch" else np.asarray
        shapes = {"a": 5, "b": (3, 4), "c": (4, 3)}
        steps = [{name: wrap(g) for name, g in arrays(2 + i, shapes).items()} for i in range(4)]
        opt, params = make(), {name: wrap(w) for name, w in arrays(1, shapes).items()}
        for grads in steps[:2]:
            opt.apply_gradients(grads, params)
        twin, twin_params = duplicate(opt), copy.deepcopy(params)
        assert (twin.step, twin.steps, repr(twin)) == (opt.step, opt.steps, repr(opt))
        for grads in steps[2:]:
            twin.apply_gradients(grads, twin_params)
        assert (opt.step, twin.step) == (2, 4)
        for grads in steps[2:]:
            opt.apply_gradients(grads, params)
        for name, w in params.items():
            assert_same_bits(w, twin_params[name], name)
            for slot, value in opt.state[name].items():
                assert_same_bits(value, twin.state[name][slot], f"{name} {slot}")


BAD_SIGNATURES: dict[str, tuple[Callable[..., Any], str]] = {
    "no g": (lambda w, *, learning_rate: w, "must begin with w, g"),
    "other names": (lambda p, g, *, learning_rate: p, "must begin with w, g"),
    "slots in *args": (lambda w, g, *slots, learning_rate: w, r"\*slots hides .* name every slot"),
    "**kwargs": (lambda w, g, **others: w, r"\*\*others hides .* name every slot and hyperparameter"),
    "a slot with a default": (lambda w, g, m=0, *, learning_rate: w, r"m cannot have a default.* put \* before m"),
    "t as a slot": (lambda w, g, t, *, learning_rate: (w, t), "t .*reserved"),
    "a slot named state": (lambda w, g, state, *, learning_rate: (w, state), "state .*reserved"),
    "a slot named learning_rate": (lambda w, g, learning_rate: (w, g), "learning_rate"),
    "a private slot": (lambda w, g, _m, *, learning_rate: (w, _m), "_m .*reserved"),
    "hyperparameter step": (lambda w, g, *, learning_rate, step=1: w, "step .*reserved"),
    "hyperparameter rule": (lambda w, g, *, learning_rate, rule=1: w, "rule .*reserved"),
    "hyperparameter clip_norm": (lambda w, g, *, learning_rate, clip_norm=1: w, "clip_norm .*reserved"),
    "hyperparameter apply_gradients": (lambda w, g, *, apply_gradients=1: w, "apply_gradients .*reserved"),
    "a default that is no number": (
        lambda w, g, *, betas=(0.9, 0.99): w, r'betas=\(0.9, 0.99\) .*@gs.rule\(static=\["betas"\]\)',
    ),
}  # fmt: skip

NUMBER = np.float64(2)
BAD_BODIES: dict[str, tuple[Callable[..., Any], str]] = {
    "too few results": (lambda w, g, m, x: w, "must return w, m; it returned 1"),
    "too many results": (lambda w, g, m, x: (w, m, g), "must return w, m; it returned 3"),
    "a list": (lambda w, g, m, x: [w, m], "must return w, m"),
    "a mapping": (lambda w, g, m, x: {"w": w, "m": m}, "must return w, m"),
    "no result": (lambda w, g, m, x: None, "must return w, m"),
    "no w": (lambda w, g, m, x: (None, m), "must return w .*None"),
    "a number for w": (lambda w, g, m, x: (1.0, m), r"must return w .*1\.0"),
    "a scalar for w": (lambda w, g, m, x: (x, m), "must return w with the shape of the old w"),
    "a statistic for a slot": (lambda w, g, m, x: (w, gs.mean(g)), "must return m with the shape of the old m"),
    "a row statistic": (lambda w, g, m, x: (w, gs.mean(g, axis=-1)), "must return m with the shape of the old m"),
    "a comparison for w": (lambda w, g, m, x: (w > g, m), "must return w"),
    "a slot read and dropped": (lambda w, g, m, x: (w - m, None), "reads the slot m but returns None"),
    "if on an array": (lambda w, g, m, x: (w if g > 0 else g, m), r"cannot branch on .*where\(condition, x, y\)"),
    "if on a scalar": (lambda w, g, m, x: (w if x else g, m), "cannot branch on .*static"),
    "if on a scalar's range": (lambda w, g, m, x: (w if x > 0 else g, m), "cannot branch on .*static"),
    "a chained comparison": (lambda w, g, m, x: (gs.where(0 < g < 1, w, g), m), "cannot branch on"),
    "and": (lambda w, g, m, x: (gs.where((w > 0) and (g > 0), w, g), m), "cannot branch on"),
    "&": (lambda w, g, m, x: (gs.where((w > 0) & (g > 0), w, g), m), r"may use \+ - \* /"),
    "max": (lambda w, g, m, x: (max(w, g), m), "cannot branch on"),
    "float": (lambda w, g, m, x: (w - float(x) * g, m), r"cannot become a number; use gradstep's sqrt"),
    "int": (lambda w, g, m, x: (w - int(x) * g, m), r"where\(…\) instead of int\(\)"),
    "round": (lambda w, g, m, x: (w - round(x) * g, m), "cannot become a number"),
    "a NumPy function": (lambda w, g, m, x: (np.sqrt(w), m), r"NumPy .*use gradstep's functions \(sqrt"),
    "a NumPy conversion": (lambda w, g, m, x: (w - np.asarray(g), m), "NumPy .*cannot take .*g"),
    "a NumPy number on the left": (lambda w, g, m, x: (NUMBER * w, m), "plain floats"),
    "a NumPy number on the right": (lambda w, g, m, x: (w * NUMBER, m), "plain floats"),
    "a NumPy array": (lambda w, g, m, x: (w - np.ones(3) * g, m), "NumPy"),
    "an array on the right": (lambda w, g, m, x: (w - g * np.ones(3), m), "plain floats and integers, got array"),
    "a torch function": (lambda w, g, m, x: (torch.sqrt(w), m), "use gradstep's functions"),
    "a power": (lambda w, g, m, x: (w - g**2, m), r"write x \* x, or gs\.sqrt\(x\), instead of"),
    "an item": (lambda w, g, m, x: (w - g[0], m), r"may use \+ - \* /"),
    "a length": (lambda w, g, m, x: (w - g / len(g), m), r"may use \+ - \* /"),
    "iteration": (lambda w, g, m, x: (w - sum(g), m), r"may use \+ - \* /"),
    "a matrix product": (lambda w, g, m, x: (w @ g, m), r"may use \+ - \* /"),
    "a remainder": (lambda w, g, m, x: (w % g, m), r"may use \+ - \* /"),
    "a method": (lambda w, g, m, x: (w - g.sum(), m), r"no \.sum; a rule may use"),
    "text": (lambda w, g, m, x: (w - g * "2", m), "plain floats and integers, got '2'"),
    "where of two numbers": (lambda w, g, m, x: (w - gs.where(g > 0, 1, 2) * g, m), "move an array into a branch"),
    "where without a condition": (lambda w, g, m, x: (gs.where(g, w, m), m), "takes a comparison first"),
    "arithmetic on a comparison": (lambda w, g, m, x: (w - (g > 0) * g, m), "condition of where"),
    "the mean of a scalar": (lambda w, g, m, x: (w - gs.mean(x), m), r"mean\(x\) takes an array"),
    "the norm of a number": (lambda w, g, m, x: (w - gs.norm(2.0), m), r"norm\(x\) takes an array"),
    "the mean over axis 0": (lambda w, g, m, x: (w - gs.mean(g, axis=0), m), "takes None, -1 or -2, got 0"),
}


class TestRuleErrors:
    @pytest.mark.parametrize("name", BAD_SIGNATURES)
    def test_a_signature_that_cannot_serve_is_refused_at_once(self, name):
        function, advice = BAD_SIGNATURES[name]
        with pytest.raises(gs.RuleError, match=advice):
            gs.rule(function)

    def test_static_names_must_exist(self):
        with pytest.raises(gs.RuleError, match=r"\['speed'\].*\['learning_rate'\]"):
            gs.rule(static=["speed"])(lambda w, g, *, learning_rate: w)

    @pytest.mark.parametrize("name", BAD_BODIES)
    def test_a_body_that_cannot_become_a_program_is_refused_and_nothing_changes(self, name):
        body, advice = BAD_BODIES[name]

        @gs.rule
        def Broken(w, g, m, *, x=0.5):
            return body(w, g, m, x)

        w = np.ones((2, 3), np.float32)
        with pytest.raises(gs.RuleError, match=re.compile(advice, re.DOTALL)):
            Broken().apply_gradients({"w": np.ones((2, 3), np.float32)}, {"w": w})
        assert (w == 1).all()

    def test_a_symbol_kept_from_an_earlier_call_is_refused(self):
        kept: list[Any] = []

        @gs.rule
        def Impure(w, g, *, learning_rate):
            kept.append(g)
            return w - learning_rate * kept[0]

        params = {"a": np.ones(2), "b": np.ones((2, 2))}
        with pytest.raises(gs.RuleError, match="earlier tracing; a rule must be a pure function"):
            Impure(0.1).apply_gradients({name: np.ones(w.shape) for name, w in params.items()}, params)

    def test_an_error_of_ones_own_comes_through(self):
        @gs.rule
        def Mistaken(w, g, *, learning_rate):
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            Mistaken(0.1).apply_gradients({"w": np.ones(2)}, {"w": np.ones(2)})

    def test_it_is_a_type_error_and_a_gradstep_error(self):
        assert issubclass(gs.RuleError, TypeError)
        assert issubclass(gs.RuleError, gs.GradstepError)
