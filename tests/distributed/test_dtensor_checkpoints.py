"""Checkpoints of DTensors: written on some placements and read on others, by several processes and by one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_torch
from thread_group import ThreadGroup, run_in_threads

torch = pytest.importorskip("torch")

from dtensor_checkpoint_checks import (  # noqa: E402
    BEGUN,
    MAKERS,
    WRITTEN,
    blank,
    compare_with_one,
    steps_of_one,
    train,
    whole_parameters,
)

import gradstep as gs  # noqa: E402
from gradstep.arrays.region import Region, Span, copy, make_up, regions_of  # noqa: E402
from gradstep.checkpoint import checkpoint_file, sharded_file  # noqa: E402
from gradstep.checkpoint.container import Container, write  # noqa: E402
from gradstep.checkpoint.sharded_file import DIGEST, INDEX, digest_of  # noqa: E402
from gradstep.checkpoint.tensors import HeldTensors, read_region  # noqa: E402

SCRIPT = Path(__file__).parent / "dtensor_checkpoint_checks.py"


def processes(ranks: int, doing: str, folder: Path) -> None:
    for rank in run_torch(ranks, SCRIPT, doing, str(folder)):
        assert (rank.code, rank.out) == (0, "checked\n"), rank.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two steps, each as one process writes it, and as four do on each of their placements.

    The four have gone on from each on another placement.
    """
    folder = tmp_path_factory.mktemp("dtensors")
    for name, maker in MAKERS.items():
        opt, params = steps_of_one(maker, BEGUN)
        opt.save(folder / f"{name}.one", params)
    processes(4, "write", folder)
    return folder


def written(folder: Path) -> list[Path]:
    return [folder / f"{name}.{kind}" for name, kind in WRITTEN]


def test_two_ranks_go_on_with_other_placements(folder: Path) -> None:
    processes(2, "read", folder)


def test_one_process_goes_on(folder: Path) -> None:
    for path in written(folder):
        params = blank(whole_parameters(path.stem))
        opt = gs.load(path, params)
        one, expected = steps_of_one(MAKERS[path.stem], BEGUN)
        compare_with_one(path.stem, opt, params, one, expected)
        train(opt, path.stem, params, BEGUN)
        train(one, path.stem, expected, BEGUN)
        compare_with_one(path.stem, opt, params, one, expected)


def test_what_sharded_cuts_itself_goes_on(folder: Path) -> None:
    for path in written(folder):

        def body(group: ThreadGroup, path: Path = path) -> tuple[Any, Any]:
            opt, params = gs.Sharded(MAKERS[path.stem](), group), blank(whole_parameters(path.stem))
            assert opt.load(path, params) == []
            train(opt, path.stem, params, BEGUN)
            return opt, params

        one, expected = steps_of_one(MAKERS[path.stem], BEGUN)
        train(one, path.stem, expected, BEGUN)
        for opt, params in run_in_threads(2, body):
            assert opt.steps.keys() <= one.steps.keys()
            compare_with_one(path.stem, None, params, one, expected)


def index_of(path: Path) -> dict[str, Any]:
    with Container(path) as container:
        return json.loads(container.metadata[INDEX])


def test_the_document_is_that_of_one_process_and_the_index_small(folder: Path) -> None:
    for path in written(folder):
        with checkpoint_file.opened(path) as file, checkpoint_file.opened(folder / f"{path.stem}.one") as one:
            ours, theirs = file.document.to_json(), one.document.to_json()
            assert ours == theirs
            assert {key: file.tensors.shape(key) for key in file.tensors.all_keys()} == {
                key: one.tensors.shape(key) for key in one.tensors.all_keys()
            }
    pieces = index_of(folder / "Adam.columns")["tensors"]["large"][2]
    assert [piece[:2] for piece in pieces] == [[rank, [[0, 36], [256 * rank, 256 * rank + 256]]] for rank in range(4)]
    assert len(index_of(folder / "Adam.rows")["tensors"]["plain"][2]) == 1  # copies are written once
    assert len(index_of(folder / "Adam.square")["tensors"]["large"][2]) == 4
    assert [len(piece) for piece in index_of(folder / "Adam.rows")["tensors"]["large"][2]] == [4] * 4


