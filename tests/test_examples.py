"""The examples, run as they stand, for fewer steps where they take long."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["numpy_digits", "jax_digits", "mlx_digits"])
def test_digits_are_recognised(name: str) -> None:
    assert example(name).train(steps=150) > 0.85


def test_the_transformer_learns_what_characters_follow() -> None:
    characters = example("torch_characters")
    assert characters.train(steps=60) < 2.9 < 4.0 < characters.train(steps=1)


def test_one_rule_gives_the_same_on_four_libraries() -> None:
    results = example("one_rule_on_four").train()
    assert set(results) == {"NumPy", "PyTorch", "JAX", "MLX"}
    for values in results.values():
        assert values == pytest.approx(results["NumPy"], rel=1e-6)
    assert results["PyTorch"] == results["NumPy"]


def test_narrow_numbers_train_as_well_as_float32_unless_they_round_small_steps_away() -> None:
    model = example("low_precision")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    try:
        losses = {way: model.train(dtype, options, steps=800) for way, (dtype, options) in model.WAYS.items()}
    finally:
        torch.set_num_threads(threads)
    exact, *others, nearest = losses.values()
    assert exact < 2.4
    assert others == pytest.approx([exact] * 4, rel=0.01)
    assert nearest > 1.02 * exact


def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    run = example("killed_and_resumed")
    interrupted, alone = tmp_path / "interrupted", tmp_path / "alone"
    interrupted.mkdir()
    alone.mkdir()
    assert len(run.kill_and_resume(interrupted)) >= 2
    ours, other = run.train(interrupted), run.train(alone)
    for name, array in other.items():
        assert np.array_equal(ours[name], array)
