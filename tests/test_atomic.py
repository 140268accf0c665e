"""A step happens wholly or not at all: whatever fails, and at whatever line it is interrupted."""

import contextlib
import dis
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import pytest
import torch

import gradstep as gs

FOLDER = os.path.dirname(gs.__file__) + os.sep


# An optimizer at work, and all that a step of it may change


def bits(array: Any) -> Any:
    """An array's dtype, shape and bytes, and how often PyTorch believes that it was written."""
    if isinstance(array, torch.Tensor):
        return array._version, *bits(array.detach().numpy())
    return str(array.dtype), array.shape, array.tobytes()


def state_of(opt: Any) -> Any:
    """Slots, counters, resolved scalars and report, of the children too."""
    scalars = {name: getattr(opt, name) for name in opt.hyperparameters}
    slots = {name: {slot: bits(array) for slot, array in slots.items()} for name, slots in opt.state.items()}
    children = [state_of(child) for child in getattr(opt, "optimizers", ())]
    return opt.step, opt.steps, opt.learning_rate, repr(opt.report), scalars, slots, children


Arrays = dict[str, Any]


class Training:
    """An optimizer, its parameters, and gradients that lie elsewhere from one call to the next.

    Where the gradients of the call before lay, there is rubbish.
    """

    def __init__(self, opt: Any, arrays: Callable[[int], Arrays], steps: int = 0) -> None:
        self.opt, self.params = opt, arrays(0)
        self._values, self._places, self._calls = arrays(1), (arrays(1), arrays(1)), 0
        for _ in range(steps):
            self.step()

    def gradients(self) -> Arrays:
        self._calls += 1
        gradients, rubbish = self._places[self._calls % 2], self._places[1 - self._calls % 2]
        for name, values in self._values.items():
            gradients[name][...] = values
            rubbish[name][...] = 99.0
        return dict(gradients)

    def step(self) -> None:
        self.opt.apply_gradients(self.gradients(), self.params)

    def retry(self) -> None:
        """The last step again, with the very same arrays."""
        self._calls -= 1
        self.step()

    def everything(self) -> Any:
        return state_of(self.opt), {name: bits(array) for name, array in self.params.items()}


def numpy_arrays(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"first": (5,), "second": (3,), "third": (4, 3), "last": (2, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def torch_arrays(seed: int) -> Arrays:
    return {name: torch.from_numpy(array) for name, array in numpy_arrays(seed).items()}


def strided_arrays(seed: int) -> Arrays:
    """Views that no kernel can walk, so that all goes through scratch."""
    return {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in numpy_arrays(seed).items()}


def large_arrays(seed: int) -> Arrays:
    """Enough elements for the pool of threads."""
    return {"w": np.random.default_rng(seed).standard_normal((600, 500), np.float32)}


LIBRARIES = {"NumPy": numpy_arrays, "strided": strided_arrays, "PyTorch": torch_arrays}


class Dial:
    """A schedule whose result is set by hand, and which remembers the steps that it was asked for."""

    def __init__(self, value: Any = 0.1) -> None:
        self.value, self.asked = value, list[int]()

    def __call__(self, step: int) -> Any:
        self.asked.append(step)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def flat(dial: Any = 0.1) -> gs.AdamW:
    return gs.AdamW(gs.exponential_decay(0.1, 0.999), weight_decay=dial, bias_correction=True)


def nested(dial: Any = 0.1, last: Any = None, first_rate: Any = 0.1) -> gs.MultiOptimizer:
    """Its last child takes `second` and `last`."""
    last = last or gs.Adafactor(gs.exponential_decay(0.1, 0.999), weight_decay=dial)
    inner = gs.MultiOptimizer([gs.Muon(0.02), last], ["third"])
    return gs.MultiOptimizer([gs.SGD(first_rate, momentum=0.9), inner], ["first"], clip_norm=1.0)


SHELLS: dict[str, Callable[..., Any]] = {"flat": flat, "nested": nested}
in_each_shell = pytest.mark.parametrize("shell", SHELLS)
early_and_late = pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])


