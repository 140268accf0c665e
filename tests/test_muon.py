"""Muon's iteration: its precision on hard spectra, equal matrices computed together, and products in bfloat16."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradstep as gs
import gradstep.mlx
import gradstep.optax
import gradstep.torch
from gradstep.program import newton_schulz

Array = np.ndarray[Any, Any]
LIBRARIES: dict[str, Callable[[Array], Any]] = {
    "NumPy": np.array, "PyTorch": torch.tensor, "JAX": jnp.array, "MLX": mx.array,
}  # fmt: skip
NARROW = {name: make for name, make in LIBRARIES.items() if name != "NumPy"}
SIDES = [(96, 384), (384, 96), (96, 192), (96, 191), (120, 96)]  # the first three are iterated on the Gram matrix


def read(array: Any) -> Array:
    return array.numpy() if isinstance(array, torch.Tensor) else np.array(array)


def spectra() -> Iterator[Any]:
    """Singular values, largest first, for a side of 96."""
    yield pytest.param(np.logspace(0, -6, 96), id="six decades")
    yield pytest.param(np.logspace(0, -3, 96), id="three decades")
    yield pytest.param(np.r_[1.0, np.full(95, 1e-3)], id="one and small ones")
    yield pytest.param(np.r_[np.full(4, 1.0), np.full(92, 1e-5)], id="rank four and noise")
    yield pytest.param(np.r_[1.0, np.zeros(95)], id="rank one")
    yield pytest.param(np.r_[np.full(48, 1.0), np.zeros(48)], id="half the rank")
    yield pytest.param(np.ones(96), id="orthogonal")


def with_spectrum(values: Array, shape: tuple[int, int]) -> Array:
    rng = np.random.default_rng(5)
    side = len(values)
    left, right = (np.linalg.qr(rng.standard_normal((length, side)))[0] for length in shape)
    return ((left * values) @ right.T).astype(np.float32)


def by_singular_values(x: Array, steps: int) -> Array:
    """What the iteration does, in float64, without a matrix product of its own."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / (np.sqrt((s * s).sum()) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SIDES, ids=str)
@pytest.mark.parametrize("values", list(spectra()))
def test_every_spectrum_keeps_its_digits(library: str, shape: tuple[int, int], values: Array) -> None:
    x = with_spectrum(values, shape)
    found = read(gs.orthogonalize(LIBRARIES[library](x)))
    assert (
        np.abs(found - by_singular_values(x, 5)).max() < 4e-5
    )  # without a new Gram matrix after three iterations: 2e-4


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (20, 20)], ids=str)
def test_any_number_of_iterations(library: str, steps: int, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(steps).standard_normal(shape).astype(np.float32)
    found = read(gs.orthogonalize(LIBRARIES[library](x), steps))
    np.testing.assert_allclose(found, by_singular_values(x, steps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)], ids=str)
