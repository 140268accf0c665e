"""What a user may hand in, and what each mistake is told: the class of the error, what came, and the remedy."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import public_optimizers

every_family = pytest.mark.parametrize("cls", public_optimizers(), ids=lambda cls: cls.__name__)
TINY = 5e-324  # the smallest number above 0
BELOW_ONE = math.nextafter(1.0, 0.0)


def spelled(value: object) -> str:
    """An id that is the same in every process."""
    return repr(value).partition(" at 0x")[0]


# Errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (gs.NonFiniteScalarError, ValueError),
        (gs.OutOfRangeError, ValueError),
        (gs.ConfigurationError, ValueError),
        (gs.ArgumentTypeError, TypeError),
        (gs.ShapeError, ValueError),
        (gs.DtypeError, TypeError),
        (gs.DeviceError, ValueError),
        (gs.UnknownParameterError, KeyError),
        (gs.DuplicateNameError, ValueError),
        (gs.AliasedParametersError, ValueError),
        (gs.ReadOnlyError, ValueError),
        (gs.NonFiniteGradientError, ValueError),
        (gs.RuleError, TypeError),
        (gs.TracingError, RuntimeError),
        (gs.CheckpointError, ValueError),
        (gs.MismatchError, ValueError),
        (gs.CommunicationError, RuntimeError),
    ],
)
def test_an_error_can_be_caught_as_gradsteps_or_as_the_builtin(error: Any, builtin: Any) -> None:
    assert issubclass(error, gs.GradstepError)
    assert issubclass(error, builtin)
    assert str(error("a 'readable' message")) == "a 'readable' message"


def test_every_public_error_is_in_the_table_above() -> None:
    public = [getattr(gs, name) for name in gs.__all__ if name.endswith("Error")]
    marks = test_an_error_can_be_caught_as_gradsteps_or_as_the_builtin.pytestmark
    listed = {row[0] for row in marks[0].args[1]}
    assert set(public) == listed | {gs.GradstepError}


# Arrays


def ones(dtype: Any = np.float32) -> Any:
    return np.ones(2, dtype)


class Foreign:
    """An array of a library that gradstep does not know, with all the protocols that tempt to convert it."""

    __module__ = "jaxlib._jax"
    shape, ndim, dtype = (2,), 1, np.dtype(np.float32)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return ones()

    def __dlpack__(self, **_: Any) -> Any:
        return ones().__dlpack__()


ARRAYS: dict[str, tuple[Any, Any, str]] = {
    "integer": (ones(np.int32), gs.DtypeError, r"dtype int32; expected float32, float64,.*\.astype\(np\.float32\)"),
    "boolean": (ones(bool), gs.DtypeError, r"dtype bool; expected float32, float64,.*\.astype\(np\.float32\)"),
    "object": (ones(object), gs.DtypeError, r"dtype object; expected float32, float64,.*\.astype"),
    "complex": (ones(np.complex64), gs.DtypeError, "dtype complex64; expected float32, float64,"),
    "bytes": (ones(np.uint8), gs.DtypeError, "dtype uint8; expected float32, float64,"),
    "long double": (ones(np.longdouble), gs.DtypeError, "expected float32, float64,"),
    "text": (np.array(["a", "b"]), gs.DtypeError, "expected float32, float64,"),
    "dates": (np.zeros(2, "M8[s]"), gs.DtypeError, "expected float32, float64,"),
    "records": (np.zeros(2, [("x", "f4")]), gs.DtypeError, "expected float32, float64,"),
    "foreign byte order": (ones(">f4"), gs.DtypeError, r"native byte order.*\.astype"),
    "masked": (np.ma.ones(2, dtype=np.float32), gs.ArgumentTypeError, r"masked array.*\.filled\(\)"),
    "integer tensor": (torch.ones(2, dtype=torch.int64), gs.DtypeError, r"torch\.int64; expected float32.*\.float\(\)"),
    "boolean tensor": (torch.ones(2, dtype=torch.bool), gs.DtypeError, r"torch\.bool.*\.float\(\)"),
    "8-bit float tensor": (torch.ones(2).to(torch.float8_e4m3fn), gs.DtypeError, r"torch\.float8.*\.float\(\)"),
    "complex tensor": (torch.ones(2, dtype=torch.complex64), gs.DtypeError, r"torch\.complex64"),
    "float": (1.0, gs.ArgumentTypeError, r"plain number.*np\.array"),
    "int": (1, gs.ArgumentTypeError, r"plain number.*np\.array"),
    "bool": (True, gs.ArgumentTypeError, r"plain number.*np\.array"),
    "NumPy scalar": (np.float32(1), gs.ArgumentTypeError, r"plain number.*np\.array"),
    "string": ("ones", gs.ArgumentTypeError, "a str.*expected an array of NumPy, PyTorch, JAX or MLX"),
    "set": ({1.0}, gs.ArgumentTypeError, "a set.*expected an array of NumPy, PyTorch, JAX or MLX"),
    "object of no kind": (object(), gs.ArgumentTypeError, "a object.*expected an array of NumPy, PyTorch, JAX or MLX"),
    "buffer": (
        memoryview(ones()),
        gs.ArgumentTypeError,
        "a memoryview.*expected an array of NumPy, PyTorch, JAX",
    ),
    "foreign array": (
        Foreign(),
        gs.ArgumentTypeError,
        r"jaxlib\._jax\.Foreign.*expected an array of NumPy, PyTorch, JAX or MLX",
    ),
    "class": (np.ndarray, gs.ArgumentTypeError, "expected an array of NumPy, PyTorch, JAX or MLX"),
}


def partner(value: Any) -> Any:
    return torch.ones(2) if isinstance(value, torch.Tensor) else ones()


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("side", ["params", "grads"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_what_is_no_real_floating_array_is_refused_by_name(kind: str, side: str, nested: bool) -> None:
    value, error, message = ARRAYS[kind]
    trees: dict[str, Any] = {side: {"w": partner(value)} for side in ("params", "grads")}
    trees[side]["w"] = value
    name = "w"
    if nested:
        trees, name = {side: [{"deep": tree}] for side, tree in trees.items()}, "0.*deep.*w"
    opt = gs.Adam(0.1)
    with pytest.raises(error, match=rf"{side}\[.*{name}'\].*{message}"):
        opt.apply_gradients(trees["grads"], trees["params"])
    assert opt.step == 0
    assert not opt.state


@pytest.mark.parametrize("kind", ARRAYS)
def test_init_refuses_them_too(kind: str) -> None:
    value, error, message = ARRAYS[kind]
    with pytest.raises(error, match=rf"params\['w'\].*{message}"):
        gs.Adam(0.1).init({"w": value})


@pytest.mark.parametrize("side", ["params", "grads"])
def test_a_list_of_numbers_is_told_to_become_an_array(side: str) -> None:
    trees: dict[str, Any] = {"params": {"w": ones()}, "grads": {"w": ones()}}
    trees[side]["w"] = [1.0, 2.0]
    with pytest.raises(gs.ArgumentTypeError, match=rf"{side}.*w.*np\.array"):
        gs.SGD(0.1).apply_gradients(trees["grads"], trees["params"])


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(2, 2), lambda: {"a": torch.nn.Linear(2, 2)}])
@pytest.mark.parametrize("side", ["params", "grads"])
def test_a_module_is_told_to_give_its_parameters(make: Any, side: str) -> None:
    trees = {"params": {}, "grads": {}, side: make()}
    remedy = r"(dict\(model|p\.grad for .* in model)\.named_parameters\(\)"
    with pytest.raises(gs.ArgumentTypeError, match=rf"{side}.*Linear.*{remedy}"):
        gs.SGD(0.1).apply_gradients(trees["grads"], trees["params"])


def test_a_module_in_place_of_gradients_is_told_to_give_its_gradients() -> None:
    with pytest.raises(gs.ArgumentTypeError, match=r"grads is a module .*p\.grad for name, p in"):
        gs.SGD(0.1).apply_gradients(torch.nn.Linear(2, 2), {})


def test_the_usual_misspellings_of_arguments_are_recognised() -> None:
    with pytest.raises(gs.ArgumentTypeError, match="lr is called learning_rate here"):
        gs.AdamW(lr=1e-3)
    with pytest.raises(gs.ArgumentTypeError, match="weight_deacy is called weight_decay here"):
        gs.AdamW(1e-3, weight_deacy=0.1)


def test_an_error_of_a_users_function_says_whose_it_is() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        gs.AdamW(1e-3, eps=lambda step: 1 / step)
    assert "AdamW's eps at step 0" in caught.value.__notes__[0]
    opt = gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.1)], [lambda name: True])
    with pytest.raises(TypeError) as caught_too:
        opt.init({"w": ones()})
    assert "filters[0] for 'w'" in caught_too.value.__notes__[0]


def test_a_module_is_no_learning_rate() -> None:
    with pytest.raises(gs.ArgumentTypeError, match=r"AdamW's learning_rate .* got a module \(Linear\)"):
        gs.AdamW(torch.nn.Linear(2, 1))  # type: ignore[arg-type]


def test_an_mlx_module_is_told_to_give_its_parameters() -> None:
    import mlx.nn

    with pytest.raises(gs.ArgumentTypeError, match=r"params.*Linear.*model\.trainable_parameters\(\)"):
        gs.SGD(0.1).apply_gradients({}, mlx.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "tree", [None, ones(), torch.ones(2), 1.0, "w", {1.0}, iter([]), torch.nn.Linear(2, 2).parameters()]
)
@pytest.mark.parametrize("side", ["params", "grads"])
def test_what_is_no_tree_is_refused(tree: Any, side: str) -> None:
    trees = {"params": {}, "grads": {}, side: tree}
    with pytest.raises(gs.ArgumentTypeError, match=rf"{side} must be a mapping.*got {type(tree).__name__}"):
        gs.SGD(0.1).apply_gradients(trees["grads"], trees["params"])


@pytest.mark.parametrize("grads", [{"w": torch.ones(2)}, {"v": torch.ones(2), "w": ones()}])
def test_libraries_are_not_mixed(grads: Any) -> None:
    with pytest.raises(gs.ArgumentTypeError, match=r"NumPy.*PyTorch.*one library|PyTorch.*NumPy.*one library"):
        gs.SGD(0.1).apply_gradients(grads, {"w": ones(), "v": ones()})


def test_parameters_of_two_libraries_may_stand_side_by_side_while_only_one_is_stepped() -> None:
    params = {"w": ones(), "v": torch.ones(2)}
    opt = gs.SGD(1.0)
    opt.apply_gradients({"w": ones()}, params)
    opt.apply_gradients({"v": torch.ones(2)}, params)
    assert not params["w"].any()
    assert not params["v"].any()


def test_a_subclass_of_ndarray_is_written_where_it_lies() -> None:
    class Special(np.ndarray):
        pass

    w = ones().view(Special)
    gs.SGD(0.5).apply_gradients({"w": ones().view(Special)}, {"w": w})
    assert type(w) is Special
    assert (w == 0.5).all()


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2), ()])
def test_a_gradient_of_another_shape_is_not_broadcast(shape: Any) -> None:
    with pytest.raises(gs.ShapeError, match=r"grads\['w'\] has shape .*, but params\['w'\] has \(2,\)"):
        gs.SGD(0.1).apply_gradients({"w": np.ones(shape, np.float32)}, {"w": ones()})


def test_an_unknown_gradient_is_told_what_there_is() -> None:
    with pytest.raises(gs.UnknownParameterError, match="gradients for 'weight', but params holds 'w', 'b'"):
        gs.SGD(0.1).apply_gradients({"w": ones(), "weight": ones()}, {"w": ones(), "b": ones()})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("other", [np.float32, np.float64])
def test_a_gradient_of_the_other_width_is_converted_as_it_is_read(dtype: Any, other: Any) -> None:
    gradient = np.array([1 / 3, 1e-30], other)
    opt, plain = gs.AdaDelta(1.0), gs.AdaDelta(1.0)
    params, expected = {"w": ones(dtype)}, {"w": ones(dtype)}
    for _ in range(3):
        opt.apply_gradients({"w": gradient}, params)
        plain.apply_gradients({"w": gradient.astype(dtype)}, expected)
    assert params["w"].dtype == dtype
    assert (params["w"] == expected["w"]).all()


# Hyperparameters: names and types


@every_family
def test_an_unknown_argument_is_told_what_there_is(cls: Any) -> None:
    with pytest.raises(gs.ArgumentTypeError) as caught:
        cls(0.1, beta3=0.9)
    message = str(caught.value)
    assert cls.__name__ in message
    assert "beta3" in message
    assert all(name in message for name in (*cls(0.1).hyperparameters, "clip_norm", "nonfinite"))


@every_family
def test_only_the_learning_rate_is_positional(cls: Any) -> None:
    assert cls(0.25).hyperparameters["learning_rate"] == 0.25
    with pytest.raises(gs.ArgumentTypeError, match=cls.__name__):
        cls(0.25, 0.5)


@every_family
def test_a_missing_learning_rate_is_an_error_where_there_is_no_default(cls: Any) -> None:
    if cls is gs.Adafactor:
        assert cls().learning_rate is None
    else:
        with pytest.raises(gs.ArgumentTypeError, match=f"{cls.__name__}.*learning_rate"):
            cls()


SCALARS = [
    (cls, name)
    for cls in public_optimizers()
    for name, value in cls(0.1).hyperparameters.items()
    if name == "learning_rate"
    or (not isinstance(value, (bool, tuple)) and name not in ("ns_steps", "ns_dtype", "relative_step"))
]
PAIRS = [
    (cls, name)
    for cls in public_optimizers()
    for name, value in cls(0.1).hyperparameters.items()
    if isinstance(value, tuple)
]
FLAGS = [
    (cls, name)
    for cls in public_optimizers()
    for name, value in cls(0.1).hyperparameters.items()
    if isinstance(value, bool)
]


def refused(cls: Any, name: str, value: Any, error: Any, message: str = "") -> None:
    """The constructor refuses the value, and so does the attribute, which then keeps what it had."""
    with pytest.raises(error, match=f"{cls.__name__}'s {name}.*{message}"):
        cls(**{"learning_rate": 0.1, name: value})
    opt = cls(0.1)
    before = opt.hyperparameters
    with pytest.raises(error, match=f"{cls.__name__}'s {name}.*{message}"):
        setattr(opt, name, value)
    assert opt.hyperparameters == before


@pytest.mark.parametrize(("cls", "name"), SCALARS)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, np.float32("nan"), Decimal("inf")], ids=spelled
)
def test_no_scalar_may_be_nan_or_infinite(cls: Any, name: str, value: Any) -> None:
    refused(cls, name, value, gs.NonFiniteScalarError)
    refused(cls, name, lambda step: value, gs.NonFiniteScalarError, "step 0")


@pytest.mark.parametrize(("cls", "name"), SCALARS)
@pytest.mark.parametrize("value", [True, np.True_, "0.1", b"0.1", 0.1j, [0.1], (0.1,), {}, object], ids=spelled)
def test_no_scalar_may_be_anything_but_a_number_or_a_schedule(cls: Any, name: str, value: Any) -> None:
    if value is object:  # callable, but what it gives is no number
        refused(cls, name, lambda step: object(), gs.ArgumentTypeError, "number")
    else:
        refused(cls, name, value, gs.ArgumentTypeError, "number")
        refused(cls, name, lambda step: value, gs.ArgumentTypeError, "number")


@pytest.mark.parametrize(("cls", "name"), SCALARS)
def test_none_is_no_number_except_where_it_has_a_meaning(cls: Any, name: str) -> None:
    if cls is gs.Adafactor and name in ("learning_rate", "beta_1"):
        assert cls(**{name: None}).hyperparameters[name] is None
    else:
        refused(cls, name, None, gs.ArgumentTypeError, "number")


@pytest.mark.parametrize(
    "value",
    [
        0,
        1 / 4,
        np.float32(0.25),
        np.float64(0.25),
        np.int64(0),
        Fraction(1, 4),
        Decimal("0.25"),
        np.array(0.25),
        torch.tensor(0.25),
    ],
    ids=spelled,
)
@pytest.mark.parametrize(("cls", "name"), [(gs.SGD, "momentum"), (gs.Adam, "learning_rate"), (gs.Muon, "momentum")])
def test_any_kind_of_number_serves(cls: Any, name: str, value: Any) -> None:
    opt = cls(**{"learning_rate": 0.1, name: value})
    assert type(opt.hyperparameters[name]) is float
    assert getattr(opt, name) == float(value)
    scheduled = cls(**{"learning_rate": 0.1, name: lambda step: value})
    assert type(getattr(scheduled, name)) is float
    assert getattr(scheduled, name) == float(value)


@pytest.mark.parametrize(("cls", "name"), PAIRS)
@pytest.mark.parametrize(
    "value",
    [0.9, (0.9,), (0.9, 0.99, 0.999), [], "ab", {0.9, 0.99}, None, iter((0.9, 0.99))],
    ids=spelled,
)
def test_a_pair_has_two_parts(cls: Any, name: str, value: Any) -> None:
    refused(cls, name, value, gs.ArgumentTypeError, "two")


@pytest.mark.parametrize(("cls", "name"), PAIRS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("value", "error"), [(math.nan, gs.NonFiniteScalarError), ("x", gs.ArgumentTypeError), (True, gs.ArgumentTypeError)]
)
def test_each_part_of_a_pair_is_checked(cls: Any, name: str, place: int, value: Any, error: Any) -> None:
    both: list[Any] = [0.5, 0.5]
    both[place] = value
    refused(cls, name, both, error)
    with pytest.raises(error, match=rf"{name}\[{place}\]"):
        cls(**{"learning_rate": 0.1, name: both})


@pytest.mark.parametrize(
    "pair", [[0.5, 0.25], (0.5, 0.25), np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])], ids=spelled
)
def test_a_pair_may_be_any_sequence(pair: Any) -> None:
    assert gs.Adam(0.1, betas=pair).hyperparameters["betas"] == (0.5, 0.25)


@pytest.mark.parametrize(("cls", "name"), FLAGS)
@pytest.mark.parametrize("value", [0, 1, None, "True", 1.0, lambda step: True], ids=spelled)
def test_a_flag_is_true_or_false(cls: Any, name: str, value: Any) -> None:
    refused(cls, name, value, gs.ArgumentTypeError, "True or False")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, gs.OutOfRangeError),
        (-1, gs.OutOfRangeError),
        (True, gs.ArgumentTypeError),
        (2.0, gs.ArgumentTypeError),
        ("5", gs.ArgumentTypeError),
        (None, gs.ArgumentTypeError),
        (lambda step: 5, gs.ArgumentTypeError),
    ],
)
def test_ns_steps_is_a_whole_number_of_at_least_one(value: Any, error: Any) -> None:
    refused(gs.Muon, "ns_steps", value, error)
    assert gs.Muon(0.1, ns_steps=1).ns_steps == gs.Muon(0.1, ns_steps=np.int64(1)).ns_steps == 1


# Hyperparameters: ranges, on both sides of each border


NOT_NEGATIVE = ([0.0, -0.0, TINY, 1e30], [-TINY, -1.0], ">= 0")
POSITIVE = ([TINY, 1e30], [0.0, -0.0, -TINY], "> 0")
DECAY = ([0.0, -0.0, BELOW_ONE], [1.0, -TINY, 1.5], r"in \[0, 1\)")
ANYTHING = ([0.0, -1.0, 1e300, -1e300], [], "")

RANGES: list[tuple[Any, str, Any]] = [
    *((cls, "learning_rate", ANYTHING) for cls in public_optimizers()),
    (gs.SGD, "momentum", NOT_NEGATIVE),
    (gs.SGD, "weight_decay", NOT_NEGATIVE),
    (gs.SGD, "dampening", NOT_NEGATIVE),
    (gs.RMSprop, "alpha", DECAY),
    (gs.RMSprop, "eps", POSITIVE),
    (gs.Adagrad, "eps", POSITIVE),
    (gs.AdaDelta, "rho", DECAY),
    (gs.AdaDelta, "eps", POSITIVE),
    (gs.Adam, "eps", NOT_NEGATIVE),
    (gs.AdamW, "eps", NOT_NEGATIVE),
    (gs.AdamW, "weight_decay", NOT_NEGATIVE),
    (gs.Adamax, "eps", NOT_NEGATIVE),
    (gs.Lion, "weight_decay", NOT_NEGATIVE),
    (gs.Adafactor, "clip_threshold", POSITIVE),
    (gs.Adafactor, "decay_rate", ([0.0, -0.0, -TINY, -1e30], [TINY, 1.0], "<= 0")),
    (gs.Adafactor, "beta_1", DECAY),
    (gs.Adafactor, "weight_decay", NOT_NEGATIVE),
    (gs.Muon, "momentum", DECAY),
    (gs.Muon, "weight_decay", NOT_NEGATIVE),
]
PAIR_RANGES: list[tuple[Any, str, int, Any]] = [
    *((cls, "betas", place, DECAY) for cls in (gs.Adam, gs.AdamW, gs.Adamax, gs.Lion) for place in (0, 1)),
    (gs.Adafactor, "eps", 0, POSITIVE),
    (gs.Adafactor, "eps", 1, NOT_NEGATIVE),
]


def test_the_ranges_of_every_scalar_are_in_the_table() -> None:
    assert {(cls, name) for cls, name, _ in RANGES} == set(SCALARS)
    assert {(cls, name, place) for cls, name, place, _ in PAIR_RANGES} == {
        (*pair, place) for pair in PAIRS for place in (0, 1)
    }


@pytest.mark.parametrize(("cls", "name", "bounds"), RANGES)
def test_a_scalar_has_its_range(cls: Any, name: str, bounds: Any) -> None:
    good, bad, text = bounds
    for value in good:
        assert getattr(cls(**{"learning_rate": 0.1, name: value}), name) == value
        assert getattr(cls(**{"learning_rate": 0.1, name: lambda step, value=value: value}), name) == value
    for value in bad:
        refused(cls, name, value, gs.OutOfRangeError, f"must be {text}, got {value!r}")
        refused(cls, name, lambda step, value=value: value, gs.OutOfRangeError, f"{text}.*step 0")


@pytest.mark.parametrize(("cls", "name", "place", "bounds"), PAIR_RANGES)
def test_each_part_of_a_pair_has_its_range(cls: Any, name: str, place: int, bounds: Any) -> None:
    good, bad, text = bounds
    for value in [*good, *bad]:
        both = [0.5, 0.5]
        both[place] = value
        if value in good:
            assert getattr(cls(0.1, **{name: both}), name) == tuple(both)
        else:
            refused(cls, name, both, gs.OutOfRangeError, text)


@pytest.mark.parametrize("value", [-TINY, math.nan, math.inf])
def test_clip_norm_is_finite_and_not_negative(value: float) -> None:
    with pytest.raises(gs.OutOfRangeError, match=r"clip_norm.*>= 0"):
        gs.SGD(0.1, clip_norm=value)
    opt = gs.SGD(0.1, clip_norm=0)
    with pytest.raises(gs.OutOfRangeError, match=r"clip_norm.*>= 0"):
        opt.clip_norm = value
    assert opt.clip_norm == 0.0


@pytest.mark.parametrize("value", ["1", True, np.True_, lambda step: 1.0])
def test_clip_norm_is_a_number(value: Any) -> None:
    with pytest.raises(gs.ArgumentTypeError, match="clip_norm"):
        gs.SGD(0.1, clip_norm=value)


@pytest.mark.parametrize("value", ["ignore", None, True, [], "ALLOW"])
def test_nonfinite_is_one_of_three_words(value: Any) -> None:
    with pytest.raises(gs.ConfigurationError, match=r"nonfinite.*'allow', 'raise', 'skip'"):
        gs.SGD(0.1, nonfinite=value)


# Ranges again, in the dtype of the computation


ROUNDED: list[tuple[Any, dict[str, Any], str]] = [
    (gs.RMSprop, {"eps": 1e-50}, "eps = 1e-50 becomes 0.0 in float32"),
    (gs.Adagrad, {"eps": 1e-46}, "eps = 1e-46 becomes 0.0 in float32"),
    (gs.AdaDelta, {"eps": 1e-50}, "eps = 1e-50 becomes 0.0 in float32"),
    (gs.Adafactor, {"eps": (1e-50, 1e-3)}, r"eps\[0\] = 1e-50 becomes 0.0 in float32"),
    (gs.Adafactor, {"clip_threshold": 1e-50}, "clip_threshold = 1e-50 becomes 0.0 in float32"),
    (gs.RMSprop, {"alpha": 1 - 1e-9}, "alpha = .* becomes 1.0 in float32"),
    (gs.Adam, {"betas": (0.9, 1 - 1e-9)}, r"betas\[1\] = .* becomes 1.0 in float32"),
    (gs.Lion, {"betas": (BELOW_ONE, 0.9)}, r"betas\[0\] = .* becomes 1.0 in float32"),
    (gs.Muon, {"momentum": 1 - 1e-9}, "momentum = .* becomes 1.0 in float32"),
    (gs.SGD, {"learning_rate": 1e39}, "learning_rate = 1e[+]39 becomes inf in float32"),
    (gs.SGD, {"weight_decay": 1e300}, "weight_decay = 1e[+]300 becomes inf in float32"),
]


@pytest.mark.parametrize(("cls", "kwargs", "message"), ROUNDED)
def test_checks_are_repeated_after_rounding(cls: Any, kwargs: Any, message: str) -> None:
    opt = cls(**{"learning_rate": 0.1, **kwargs})
    with pytest.raises(gs.OutOfRangeError, match=f"{cls.__name__}'s {message}"):
        opt.apply_gradients({"w": ones()}, {"w": ones()})
    assert opt.step == 0
    opt.apply_gradients({"w": ones(np.float64)}, {"w": ones(np.float64)})
    assert opt.step == 1


def test_a_mixture_of_dtypes_is_checked_in_each() -> None:
    opt = gs.RMSprop(0.1, eps=1e-50)
    params = {"wide": ones(np.float64), "narrow": ones()}
    with pytest.raises(gs.OutOfRangeError, match="float32"):
        opt.apply_gradients({"wide": ones(np.float64), "narrow": ones()}, params)
    assert (params["wide"] == 1).all()


def test_an_expression_of_scalars_must_be_finite_too() -> None:
    opt = gs.AdamW(1e30, weight_decay=1e30)
    with pytest.raises(gs.NonFiniteScalarError, match=r"AdamW.*learning_rate = 1e[+]30.*weight_decay = 1e[+]30"):
        opt.apply_gradients({"w": ones()}, {"w": ones()})


# What must go together


def test_nesterov_needs_momentum_and_no_dampening() -> None:
    for kwargs in ({}, {"momentum": 0}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.0, "dampening": 0.1}):
        with pytest.raises(gs.ConfigurationError, match="nesterov=True needs momentum > 0 and dampening = 0"):
            gs.SGD(0.1, nesterov=True, **kwargs)
    assert gs.SGD(0.1, nesterov=True, momentum=TINY).nesterov
    assert gs.SGD(0.1, nesterov=True, momentum=lambda step: 0.9).nesterov


def test_adafactor_never_ignores_a_given_rate() -> None:
    with pytest.raises(gs.ConfigurationError, match=r"relative_step=True needs no learning rate, got 0.1"):
        gs.Adafactor(0.1, relative_step=True)
    with pytest.raises(gs.ConfigurationError, match="relative_step=False needs a learning rate, got None"):
        gs.Adafactor(relative_step=False)
    for opt in (gs.Adafactor(), gs.Adafactor(relative_step=True), gs.Adafactor(None)):
        assert opt.learning_rate is None
    for opt in (gs.Adafactor(0.1), gs.Adafactor(0.1, relative_step=False)):
        assert opt.learning_rate == 0.1


def test_adafactors_rate_cannot_be_set_against_relative_step() -> None:
    opt = gs.Adafactor(relative_step=True)
    with pytest.raises(gs.ConfigurationError, match="relative_step"):
        opt.learning_rate = 0.1
    assert opt.learning_rate is None
    free = gs.Adafactor()
    free.learning_rate = 0.1
    assert free.learning_rate == 0.1
    free.learning_rate = None
    assert free.learning_rate is None


# Attributes


@every_family
@pytest.mark.parametrize("name", ["learningrate", "lr", "weightdecay", "clipnorm", "state_", "foo"])
def test_a_misspelt_attribute_is_refused(cls: Any, name: str) -> None:
    opt = cls(0.1)
    with pytest.raises(AttributeError, match=f"{cls.__name__}.*{name}"):
        setattr(opt, name, 1.0)
    assert not hasattr(opt, name)


@pytest.mark.parametrize("name", ["step", "steps", "state", "report", "hyperparameters"])
@pytest.mark.parametrize("make", [lambda: gs.Adam(0.1), lambda: gs.MultiOptimizer([gs.Adam(0.1)])])
def test_what_an_optimizer_reports_cannot_be_set(make: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(make(), name, None)


def test_a_rule_without_a_learning_rate_refuses_one() -> None:
    @gs.rule
    def Fixed(w: Any, g: Any, *, speed: Any = 1.0) -> Any:
        return w - speed * g

    opt = Fixed()
    assert opt.learning_rate is None
    with pytest.raises((AttributeError, gs.GradstepError), match=r"learning_rate|learning rate"):
        opt.learning_rate = 0.1
    assert opt.learning_rate is None
