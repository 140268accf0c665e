"""Arrays looked at again: what a cached plan may be used for, and that every way of looking sees the same."""

import contextlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import gradstep as gs
from gradstep.arrays import numpy as on_numpy
from gradstep.arrays import numpy_objects
from gradstep.arrays import torch as on_torch
from gradstep.arrays.exchange import Exchange, ExchangeWatch, describing_function
from gradstep.arrays.library import MOVED, OTHER, STAYED
from gradstep.arrays.memory import Memory
from gradstep.arrays.torch_offsets import find_offsets
from gradstep.step import launch
from gradstep.step.overlap import Extents


def with_offsets(tensors: list[Any]) -> Any:
    offsets, describe = find_offsets(), describing_function(torch.Tensor)
    assert offsets is not None
    assert describe is not None
    in_python = lambda _: pytest.fail("asked in Python")  # noqa: E731
    return ExchangeWatch(Exchange(describe, offsets), tensors, on_torch.DLPACK_CODES, in_python)


def with_table(tensors: list[Any]) -> Any:
    describe = describing_function(torch.Tensor)
    assert describe is not None
    return ExchangeWatch(Exchange(describe, None), tensors, on_torch.DLPACK_CODES, on_torch._any_negated)


WAYS: dict[str, Callable[[list[Any]], Any]] = {
    "table and offsets": with_offsets,
    "table": with_table,
    "methods": on_torch.Watched,
}
in_every_way = pytest.mark.parametrize("watch", WAYS.values(), ids=WAYS)


def tensors(count: int = 70) -> list[Any]:
    """More than one block of them, of many kinds."""
    makers: list[Callable[[], Any]] = [
        lambda: torch.ones(3),
        lambda: torch.ones(4, 5).t(),
        lambda: torch.nn.Parameter(torch.ones(2, 3)),
        lambda: torch.ones((), dtype=torch.float64),
        lambda: torch.ones(2, 0),
        lambda: torch.ones(9, 2)[::3],
    ]
    return [makers[i % len(makers)]() for i in range(count)]


@in_every_way
def test_addresses_are_those_that_torch_tells(watch: Any) -> None:
    first, second = tensors(), tensors()
    watched = watch(first)
    watched.locate(first)
    assert watched.addresses.tolist() == [tensor.data_ptr() for tensor in first]
    assert watched.locate(first) == STAYED
    assert watched.locate(second) == MOVED
    assert watched.addresses.tolist() == [tensor.data_ptr() for tensor in second]
    mixed = [*second[:39], first[39], *second[40:]]
    assert watched.locate(mixed) == MOVED
    assert watched.locate(mixed) == STAYED


CHANGES: dict[str, Callable[[], Any]] = {
    "another shape": lambda: torch.ones(4),
    "another stride": lambda: torch.ones(6)[::2],
    "another dtype": lambda: torch.ones(3, dtype=torch.float64),
    "an integer dtype of that size": lambda: torch.ones(3, dtype=torch.int32),
    "another type": lambda: torch.nn.Parameter(torch.ones(3)),
    "more dimensions": lambda: torch.ones(3, 1),
    "another device": lambda: torch.ones(3, device="meta"),
    "lazily negated": lambda: torch._neg_view(torch.ones(3)),
    "no memory": lambda: torch.ones(3).to_sparse(),
}


@in_every_way
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("place", [0, 36, 66])
def test_whatever_else_differs_is_seen(watch: Any, change: Callable[[], Any], place: int) -> None:
    before = tensors()
    watched = watch(before)
    assert watched.locate(before) in (STAYED, MOVED)
    assert watched.locate([*before[:place], change(), *before[place + 1 :]]) == OTHER
    assert watched.locate(before[:-1]) == OTHER


def test_the_offsets_tell_negated_tensors_from_all_others() -> None:
    watched = with_offsets([torch.ones(3)])
    for _ in range(200):
        plain = torch.randn(3)
        assert watched.locate([plain]) != OTHER
        assert watched.locate([torch._neg_view(plain)]) == OTHER


@pytest.mark.parametrize("unknown", ["offsets", "table"])
def test_without_offsets_or_table_steps_are_the_same(monkeypatch: Any, unknown: str) -> None:
    if unknown == "table":
        monkeypatch.setattr(on_torch, "describing_function", lambda _: None)
    monkeypatch.setattr(on_torch, "find_offsets", lambda: None)
    on_torch._exchange.cache_clear()
    try:
        exchange = on_torch._exchange()
        assert exchange is None if unknown == "table" else exchange is not None and exchange.offsets is None
        found = trained_with_fresh_gradients()
    finally:
        on_torch._exchange.cache_clear()
    monkeypatch.undo()
    assert torch.equal(found, trained_with_fresh_gradients())