def assert_refused(training: Training, control: Training, error: Any, call: Callable[[], object]) -> str:
    """The call fails and changes nothing, and the next step is that of an optimizer that never failed."""
    before, _ = training.everything(), control.everything()  # who holds slots sees their versions count from then on
    with pytest.raises(error) as caught:
        call()
    assert training.everything() == before
    training.step()
    control.step()
    assert training.everything() == control.everything()
    return str(caught.value)


# Arguments that cannot serve


def wrong_shape(params: Arrays, grads: Arrays) -> None:
    grads["last"] = np.zeros((3, 2), np.float32)


def integer_gradient(params: Arrays, grads: Arrays) -> None:
    grads["last"] = np.zeros((2, 3), np.int32)


def integer_parameter(params: Arrays, grads: Arrays) -> None:
    params["last"] = np.zeros((2, 3), np.int32)


def unknown_name(params: Arrays, grads: Arrays) -> None:
    grads["lost"] = grads["last"]


def read_only(params: Arrays, grads: Arrays) -> None:
    params["last"] = np.broadcast_to(np.float32(1), (2, 3))


def mixed_libraries(params: Arrays, grads: Arrays) -> None:
    grads["last"] = torch.zeros(2, 3)


def no_array(params: Arrays, grads: Arrays) -> None:
    grads["last"] = "zeros"


def bad_key(params: Arrays, grads: Arrays) -> None:
    grads[2.5] = grads["last"]  # pyright: ignore[reportArgumentType]


def parameter_as_gradient(params: Arrays, grads: Arrays) -> None:
    grads["last"] = params["last"]


def tied(params: Arrays, grads: Arrays) -> None:
    params["last"] = params["third"][:2]


SPOILS = {
    wrong_shape: gs.ShapeError,
    integer_gradient: gs.DtypeError,
    integer_parameter: gs.DtypeError,
    unknown_name: gs.UnknownParameterError,
    read_only: gs.ReadOnlyError,
    mixed_libraries: gs.ArgumentTypeError,
    no_array: gs.ArgumentTypeError,
    bad_key: gs.ArgumentTypeError,
    parameter_as_gradient: gs.AliasedParametersError,
    tied: gs.AliasedParametersError,
}


@in_each_shell
@early_and_late
@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_arrays_that_cannot_serve_change_nothing(shell: str, steps: int, spoil: Any) -> None:
    training, control = (Training(SHELLS[shell](), numpy_arrays, steps) for _ in range(2))
    params, grads = dict(training.params), training.gradients()
    spoil(params, grads)
    assert_refused(training, control, SPOILS[spoil], lambda: training.opt.apply_gradients(grads, params))


@in_each_shell
@early_and_late
@pytest.mark.parametrize("side", ["params", "grads"])
def test_a_tensor_on_another_device_changes_nothing(shell: str, steps: int, side: str) -> None:
    training, control = (Training(SHELLS[shell](), torch_arrays, steps) for _ in range(2))
    trees = {"params": dict(training.params), "grads": training.gradients()}
    trees[side]["last"] = torch.zeros(2, 3, device="meta")
    message = assert_refused(
        training, control, gs.DeviceError, lambda: training.opt.apply_gradients(trees["grads"], trees["params"])
    )
    assert f"{side}['last']" in message
    assert "meta" in message
    assert ".cpu()" in message


@in_each_shell
@early_and_late
def test_a_gradient_that_is_not_finite_changes_nothing_when_told_to_raise(shell: str, steps: int) -> None:
    training, control = (Training(SHELLS[shell](), numpy_arrays, steps) for _ in range(2))
    training.opt.nonfinite = control.opt.nonfinite = "raise"
    grads = training.gradients()
    grads["last"] = np.full((2, 3), np.nan, np.float32)
    message = assert_refused(
        training, control, gs.NonFiniteGradientError, lambda: training.opt.apply_gradients(grads, training.params)
    )
    assert "last" in message
    assert "first" not in message