def test_files_are_merged(folder: Path, tmp_path: Path) -> None:
    checkpoint_file.merge(folder / "Adam.square", tmp_path / "merged")
    params = blank(whole_parameters("Adam"))
    opt = gs.load(tmp_path / "merged", params)
    compare_with_one("Adam", opt, params, *steps_of_one(MAKERS["Adam"], BEGUN))


class TestDamage:
    """Each on a checkpoint of its own."""

    @pytest.fixture
    def path(self, folder: Path, tmp_path: Path) -> Path:
        source = folder / "Adam.columns"
        (tmp_path / "Adam.columns.shards").mkdir()
        for shard in (folder / "Adam.columns.shards").iterdir():
            (tmp_path / "Adam.columns.shards" / shard.name).write_bytes(shard.read_bytes())
        (tmp_path / source.name).write_bytes(source.read_bytes())
        return tmp_path / source.name

    def change(self, path: Path, change: Callable[[Any], None]) -> None:
        """Write the index anew, with a digest that fits."""
        with Container(path) as container:
            metadata = dict(container.metadata)
        index = json.loads(metadata[INDEX])
        change(index["tensors"]["large"][2])
        metadata[INDEX] = json.dumps(index)
        metadata[DIGEST] = digest_of(metadata)
        with path.open("wb") as file:
            write(file, [], lambda _: metadata)

    def refused(self, path: Path, message: str) -> None:
        params = blank(whole_parameters("Adam"))
        with pytest.raises(gs.CheckpointError, match=message):
            gs.load(path, params)
        for array in params.values():
            assert not array.any()

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ([[0, 36], [0, 255]], "pieces that do not make up its 36864 elements"),  # one column less
            ([[0, 36], [1, 257]], "pieces that do not make up its 36864 elements"),  # one of another rank's
            ([[0, 36]], "must be a list of 2"),
            ([[0, 36], [0, 128, 900, 1028]], "no ascending ranges of an axis of length 1024"),
            ([[0, 36], [128, 256, 0, 128]], "no ascending ranges of an axis"),
            ([[0, 36], [0, 256, 300]], "no ascending ranges of an axis"),
            ([[0, 36], []], "no ascending ranges of an axis"),
            ([[0, 36], [-1, 255]], "must hold numbers of elements"),
        ],
    )
    def test_a_region_that_does_not_fit(self, path: Path, axes: Any, message: str) -> None:
        self.change(path, lambda pieces: pieces[0].__setitem__(1, axes))
        self.refused(path, message)

    def test_regions_that_are_exchanged(self, path: Path) -> None:
        """They make up the tensor, but the hashes are those of others."""

        def exchange(pieces: Any) -> None:
            pieces[0][0], pieces[1][0] = pieces[1][0], pieces[0][0]

        self.change(path, exchange)
        self.refused(path, "the bytes of its piece of tensor 'large' are not those that were saved")

    def test_bytes_of_a_region(self, path: Path) -> None:
        shard = sorted((path.parent / "Adam.columns.shards").iterdir())[0]
        with Container(shard) as container:
            start = shard.stat().st_size - max(extent.end for extent in container.tensors.values())
            at = start + container.tensors["large"].begin + 5
        content = bytearray(shard.read_bytes())
        content[at] ^= 1
        shard.write_bytes(content)
        self.refused(path, "the bytes of its piece of tensor 'large' are not those that were saved")


