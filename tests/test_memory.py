"""After its first step an optimizer allocates nothing that grows with the parameters, and it holds none of them."""

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import configurations


def arrays(size: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"matrix": (size, 128), "wide": (64, size), "vector": (size * 16,), "stack": (4, size // 4, 32)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def tensors(size: int, dtype: Any = np.float32) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in arrays(size, dtype).items()}


def peak_of(function: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy held during a call beyond what they held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def settled(opt: Any, make: Callable[[int], Any], size: int, steps: int = 2) -> tuple[Any, Any]:
    params, grads = make(size), make(size)
    for _ in range(steps):
        opt.apply_gradients(grads, params)
    return params, grads


def of_bytes(tree: Any) -> int:
    return sum(array.nbytes for array in tree.values())


def test_the_measure_sees_arrays() -> None:
    assert peak_of(lambda: np.ones(1_000_000, np.uint8)) >= 1_000_000


def held_and_clipped() -> Iterator[Any]:
    """Every row plain in one library and clipped in the other; the next row of its family the other way round."""
    makers = {"NumPy": arrays, "PyTorch": tensors}
    for place, row in enumerate(configurations()):
        for number, (library, make) in enumerate(makers.items()):
            clipped = (place + number) % 2
            options = {"clip_norm": 1.0, "nonfinite": "raise"} if clipped else {}
            yield pytest.param(*row.values, options, make, id=f"{row.id}-{'clipped' if clipped else 'plain'}-{library}")


@pytest.mark.parametrize(("cls", "kwargs", "options", "make"), list(held_and_clipped()))
def test_a_later_step_allocates_nothing_that_grows_with_the_parameters(
    cls: Any, kwargs: Any, options: Any, make: Any
) -> None:
    peaks: list[int] = []
    for size in (64, 512):
        opt = cls(**kwargs, **options)
        params, grads = settled(opt, make, size)
        peaks.append(peak_of(lambda opt=opt, grads=grads, params=params: opt.apply_gradients(grads, params)))
    growth = of_bytes(arrays(512)) - of_bytes(arrays(64))
    rows_and_columns = 16 * (512 + 128) * 8 if cls is gs.Adafactor else 0
    assert peaks[1] - peaks[0] < growth / 50 + rows_and_columns


def torch_allocations(function: Callable[[], object]) -> int:
    """The bytes that PyTorch allocates during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


@pytest.mark.parametrize(("cls", "kwargs"), [(gs.Muon, {}), (gs.AdamW, {}), (gs.Adafactor, {})])
def test_nor_does_pytorch(cls: Any, kwargs: Any) -> None:
    opt = cls(0.1, **kwargs)
    params, grads = settled(opt, tensors, 256)
    assert torch_allocations(lambda: torch.zeros(10_000)) >= 40_000
    assert torch_allocations(lambda: opt.apply_gradients(grads, params)) < of_bytes(params) / 100


def test_strided_parameters_reuse_their_scratch() -> None:
    opt = gs.Adam(0.1)
    base, grads = np.ones((512, 512), np.float32), {"w": np.ones((512, 256), np.float32)}
    params = {"w": base[:, ::2]}
    opt.apply_gradients(grads, params)
    assert peak_of(lambda: opt.apply_gradients(grads, params)) < base.nbytes / 50


def test_gradients_at_new_addresses_need_no_new_plan() -> None:
    opt = gs.Adam(0.1)
    params, _ = settled(opt, arrays, 1024)
    fresh = [arrays(1024) for _ in range(3)]
    opt.apply_gradients(fresh[0], params)
    for grads in fresh[1:]:
        assert peak_of(lambda grads=grads: opt.apply_gradients(grads, params)) < of_bytes(params) / 100


def test_a_step_does_not_keep_what_it_allocated() -> None:
    opt = gs.Adam(0.1, clip_norm=1.0)
    params, grads = settled(opt, arrays, 64, steps=5)
    tracemalloc.start()
    try:
        for _ in range(3):
            opt.apply_gradients(grads, params)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            opt.apply_gradients(grads, params)
        assert tracemalloc.get_traced_memory()[0] - before < 5_000
    finally:
        tracemalloc.stop()


class Watched(np.ndarray):
    """An array that can be watched."""


def watched(tree: dict[str, Any]) -> tuple[dict[str, Any], list[weakref.ref[Any]]]:
    tree = {name: array if isinstance(array, torch.Tensor) else array.view(Watched) for name, array in tree.items()}
    return tree, [weakref.ref(array) for array in tree.values()]


@pytest.mark.parametrize(
    "make", [arrays, tensors, lambda size: {"w": arrays(size)["matrix"][:, ::2]}], ids=["NumPy", "PyTorch", "strided"]
)
@pytest.mark.parametrize("kind", ["elementwise", "Adafactor", "Muon", "clipped"])
def test_an_optimizer_holds_no_reference_to_parameters_or_gradients(make: Any, kind: str) -> None:
    opt = {
        "elementwise": lambda: gs.Adam(0.1),
        "Adafactor": lambda: gs.Adafactor(),
        "Muon": lambda: gs.Muon(0.1),
        "clipped": lambda: gs.MultiOptimizer([gs.SGD(0.1), gs.Adam(0.1)], ["v*"], clip_norm=1.0, nonfinite="skip"),
    }[kind]()
    (params, of_params), (grads, of_grads) = watched(make(64)), watched(make(64))
    for _ in range(2):
        opt.apply_gradients(grads, params)
    del params, grads
    gc.collect()
    assert [ref() for ref in of_params + of_grads] == [None] * len(of_params + of_grads)
    assert opt.step == 2


def test_a_failed_step_holds_nothing_either() -> None:
    opt = gs.Adam(0.1)
    (params, of_params), (grads, of_grads) = watched(arrays(64)), watched(arrays(64))
    opt.apply_gradients(grads, params)
    with pytest.raises(gs.ShapeError):
        opt.apply_gradients({"matrix": grads["vector"]}, params)
    del params, grads
    gc.collect()
    assert not any(ref() is not None for ref in of_params + of_grads)


def test_init_lets_go_of_the_old_slots() -> None:
    opt = gs.Adam(0.1)
    params, _ = settled(opt, arrays, 64)
    old = weakref.ref(opt.state["matrix"]["m"])
    opt.init(params)
    gc.collect()
    assert old() is None
