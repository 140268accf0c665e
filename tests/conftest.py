"""What all tests share: kernels kept in a folder of this run, Hypothesis without a clock, and imports among tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import gradstep as gs
from gradstep.program.threads import available_threads

sys.path.insert(0, str(Path(__file__).parent))  # tests import the table of families by its name

settings.register_profile(
    "gradstep", deadline=None, max_examples=30, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gradstep")


@pytest.fixture(scope="session", autouse=True)
def kernels_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep compiled kernels out of the user's cache; the workers of one run share them."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSTEP_CACHE_DIR", str(folder))
        yield


@pytest.fixture
def default_threads() -> Iterator[None]:
    """Give back the default number of threads after a test that sets it."""
    yield
    gs.set_num_threads(available_threads())