@in_each_shell
@early_and_late
def test_a_skipped_step_changes_nothing_but_the_report(shell: str, steps: int) -> None:
    training, control = (Training(SHELLS[shell](), numpy_arrays, steps) for _ in range(2))
    training.opt.nonfinite = control.opt.nonfinite = "skip"
    grads = training.gradients()
    grads["last"] = np.full((2, 3), np.inf, np.float32)
    training.opt.apply_gradients(grads, training.params)
    report = training.opt.report
    assert (report.applied, report.step, report.culprits) == (False, steps, ("last",))
    training.opt._report = control.opt.report
    assert training.everything() == control.everything()
    training.step()
    control.step()
    assert training.everything() == control.everything()


# Schedules


UNUSABLE = {
    "NaN": (float("nan"), gs.NonFiniteScalarError),
    "infinite": (float("inf"), gs.NonFiniteScalarError),
    "out of range": (-1.0, gs.OutOfRangeError),
    "out of the range of float32": (1e39, gs.OutOfRangeError),
    "no number": ("much", gs.ArgumentTypeError),
    "raising": (LookupError("no such step"), LookupError),
}


@in_each_shell
@early_and_late
@pytest.mark.parametrize("result", UNUSABLE)
def test_a_schedule_that_fails_changes_nothing(shell: str, steps: int, result: str) -> None:
    dial = Dial()
    training, control = (
        Training(SHELLS[shell](dial), numpy_arrays, steps),
        Training(SHELLS[shell](), numpy_arrays, steps),
    )
    if steps == 0:  # the constructor's call was the first step's
        training.step()
        control.step()
    before = training.everything()
    dial.value, error = UNUSABLE[result]
    with pytest.raises(error):
        training.step()
    with pytest.raises(error):
        training.opt.preflight() if result != "out of the range of float32" else training.step()
    assert training.everything() == before
    dial.value = 0.1
    if result == "out of the range of float32":
        return  # the schedule's call for this step has succeeded and is not repeated
    training.step()
    control.step()
    training_state, control_state = training.everything(), control.everything()
    assert training_state == control_state


@early_and_late
def test_a_retry_asks_only_the_schedule_that_failed(steps: int) -> None:
    good, bad = Dial(), Dial()
    training = Training(nested(bad, first_rate=good), numpy_arrays, steps + 1)
    coming = steps + 1
    bad.value = float("nan")
    for _ in range(3):
        with pytest.raises(gs.NonFiniteScalarError):
            training.step()
    bad.value = 0.2
    training.step()
    assert good.asked == [*range(coming), coming]
    assert bad.asked == [*range(coming), *[coming] * 4]


# Memory that is shared


def buffer() -> Any:
    return np.arange(1, 41, dtype=np.float32)


def self_overlapping(size: int) -> Any:
    return np.lib.stride_tricks.as_strided(buffer(), (size,), (2,))


# Each gives the parameters a and b and the gradients a and b.
SHARING: dict[str, Callable[[], tuple[Any, Any, Any, Any]]] = {
    "one parameter under two names": lambda: ((b := buffer())[:4], b[:4], buffer()[:4], buffer()[:4]),
    "parameters overlap by one element": lambda: ((b := buffer())[:4], b[3:7], buffer()[:4], buffer()[:4]),
    "parameters overlap by one byte": lambda: (
        (b := buffer())[:4],
        b.view(np.uint8)[15:31].view(np.float32),
        buffer()[:4],
        buffer()[:4],
    ),
    "parameters overlap backwards": lambda: ((b := buffer())[:4], b[6:2:-1], buffer()[:4], buffer()[:4]),
    "one parameter lies within another": lambda: ((b := buffer())[:20], b[4:6], buffer()[:20], buffer()[:2]),
    "parameters of two dtypes overlap": lambda: (
        (b := buffer())[:4],
        b[2:6].view(np.float64),
        buffer()[:4],
        buffer()[:2],
    ),
    "a matrix and its transpose": lambda: (
        (b := buffer())[:4].reshape(2, 2),
        b[:4].reshape(2, 2).T,
        *(buffer()[:4].reshape(2, 2) for _ in range(2)),
    ),
    "every other element, both the same": lambda: ((b := buffer())[:8:2], b[2:10:2], buffer()[:4], buffer()[:4]),
    "a gradient is its own parameter": lambda: ((b := buffer())[:4], buffer()[:4], b[:4], buffer()[:4]),
    "a gradient is another parameter": lambda: (buffer()[:4], (b := buffer())[:4], b[:4], buffer()[:4]),
    "a gradient overlaps its parameter": lambda: ((b := buffer())[:4], buffer()[:4], b[1:5], buffer()[:4]),
    "a gradient repeats an element of its parameter": lambda: (
        (b := buffer())[:4],
        buffer()[:4],
        np.broadcast_to(b[3:4], (4,)),
        buffer()[:4],
    ),
    "elements of a parameter overlap": lambda: (self_overlapping(4), buffer()[:4], buffer()[:4], buffer()[:4]),
}