class TestRegions:
    @pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 6), (4, 3, 2), (3, 1, 4)])
    def test_a_span_is_a_few_regions(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        numbers = np.arange(size).reshape(shape)
        for start in range(size + 1):
            for stop in range(start, size + 1):
                regions = regions_of(Span(start, stop), shape)
                assert len(regions) <= max(2 * len(shape) - 1, 1)
                picked = [int(n) for region in regions for n in np.asarray(numbers[region.picked]).reshape(-1)]
                assert picked == list(range(start, stop))

    def test_any_part_is_read_of_any_parts(self) -> None:
        """Random parts against NumPy's own picking."""
        rng, shape = np.random.default_rng(0), (6, 5, 4)
        numbers = np.arange(120, dtype=np.int64).reshape(shape)

        def some() -> Any:
            if rng.integers(2):
                return Span(*sorted(rng.integers(0, 121, 2).tolist()))
            axes: list[Any] = []
            for length in shape:
                ends = sorted(rng.choice(length + 1, 2 * int(rng.integers(1, 3)), replace=False).tolist())
                axes.append(tuple(zip(ends[::2], ends[1::2], strict=True)))
            return Region(shape, tuple(axes))

        def elements(where: Any) -> Any:
            regions = regions_of(where, shape)
            return np.concatenate([np.zeros(0, np.int64), *(numbers[r.picked].reshape(-1) for r in regions)])

        for _ in range(300):
            source, target = some(), some()
            wanted = elements(target)
            room = np.full(wanted.size, -1)
            copy(elements(source), regions_of(source, shape), room, regions_of(target, shape))
            assert room.tolist() == [n if n in set(elements(source).tolist()) else -1 for n in wanted.tolist()]

    def test_parts_make_up_a_whole_once(self) -> None:
        left, right = Region((4, 6), (((0, 4),), ((0, 3),))), Region((4, 6), (((0, 4),), ((3, 6),)))
        odd, even = (Region((4, 6), (((0, 4),), runs)) for runs in (((1, 2), (3, 4)), ((0, 1), (2, 3))))
        assert make_up((4, 6), [left, right])
        assert make_up((4, 6), [odd, even, Region((4, 6), (((0, 4),), ((4, 6),)))])
        assert make_up((4, 6), [Region((4, 6), (((0, 2),), ((0, 3),))), right._replace(axes=(((0, 2),), ((3, 6),))),
                                Span(12, 15), Span(15, 24)])  # fmt: skip
        assert not make_up((4, 6), [left])
        assert not make_up((4, 6), [left, left])
        assert not make_up((4, 6), [left, Span(0, 12)])
        assert make_up((0, 3), [Span(0, 0)]) and make_up((), [Span(0, 1)])

    def test_a_grid_that_is_too_large_to_look_at_is_refused(self) -> None:
        shape = (60,) * 5
        every = tuple((n, n + 1) for n in range(0, 60, 2))
        other = tuple((n, n + 1) for n in range(1, 60, 2))
        halves = [Region(shape, (runs, *(((0, 60),) for _ in range(4)))) for runs in (every, other)]
        assert make_up(shape, halves)
        fine = [half._replace(axes=(half.axes[0], *[every + other] * 4)) for half in halves]
        assert not make_up(shape, fine)

    def test_arrays_of_a_state_dict(self) -> None:
        array = np.arange(24, dtype=np.float32).reshape(4, 6)
        region = Region((4, 6), (((1, 3),), ((0, 1), (4, 6))))
        found = read_region(HeldTensors({"w": array}), "w", region)
        assert found.bits.tolist() == array[1:3][:, [0, 4, 5]].tolist()


def test_each_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch = Container.fetch

    def counted(self: Container, key: str, *rest: Any) -> str:
        fetched.append(key)
        return fetch(self, key, *rest)

    monkeypatch.setattr(sharded_file.Container, "fetch", counted)
    region = Region((36, 1024), (((0, 36),), ((0, 10), (300, 400))))  # of two of the four pieces
    with checkpoint_file.opened(folder / "Adam.columns") as file:
        found = read_region(file.tensors, "large", region).bits
    assert fetched == ["large"] * 2
    expected = steps_of_one(MAKERS["Adam"], BEGUN)[1]["large"]
    assert np.array_equal(found, expected.numpy()[region.picked].view(found.dtype))
