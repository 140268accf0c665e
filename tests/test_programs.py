"""Proves what happens to a rule on its way to a kernel: scalars hoisted in float64, terms removed, formulas printed."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest

import gradstep as gs
from families import ELEMENTWISE_FAMILIES, MATRIX_FAMILIES, assert_same_bits, configurations
from gradstep import ops

Array = np.ndarray[Any, Any]
EVERYTHING = {name: getattr(gs, name) for name in ops.__all__}


@dataclass
class Explained:
    """The text of `gs.explain`, taken apart: the formulas in their order, the IR of each sweep and of what follows."""

    text: str
    formulas: list[tuple[str, str]] = field(default_factory=list)
    ir: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        formulas, *self.ir = re.split(r"^; (?:after )?sweep \d+\n", self.text, flags=re.MULTILINE)
        found = re.findall(r"^    (\S+) = (.+?)(?: on the array library)?$", formulas, flags=re.MULTILINE)
        self.formulas = list(found)

    def evaluate(self, arrays: dict[str, Array], scalars: dict[str, float]) -> dict[str, Array]:
        """The new value of each array, by reading the formulas as Python, line by line."""
        known = {**EVERYTHING, **arrays, **scalars, "shape": arrays["w"].shape}
        for name, text in self.formulas:
            known[plain(name)] = eval(plain(text), {}, known)
        return {name: known[plain(f"{name}'")] for name in arrays if plain(f"{name}'") in known}


def plain(text: str) -> str:
    """A formula with Python's kind of names: `m'` is what `m` becomes."""
    return text.replace("'", "_new")


@pytest.fixture
def explained(capsys: pytest.CaptureFixture[str]) -> Callable[..., Explained]:
    """`gs.explain`, taken apart."""

    def explain(opt: gs.Optimizer, **options: Any) -> Explained:
        gs.explain(opt, **options)
        return Explained(capsys.readouterr().out)

    return explain


def one_step(opt: Any, w: Any, g: Any, dtype: str = "float32") -> Array:
    """The parameter after one step."""
    params = {"w": np.array(w, dtype)}
    return opt.apply_gradients({"w": np.array(g, dtype)}, params)["w"]


class TestScalarsAreComputedInFloat64:
    def test_one_minus_beta_is_rounded_once(self):
        opt = gs.Adam(0.1)
        one_step(opt, [1.0], [1.0])
        assert opt.state["w"]["v"][0] == np.float32(1 - 0.999)
        assert opt.state["w"]["v"][0] != np.float32(1) - np.float32(0.999)

    def test_a_product_of_hyperparameters_is_rounded_once(self):
        w = one_step(gs.AdamW(0.3, weight_decay=0.7, eps=1.0), [1.0], [0.0])
        assert w[0] == np.float32(1 - 0.3 * 0.7)
        assert w[0] != np.float32(1) - np.float32(0.3) * np.float32(0.7)

    def test_the_bias_correction_is_rounded_once(self):
        opt, w, m = gs.Adam(0.1, betas=(0.9, 0.0), eps=0.0, bias_correction=True), np.zeros(1, np.float32), 0.0
        for t in range(1, 8):
            w[:] = 0
            opt.apply_gradients({"w": np.ones(1, np.float32)}, {"w": w})
            m = np.float32(0.9) * np.float32(m) + np.float32(1 - 0.9)
            assert w[0] == -np.float32(0.1 / (1 - 0.9**t)) * m

    def test_float64_parameters_get_float64_scalars(self):
        opt = gs.Adam(0.1)
        one_step(opt, [1.0], [1.0], "float64")
        assert opt.state["w"]["v"][0] == 1 - 0.999


@gs.rule
def Fragile(w, g, *, learning_rate, momentum=0.5, scale=1.0):
    return w - learning_rate * scale * g / (1 - momentum) - gs.sqrt(0.75 - momentum) * g


class TestScalarExpressionsMustBeFinite:
    @pytest.mark.parametrize(
        ("hyperparameters", "expression", "cause"),
        [
            ({"momentum": 1.0}, "sqrt(0.75 - momentum)", "undefined"),
            ({"momentum": 0.8}, "sqrt(0.75 - momentum)", "momentum = 0.8"),
            ({"learning_rate": 1e30, "scale": 1e30}, "learning_rate * scale", "not finite in float32"),
            ({"learning_rate": 1e200, "scale": 1e200}, "learning_rate", "float32"),
        ],
    )
    def test_the_error_names_the_expression_and_nothing_changes(self, hyperparameters, expression, cause):
        opt, w = Fragile(**{"learning_rate": 0.1} | hyperparameters), np.ones(3, np.float32)
        with pytest.raises((gs.NonFiniteScalarError, gs.OutOfRangeError), match=re.escape(expression)) as error:
            opt.apply_gradients({"w": np.ones(3, np.float32)}, {"w": w})
        assert cause in str(error.value)
        assert (w == 1).all()
        assert (opt.step, opt.steps) == (0, {})

    @pytest.mark.parametrize(
        ("expression", "spelled"),
        [
            (lambda x: 1 / (1 - x), "1 / (1 - x)"),
            (lambda x: gs.log(x - 1), "log(x - 1)"),
            (lambda x: gs.exp(1000 * x), "exp(1000 * x)"),
            (lambda x: gs.sqrt(-x), "sqrt(-x)"),
            (lambda x: (-x) ** 0.5, "(-x)**0.5"),
            (lambda x: (2 * x) ** 2000, "(2 * x)**2000"),
            (lambda x: x * 1e200 * 1e200, "x * 1e+200 * 1e+200"),
            (lambda x: gs.minimum(x, 1e300 * x * 1e10) - 1e300 * x * 1e10, "minimum(x, 1e+300 * x * 1e+10)"),
        ],
    )
    def test_every_kind_of_undefined_scalar_is_refused(self, expression, spelled):
        @gs.rule
        def Undefined(w, g, *, x):
            return w - expression(x) * g

        with pytest.raises(gs.NonFiniteScalarError, match=re.escape(spelled)) as error:
            one_step(Undefined(x=1.0), [1.0], [1.0], "float64")
        assert "Undefined" in str(error.value)
        assert "x = 1.0" in str(error.value)

    def test_what_overflows_float32_is_fine_in_float64(self):
        opt = Fragile(1e30, scale=1e30, momentum=0.0)
        assert one_step(opt, [0.0], [1e-60], "float64")[0] == pytest.approx(-1)

    def test_the_step_after_the_cause_is_removed_succeeds(self):
        opt = Fragile(0.1, momentum=1.0)
        with pytest.raises(gs.NonFiniteScalarError):
            one_step(opt, [1.0], [1.0])
        opt.momentum = 0.5
        assert np.isfinite(one_step(opt, [1.0], [1.0])).all()
        assert opt.step == 1

    def test_a_scheduled_expression_is_refused_at_its_step(self):
        opt = Fragile(0.1, momentum=lambda step: 0.5 if step < 2 else 1.0)
        for _ in range(2):
            one_step(opt, [1.0], [1.0])
        with pytest.raises(gs.NonFiniteScalarError, match="momentum"):
            one_step(opt, [1.0], [1.0])
        assert opt.step == 2


DECAYING = [
    (gs.SGD, {"learning_rate": 0.1}),
    (gs.AdamW, {"learning_rate": 0.1}),
    (gs.Lion, {"learning_rate": 0.1}),
    (gs.Adafactor, {}),
    (gs.Muon, {"learning_rate": 0.1}),
]


class TestFixedZerosRemoveTerms:
    @pytest.mark.parametrize(("cls", "kwargs"), DECAYING)
    def test_a_weight_decay_of_zero_leaves_the_program_and_a_schedule_never_does(self, cls, kwargs, explained):
        for ndim in (1, 2):
            assert "weight_decay" not in explained(cls(**kwargs, weight_decay=0), ndim=ndim, ir=False).text
            assert "weight_decay" in explained(cls(**kwargs, weight_decay=0.1), ndim=ndim, ir=False).text
            assert "weight_decay" in explained(cls(**kwargs, weight_decay=lambda step: 0.0), ndim=ndim, ir=False).text

    def test_a_removed_term_takes_no_part_and_a_scheduled_zero_does(self):
        assert one_step(gs.SGD(0.1, weight_decay=0.0), [math.inf], [1.0])[0] == math.inf
        assert math.isnan(one_step(gs.SGD(0.1, weight_decay=lambda step: 0.0), [math.inf], [1.0])[0])

    def test_a_momentum_of_zero_keeps_no_slot_and_a_schedule_always_does(self):
        for momentum, slots in ((0, set()), (0.0, set()), (0.9, {"v"}), (lambda step: 0.0, {"v"})):
            opt = gs.SGD(0.1, momentum=momentum)
            one_step(opt, [1.0], [1.0])
            assert opt.state["w"].keys() == slots

    def test_a_zero_set_later_removes_the_slot_and_a_number_brings_it_back(self):
        opt, params = gs.SGD(1.0, momentum=0.5), {"w": np.zeros(1, np.float32)}
        for momentum, slots, moved in ((0.5, {"v"}, -1), (0, set(), -2), (0.5, {"v"}, -3)):
            opt.momentum = momentum
            opt.apply_gradients({"w": np.ones(1, np.float32)}, params)
            assert opt.state["w"].keys() == slots
            assert params["w"][0] == moved

    def test_adafactor_keeps_a_first_moment_only_when_asked(self):
        for beta_1, kept in ((None, False), (0.0, True), (0.9, True)):
            opt = gs.Adafactor(beta_1=beta_1)
            one_step(opt, np.ones((2, 2)), np.ones((2, 2)))
            assert ("m" in opt.state["w"]) == kept


def hyperparameters_by_symbol(opt: Any) -> dict[str, float]:
    """Each scalar under the name that formulas use."""
    values: dict[str, float] = {}
    for name in opt.hyperparameters:
        value = getattr(opt, name)
        if isinstance(value, tuple):
            stem = name.removesuffix("s") if name == "betas" else name
            values |= {f"{stem}{i}": part for i, part in enumerate(value, 1)}
        else:
            values[name] = value
    return values


class TestFormulas:
    def test_those_of_adamw_read_like_the_paper(self, explained):
        found = explained(gs.AdamW(0.1, bias_correction=True), ir=False)
        assert "AdamW, float32, 2 dimensions: 1 sweep, 28 bytes per element" in found.text
        assert found.formulas == [
            ("s1", "1 - beta1"),
            ("s2", "1 - beta2"),
            ("s3", "1 - learning_rate * weight_decay"),
            ("s4", "learning_rate / (1 - beta1**t)"),
            ("s5", "1 / sqrt(1 - beta2**t)"),
            ("m'", "beta1 * m + s1 * g"),
            ("v'", "beta2 * v + s2 * (g * g)"),
            ("w'", "w * s3 - s4 * m' / (sqrt(v') * s5 + eps)"),
        ]

    @pytest.mark.parametrize(("cls", "kwargs"), configurations(*ELEMENTWISE_FAMILIES))
    def test_read_as_python_they_give_the_bits_of_the_step(self, cls, kwargs, explained):
        self.check(cls(**kwargs), explained, (5,), assert_same_bits)

    @pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 4, 3)])
    @pytest.mark.parametrize(("cls", "kwargs"), configurations(*MATRIX_FAMILIES))
    def test_those_of_adafactor_and_muon_are_true_as_well(self, cls, kwargs, shape, explained):
        def close(found: Array, expected: Array, what: str) -> None:
            np.testing.assert_allclose(found, expected, 1e-11, 1e-12, err_msg=what)

        self.check(cls(**kwargs), explained, shape, close)

    def check(self, opt: Any, explained: Any, shape: tuple[int, ...], compare: Callable[..., None]) -> None:
        rng = np.random.default_rng(1)
        params = {"w": rng.standard_normal(shape)}
        opt.apply_gradients({"w": rng.standard_normal(shape)}, params)
        g = rng.standard_normal(shape)
        before = {"w": params["w"].copy(), "g": g, **{k: v.copy() for k, v in opt.state["w"].items()}}
        kept_dimensions = {"row": lambda x: x[..., :, None], "col": lambda x: x[..., None, :]}
        before = {name: kept_dimensions.get(name, np.asarray)(value) for name, value in before.items()}
        scalars = hyperparameters_by_symbol(opt) | {"t": 2}
        expected = explained(opt, ndim=len(shape), dtype="float64", ir=False).evaluate(before, scalars)
        opt.apply_gradients({"w": g}, params)
        after = {"w": params["w"], **opt.state["w"]}
        assert expected.keys() == after.keys()
        for name, value in after.items():
            compare(value, np.reshape(expected[name], value.shape), name)

    @pytest.mark.parametrize(
        "body",
        [
            "w - (g - m)", "w - g - m", "w - (g + m)", "w + (g + m)", "w / (g / m)", "w / g / m", "w / (g * m)",
            "w * (g * m)", "w * (g + m)", "(w + g) * m", "w * g + m", "-(w + g)", "-w + g", "-w * g", "w * -g",
            "w - -g", "-(-w)", "-(w * g)", "g * x**t", "g * (x**2)**t", "g * x**2**t", "g * (x * 2)**t", "g * -x**2",
            "g * (-x)**2", "g * (-2.0)**t", "g * x**(-t)", "g * x**-2.0", "w - (-2.0)", "g * (1 - (1 - x))",
            "g * (x / (x / 3))", "gs.where(w < g, m, -m)", "gs.where(w - g < g - m, w, g) * m", "1 / 3 * g",
            "g * 1e-50", "gs.maximum(w, -(g - m)) - m", "g * (0.1 + x)", "g + 123456789.0",
            "gs.where(gs.mean(g) > 0, g, m)", "(g - gs.mean(g)) / gs.norm(g)",
        ],
    )  # fmt: skip
    def test_parentheses_that_matter_stay(self, body, explained):
        names = {"gs": gs}
        exec(f"def Formula(w, g, m, *, x, t):\n    return {body}, w * m", names)
        opt = gs.rule(names["Formula"])(x=0.7)
        w, g, m = np.array([[1.5, -0.3, 0.2], [0.7, -1.1, 2.3], [-0.4, 0.9, -1.7]])
        params = {"w": np.ones(3)}
        opt.apply_gradients({"w": np.ones(3)}, params)
        params["w"][:], opt.state["w"]["m"][:] = w, m
        expected = explained(opt, ndim=1, dtype="float64", ir=False).evaluate(
            {"w": w, "g": g, "m": m}, {"x": 0.7, "t": 2}
        )
        opt.apply_gradients({"w": g}, params)
        assert_same_bits(params["w"], expected["w"], body)
        assert_same_bits(opt.state["w"]["m"], expected["m"], body)

    @pytest.mark.parametrize("slots", ["g, a", "b, a", "a + g, a + g", "w, w", "a, b"])
    def test_slots_that_hold_what_is_there_already_are_shown(self, slots, explained):
        names: dict[str, Any] = {}
        exec(f"def Passing(w, g, a, b, *, x):\n    return w - x * g, {slots}", names)
        found = explained(gs.rule(names["Passing"])(x=0.7), dtype="float64", ir=False)
        arrays = {name: np.array([number]) for name, number in zip("wgab", (1.5, -0.3, 0.2, 0.9), strict=True)}
        evaluated = arrays | found.evaluate(arrays, {"x": 0.7})
        expected = names["Passing"](*arrays.values(), x=0.7)
        assert [evaluated[name] for name in "wab"] == list(expected)

    def test_every_child_of_a_multi_optimizer_is_explained(self, explained):
        text = explained(gs.MultiOptimizer([gs.Lion(0.1), gs.SGD(0.1)], ["*.bias"]), ir=False).text
        assert [line.split(",")[0] for line in text.splitlines() if "dimensions" in line] == ["Lion", "SGD"]

    def test_clipping_shows(self, explained):
        assert "grad_scale" in explained(gs.SGD(0.1, clip_norm=1.0), ir=False).text
        assert "grad_scale" not in explained(gs.SGD(0.1), ir=False).text


class TestPasses:
    def test_adafactor_takes_three_sweeps_over_a_matrix(self, explained):
        found = explained(gs.Adafactor())
        assert found.text.startswith("Adafactor, float32, 2 dimensions: 3 sweeps, 24 bytes per element")
        assert len(found.ir) == 6
        assert [found.text.count(f"; after sweep {n}\n") for n in (1, 2, 3, 4)] == [1, 1, 1, 0]

    @pytest.mark.parametrize(("cls", "kwargs"), configurations(*ELEMENTWISE_FAMILIES))
    def test_elementwise_rules_take_one(self, cls, kwargs, explained):
        assert ": 1 sweep," in explained(cls(**kwargs), ir=False).text

    @pytest.mark.parametrize("ndim", [1, 2])
    def test_muon_takes_one_more_for_matrices(self, ndim, explained):
        assert f": {ndim} sweep" in explained(gs.Muon(0.1), ndim=ndim, ir=False).text


class TestIR:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize(("cls", "kwargs"), configurations())
    def test_it_parses_and_is_strict_ieee_arithmetic(self, cls, kwargs, dtype, explained):
        found = explained(cls(**kwargs), dtype=dtype)
        assert found.ir
        for text in found.ir:
            module = llvm.parse_assembly(text)
            module.verify()
            assert [function.name for function in module.functions if function.name == "sweep"]
            assert not re.search(r"\b(fast|contract|reassoc|nnan|ninf|nsz|arcp|afn|fma)\b", text)
            # The square of a float32 is exact in float64: contracted or not, the sum is the same.
            squares = re.findall(r"call .*@llvm\.fmuladd\S*\(.* (%\w+), .* (%\w+), .*\)", text)
            assert len(squares) == len(re.findall("call .*fmuladd", text))
            assert all(x == y and re.search(rf"{x} = fpext .*float", text) for x, y in squares)
            assert dtype == "float32" or not squares

    def test_it_can_be_left_out(self, explained):
        assert "define" in explained(gs.SGD(0.1)).text
        assert "define" not in explained(gs.SGD(0.1), ir=False).text


class TestLateParameters:
    @pytest.mark.parametrize(("cls", "kwargs"), configurations())
    def test_each_counts_its_own_steps_and_equals_an_optimizer_of_its_own(self, cls, kwargs):
        rng = np.random.default_rng(2)
        first_step = {"a": 0, "b": 2, "c": 2, "d": 3}
        shapes = {"a": (3, 4), "b": (3, 4), "c": (70,), "d": ()}
        together = {name: np.array(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
        apart = {name: w.copy() for name, w in together.items()}
        opt, own = cls(**kwargs), {name: cls(**kwargs) for name in shapes}
        for step in range(5):
            grads = {
                name: np.array(rng.standard_normal(shape).astype(np.float32))
                for name, shape in shapes.items()
                if step >= first_step[name]
            }
            opt.apply_gradients(grads, together)
            for name, g in grads.items():
                own[name].apply_gradients({name: g}, apart)
        assert opt.steps == {"a": 5, "b": 3, "c": 3, "d": 2}
        assert opt.step == 5
        for name, w in together.items():
            assert_same_bits(w, apart[name], name)
            for slot, value in own[name].state[name].items():
                assert_same_bits(opt.state[name][slot], value, f"{name} {slot}")

    def test_a_late_first_step_is_corrected_like_any_first_step(self):
        opt, params = gs.Adam(0.25, eps=0.0, bias_correction=True), {name: np.zeros(2) for name in "ab"}
        for _ in range(9):
            opt.apply_gradients({"a": np.ones(2)}, params)
        opt.apply_gradients({"a": np.ones(2), "b": np.full(2, 3.0)}, params)
        np.testing.assert_allclose(params["b"], -0.25, 1e-14)

    def test_a_parameter_that_pauses_keeps_its_count(self):
        opt, params = gs.Adam(0.1, bias_correction=True), {name: np.zeros(2) for name in "ab"}
        for names in ("ab", "a", "a", "ab"):
            opt.apply_gradients({name: np.ones(2) for name in names}, params)
        assert opt.steps == {"a": 4, "b": 2}

    @pytest.mark.parametrize("steps_before", [0, 1])
    def test_a_failed_step_changes_nothing_for_steps_of_a_child_alone_and_after(self, steps_before):
        results = []
        for fails in (False, True):
            child, frail = gs.Adam(0.1, bias_correction=True), Fragile(0.1)
            opt = gs.MultiOptimizer([child, frail], [lambda name, parameter: name in "ab"])
            params, grads = {name: np.zeros(2) for name in "abc"}, {name: np.ones(2) for name in "abc"}
            for _ in range(steps_before):
                opt.apply_gradients(grads, params)
            if fails:
                frail.momentum = 1.0
                with pytest.raises(gs.NonFiniteScalarError):
                    opt.apply_gradients(grads, params)
                frail.momentum = 0.5
            child.apply_gradients({"a": np.ones(2)}, params)
            opt.apply_gradients({name: 5 * g for name, g in grads.items()}, params)
            assert child.steps == {"a": steps_before + 2, "b": steps_before + 1}
            results.append(params | {f"{name} {slot}": child.state[name][slot] for name in "ab" for slot in "mv"})
        for name, value in results[0].items():
            assert_same_bits(results[1][name], value, name)