SEPARATE: dict[str, Callable[[], tuple[Any, Any, Any, Any]]] = {
    "neighbours": lambda: ((b := buffer())[:4], b[4:8], b[8:12], b[12:16]),
    "interleaved": lambda: ((b := buffer())[:16:4], b[1:17:4], b[2:18:4], b[3:19:4]),
    "neighbours backwards": lambda: ((b := buffer())[3::-1], b[4:8], b[11:7:-1], b[12:16]),
    "columns of one matrix": lambda: ((m := buffer().reshape(4, 10))[:, :3], m[:, 3:5], m[:, 5:8], m[:, 8:]),
    "one gradient for both": lambda: (buffer()[:4], buffer()[4:8], (b := buffer())[:4], b[:4]),
    "gradients that overlap": lambda: (buffer()[:4], buffer()[4:8], (b := buffer())[:4], b[1:5]),
    "an empty one within another": lambda: ((b := buffer())[:8], b[4:4], buffer()[:8], b[4:4]),
}


def lookalike(array: Any) -> Any:
    """Memory of its own in the same layout, so that a plan made for it would serve."""
    return np.lib.stride_tricks.as_strided(np.ones(64, array.dtype)[20:], array.shape, array.strides)


def shells_for_two() -> list[Any]:
    return [gs.Adam(0.1), gs.MultiOptimizer([gs.Lion(0.1), gs.MultiOptimizer([gs.Adam(0.1)])], ["a"])]


@early_and_late
@pytest.mark.parametrize("case", SHARING)
@pytest.mark.parametrize("place", [0, 1], ids=SHELLS)
def test_shared_memory_that_would_be_written_is_refused(place: int, case: str, steps: int) -> None:
    opt = shells_for_two()[place]
    arrays = SHARING[case]()
    for _ in range(steps if case != "elements of a parameter overlap" else 0):
        a, b, ga, gb = map(lookalike, arrays)
        opt.apply_gradients({"a": ga, "b": gb}, {"a": a, "b": b})
    before = state_of(opt), [array.tobytes() for array in arrays]
    a, b, ga, gb = arrays
    with pytest.raises(gs.AliasedParametersError, match=r"(params|grads)\['a'\]"):
        opt.apply_gradients({"a": ga, "b": gb}, {"a": a, "b": b})
    assert (state_of(opt), [array.tobytes() for array in arrays]) == before


@pytest.mark.parametrize("case", SEPARATE)
@pytest.mark.parametrize("place", [0, 1], ids=SHELLS)
def test_memory_that_only_lies_close_is_accepted(place: int, case: str) -> None:
    together, apart = shells_for_two()[place], shells_for_two()[place]
    a, b, ga, gb = SEPARATE[case]()
    params, grads = {"a": a, "b": b}, {"a": ga, "b": gb}
    copies = {name: array.copy() for name, array in params.items()}
    gradients = {name: array.copy() for name, array in grads.items()}
    for _ in range(2):
        together.apply_gradients(grads, params)
        apart.apply_gradients(gradients, copies)
    assert all(params[name].tobytes() == copies[name].tobytes() for name in params)
    assert all(grads[name].tobytes() == gradients[name].tobytes() for name in grads)


