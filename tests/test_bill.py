"""Holds `opt.memory` to what a step really allocates."""

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradstep as gs
from families import configurations

TABLES = 2048  # bytes for each parameter: addresses, chunks, scalars, counts
STORAGE: list[dict[str, Any]] = [
    {}, {"slot_dtype": "bfloat16"}, {"slot_dtype": "int8"}, {"rounding": "stochastic"}, {"master_weights": True},
]  # fmt: skip
SHAPES = {
    "matrix": (300, 70),
    "tall": (500, 20),
    "stack": (3, 40, 50),
    "vector": (70_001,),
    "scalar": (),
    "none": (0, 4),
}
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda array: array,
    "columns first": lambda array: np.asfortranarray(array),
    "every other": lambda array: np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array,
}


def made(cls: Any, kwargs: dict[str, Any], storage: dict[str, Any]) -> Any:
    if cls is gs.Adafactor and storage.get("slot_dtype") == "int8":
        storage = {"slot_dtype": {"v": "int8", "m": "int8"}}
    return cls(**kwargs, **storage)


def allocated(body: Callable[[], object]) -> int:
    """The bytes of NumPy arrays that live on after the call."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    tracemalloc.start()
    try:
        result = body()
        traces = tracemalloc.take_snapshot().filter_traces([domain]).traces
        del result
        return sum(trace.size for trace in traces)
    finally:
        tracemalloc.stop()


def bills() -> Iterator[Any]:
    """Every row with every storage, each with one layout in turn, so that both meet all layouts."""
    for place, row in enumerate(configurations()):
        for number, storage in enumerate(STORAGE):
            layout = list(LAYOUTS)[(place + number) % len(LAYOUTS)]
            yield pytest.param(*row.values, storage, layout, id=f"{row.id}-{storage}-{layout}")


@pytest.mark.parametrize(("cls", "kwargs", "storage", "layout"), list(bills()))
def test_a_step_allocates_what_the_bill_says(cls, kwargs, storage, layout):
    dtype = "bfloat16" if "master_weights" in storage or "rounding" in storage else "float32"
    rng = np.random.default_rng(0)
    params, grads = ({n: LAYOUTS[layout](rng.standard_normal(s).astype("float32").astype(jnp.dtype(dtype)))
                      for n, s in SHAPES.items()} for _ in range(2))  # fmt: skip
    for nonfinite in ("allow", "raise"):
        opt = made(cls, kwargs, storage)
        opt.nonfinite = nonfinite
        bill = opt.memory(params)
        assert not opt.state
        assert bill.masters == (4 * sum(w.size for w in params.values()) if opt.master_weights else 0)
        real = allocated(lambda opt=opt: opt.apply_gradients(grads, params))
        assert bill.total <= real <= bill.total + TABLES * len(params)
        kept = sum(array.nbytes for slots in opt.state.values() for array in slots.values())
        assert kept == bill.slots + bill.masters


def beyond_the_bill(opt: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """The bytes that a first step allocates, less the bill."""
    params, grads = ({name: np.ones(shape, np.float32) for name, shape in shapes.items()} for _ in range(2))
    bill = opt.memory(params)
    return allocated(lambda: opt.apply_gradients(grads, params)) - bill.total


CHUNK = 24  # bytes that a kernel's table has for a chunk


@pytest.mark.parametrize(
    ("make", "width", "tables"),
    [
        (lambda: gs.AdamW(0.1), None, CHUNK),
        (lambda: gs.AdamW(0.1, nonfinite="raise"), None, 2 * CHUNK + 8),  # and each block's tensor
        (lambda: gs.Adafactor(0.1), None, 2 * CHUNK),
        (lambda: gs.Adafactor(0.1), 512, 3 * CHUNK),
        (lambda: gs.Adafactor(0.1, clip_norm=1.0), 512, 4 * CHUNK + 8),
    ],
)
def test_nothing_that_grows_with_a_parameter_is_left_out(make, width, tables):
    """Per block of 32,768 elements, or 64 rows of 512: what is allocated beyond the bill are tables alone."""
    left_out = [
        beyond_the_bill(make(), {"w": (blocks * 64, width) if width else (blocks << 15,)}) for blocks in (50, 90)
    ]
    assert left_out[1] - left_out[0] == 40 * tables


def test_many_tensors_cost_what_the_bill_says_but_for_their_tables():
    """The totals of tensors of one block, and of several, are on it: they are what differs between the two."""
    left_out = [
        beyond_the_bill(gs.Adafactor(0.1), {str(i): (size,) for i in range(100)}) for size in (100, (1 << 15) + 100)
    ]
    assert left_out[1] - left_out[0] == 100 * 2 * CHUNK


@pytest.mark.parametrize("library", ["torch", "jax", "mlx"])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_slots_of_other_libraries_cost_the_same(library, storage):
    make = {"torch": lambda s: torch.zeros(s, dtype=torch.bfloat16), "jax": lambda s: jnp.zeros(s, "bfloat16"),
            "mlx": lambda s: mx.zeros(s, mx.bfloat16)}[library]  # fmt: skip
    params = {name: make(shape) for name, shape in SHAPES.items()}
    opt = gs.AdamW(0.1, **storage)
    bill = opt.memory(params)
    opt.init(params)
    arrays = [array for slots in opt.state.values() for array in slots.values()]
    assert sum(array.nbytes for array in arrays) == bill.slots + bill.masters
    assert bill.masters == (4 * sum(np.prod(s, dtype=int) for s in SHAPES.values()) if opt.master_weights else 0)


def test_the_bill_of_several_optimizers_is_their_sum_and_frozen_parameters_cost_nothing():
    params = {"a": np.zeros(1000, np.float32), "b": np.zeros(1000, np.float32), "c": np.zeros(9, np.float32)}
    opt = gs.MultiOptimizer([gs.Adam(0.1), gs.SGD(0.1, momentum=0.9)], ["a"], frozen=["c"])
    assert opt.memory(params) == gs.MemoryBill(slots=3 * 4000)
    assert gs.SGD({"a": 0.1, "*": 0.2}, momentum={"a": 0, "*": 0.9}).memory(params).slots == 4036
    assert str(gs.SGD(0.1).memory(params)) == "total 0 bytes"
    assert str(opt.memory(params)) == "slots 12,000 bytes, total 12,000 bytes"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", [{}, {"slot_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("cls", [gs.AdamW, gs.Muon])
def test_sums_of_micro_batches_are_on_the_bill(layout, storage, every, cls):
    rng = np.random.default_rng(0)
    params, grads = ({n: LAYOUTS[layout](rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
                     for _ in range(2))  # fmt: skip
    opt = gs.Accumulate(cls(0.1, nonfinite="raise", **storage), every=every)
    bill = opt.memory(params)
    assert bill.sums == sum(w.nbytes for w in params.values())
    real = allocated(lambda: [opt.apply_gradients(grads, params) for _ in range(every)])
    assert bill.total <= real <= bill.total + 3 * TABLES * len(params)
    assert gs.Accumulate(gs.AdamW(0.1), every=1).memory(params) == gs.AdamW(0.1).memory(params)


def test_what_cannot_be_trained_has_no_bill():
    with pytest.raises(gs.DtypeError, match=r"params\['a'\] has dtype int64"):
        gs.SGD(0.1).memory({"a": np.zeros(3, int)})


def two_matrices(dtype: Any = None) -> Any:
    """A rule that orthogonalizes twice; the second time in another dtype."""

    @gs.rule
    def Twice(w: Any, g: Any, *, learning_rate: Any) -> Any:
        if w.ndim < 2:
            return w - learning_rate * g
        update = gs.orthogonalize(g, 3) + gs.orthogonalize(g * g, 2, dtype)
        return w - learning_rate * update

    return Twice(0.1)


MATRICES = [
    {"wide": (70, 300)},
    {"square": (90, 90)},
    {f"small {i}": (40, 50) for i in range(700)},  # more than fit into a stack
    {"large": (600, 600), "small": (20, 30), "none": (0, 5), "vector": (3,)},
]


@pytest.mark.parametrize("shapes", MATRICES, ids=lambda shapes: str(next(iter(shapes.values()))))
@pytest.mark.parametrize("rule", ["Muon", "Twice"])
def test_every_matrix_of_a_rule_and_the_workspace_are_on_the_bill(shapes: Any, rule: str) -> None:
    params, grads = ({n: np.ones(s, np.float32) for n, s in shapes.items()} for _ in range(2))
    opt = gs.Muon(0.1) if rule == "Muon" else two_matrices()
    bill = opt.memory(params)
    real = allocated(lambda: opt.apply_gradients(grads, params))
    assert bill.total <= real <= bill.total + TABLES * len(params)


@pytest.mark.parametrize("shapes", MATRICES, ids=lambda shapes: str(next(iter(shapes.values()))))
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("rule", ["Muon", "Twice"])
def test_a_workspace_of_pytorch_is_too(shapes: Any, dtype: Any, rule: str, monkeypatch: Any) -> None:
    params, grads = ({n: torch.ones(s) for n, s in shapes.items()} for _ in range(2))
    opt = gs.Muon(0.1, ns_dtype=dtype) if rule == "Muon" else two_matrices(dtype)
    bill, empty = opt.memory(params), torch.empty
    held: dict[torch.dtype, list[int]] = {}

    def noted(size: int, dtype: torch.dtype) -> torch.Tensor:
        held.setdefault(dtype, []).append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", noted)
    matrices = allocated(lambda: opt.apply_gradients(grads, params))  # those that NumPy made for kernels
    workspace = sum(max(sizes) * dtype.itemsize for dtype, sizes in held.items())
    assert bill.scratch <= matrices + workspace <= bill.scratch + TABLES * len(params)


@pytest.mark.parametrize(
    ("shape", "count", "dtype", "expected"),
    [
        ((90, 90), 1, None, 4 * (90 * 90 + 3 * 90 * 90)),  # the matrix; its product, A and P
        ((90, 90), 3, None, 4 * 3 * (90 * 90 + 3 * 90 * 90)),
        ((600, 500), 3, None, 4 * (3 * 600 * 500 + 600 * 500 + 2 * 500 * 500)),
        ((300, 70), 2, None, 4 * 2 * (2 * 300 * 70 + 4 * 70 * 70)),  # two more: the square of P, and Q
        ((300, 70), 1, "bfloat16", 4 * 300 * 70 + 2 * (2 * 300 * 70 + 2 * 70 * 70)),
    ],
)
def test_no_more_is_taken_than_the_iteration_needs(shape: Any, count: int, dtype: Any, expected: int) -> None:
    params = {str(i): torch.zeros(shape) for i in range(count)}
    assert gs.Muon(0.1, ns_dtype=dtype).memory(params).scratch == expected


def test_matrices_of_two_dtypes_have_a_workspace_each() -> None:
    params = {"a": np.ones((600, 500), np.float32), "b": np.ones((600, 500), np.float16)}
    opt = gs.Muon(0.1)
    bill = opt.memory(params)
    real = allocated(lambda: opt.apply_gradients({n: np.ones_like(w) for n, w in params.items()}, params))
    assert bill.total <= real <= bill.total + TABLES * len(params)