def test_zeros_and_one_huge_element_are_no_trouble(library: str, shape: tuple[int, int]) -> None:
    x = np.zeros(shape, np.float32)
    np.testing.assert_array_equal(read(gs.orthogonalize(LIBRARIES[library](x))), x)
    x += np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[1, 2] = 1e12
    found = read(gs.orthogonalize(LIBRARIES[library](x)))
    np.testing.assert_allclose(found, by_singular_values(x, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", ["NumPy", "PyTorch"])
@pytest.mark.parametrize("side", [23, 24, 25, 51])
def test_symmetric_products_in_halves(library: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "HALVED", 24)
    rng = np.random.default_rng(side)
    for shape in ((side, side), (side, 2 * side), (2 * side, side)):
        x = rng.standard_normal(shape).astype(np.float32)
        found = read(gs.orthogonalize(LIBRARIES[library](x), 2))
        np.testing.assert_allclose(found, by_singular_values(x, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(8000, 251), (249, 8000)], ids=str)
def test_the_norm_of_many_elements(library: str, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = read(gs.orthogonalize(LIBRARIES[library](x), 1))
    wanted = by_singular_values(x, 1)
    assert (
        abs(np.vdot(found, wanted) / np.vdot(wanted, wanted) - 1) < 1e-5
    )  # PyTorch sums that many squares with an error of 2e-5


def stepped(opt: Any, gradients: Mapping[str, Array], make: Callable[[Array], Any]) -> dict[str, Array]:
    params = {name: make(np.zeros_like(g)) for name, g in gradients.items()}
    new = opt.apply_gradients({name: make(g) for name, g in gradients.items()}, params)
    return {name: read(array) for name, array in new.items()}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_equal_matrices_are_computed_together_and_each_gets_its_own(library: str, dtype: Any) -> None:
    if library == "NumPy" and dtype:
        pytest.skip("NumPy has no such products")
    rng = np.random.default_rng(0)
    shapes = {"a": (300, 400), "b": (12, 40), "c": (40, 12), "d": (12, 5, 8), "e": (12, 12), "f": (0, 4)}
    stacked = library in ("NumPy", "PyTorch")
    gradients = {
        f"{kind}{i}": rng.standard_normal(shape).astype(np.float32) * (1 + i)
        for i in range(10 if stacked else 2)
        for kind, shape in shapes.items()
    }
    together = stepped(gs.Muon(1.0, weight_decay=0, ns_dtype=dtype), gradients, LIBRARIES[library])
    for name, g in gradients.items():
        if not g.size:
            continue
        matrix = g.reshape(len(g), -1)
        scale = math.sqrt(max(1.0, g.shape[-2] / g.shape[-1]))
        wanted = -scale * by_singular_values(matrix, 5).reshape(g.shape)
        np.testing.assert_allclose(together[name], wanted, rtol=0, atol=0.1 if dtype else 2e-5)
        if stacked and not dtype:
            alone = stepped(gs.Muon(1.0, weight_decay=0), {name: g}, LIBRARIES[library])[name]
            np.testing.assert_allclose(together[name], alone, rtol=0, atol=2e-5)


class TestBfloat16:
    @pytest.mark.parametrize("library", NARROW)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("shape", [(40, 30), (30, 160), (160, 30), (400, 400)], ids=str)
    def test_products_are_coarse_and_nothing_else_is(self, library: str, dtype: Any, shape: tuple[int, int]) -> None:
        if dtype is np.float64 and library != "PyTorch":
            pytest.skip("float64 is not enabled")
        x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
        given = NARROW[library](x)
        found = gs.orthogonalize(given, dtype="bfloat16")
        assert found.dtype == given.dtype
        wanted = by_singular_values(x, 5)
        error = np.linalg.norm(read(found) - wanted) / np.linalg.norm(wanted)
        assert 1e-4 < error < 0.04

    @pytest.mark.parametrize("shape", [(40, 30), (30, 40), (64, 256), (400, 400)], ids=str)
    @pytest.mark.parametrize("nesterov", [True, False])
    def test_it_is_what_torch_does(self, shape: tuple[int, int], nesterov: bool) -> None:
        generator = torch.Generator().manual_seed(2)
        mine, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        opt = gradstep.torch.Muon([mine], 1.0, weight_decay=0, nesterov=nesterov, ns_dtype="bfloat16")
        oracle = torch.optim.Muon([theirs], 1.0, weight_decay=0, nesterov=nesterov)
        exact = gs.Muon(1.0, weight_decay=0, nesterov=nesterov)
        for _ in range(2):
            g = torch.randn(shape, generator=generator)
            full = torch.zeros(shape)
            for w in (mine, theirs):
                w.data.zero_()
                w.grad = g.clone()
            opt.step()
            oracle.step()
            exact.apply_gradients({"w": g.clone()}, {"w": full})
            far, apart = ((mine.detach() - other).norm() / full.norm() for other in (full, theirs.detach()))
            assert 1e-4 < far < 0.03  # it is not computed in float32
            assert apart < 0.03

    @pytest.mark.parametrize("values", list(spectra()))
    @pytest.mark.parametrize("library", NARROW)
    def test_hard_spectra_stay_finite(self, library: str, values: Array) -> None:
        found = read(gs.orthogonalize(NARROW[library](with_spectrum(values, (96, 384))), dtype="bfloat16"))
        assert np.linalg.norm(found, 2) < 1.5

    def test_adapters_pass_it_on(self) -> None:
        g = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
        wanted = np.array(
            gs.Muon(1.0, ns_dtype="bfloat16").apply_gradients({"w": mx.array(g)}, {"w": mx.zeros((8, 12))})["w"]
        )
        opt = gradstep.mlx.Muon(1.0, ns_dtype="bfloat16")
        np.testing.assert_array_equal(
            np.array(opt.apply_gradients({"w": mx.array(g)}, {"w": mx.zeros((8, 12))})["w"]), wanted
        )
        assert opt.ns_dtype == "bfloat16"
        tx, params = gradstep.optax.muon(1.0, ns_dtype="bfloat16"), jnp.zeros((8, 12))
        plain = gradstep.optax.muon(1.0)
        coarse, fine = (np.array(t.update(jnp.array(g), t.init(params), params)[0]) for t in (tx, plain))
        assert 1e-4 < np.abs(coarse - fine).max() < 0.05
        module = torch.nn.Parameter(torch.zeros(8, 12))
        module.grad = torch.tensor(g)
        kwargs: dict[str, Any] = {"ns_coefficients": (2.0, -1.5, 0.5), "lr": 1.0, "weight_decay": 0}
        results: list[Any] = []
        for dtype in ("bfloat16", None):  # torch's own operations follow other coefficients
            module.data.zero_()
            gradstep.torch.Muon([module], ns_dtype=dtype, **kwargs).step()
            results.append(module.detach().clone())
        assert 1e-4 < (results[0] - results[1]).abs().max() < 0.05

    def test_numpy_has_none_and_says_so_before_anything_is_written(self) -> None:
        params = {"b": np.ones(3, np.float32), "w": np.ones((2, 3), np.float32)}
        grads = {name: np.ones_like(w) for name, w in params.items()}
        opt = gs.Muon(0.1, ns_dtype="bfloat16")
        for call in (lambda: opt.apply_gradients(grads, params), lambda: opt.memory(params), lambda: opt.init(params)):
            with pytest.raises(gs.DtypeError, match=r"Muon .*params\['w'\] belongs to NumPy.*; leave ns_dtype out"):
                call()
            assert not opt.state
            assert opt.step == 0
        assert all((w == 1).all() for w in params.values())
        with pytest.raises(gs.DtypeError, match="NumPy has no matrix products in bfloat16; leave the dtype out"):
            gs.orthogonalize(np.ones((2, 3)), dtype="bfloat16")
        opt.ns_dtype = None
        opt.apply_gradients(grads, params)
        assert opt.step == 1

    @pytest.mark.parametrize("value", ["float16", "float32", "", True, 16, torch.bfloat16, ["bfloat16"]], ids=str)
    def test_no_other_dtype_is_taken(self, value: Any) -> None:
        message = r"ns_dtype must be one of None, 'bfloat16', got"
        for make in (
            lambda: gs.Muon(0.1, ns_dtype=value),
            lambda: gs.Muon(0.1).set_hyperparameters({"ns_dtype": value}),
            lambda: gradstep.torch.Muon([torch.nn.Parameter(torch.ones(2, 2))], ns_dtype=value),
            lambda: gradstep.mlx.Muon(0.1, ns_dtype=value),
            lambda: gradstep.optax.muon(0.1, ns_dtype=value),
        ):
            with pytest.raises(gs.ConfigurationError, match=message):
                make()
        with pytest.raises(gs.ConfigurationError, match="orthogonalize's dtype must be one of"):
            gs.orthogonalize(np.ones((2, 2)), dtype=value)

    def test_it_is_seen_kept_and_restored(self, tmp_path: Any, capsys: Any) -> None:
        opt = gs.Muon(0.1, ns_dtype="bfloat16")
        params = {"w": torch.ones(3, 4)}
        opt.apply_gradients({"w": torch.ones(3, 4)}, params)
        assert "ns_dtype='bfloat16'" in repr(opt)
        gs.explain(opt, ir=False)
        assert "steps=5, dtype=bfloat16)" in capsys.readouterr().out
        assert opt.hyperparameters["ns_dtype"] == opt.ns_dtype == "bfloat16"
        opt.save(tmp_path / "muon.safetensors", params)
        other = gs.Muon(0.1)
        other.load(tmp_path / "muon.safetensors", {"w": torch.ones(3, 4)})
        assert other.ns_dtype == "bfloat16"

    def test_torch_loads_checkpoints_that_do_not_know_it(self) -> None:
        w = torch.nn.Parameter(torch.ones(3, 4))
        saved = torch.optim.Muon([w]).state_dict()
        opt = gradstep.torch.Muon([w], ns_dtype="bfloat16")
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["ns_dtype"] is None
