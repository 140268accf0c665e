"""Proves that files that were written once mean the same for good."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.safetensors"))
EXPECTED: dict[str, Any] = {
    name: meaning for path in sorted(FOLDER.glob("*.json")) for name, meaning in json.loads(path.read_text()).items()
}


def golden() -> Any:
    spec = importlib.util.spec_from_file_location("golden_files", FOLDER.with_name("golden_files.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_has_a_meaning_and_every_meaning_a_file() -> None:
    assert {path.name for path in FILES} == EXPECTED.keys()
    assert len(FILES) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_means_what_it_meant(path: Path) -> None:
    files = golden()
    found = json.loads(json.dumps(files.meaning(*files.load(path))))
    assert found == EXPECTED[path.name]