def trained_with_fresh_gradients() -> Any:
    opt, params = gs.Adam(0.1), {"w": torch.ones(5)}
    for step in range(4):
        opt.apply_gradients({"w": torch.full((5,), float(step))}, params)
    return params["w"]


def test_slots_that_somebody_holds_are_followed_from_then_on() -> None:
    opt, params = gs.SGD(1.0, momentum=0.5), {"w": torch.zeros(2), "b": torch.zeros(1)}
    grads = {"w": torch.ones(2), "b": torch.ones(1)}
    opt.apply_gradients(grads, params)
    opt.apply_gradients(grads, params)
    held = opt.state["w"]["v"]
    version = held._version
    opt.apply_gradients(grads, params)
    assert held._version == version + 1
    held.data = torch.full((2,), 100.0)
    opt.apply_gradients(grads, params)
    assert held.tolist() == [51.0, 51.0]
    assert opt.state["b"]["v"].tolist() == [1.875]


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 6)), min_size=1, max_size=8)


@given(spans, spans)
def test_gradients_that_touch_what_is_written_are_found(written: Any, moved: Any) -> None:
    def places(kind: str, spans: Any) -> dict[str, Memory]:
        return {f"{kind}{i}": Memory(4 * at + 4096, (size,), (4,), "float32") for i, (at, size) in enumerate(spans)}

    def touch(one: Any, other: Any) -> bool:
        return one[1] > 0 and other[1] > 0 and one[0] < other[0] + other[1] and other[0] < one[0] + one[1]

    def addresses(spans: Any) -> Any:
        return np.array([4 * at + 4096 for at, _ in spans], np.int64)

    apart = [span for i, span in enumerate(written) if not any(touch(span, other) for other in written[:i])]
    away = [(1000 + 10 * i, size) for i, (_, size) in enumerate(moved)]
    extents = Extents(places("w", apart), places("g", away), {})
    extents.check(addresses(apart), addresses(away))
    extents.check_gradients(addresses(away))
    clash = any(touch(one, other) for one in apart for other in moved)
    with pytest.raises(gs.AliasedParametersError) if clash else contextlib.nullcontext():
        extents.check_gradients(addresses(moved))


@pytest.mark.parametrize("make", [lambda: gs.AdamW(0.1), lambda: gs.Adafactor(), lambda: gs.SGD(0.1, clip_norm=1.0)])
def test_runs_of_chunks_give_the_bits_of_single_ones(monkeypatch: Any, make: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = [(5,), (3 << 15,), (700, 65), ((1 << 15) + 1,), (1,), (300, 300)]
    start = [rng.standard_normal(size, np.float32) for size in sizes]
    grads = {str(i): rng.standard_normal(size, np.float32) for i, size in enumerate(sizes)}

    def trained() -> Any:
        opt, params = make(), {str(i): array.copy() for i, array in enumerate(start)}
        for _ in range(2):
            opt.apply_gradients(grads, params)
        return params

    monkeypatch.setattr(launch, "RUN", 1)
    single = trained()
    monkeypatch.setattr(launch, "RUN", 16)
    monkeypatch.setattr(launch, "GRABS", 1)
    monkeypatch.setattr("gradstep.program.threads.WORTH_THREADS", 0)
    runs = trained()
    assert all(np.array_equal(single[name], runs[name]) for name in grads)


def test_row_and_column_slots_are_written_wherever_they_lie() -> None:
    plain, moved = gs.Adafactor(0.1), gs.Adafactor(0.1)
    params = [{"w": torch.arange(120.0).reshape(2, 5, 3, 4)} for _ in range(2)]
    for step in range(3):
        for opt, tree in zip((plain, moved), params, strict=True):
            opt.apply_gradients({"w": torch.full((2, 5, 3, 4), step + 1.0)}, tree)
        for slot in moved.state["w"].values():
            slot.data = slot.transpose(0, 1).contiguous().transpose(0, 1)
    for slot, array in plain.state["w"].items():
        assert not moved.state["w"][slot].is_contiguous()
        assert torch.equal(moved.state["w"][slot], array)
    assert torch.equal(params[0]["w"], params[1]["w"])


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["PyTorch", "NumPy"])
def test_a_parameter_without_gradient_that_becomes_tied_is_noticed(make: Any) -> None:
    opt, params = gs.SGD(0.1), {"w": make([1.0, 2.0]), "frozen": make([3.0, 4.0])}
    for _ in range(2):
        opt.apply_gradients({"w": make([1.0, 1.0])}, params)
    params["frozen"] = params["w"][:]
    with pytest.raises(gs.AliasedParametersError, match="frozen"):
        opt.apply_gradients({"w": make([1.0, 1.0])}, params)
    assert opt.step == 2