@pytest.mark.parametrize("role", ["params", "grads"])
@pytest.mark.parametrize("owner", ["a", "b"])
def test_a_slot_cannot_be_a_parameter_or_a_gradient_too(role: str, owner: str) -> None:
    opt = gs.Adam(0.1)
    trees = {role: {"a": buffer(), "b": buffer()} for role in ("params", "grads")}
    opt.apply_gradients(trees["grads"], trees["params"])
    trees[role]["a"] = opt.state[owner]["m"]
    before = state_of(opt)
    with pytest.raises(gs.AliasedParametersError) as caught:
        opt.apply_gradients(trees["grads"], trees["params"])
    assert f"{role}['a']" in str(caught.value)
    assert f"state['{owner}']['m']" in str(caught.value)
    assert state_of(opt) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda x: {"a": x, "b": x},
        lambda x: {"a": x, "b": x.t()},
        lambda x: {"a": x, "b": x[0]},
        lambda x: {"a": x[0].expand(3, 2)},
        lambda x: {"a": x.as_strided((2, 2), (1, 1))},
        lambda x: {"a": torch.nn.Parameter(x), "b": torch.nn.Parameter(x)},
    ],
    ids=["tied", "transposed", "row", "expanded", "overlapping", "two parameters of one tensor"],
)
def test_tensors_that_share_memory_are_refused(make: Any) -> None:
    params = make(torch.ones(2, 2))
    grads = {name: torch.ones(tensor.shape) for name, tensor in params.items()}
    opt = gs.Adam(0.1)
    with pytest.raises(gs.AliasedParametersError, match=r"params\['a'\]"):
        opt.apply_gradients(grads, params)
    assert opt.step == 0
    assert not opt.state
    assert all(bool((tensor == 1).all()) for tensor in params.values())


def test_gradients_are_checked_wherever_they_move() -> None:
    memory = np.zeros(64)
    opt = gs.SGD(0.1, momentum=0.9)
    params = {"a": memory[8:12], "b": memory[20:24], "c": memory[40:41]}
    grads = {name: np.zeros(array.shape) for name, array in params.items()}
    opt.apply_gradients(grads, params)
    written = [*params.values(), *(slots["v"] for slots in opt.state.values())]
    refused = []
    for start in range(61):
        grads["b"] = memory[start : start + 4]
        overlapping = any(np.shares_memory(grads["b"], array) for array in written)
        with pytest.raises(gs.AliasedParametersError) if overlapping else contextlib.nullcontext():
            opt.apply_gradients(grads, params)
        refused.append(overlapping)
    assert sum(refused) == 7 + 7 + 4
    assert opt.step == 1 + 61 - sum(refused)


@pytest.mark.parametrize("warm", [False, True])
def test_a_parameter_without_a_gradient_must_not_share_memory_with_one_that_moves(warm: bool) -> None:
    opt = gs.SGD(0.1)
    w = buffer()
    params = {"tied": w[:4], "w": buffer()[:4], "other": np.arange(3)}
    if warm:
        opt.apply_gradients({"w": buffer()[:4], "tied": buffer()[:4]}, params)
    params["w"] = w[2:6]
    before = w.copy()
    with pytest.raises(gs.AliasedParametersError, match=r"params\['tied'\] and params\['w'\]"):
        opt.apply_gradients({"w": buffer()[:4]}, params)
    assert (w == before).all()


# Failures of the machine


class Shortage:
    """Memory that is refused at one allocation."""

    def __init__(self, patch: pytest.MonkeyPatch, refused: int) -> None:
        self.refused, self.calls = refused, 0
        for module in (np, torch):
            for name in ("zeros", "empty", "empty_like", "zeros_like", "full", "concatenate", "stack", "repeat"):
                if hasattr(module, name):
                    patch.setattr(module, name, self._limited(getattr(module, name)))

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.refused:
                raise MemoryError
            return function(*args, **kwargs)

        return allocate


