"""DTensors, FSDP and tensor parallelism: real processes do what `dtensor_checks.py` says, and take whole steps."""

from pathlib import Path

import numpy as np
import pytest
from processes import run_torch

from gradstep.arrays.region import Region

torch = pytest.importorskip("torch")
SCRIPT = Path(__file__).parent / "dtensor_checks.py"


@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_of_dtensors_are_those_of_whole_tensors(ranks: int) -> None:
    for rank in run_torch(ranks, SCRIPT, limit=120.0):
        assert (rank.code, rank.out) == (0, "checked\n"), rank.err


@pytest.mark.parametrize(
    ("axes", "start"),
    [
        ((((0, 4),), ((0, 6),)), 0),
        ((((2, 4),), ((0, 6),)), 12),
        ((((2, 4),), ((0, 3),)), None),  # columns
        ((((3, 4),), ((2, 5),)), 20),  # within one row
        ((((0, 1), (2, 3)), ((0, 6),)), None),  # every other row
        ((((4, 4),), ((0, 6),)), 0),  # none
    ],
)
def test_a_region_knows_whether_its_elements_follow_on_each_other(axes, start) -> None:
    region, whole = Region((4, 6), axes), np.arange(24).reshape(4, 6)
    picked = whole[region.picked]
    assert region.start == start
    assert picked.shape == region.lengths and picked.size == region.size
    if start is not None:
        assert picked.reshape(-1).tolist() == list(range(start, start + region.size))


def test_a_region_of_a_tensor_without_axes_is_its_element() -> None:
    region = Region((), ())
    assert (region.start, region.size, np.array(7)[region.picked]) == (0, 1, 7)