# Arrays of NumPy


def with_fields(arrays: list[Any]) -> Any:
    offsets = numpy_objects.find_offsets()
    assert offsets is not None
    return numpy_objects.ObjectWatch(offsets, arrays)


on_numpy_in_every_way = pytest.mark.parametrize("watch", [with_fields, on_numpy.Watched], ids=["fields", "methods"])


class Own(np.ndarray[Any, Any]):
    """A type of its own."""


def arrays() -> list[Any]:
    base = np.zeros((4, 6), np.float32)
    return [
        np.ones(3), base.T, base[::2, 1:], np.ones((), np.float64), np.ones((2, 0)), np.zeros((1,) * 20),
        np.ones(5, np.float16), np.ones(3, np.uint8), np.ones(2, np.float32).view(Own), base[:, ::-1],
    ]  # fmt: skip


@on_numpy_in_every_way
def test_numpys_addresses_are_those_that_it_tells(watch: Any) -> None:
    first, second = arrays(), arrays()
    seen = watch(first)
    seen.locate(first)
    assert seen.locate(first) == STAYED
    assert seen.locate(second) == MOVED
    assert seen.addresses.tolist() == [array.__array_interface__["data"][0] for array in second]


@on_numpy_in_every_way
@pytest.mark.parametrize("place", range(10))
def test_another_layout_type_or_flag_of_numpys_is_seen(watch: Any, place: int) -> None:
    seen = watch(arrays())

    def changed(make: Callable[[Any], Any]) -> Any:
        some = arrays()
        some[place] = make(some[place])
        return seen.locate(some)

    def read_only(array: Any) -> Any:
        array.flags.writeable = False
        return array

    assert changed(read_only) == OTHER
    assert changed(lambda a: a[None]) == OTHER
    assert changed(lambda a: a.astype(np.int32)) == OTHER
    assert changed(lambda a: np.zeros((*a.shape, 1), a.dtype)[..., 0].view(Own if type(a) is np.ndarray else None)) == (
        OTHER
    )
    assert changed(lambda a: None) == OTHER
    assert changed(lambda a: 1.0) == OTHER
    assert seen.locate(arrays()[:-1]) == OTHER
    assert seen.locate([]) == OTHER
    assert seen.locate(arrays()) in (STAYED, MOVED)


def test_a_dtype_object_of_its_own_is_looked_at_the_slow_way() -> None:
    """Equal dtypes may be different objects; what is not known for sure is planned anew, which is right too."""
    own = np.dtype(np.float32).newbyteorder("=").newbyteorder("<").newbyteorder("=")
    params = {"w": np.zeros(3, own)}
    opt, plain, others = gs.SGD(0.5, momentum=0.5), gs.SGD(0.5, momentum=0.5), {"w": np.zeros(3, np.float32)}
    for _ in range(3):
        opt.apply_gradients({"w": np.ones(3, np.float32)}, params)
        plain.apply_gradients({"w": np.ones(3, np.float32)}, others)
    assert (params["w"] == others["w"]).all()


def test_where_numpy_keeps_its_fields_elsewhere_methods_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_numpy, "find_offsets", lambda: None)
    assert type(on_numpy.NUMPY.watch(arrays())) is on_numpy.Watched


@pytest.mark.parametrize("field", ["data", "ndim", "shape", "strides", "dtype", "flags", "type"])
def test_a_field_that_lies_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    if field in ("shape", "strides"):
        monkeypatch.setattr(numpy_objects, "_has_layout", lambda array: array.ndim < 3)
    else:
        wrong = numpy_objects.EXPECTED._replace(**{field: getattr(numpy_objects.EXPECTED, field) + 8})
        monkeypatch.setattr(numpy_objects, "EXPECTED", wrong)
    assert numpy_objects.find_offsets.__wrapped__() is None