@pytest.mark.parametrize(("library", "steps"), [("strided", 0), ("PyTorch", 0), ("NumPy", 1)])
def test_a_failed_allocation_changes_nothing(library: str, steps: int) -> None:
    def step(training: Training) -> None:
        """A step of other parameters than before, which needs a new plan."""
        grads = training.gradients()
        training.opt.apply_gradients({name: grads[name] for name in ("second", "third", "last")}, training.params)

    control = Training(nested(), LIBRARIES[library], steps)
    step(control)
    expected = control.everything()
    for refused in itertools.count(1):
        training = Training(nested(), LIBRARIES[library], steps)
        before = training.everything()
        with pytest.MonkeyPatch.context() as patch:
            shortage = Shortage(patch, refused)
            with contextlib.suppress(MemoryError):
                step(training)
        if shortage.calls < refused:
            break
        assert training.everything() == before
        step(training)
        assert training.everything() == expected
    assert refused > 20


def last_rule(constant: float) -> Any:
    """A rule whose kernel nobody has compiled yet."""

    @gs.rule
    def Fresh(w: Any, g: Any, m: Any, *, learning_rate: Any) -> Any:
        m = m + constant * g
        return w - learning_rate * m, m

    return Fresh(0.1)


@pytest.mark.parametrize("place", [0, 1], ids=SHELLS)
@pytest.mark.parametrize("broken", ["parse_assembly", "create_mcjit_compiler"])
def test_a_kernel_that_cannot_be_compiled_changes_nothing(
    place: int, broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("GRADSTEP_CACHE_DIR", str(tmp_path / "kernels"))
    constant = 1.625 + place + 2 * len(broken)
    make = (last_rule, lambda constant: nested(last=last_rule(constant)))[place]
    training = Training(make(constant), numpy_arrays)
    before = training.everything()
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError("LLVM is unwell")

        patch.setattr(llvmlite.binding, broken, fail)
        with pytest.raises(RuntimeError, match="unwell"):
            training.step()
    assert training.everything() == before
    control = Training(make(constant), numpy_arrays)
    control.step()
    training.step()
    assert training.everything() == control.everything()


# A strike at every line


class Site(NamedTuple):
    """The moment before a line of a function runs for the `visit`-th time."""

    code: CodeType
    line: int
    visit: int


class InjectedError(Exception):
    """An error that no code expects."""


class MissedError(AssertionError):
    """A call that did not come by where it was to be struck."""


def inject() -> None:
    raise InjectedError


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(FOLDER) or code.co_filename == contextlib.__file__


@functools.cache
def ends_of_with(code: CodeType) -> frozenset[int]:
    """Where a `with` body is over and `__exit__` about to be called. No interrupt can come there, only a tracer."""
    instructions = list(dis.get_instructions(code))
    nones = [i.opname == "LOAD_CONST" and i.argval is None for i in instructions]
    calls = [n for n in range(len(nones)) if nones[n : n + 3] == [True] * 3]
    saving = [n - 1 for n in calls if instructions[n - 1].opname == "SWAP"]  # what the body returns
    return frozenset(instructions[n].offset for n in calls + saving)


def traced(tracer: Any, function: Callable[[], object]) -> None:
    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        function()
    finally:
        sys.settrace(previous)


def sites_of(function: Callable[[], object]) -> list[tuple[Site, bool]]:
    """Every line of gradstep that a call runs, each with whether interrupts are held there."""
    visits: dict[tuple[CodeType, int], int] = {}
    sites: list[tuple[Site, bool]] = []
    handler = signal.getsignal(signal.SIGINT)

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and frame.f_lasti not in ends_of_with(frame.f_code):
            place = frame.f_code, frame.f_lineno
            visits[place] = visits.get(place, 0) + 1
            sites.append((Site(*place, visits[place]), signal.getsignal(signal.SIGINT) is not handler))
        return at_line

    traced(lambda frame, *_: at_line if is_ours(frame.f_code) else None, function)
    return sites


def struck(site: Site, strike: Callable[[], None], function: Callable[[], object]) -> bool:
    """Call the function with a strike at that site; whether an exception came out."""
    visits, fired, code = 0, False, site.code

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal visits, fired
        if event == "line" and frame.f_lineno == site.line and frame.f_lasti not in ends_of_with(frame.f_code):
            visits += 1
            if visits == site.visit:
                fired = True
                strike()
        return at_line

    raised = True
    with contextlib.suppress(InjectedError, KeyboardInterrupt):
        traced(lambda frame, *_: at_line if frame.f_code is code and not fired else None, function)
        raised = False
    if not fired:
        raise MissedError(f"the step did not come by {site}")
    return raised


def ends(sites: list[Site]) -> list[Site]:
    """The first and the last visit of each line."""
    last = {site[:2]: site for site in sites}
    return [site for site in sites if site.visit == 1 or site == last[site[:2]]]


def elsewhere(function: Callable[[], object]) -> None:
    """Run on another thread, which a lock that was left behind would block for ever."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "another thread is locked out"
    if failures:
        raise failures[0]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python has it at the start; pytest's workers ignore it."""
    assert threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def chosen_sites(training: Training, strike: Callable[[], None]) -> list[Site]:
    """Where to strike: interrupts anywhere, errors anywhere before interrupts are held for the commit."""
    sites = sites_of(training.step)
    if strike is inject:
        sites = list(itertools.takewhile(lambda site: not site[1], sites))
    assert len(sites) > 100
    return [site for site, _ in sites]


def assert_whole(training: Training, site: Site, strike: Callable[[], None], expected: Callable[[], Any]) -> None:
    """Struck there, a step is taken or not; if not, the next one is as if nothing had been."""
    before = training.everything()
    raised = struck(site, strike, training.step)
    after, expected_after = training.everything(), expected()
    assert raised or strike is inject, f"an interrupt was lost at {site}"
    assert after in (before, expected_after), f"neither old nor new after {strike.__name__} at {site}"
    if strike is inject and raised:
        assert after == before, f"an error changed something at {site}"
    if after == before:
        elsewhere(training.retry)
        assert training.everything() == expected_after, f"the step after {strike.__name__} at {site} is wrong"
    else:
        elsewhere(lambda: training.opt.__getstate__())  # takes all locks


def settle(training: Training) -> None:
    """Slots that somebody has seen are planned anew, once."""
    training.everything()
    training.step()


def translates(site: Site) -> bool:
    """Whether the line is of a rule's translation, which knows of no array and no optimizer."""
    return site.code.co_filename.startswith(os.path.join(FOLDER, "program"))


def strike_first_steps(make: Callable[[], Training], strike: Callable[[], None], part: slice) -> None:
    """Strike a fresh optimizer's first step, once at each line, but at some alone of those that translate rules."""
    make().step()  # compiles the kernels
    control = make()
    sites = [site for site in chosen_sites(control, strike) if site.visit == 1]
    translating = [site for site in sites if translates(site)]
    sites = [site for site in sites if not translates(site)] + translating[::4]
    expected = control.everything()
    for site in sites[part]:
        assert_whole(make(), site, strike, lambda: expected)


def strike_later_steps(
    make: Callable[[], Training], strike: Callable[[], None], part: slice = slice(None), *, all_visits: bool = False
) -> None:
    """Strike a step whose plan is cached, and go on."""
    recorded, training, control = make(), make(), make()
    for each in (recorded, training, control):
        each.step()
        settle(each)

    def expected() -> Any:
        control.step()
        return control.everything()

    sites = chosen_sites(recorded, strike)
    for site in (sites if all_visits else ends(sites))[part]:
        assert_whole(training, site, strike, expected)


ELEMENTWISE = flat
EVERY_KIND: dict[str, Callable[[], Any]] = {
    "elementwise": flat,
    "Adafactor": lambda: gs.Adafactor(beta_1=0.9),
    "Muon": lambda: gs.Muon(gs.exponential_decay(0.02, 0.999)),
    "nested": nested,
}


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("kind", "library", "part"),
    [
        ("elementwise", "NumPy", slice(None)),
        ("elementwise", "strided", slice(0, None, 6)),
        ("nested", "NumPy", slice(0, None, 8)),
        ("nested", "strided", slice(1, None, 12)),
        ("nested", "PyTorch", slice(3, None, 12)),
    ],
)
def test_ctrl_c_at_any_line_of_a_first_step(kind: str, library: str, part: slice) -> None:
    strike_first_steps(lambda: Training(EVERY_KIND[kind](), LIBRARIES[library]), interrupt, part)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("kind", "library", "part"),
    [("elementwise", "PyTorch", slice(0, None, 2)), ("nested", "NumPy", slice(0, None, 12))],
)
def test_an_error_at_any_line_of_a_first_step(kind: str, library: str, part: slice) -> None:
    strike_first_steps(lambda: Training(EVERY_KIND[kind](), LIBRARIES[library]), inject, part)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("strike", [interrupt, inject])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_strike_at_any_line_of_a_later_step(library: str, strike: Any) -> None:
    strike_later_steps(lambda: Training(flat(), LIBRARIES[library]), strike, all_visits=True)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("strike", [interrupt, inject])
