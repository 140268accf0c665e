"""Any names survive a file, and other readers of the format understand what is in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from hypothesis import example, given
from hypothesis import strategies as st

import gradstep as gs
from checkpoints import FUNCTIONS, RULES, bits, bits_of, cases, everything, held_tree, seen, take_steps

ODD = [
    "", ".", "..", "/", "a/b", "../a", "w", "w.m", "w.v", "w.m.codes", "w.g.sum", "g.sum", "__metadata__", "w#2",
    "w.m#2", "__metadata__#2", "\ud800", "\\ud800", "w.\udfff", "\x00", "\n", '"', "\\", "é", "e\u0301", "🙂",
    "a" * 5000, "gradstep", "*", "[w]", "sha256", "w ", " ",
]  # fmt: skip
NAMES = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=()), max_size=8))
NAMED = st.dictionaries(NAMES, st.integers(0, 4), min_size=1, max_size=8)


def arrays(sizes: dict[str, int], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def rounds() -> Any:
    return gs.Accumulate(gs.Adam({"w*": 0.1, "*": 0.2}, slot_dtype={"m": "int8"}), every=2)


@given(NAMED)
@example(dict.fromkeys(ODD, 2))
@example({"w": 2, "w.m": 2, "w.g": 1, "w.m.codes": 3, "w.g.sum": 2, "w#2": 1, "w.m#2": 1, "w.v": 3, "__metadata__": 1})
def test_every_tree_of_names_survives(tmp_path_factory: Any, sizes: dict[str, int]) -> None:
    path = tmp_path_factory.getbasetemp() / "names.safetensors"
    opt, params = rounds(), arrays(sizes, 0)
    for seed in range(1, 4):
        opt.apply_gradients(arrays(sizes, seed), params)
    opt.save(path, params)
    others = {name: np.zeros_like(array) for name, array in reversed(params.items())}
    twin = gs.load(path, others)
    assert everything(twin) == everything(opt)
    assert bits_of(others) == bits_of(params)
    late = rounds()
    late.load(path)
    for optimizer, own in ((opt, params), (late, others)):
        optimizer.apply_gradients(arrays(sizes, 4), own)
    assert everything(late) == everything(opt)
    assert bits_of(others) == bits_of(params)


@given(NAMED)
@example(dict.fromkeys(ODD, 2))
def test_another_reader_finds_every_array_under_these_names(tmp_path_factory: Any, sizes: dict[str, int]) -> None:
    path = tmp_path_factory.getbasetemp() / "read.safetensors"
    opt, params = rounds(), arrays(sizes, 0)
    for seed in range(1, 4):
        opt.apply_gradients(arrays(sizes, seed), params)
    opt.save(path, params)
    found = safetensors.numpy.load_file(path)
    state = [array for slots in opt.state.values() for array in slots.values()]
    wanted = [*params.values(), *state, *opt.sums.values()]
    assert sorted(map(bits, found.values())) == sorted(map(bits, wanted))
    for name, array in params.items():
        if not any(name.startswith(f"{other}.") or "#" in name for other in params) and name != "__metadata__":
            key = name.encode("utf-8", "backslashreplace").decode()
            if sum(key == other.encode("utf-8", "backslashreplace").decode() for other in params) == 1:
                assert bits(found[key]) == bits(array)


@pytest.mark.parametrize("nest", ["dicts", "lists"])
def test_nested_parameters_are_saved_by_their_dotted_names(nest: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def tree(value: float) -> Any:
        leaf = {"w": np.full(3, value), "b": np.full((), value)}
        return (
            {"layers": {"0": leaf, "1": {"w": np.full(2, value)}}}
            if nest == "dicts"
            else {"layers": [leaf, ({"w": np.full(2, value)})]}
        )

    opt, params = gs.Adam(0.1), tree(1.0)
    opt.apply_gradients(tree(0.5), params)
    opt.save(path, params)
    assert safetensors.numpy.load_file(path).keys() == {
        f"layers.{n}{slot}" for n in ("0.w", "0.b", "1.w") for slot in ("", ".m", ".v")
    }
    others = tree(0.0)
    twin = gs.load(path, others)
    assert repr(others) == repr(params)
    assert everything(twin) == everything(opt)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    "name", ["everything of bfloat16", "bfloat16 slots of float64", "float16 slots of float16", "in a nested round"]
)
def test_safetensors_reads_the_same_bytes(library: str, name: str, tmp_path: Path) -> None:
    case, path = cases(library)[name], tmp_path / "a.safetensors"
    opt, params = case.make(), held_tree(library, case.params(0))
    take_steps(case, library, opt, params, range(case.before))
    opt.save(path, params)
    wanted = dict(params)
    wanted |= {f"{parameter}.{slot}": array for parameter, slots in opt.state.items() for slot, array in slots.items()}
    wanted |= {f"{parameter}.g.sum": array for parameter, array in getattr(opt, "sums", {}).items()}
    assert bits_of(safetensors.torch.load_file(path)) == bits_of(wanted)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == wanted.keys()
        metadata = file.metadata()
        for key, array in wanted.items():
            piece = file.get_slice(key)
            assert piece.get_shape() == list(seen(array).shape)
            codes = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}
            assert piece.get_dtype() == codes[str(seen(array).dtype)]
    assert all(isinstance(text, str) for text in metadata.values())


def test_the_hashes_are_of_each_tensors_bytes(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "a.safetensors"
    opt, params = gs.Adam(0.1, slot_dtype="int8"), arrays({"w": 300, "b": 2, "e": 0}, 0)
    opt.apply_gradients(arrays({"w": 300, "b": 2, "e": 0}, 1), params)
    opt.save(path, params)
    with safetensors.safe_open(path, "numpy") as file:
        hashes = json.loads(file.metadata()["gradstep.sha256"])
        assert hashes == {key: hashlib.sha256(file.get_tensor(key).tobytes()).hexdigest() for key in hashes}


def test_a_file_of_other_software_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    opt = gs.Adam(0.1)
    for load in (gs.load, opt.load):
        with pytest.raises(gs.CheckpointError, match="no checkpoint"):
            load(path)
    assert gs.latest(tmp_path) is None


def test_rewritten_by_safetensors_with_its_metadata_it_is_still_the_checkpoint(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    opt, params = gs.Adam(0.1), arrays({"w": 5, "b": 2}, 0)
    opt.apply_gradients(arrays({"w": 5, "b": 2}, 1), params)
    opt.save(path, params)
    with safetensors.safe_open(path, "numpy") as file:
        safetensors.numpy.save_file(safetensors.numpy.load_file(path), other, file.metadata())
    assert everything(gs.load(other, rules=RULES, functions=FUNCTIONS)) == everything(opt)
