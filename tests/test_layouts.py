"""Where arrays lie in memory never changes a result: views, odd strides, empty arrays, and what PyTorch wraps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradstep as gs
from families import configurations, public_optimizers

every_family = pytest.mark.parametrize("cls", public_optimizers(), ids=lambda cls: cls.__name__)
every_configuration = pytest.mark.parametrize(("cls", "kwargs"), configurations())


def values(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def unaligned(array: Any) -> Any:
    """The same values one byte off."""
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def spread(array: Any) -> Any:
    """Every second element along every axis."""
    view = np.zeros([2 * length for length in array.shape], array.dtype)[
        tuple(slice(None, None, 2) for _ in array.shape)
    ]
    view[...] = array
    return view


def channels_last(array: Any) -> Any:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)).transpose(0, 3, 1, 2)


def with_odd_strides(array: Any) -> Any:
    """Axes of length 1 may have any stride."""
    return np.lib.stride_tricks.as_strided(
        array, array.shape, [s if n > 1 else 12345 for n, s in zip(array.shape, array.strides, strict=True)]
    )


Layout = Callable[[Any], Any]

# How an array of shape (2, 3, 1, 5) can lie.
LAYOUTS: dict[str, Layout] = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2),
    "channels last": channels_last,
    "negative strides": lambda x: np.ascontiguousarray(x[::-1, :, :, ::-1])[::-1, :, :, ::-1],
    "every second element": spread,
    "part of a larger array": lambda x: np.pad(x, 1)[1:-1, 1:-1, 1:-1, 1:-1],
    "unaligned": unaligned,
    "unaligned and spread": lambda x: unaligned(np.repeat(x, 2, axis=3))[..., ::2],
    "odd strides of size-1 axes": with_odd_strides,
}

SHAPE = (2, 3, 1, 5)


def run(opt: Any, params: dict[str, Any], gradients: list[dict[str, Any]]) -> None:
    for grads in gradients:
        opt.apply_gradients(grads, params)


def same(found: Any, expected: Any) -> bool:
    return bool((np.asarray(found) == np.asarray(expected)).all()) and np.shape(found) == np.shape(expected)


def assert_like_contiguous(cls: Any, kwargs: Any, of_parameter: Layout, of_gradient: Layout, dtype: Any) -> None:
    w, gradients = values(*SHAPE, dtype=dtype), [values(*SHAPE, seed=seed, dtype=dtype) for seed in (1, 2)]
    opt, plain = cls(**kwargs), cls(**kwargs)
    params, expected = {"w": of_parameter(w.copy())}, {"w": w.copy()}
    assert same(params["w"], w)
    run(opt, params, [{"w": of_gradient(g.copy())} for g in gradients])
    run(plain, expected, [{"w": g} for g in gradients])
    assert same(params["w"], expected["w"])
    for slot, array in plain.state["w"].items():
        assert same(opt.state["w"][slot], array), slot


@every_configuration
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_result(cls: Any, kwargs: Any, layout: str) -> None:
    assert_like_contiguous(cls, kwargs, LAYOUTS[layout], LAYOUTS[layout], np.float32)


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
@pytest.mark.parametrize("cls", [gs.AdamW, gs.Adafactor, gs.Muon])
def test_gradients_may_lie_otherwise_than_parameters(cls: Any, of_parameter: str, of_gradient: str) -> None:
    assert_like_contiguous(cls, {"learning_rate": 0.1}, LAYOUTS[of_parameter], LAYOUTS[of_gradient], np.float64)


def test_what_lies_between_the_elements_of_a_view_is_left_alone() -> None:
    base = np.full((4, 6), 7.0, np.float32)
    view = base[::2, ::3]
    gs.SGD(1.0, momentum=0.9).apply_gradients({"w": np.ones((2, 2), np.float32)}, {"w": view})
    assert (view == 6).all()
    assert (base == 6).sum() == 4
    assert (base == 7).sum() == 20


@every_family
def test_a_gradient_that_repeats_one_value_is_read_as_such(cls: Any) -> None:
    opt, plain = cls(0.1), cls(0.1)
    params, expected = {"w": values(3, 4)}, {"w": values(3, 4)}
    row = values(4, seed=1)
    for gradient in (np.broadcast_to(np.float32(0.5), (3, 4)), np.broadcast_to(row, (3, 4))):
        opt.apply_gradients({"w": gradient}, params)
        plain.apply_gradients({"w": gradient.copy()}, expected)
    assert same(params["w"], expected["w"])


@every_configuration
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_one_element_are_ordinary(cls: Any, kwargs: Any, shape: Any, dtype: Any) -> None:
    opt = cls(**kwargs)
    params = {"w": np.full(shape, 0.5, dtype)}
    for _ in range(2):
        opt.apply_gradients({"w": np.full(shape, 0.25, dtype)}, params)
    assert params["w"].shape == shape
    assert np.isfinite(params["w"]).all()
    assert (params["w"] < 0.5).all()
    assert opt.steps == {"w": 2}


@every_family
def test_a_zero_dimensional_array_moves_like_its_only_element(cls: Any) -> None:
    opt = cls(0.1)
    params = {"scalar": np.array(0.5), "vector": np.array([0.5])}
    for _ in range(3):
        opt.apply_gradients({"scalar": np.array(0.25), "vector": np.array([0.25])}, params)
    assert params["scalar"] == params["vector"][0]


@every_configuration
@pytest.mark.parametrize("library", [np, torch])
def test_empty_arrays_are_ordinary(cls: Any, kwargs: Any, library: Any) -> None:
    opt, plain = cls(**kwargs), cls(**kwargs)
    shapes = [(0,), (3, 0), (0, 3), (0, 4, 5), (2, 0, 3)]
    params = {str(shape): library.zeros(shape, dtype=library.float32) for shape in shapes}
    params["full"] = library.ones((2, 3), dtype=library.float32)
    alone = {"full": library.ones((2, 3), dtype=library.float32)}
    for _ in range(2):
        opt.apply_gradients(
            {name: library.ones(array.shape, dtype=array.dtype) for name, array in params.items()}, params
        )
        plain.apply_gradients({"full": library.ones((2, 3), dtype=library.float32)}, alone)
    assert same(params["full"], alone["full"])
    assert opt.steps == dict.fromkeys(params, 2)
    assert all(tuple(params[str(shape)].shape) == shape for shape in shapes)
    assert all(bool((array == array).all()) for slots in opt.state.values() for array in slots.values())


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_only_empty_arrays_are_a_step_too(clip_norm: float | None) -> None:
    opt = gs.Adam(0.1, clip_norm=clip_norm, nonfinite="raise")
    opt.apply_gradients({"w": np.zeros((0, 3))}, {"w": np.zeros((0, 3))})
    assert opt.step == 1
    assert opt.report.grad_norm == 0


def test_memory_mapped_files_are_written(tmp_path: Any) -> None:
    file = tmp_path / "weights"
    values(4, 5).tofile(file)
    opt, plain = gs.Adam(0.1), gs.Adam(0.1)
    mapped = np.memmap(file, np.float32, "r+", shape=(4, 5))
    expected = {"w": values(4, 5)}
    for seed in (1, 2):
        opt.apply_gradients({"w": values(4, 5, seed=seed)}, {"w": mapped})
        plain.apply_gradients({"w": values(4, 5, seed=seed)}, expected)
    mapped.flush()
    assert same(np.fromfile(file, np.float32).reshape(4, 5), expected["w"])
    with pytest.raises(gs.ReadOnlyError, match=r"params\['w'\]"):
        opt.apply_gradients({"w": values(4, 5)}, {"w": np.memmap(file, np.float32, "r", shape=(4, 5))})


@pytest.mark.parametrize("layout", ["C", "Fortran", "transposed", "channels last"])
def test_slots_copy_the_order_of_dense_parameters(layout: str) -> None:
    opt = gs.Adam(0.1)
    w = LAYOUTS[layout](values(*SHAPE))
    opt.apply_gradients({"w": values(*SHAPE)}, {"w": w})
    moving = [axis for axis, length in enumerate(SHAPE) if length > 1]
    for slot in opt.state["w"].values():
        assert [slot.strides[axis] for axis in moving] == [w.strides[axis] for axis in moving]


def test_slots_of_views_are_dense() -> None:
    opt = gs.Adam(0.1)
    opt.apply_gradients({"w": values(2, 3)}, {"w": spread(values(2, 3))})
    assert all(slot.flags.c_contiguous for slot in opt.state["w"].values())


def test_slots_of_rules_that_read_in_c_order_are_in_c_order() -> None:
    opt = gs.Muon(0.1)
    opt.apply_gradients({"w": values(4, 3)}, {"w": np.asfortranarray(values(4, 3))})
    assert opt.state["w"]["v"].flags.c_contiguous


def test_a_parameter_may_change_its_layout_between_steps() -> None:
    opt, plain = gs.Adam(0.1), gs.Adam(0.1)
    w, expected = values(*SHAPE), {"w": values(*SHAPE)}
    for seed, layout in enumerate(LAYOUTS.values()):
        w = layout(w.copy())
        opt.apply_gradients({"w": values(*SHAPE, seed=seed)}, {"w": w})
        plain.apply_gradients({"w": values(*SHAPE, seed=seed)}, expected)
        assert same(w, expected["w"])


# PyTorch


TENSORS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every second element": lambda x: torch.repeat_interleave(x, 2, dim=3)[..., ::2],
    "at an offset": lambda x: torch.nn.functional.pad(x, (3, 0))[..., 3:],
}


@every_family
@pytest.mark.parametrize("layout", TENSORS)
def test_tensors_of_any_layout_give_what_numpy_gives(cls: Any, layout: str) -> None:
    opt, plain = cls(0.1), cls(0.1)
    w = TENSORS[layout](torch.from_numpy(values(*SHAPE)))
    expected = {"w": values(*SHAPE)}
    for seed in (1, 2):
        g = values(*SHAPE, seed=seed)
        opt.apply_gradients({"w": TENSORS[layout](torch.from_numpy(g))}, {"w": w})
        plain.apply_gradients({"w": g}, expected)
    if cls is gs.Muon:  # each library's own matrix product
        np.testing.assert_allclose(w, expected["w"], rtol=1e-4, atol=1e-5)
    else:
        assert same(w, expected["w"])


def test_a_tensor_may_change_its_layout_between_steps() -> None:
    opt, plain = gs.Adam(0.1), gs.Adam(0.1)
    w, expected = torch.nn.Parameter(torch.from_numpy(values(*SHAPE))), {"w": values(*SHAPE)}
    for seed, layout in enumerate([*TENSORS.values(), *reversed(TENSORS.values())]):
        w.data = layout(w.data.clone())
        opt.apply_gradients({"w": torch.from_numpy(values(*SHAPE, seed=seed))}, {"w": w})
        plain.apply_gradients({"w": values(*SHAPE, seed=seed)}, expected)
        assert same(w.detach(), expected["w"])


def test_slots_of_channels_last_tensors_are_channels_last() -> None:
    opt = gs.Adam(0.1)
    w = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    opt.apply_gradients({"w": torch.ones(2, 3, 4, 5)}, {"w": w})
    assert all(slot.stride() == w.stride() for slot in opt.state["w"].values())


def test_parameters_that_require_gradients_are_stepped() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    opt = gs.SGD(0.5)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    params = dict(model.named_parameters())
    opt.apply_gradients({name: parameter.grad for name, parameter in params.items()}, params)
    assert torch.equal(model.weight, before - 0.5)
    assert model.weight.requires_grad
    assert model.weight.is_leaf
    assert torch.equal(model.weight.grad, torch.ones(2, 3))


@pytest.mark.parametrize("layout", TENSORS)
@every_family
def test_version_counters_of_all_that_is_written_advance(cls: Any, layout: str) -> None:
    opt = cls(0.1)
    w, g = TENSORS[layout](torch.ones(SHAPE)), TENSORS[layout](torch.ones(SHAPE))
    opt.apply_gradients({"w": g}, {"w": w})
    written = [w, *opt.state["w"].values()]
    before = [tensor._version for tensor in written]
    version = g._version
    opt.apply_gradients({"w": g}, {"w": w})
    assert all(tensor._version > old for tensor, old in zip(written, before, strict=True))
    assert g._version == version


def test_autograd_notices_a_step_between_forward_and_backward() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    gs.SGD(0.1).apply_gradients({"w": torch.ones(3)}, {"w": w})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_stepped() -> None:
    with torch.inference_mode():
        w, g = torch.ones(3), torch.ones(3)
    opt = gs.SGD(0.5, momentum=0.9)
    normal = torch.ones(3)
    opt.apply_gradients({"w": g, "n": g}, {"w": w, "n": normal})
    with torch.inference_mode():
        opt.apply_gradients({"w": g, "n": g}, {"w": w, "n": normal})
    assert w.is_inference()
    assert torch.equal(w.clone(), normal)
    np.testing.assert_allclose(normal, 1 - 0.5 - 0.5 * 1.9, rtol=1e-6)
    assert normal._version > 0


def test_a_subclass_of_tensor_that_is_a_buffer_is_stepped() -> None:
    buffer = torch.nn.Buffer(torch.ones(2))
    gs.SGD(0.5).apply_gradients({"w": torch.ones(2)}, {"w": buffer})
    assert torch.equal(buffer, torch.full((2,), 0.5))


def negated() -> Any:
    return torch._neg_view(torch.ones(2))


def imaginary_part_of_a_conjugate() -> Any:
    return torch.ones(2, dtype=torch.complex64).conj().imag


def sparse() -> Any:
    return torch.ones(2).to_sparse()


def on_meta() -> Any:
    return torch.ones(2, device="meta")


def integer() -> Any:
    return torch.ones(2, dtype=torch.int32)


REFUSED = {
    negated: (gs.ArgumentTypeError, "negated.*resolve_neg"),
    imaginary_part_of_a_conjugate: (gs.ArgumentTypeError, "negated.*resolve_neg"),
    sparse: (gs.ArgumentTypeError, r"sparse.*\.to_dense\(\)"),
    on_meta: (gs.DeviceError, r"meta.*\.cpu\(\)"),
    integer: (gs.DtypeError, r"int32.*\.float\(\)"),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "planned"])
@pytest.mark.parametrize("side", ["params", "grads"])
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_tensors_without_plain_memory_are_refused(make: Any, side: str, warm: bool) -> None:
    opt = gs.SGD(0.1, momentum=0.9)
    trees = {"params": {"w": torch.ones(2)}, "grads": {"w": torch.ones(2)}}
    if warm:
        opt.apply_gradients(trees["grads"], trees["params"])
    trees[side]["w"] = make()
    error, message = REFUSED[make]
    with pytest.raises(error, match=rf"{side}\['w'\].*{message}"):
        opt.apply_gradients(trees["grads"], trees["params"])
    assert opt.step == warm


def test_fake_tensors_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
    warm, real = gs.SGD(0.1), {"w": torch.ones(2)}
    warm.apply_gradients({"w": torch.ones(2)}, real)
    for opt in (gs.SGD(0.1), warm):
        steps = opt.step
        with pytest.raises(gs.TracingError, match=r"grads\['w'\].*FakeTensor.*no memory"):
            opt.apply_gradients({"w": fake}, real)
        with pytest.raises(gs.TracingError, match=r"params\['w'\].*FakeTensor.*no memory"):
            opt.apply_gradients(real, {"w": fake})
        with FakeTensorMode(), pytest.raises(gs.TracingError, match=r"FakeTensor.*no memory"):
            opt.apply_gradients({"w": torch.ones(2)}, {"w": torch.ones(2)})
        assert opt.step == steps


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "planned"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "functionalize"])
def test_a_step_within_a_transformation_is_refused(transform: str, warm: bool) -> None:
    opt = gs.SGD(0.1)
    if warm:
        opt.apply_gradients({"w": torch.ones(2)}, {"w": torch.ones(2)})

    def step(x: Any) -> Any:
        return opt.apply_gradients({"w": x}, {"w": torch.ones(2)})["w"].sum()

    arguments = {"grad": torch.ones(2), "vmap": torch.ones(3, 2), "functionalize": torch.ones(2)}
    with pytest.raises(gs.TracingError, match="transformation"):
        getattr(torch.func, transform)(step)(arguments[transform])
    assert opt.step == warm