@pytest.mark.parametrize(
    ("kind", "library", "part"),
    [
        ("Adafactor", "NumPy", slice(None)),
        ("Muon", "PyTorch", slice(None)),
        ("nested", "NumPy", slice(None)),
        ("nested", "strided", slice(0, None, 3)),
        ("nested", "PyTorch", slice(1, None, 3)),
    ],
)
def test_a_strike_at_any_line_of_a_later_step_of_larger_rules(
    kind: str, library: str, part: slice, strike: Any
) -> None:
    strike_later_steps(lambda: Training(EVERY_KIND[kind](), LIBRARIES[library]), strike, part)


@pytest.mark.usefixtures("ctrl_c", "default_threads")
@pytest.mark.parametrize("kind", ["elementwise", "Adafactor"])
def test_ctrl_c_while_several_threads_work(kind: str) -> None:
    gs.set_num_threads(3)
    training, control = (Training(EVERY_KIND[kind](), large_arrays, 1) for _ in range(2))
    recorded = Training(EVERY_KIND[kind](), large_arrays, 1)
    for each in (recorded, training, control):
        settle(each)
    at_work = [
        site
        for site in ends(chosen_sites(recorded, interrupt))
        if os.path.basename(site.code.co_filename) in ("threads.py", "interrupts.py", "launch.py", "batch.py")
    ]

    def expected() -> Any:
        control.step()
        return control.everything()

    missed = 0
    for site in at_work[::2]:
        try:
            assert_whole(training, site, interrupt, expected)
        except MissedError:  # whether a thread has woken up in time is a matter of chance
            missed += 1
            assert training.everything() == expected()
    assert missed < len(at_work) / 8
    elsewhere(lambda: gs.set_num_threads(2))  # waits for the pool to be free
    elsewhere(training.step)
    assert training.everything() == expected()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1], ids=lambda number: number.name)
def test_other_signals_whose_handlers_raise_wait_too(number: signal.Signals) -> None:
    def handler(*_: object) -> None:
        raise InjectedError

    def strike() -> None:
        signal.raise_signal(number)

    previous = signal.signal(number, handler)
    try:
        strike_later_steps(lambda: Training(flat(), numpy_arrays), strike)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)


@pytest.mark.usefixtures("ctrl_c")
def test_a_handler_of_ones_own_is_called_once_and_kept() -> None:
    calls: list[int] = []

    def handler(number: int, _: object) -> None:
        calls.append(number)

    signal.signal(signal.SIGINT, handler)
    recorded, training = Training(flat(), numpy_arrays, 1), Training(flat(), numpy_arrays, 1)
    held = [site for site, held in sites_of(recorded.step) if held]
    for site in held:
        before = training.opt.step
        assert not struck(site, interrupt, training.step)
        assert (calls, training.opt.step) == ([signal.SIGINT], before + 1)
        assert signal.getsignal(signal.SIGINT) is handler
        calls.clear()
