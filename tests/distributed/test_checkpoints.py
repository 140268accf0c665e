"""Checkpoints of several ranks: written by each, one from the moment its index is there, loaded by any number."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from processes import run_torch
from thread_group import ThreadGroup, group_of_one, run_in_threads

import gradstep as gs
from families import assert_same_bits
from gradstep.checkpoint import checkpoint_file, files, shards
from gradstep.checkpoint.container import Container, write
from gradstep.checkpoint.restore import Restoration
from gradstep.checkpoint.sharded_file import DIGEST, INDEX, digest_of
from gradstep.distributed import saving

SHAPES = {"large": (300, 333), "odd": (70_001,), "scalar": (), "empty": (0, 3), "small": (3, 1), "matrix": (24, 40)}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Make = Callable[[], gs.Optimizer]


def arrays(dtype: Any = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def gradients(step: int, dtype: Any = "float32") -> dict[str, Any]:
    """Multiples of 1/4, of which any number of ranks has the average."""
    rng = np.random.default_rng(step)
    return {name: np.asarray(rng.integers(-8, 9, shape) / 4, dtype) for name, shape in SHAPES.items()}


def train(opt: Any, params: Any, first: int, last: int, dtype: Any = "float32") -> None:
    for step in range(first, last):
        opt.apply_gradients(gradients(step, dtype), params)


def blank(dtype: Any = "float32") -> dict[str, Any]:
    return {name: np.zeros_like(array) for name, array in arrays(dtype).items()}


def saved(path: Path, ranks: int = 3, make: Make | None = None) -> Path:
    """A checkpoint of two steps of several ranks."""

    def body(group: ThreadGroup) -> None:
        opt, params = gs.Sharded((make or (lambda: gs.Adam(0.1)))(), group), arrays()
        train(opt, params, 0, 2)
        opt.save(path, params)

    run_in_threads(ranks, body)
    return path


def shard_names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "run.safetensors.shards").iterdir()}


def all_raise(ranks: int, body: Callable[[ThreadGroup], object]) -> list[BaseException]:
    """What each rank raises."""

    def raised(group: ThreadGroup) -> BaseException:
        with pytest.raises((gs.GradstepError, OSError)) as caught:
            body(group)
        return caught.value

    return run_in_threads(ranks, raised)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


@pytest.fixture
def alone_in_group() -> ThreadGroup:
    return group_of_one()


MAKERS: dict[str, tuple[Make, Any]] = {
    "a schedule, clipping": (lambda: gs.AdamW(gs.cosine_decay(0.1, 9), clip_norm=1.0, bias_correction=True), "float32"),
    "8 bits": (lambda: gs.Adam(0.1, slot_dtype="int8", rounding="stochastic"), "float32"),
    "narrow": (lambda: gs.Lion(0.01, rounding="stochastic"), BFLOAT16),
    "masters": (lambda: gs.AdamW(0.01, master_weights=True, slot_dtype={"m": "bfloat16"}), BFLOAT16),
    "float64": (lambda: gs.AdaDelta(0.5), "float64"),
    "no slots": (lambda: gs.SGD(0.1), "float32"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "dtype"), MAKERS.values(), ids=MAKERS)
def test_any_number_of_ranks_goes_on_bit_for_bit(make: Make, dtype: Any, path: Path) -> None:
    one, expected = make(), arrays(dtype)
    train(one, expected, 0, 5, dtype)

    def begin(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(make(), group), arrays(dtype)
        train(opt, params, 0, 1, dtype)
        opt.save(path, params)

    run_in_threads(4, begin)
    for step, ranks in enumerate((3, 1, 2), start=1):

        def go_on(group: ThreadGroup, step: int = step) -> tuple[Any, Any]:
            opt, params = gs.Sharded(make(), group), blank(dtype)
            assert opt.load(path, params) == []
            assert opt.step == step
            train(opt, params, step, step + 1, dtype)
            opt.save(path, params)
            return opt, params

        run_in_threads(ranks, go_on)
    params = blank(dtype)
    opt = gs.load(path, params)  # one process, and no group
    train(opt, params, 4, 5, dtype)
    assert (opt.step, opt.steps) == (one.step, one.steps)
    for name in SHAPES:
        assert_same_bits(params[name], expected[name])
        for slot, array in one.state[name].items():
            assert_same_bits(opt.state[name][slot], array)


def test_matrices_and_several_optimizers_move_to_other_owners(path: Path) -> None:
    def make() -> gs.Optimizer:
        return gs.MultiOptimizer([gs.Muon(0.02), gs.Adafactor(0.01), gs.Adam(0.1)], ["matrix", "large"])

    one, expected = make(), arrays()
    train(one, expected, 0, 4)
    saved(path, 2, make)

    def go_on(group: ThreadGroup) -> tuple[Any, Any]:
        opt, params = gs.Sharded(make(), group), blank()
        opt.load(path, params)
        train(opt, params, 2, 4)
        return opt, params

    ranks = run_in_threads(3, go_on)
    owned = [set(opt.state) for opt, _ in ranks]
    assert sum("matrix" in names for names in owned) == sum("large" in names for names in owned) == 1
    for _, params in ranks:
        for name in SHAPES:
            np.testing.assert_allclose(params[name], expected[name], rtol=2e-6, atol=2e-6)


def test_one_process_and_many_read_each_other(path: Path) -> None:
    one, expected = gs.Adam(0.1), arrays()
    train(one, expected, 0, 2)
    one.save(path, expected)

    def go_on(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.Adam(0.3), group), blank()
        opt.load(path, params)
        assert opt.learning_rate == 0.1
        train(opt, params, 2, 3)
        opt.save(path, params)

    run_in_threads(2, go_on)
    train(one, expected, 2, 3)
    other, params = gs.Adam(0.1), blank()
    other.load(path, params)
    for name in SHAPES:
        assert_same_bits(params[name], expected[name])
        assert_same_bits(other.state[name]["v"], one.state[name]["v"])
    torch_params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    loaded = gs.load(path, torch_params)
    assert_same_bits(loaded.state["odd"]["m"].numpy(), one.state["odd"]["m"])


def test_state_without_parameters_and_parameters_without_state(path: Path) -> None:
    def body(group: ThreadGroup) -> Any:
        opt, params = gs.Sharded(gs.SGD(0.1, momentum=0.9, frozen=["small"]), group), arrays()
        counter = np.arange(5) + 7
        opt.apply_gradients({"odd": gradients(0)["odd"]}, params)
        opt.save(path, {**params, "counter": counter})
        train(opt, params, 1, 2)
        again, copies = (
            gs.Sharded(gs.SGD(0.1, momentum=0.9, frozen=["small"]), group),
            {**blank(), "counter": counter * 0},
        )
        again.load(path, copies)
        assert copies.pop("counter").tolist() == counter.tolist()
        train(again, copies, 1, 2)
        opt.save(path)
        with pytest.raises(gs.MismatchError, match="they were not saved"):
            again.load(path, copies)
        again.load(path, like=copies)
        train(again, copies, 2, 3)
        train(opt, params, 2, 3)
        return params, copies

    for params, copies in run_in_threads(2, body):
        for name in SHAPES:
            assert_same_bits(copies[name], params[name])


def test_what_nobody_steps_is_that_of_rank_0_and_order_does_not_matter(path: Path) -> None:
    def body(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.SGD(0.1), group), arrays()
        train(opt, params, 0, 1)
        own = {"mean": np.full(4, group.rank, np.float32), "x\\ud800": np.ones(2), "x\ud800": np.zeros(2)}
        opt.save(path, dict(sorted({**params, **own}.items(), reverse=bool(group.rank))))

    run_in_threads(3, body)
    found = {**blank(), "mean": np.ones(4, np.float32), "x\\ud800": np.zeros(2), "x\ud800": np.ones(2)}
    gs.load(path, found)
    assert found["mean"].tolist() == [0] * 4
    assert (found["x\\ud800"].tolist(), found["x\ud800"].tolist()) == ([1, 1], [0, 0])


def test_layouts_and_tensors_of_torch(path: Path) -> None:
    shape = (2, 8, 6, 5)

    def tensors_of(value: float) -> dict[str, Any]:
        image = torch.full(shape, value).to(memory_format=torch.channels_last)
        return {"image": image, "long": torch.full((50_000,), value)}

    def grads(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {"image": torch.rand(shape, generator=generator), "long": torch.rand(50_000, generator=generator)}

    def body(group: ThreadGroup) -> Any:
        opt, params = gs.Sharded(gs.Adam(0.1), group), tensors_of(1.0)
        opt.apply_gradients(grads(0), params)
        opt.save(path, params)
        again, copies = gs.Sharded(gs.Adam(0.1), group), tensors_of(0.0)
        again.load(path, copies)
        assert copies["image"].is_contiguous(memory_format=torch.channels_last)
        for some, others in ((opt, params), (again, copies)):
            some.apply_gradients(grads(1), others)
        return params, copies

    for params, copies in run_in_threads(2, body):
        for name in params:
            assert torch.equal(params[name], copies[name])


def test_micro_batches_are_saved_between_rounds(path: Path) -> None:
    def make(group: ThreadGroup) -> Any:
        return gs.Accumulate(gs.Sharded(gs.Adam(0.1), group), every=2)

    def body(group: ThreadGroup) -> Any:
        opt, params = make(group), arrays()
        train(opt, params, 0, 3)
        with pytest.raises(gs.ConfigurationError, match=r"1 of 2 micro-batches have come, .* save when opt.micro_step"):
            opt.save(path, params)
        train(opt, params, 3, 4)
        opt.save(path, params)
        again, copies = make(group), blank()
        again.load(path, copies)
        train(again, copies, 4, 6)
        train(opt, params, 4, 6)
        return opt, again, params, copies

    for opt, again, params, copies in run_in_threads(2, body):
        assert opt.step == again.step == 3
        for name in SHAPES:
            assert_same_bits(copies[name], params[name])


def test_a_state_dict_of_one_process_is_shared_out() -> None:
    one, expected = gs.Adam(0.1), arrays()
    train(one, expected, 0, 1)
    state = copy.deepcopy(one.state_dict())

    def body(group: ThreadGroup) -> Any:
        opt, params = gs.Sharded(gs.Adam(0.5), group), {name: array.copy() for name, array in expected.items()}
        opt.load_state_dict(state, like=params)
        train(opt, params, 1, 2)
        return params

    ranks = run_in_threads(3, body)
    train(one, expected, 1, 2)
    for params in ranks:
        for name in SHAPES:
            assert_same_bits(params[name], expected[name])


def test_a_rank_holds_its_share_and_no_more(path: Path) -> None:
    """Four ranks in one process together have one state, and a buffer for each, whoever saved it in what parts."""
    size, ranks, buffer = 256 * 32768, 4, 4 << 20

    def save(group: ThreadGroup) -> None:
        opt = gs.Sharded(gs.Adam(0.1), group)
        opt.apply_gradients({"w": grads}, params)
        group.gather(np.zeros(1))
        tracemalloc.reset_peak()
        opt.save(path)
        group.gather(np.zeros(1))

    def load(group: ThreadGroup) -> Any:
        opt = gs.Sharded(gs.Adam(0.1), group)
        opt.load(path, like=params)
        return opt

    params, grads = {"w": np.ones(size, np.float32)}, np.ones(size, np.float32)
    tracemalloc.start()
    try:
        run_in_threads(1, save)  # so that no two write to one array
        assert (
            tracemalloc.get_traced_memory()[1] < 8 * size + 4 * size + 32 * buffer
        )  # with averaged gradients, buckets
        tracemalloc.stop()
        tracemalloc.start()
        loaded = run_in_threads(ranks, load)
        assert tracemalloc.get_traced_memory()[1] < 8 * size + ranks * 2 * buffer
    finally:
        tracemalloc.stop()
    assert [sum(a.nbytes for slots in opt.state.values() for a in slots.values()) for opt in loaded] == [2 * size] * 4


# All or nothing


@pytest.mark.parametrize("where", ["a shard", "the index"])
def test_a_disk_that_fails_leaves_the_old_checkpoint(where: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(path)
    before, names = path.read_bytes(), shard_names(path.parent)

    def failing(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.Adam(0.1), group), blank()
        opt.load(path, params)
        opt.save(path, params)

    names_of: dict[int, Path] = {}

    def named(name: Any, original: Any = files.create_held) -> Any:
        file, place = original(name)
        names_of[file.fileno()] = place
        return file, place

    def full(file: Any, found: Any, metadata: Any, original: Any = write) -> None:
        original(file, found, metadata)
        if ("00002-of" in names_of[file.fileno()].name) if where == "a shard" else not found:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "create_held", named)
    monkeypatch.setattr(files, "create_held", named)
    monkeypatch.setattr(shards, "write", full)
    monkeypatch.setattr(checkpoint_file, "write", full)
    found = all_raise(3, failing)
    rank = 1 if where == "a shard" else 0
    assert {(type(e), str(e)) for e in found} == {(OSError, f"rank {rank}: [Errno 28] No space left on device")}
    assert (path.read_bytes(), shard_names(path.parent)) == (before, names)
    checkpoint_file.verify(path)


@pytest.mark.parametrize("when", ["before it has its place", "when it has its place"])
def test_an_index_that_fails(when: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the index's place afterwards has all its shards."""
    saved(path)
    name = "_rename" if when == "before it has its place" else "sync_folder"
    original = getattr(files, name)

    def failing(place: Any, *rest: Any) -> None:
        if name == "_rename" or threading.current_thread() is commits[0]:
            raise OSError(5, "Input/output error")
        original(place, *rest)

    commits: list[threading.Thread] = []

    def commit(*given: Any, original: Any = saving.save_index) -> None:
        commits.append(threading.current_thread())
        original(*given)

    def body(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.Adam(0.1), group), blank()
        opt.load(path, params)
        train(opt, params, 2, 3)
        opt.save(path, params)

    monkeypatch.setattr(files, name, failing)
    monkeypatch.setattr(saving, "save_index", commit)
    assert {str(error) for error in all_raise(3, body)} == {"rank 0: [Errno 5] Input/output error"}
    checkpoint_file.verify(path)
    assert gs.load(path, blank()).step == (2 if name == "_rename" else 3)
    if name == "_rename":
        assert len(shard_names(path.parent)) == 3


def test_a_load_that_fails_on_one_rank_when_others_have_changed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(path)

    def body(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.Adam(0.1), group), arrays()
        ranks[threading.get_ident()] = group.rank
        train(opt, params, 0, 1)
        with pytest.raises(OSError, match="rank 1: gone"):
            opt.load(path, params)
        for again in (lambda: train(opt, params, 1, 2), lambda: opt.save(path)):
            with pytest.raises(gs.ConfigurationError, match="the last load failed on one of the ranks when others had"):
                again()
        monkeypatch.undo()
        group.gather(np.zeros(1))
        opt.load(path, params)
        train(opt, params, 2, 3)
        assert opt.step == 3

    def failing(keys: Any, *rest: Any, original: Any = Restoration.__new__) -> Any:
        found = original(keys, *rest)
        return found._replace(adopt=broken) if ranks[threading.get_ident()] == 1 else found

    def broken() -> None:
        raise OSError("gone")

    ranks: dict[int, int] = {}
    monkeypatch.setattr(Restoration, "__new__", failing)
    run_in_threads(2, body)


DYING = """
import os, signal, sys
import numpy as np
import torch
import gradstep as gs
from gradstep.checkpoint import checkpoint_file, shards
from gradstep.distributed import saving

path, moment = sys.argv[1:]
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
opt, params = gs.Sharded(gs.Adam(0.1), torch.distributed.group.WORLD), {"w": np.zeros(100_000, np.float32)}
grads = {"w": np.ones(100_000, np.float32)}
opt.apply_gradients(grads, params)
opt.save(path, params)
opt.apply_gradients(grads, params)


def dying(function, after):
    def wrapped(*given):
        found = function(*given) if after else None
        os.kill(os.getpid(), signal.SIGKILL)
        return found
    return wrapped


if moment == "shard" and rank == 1:
    shards.write = dying(shards.write, True)
if moment == "before" and rank == 0:
    saving.save_index = dying(saving.save_index, False)
if moment == "after" and rank == 0:
    saving.save_index = dying(saving.save_index, True)
try:
    opt.save(path, params)
except gs.CommunicationError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(("moment", "victim", "step"), [("shard", 1, 1), ("before", 0, 1), ("after", 0, 2)])
def test_a_rank_that_is_killed_while_saving(moment: str, victim: int, step: int, path: Path) -> None:
    ended = run_torch(2, DYING, str(path), moment)
    assert ended[victim].code == -9
    assert ended[1 - victim].code == 0, ended[1 - victim].err
    assert "another rank is dead, silent or does something else" in ended[1 - victim].out
    params = {"w": np.zeros(100_000, np.float32)}
    opt = gs.load(path, params)
    one, expected = gs.Adam(0.1), {"w": np.zeros(100_000, np.float32)}
    for _ in range(step):
        one.apply_gradients({"w": np.ones(100_000, np.float32)}, expected)
    assert opt.step == step
    assert_same_bits(params["w"], expected["w"])
    assert_same_bits(opt.state["w"]["v"], one.state["w"]["v"])

    def go_on(group: ThreadGroup) -> None:
        again = gs.Sharded(gs.Adam(0.1), group)
        again.load(path, params)
        again.save(path, params)

    run_in_threads(1, go_on)
    assert len(shard_names(path.parent)) == 1  # what the dead have left is gone


KILLED = """
import os, random, signal, sys, threading
import torch
from test_checkpoints import arrays, gradients
import gradstep as gs

path, victim, after = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
opt, params = gs.Sharded(gs.Adam(0.01), torch.distributed.group.WORLD), arrays()
if rank == victim:
    timer = threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
try:
    while True:
        opt.apply_gradients(gradients(opt.step), params)
        if opt.step % 3 == 0:
            opt.save(path, params, keep=2)
        if opt.step == 3 and rank == victim:
            timer.start()
except gs.CommunicationError as error:
    print(f"{opt.step}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_killed_at_random(seed: int, path: Path) -> None:
    """The survivors report it, and another number of ranks goes on with the bits of a run that nobody disturbed."""
    rng = random.Random(seed)
    ranks, after = 2 + seed % 2, rng.uniform(0, 0.4)
    victim = rng.randrange(ranks)
    ended = run_torch(ranks, KILLED, str(path), str(victim), str(after))
    told = [rank for number, rank in enumerate(ended) if number != victim]
    assert ended[victim].code == -9
    assert [(rank.code, "another rank is dead, silent or does" in rank.out) for rank in told] == [(0, True)] * len(told)
    last = max(int(rank.out.partition(":")[0]) for rank in told)
    found = gs.latest(path.parent)
    assert found == path

    def go_on(group: ThreadGroup) -> tuple[int, int, Any]:
        opt, params = gs.Sharded(gs.Adam(0.01), group), blank()
        opt.load(found, params)
        begun = opt.step
        train(opt, params, begun, begun + 2)
        return begun, opt.step, params

    one, expected = gs.Adam(0.01), arrays()
    for begun, step, params in run_in_threads(5 - ranks, go_on):
        assert last - 4 <= begun <= last + 1
        train(one, expected, one.step, step)
        for name in SHAPES:
            assert_same_bits(params[name], expected[name])


def test_shards_live_as_long_as_an_index_names_them(path: Path) -> None:
    folder = path.parent

    def body(group: ThreadGroup) -> None:
        opt, params = gs.Sharded(gs.SGD(0.1, momentum=0.9), group), arrays()
        for step in range(4):
            train(opt, params, step, step + 1)
            opt.save(path, params, keep=2)
            if group.rank == 0 and step == 1:
                shutil.copy(path, folder / "best.safetensors")
            group.gather(np.zeros(1))

    run_in_threads(2, body)
    assert {p.name for p in folder.iterdir()} == {
        "run.safetensors",
        "run.1.safetensors",
        "best.safetensors",
        "run.safetensors.shards",
    }
    assert len(shard_names(folder)) == 6
    assert [gs.load(folder / name, blank()).step for name in ("best.safetensors", "run.1.safetensors", path)] == [
        2,
        3,
        4,
    ]
    held = folder / "run.safetensors.shards" / "0123456789ab-00001-of-00001.safetensors"
    ours = held.with_name("somebody's.safetensors")
    with held.open("wb") as file:
        files.claim(file)
        ours.touch()
        (folder / "best.safetensors").unlink()
        shards.cleaning(path)(path)
        assert len(shard_names(folder)) == 4 + 2
    shards.cleaning(path)(path)
    assert len(shard_names(folder)) == 4 + 1
    assert ours.exists()


@pytest.mark.parametrize(
    ("first", "second"), [("step.100", "step.200"), ("run.ckpt", "run.safetensors"), ("a.[bc]", "a.b")]
)
def test_names_that_look_alike_do_not_share_shards(first: str, second: str, path: Path) -> None:
    for name in (first, second, second):
        saved(path.with_name(name))
    shutil.copy(path.with_name(second), path.with_name(f"{second}.best"))
    saved(path.with_name(second))
    for name in (first, second, f"{second}.best"):
        checkpoint_file.verify(path.with_name(name))


def test_an_index_that_cannot_be_read_keeps_all_shards(path: Path) -> None:
    saved(path, 1)
    content = bytearray(path.read_bytes())
    content[content.index(b"shards")] ^= 1
    path.with_name("best.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=r"left there: 'best.safetensors' cannot be read and may name them"):
        saved(path, 1)
    assert len(shard_names(path.parent)) == 2
    path.with_name("best.safetensors").unlink()
    saved(path, 1)
    assert len(shard_names(path.parent)) == 1


def test_a_folder_that_is_a_link_is_not_cleaned(path: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "run.safetensors.shards").symlink_to(tmp_path / "big")
    for _ in range(2):
        saved(path, 1)
    assert len([*(tmp_path / "big").iterdir()]) == 2
    checkpoint_file.verify(path)


def test_a_file_in_the_place_of_an_index_takes_its_shards_away(path: Path) -> None:
    saved(path)
    gs.Adam(0.1).save(path)
    assert not (path.parent / "run.safetensors.shards").exists()
    assert gs.load(path).step == 0


def test_shards_are_as_open_to_others_as_their_index(path: Path) -> None:
    saved(path)
    path.chmod(0o600)
    saved(path)
    assert {p.stat().st_mode & 0o777 for p in [path, *(path.parent / "run.safetensors.shards").iterdir()]} == {0o600}


def test_a_file_system_without_locks_keeps_no_old_shards(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "claim", lambda file: None)
    saved(path)
    first = shard_names(path.parent)
    saved(path)
    assert len(shard_names(path.parent)) == 3
    assert not first & shard_names(path.parent)


def test_latest_finds_an_index_that_is_whole(path: Path) -> None:
    saved(path)
    older = saved(path.with_name("older.safetensors"))
    os.utime(older, (1, 1))
    assert gs.latest(path.parent) == path
    next((path.parent / "run.safetensors.shards").glob("*00002*")).unlink()
    with pytest.warns(UserWarning, match=r"run.safetensors was left out: .* is missing; an index and the folder"):
        assert gs.latest(path.parent) == older


# What ranks do not have in common, and what does not fit


class TestWhatIsRefused:
    def test_other_parameters_on_one_rank(self, path: Path) -> None:
        def body(group: ThreadGroup) -> None:
            opt, params = gs.Sharded(gs.Adam(0.1), group), arrays()
            train(opt, params, 0, 1)
            opt.save(path, {**params, "extra": np.zeros(group.rank + 1)})

        (error,) = {str(error) for error in all_raise(2, body)}
        assert error.startswith("params['extra']: float64 of shape (1,) on rank 0, but float64 of shape (2,) on rank 1")
        assert not path.exists()

    def test_a_file_for_each_rank(self, path: Path) -> None:
        def body(group: ThreadGroup) -> None:
            gs.Sharded(gs.Adam(0.1), group).save(path.with_name(f"{group.rank}.safetensors"))

        (error,) = {str(error) for error in all_raise(2, body)}
        assert error.startswith("the name of the file: '0.safetensors' on rank 0, but '1.safetensors' on rank 1")

    def test_folders_that_are_not_shared(self, path: Path) -> None:
        def body(group: ThreadGroup) -> None:
            folder = path.parent / str(group.rank)
            folder.mkdir()
            gs.Sharded(gs.Adam(0.1), group).save(folder / "run.safetensors")

        (error,) = {str(error) for error in all_raise(2, body)}
        assert "does not exist; all ranks must save into the same folder, on a disk that they share" in error
        assert not [*path.parent.rglob("*.safetensors")]

    def test_a_folder_that_does_not_exist(self, path: Path) -> None:
        found = all_raise(2, lambda group: gs.Sharded(gs.Adam(0.1), group).save(path.parent / "no" / "run.safetensors"))
        assert {type(error) for error in found} == {FileNotFoundError}
        assert "there is no such folder to save into" in str(found[0])

    def test_another_rate_on_one_rank(self, path: Path) -> None:
        found = all_raise(2, lambda group: gs.Sharded(gs.Adam(0.1 + group.rank), group).save(path))
        assert {str(e)[:70] for e in found} == {
            "opt.hyperparameters.learning_rate: 0.1 on rank 0, but 1.1 on rank 1; t"
        }

    def test_init_on_one_rank(self, path: Path) -> None:
        def body(group: ThreadGroup) -> None:
            opt, params = gs.Sharded(gs.Adam(0.1), group), arrays()
            train(opt, params, 0, 1)
            if group.rank:
                opt.init(params)
            opt.save(path)

        assert {str(error)[:60] for error in all_raise(2, body)} == {
            "how often init was called: 0 on rank 0, but 1 on rank 1; the"
        }

    @pytest.mark.parametrize("wrong", [{"strict": "x"}, {"hyperparameters": "yours"}])
    def test_arguments_that_cannot_be_on_one_rank(self, wrong: Any, path: Path) -> None:
        saved(path)

        def body(group: ThreadGroup) -> None:
            gs.Sharded(gs.Adam(0.1), group).load(path, blank(), **(wrong if group.rank else {}))

        (error,) = {str(error) for error in all_raise(2, body)}
        assert error.startswith("rank 1: ")
        assert "must be" in error

    def test_loading_without_parameters(self, path: Path) -> None:
        saved(path)
        (error,) = {str(e) for e in all_raise(2, lambda group: gs.Sharded(gs.Adam(0.1), group).load(path))}
        assert "pass params to overwrite them too, or like=params" in error

    def test_another_optimizer(self, path: Path) -> None:
        saved(path)
        found = all_raise(2, lambda group: gs.Sharded(gs.Lion(0.1), group).load(path, blank()))
        for error in found:
            assert isinstance(error, gs.MismatchError)
            assert [tuple(d) for d in error.differences] == [("different", "opt", "Adam", "Lion")]

    def test_what_fits_is_taken_if_asked(self, path: Path) -> None:
        saved(path)

        def body(group: ThreadGroup) -> Any:
            opt, params = gs.Sharded(gs.Adam(0.1), group), {**blank(), "new": np.zeros(40_000, np.float32)}
            del params["small"]
            found = opt.load(path, params, strict=False)
            opt.apply_gradients({n: np.ones_like(a) for n, a in params.items()}, params)
            return [(d.kind, d.where) for d in found], opt.steps

        for found, steps in run_in_threads(2, body):
            assert ("unexpected", "state['small']") in found
            assert ("missing", "params['new']") in found
            assert {steps[name] for name in steps if name != "new"} == {3}
            assert steps.get("new", 1) == 1

    def test_parameters_that_differ_after_loading(self, path: Path) -> None:
        saved(path)

        def body(group: ThreadGroup) -> None:
            opt, params = gs.Sharded(gs.Adam(0.1), group), arrays()
            params["small"] += group.rank
            opt.load(path, like=params)
            train(opt, params, 2, 3)

        (error,) = {str(error) for error in all_raise(2, body)}
        assert error.startswith("the values of params['small'] by their CRC-32")

    def test_another_file_on_one_rank(self, path: Path) -> None:
        """Of two runs that differ in nothing but their gradients."""

        def save(group: ThreadGroup) -> None:
            opt, params = gs.Sharded(gs.Adam(0.1), group), arrays()
            for first in (5, 6):
                opt.apply_gradients(gradients(first), params)
            opt.save(path.with_name("other.safetensors"), params)

        saved(path)
        run_in_threads(3, save)

        def body(group: ThreadGroup) -> None:
            one = path if group.rank else path.with_name("other.safetensors")
            gs.Sharded(gs.Adam(0.1), group).load(one, blank())

        assert {str(error)[:31] for error in all_raise(2, body)} == {"the checkpoint, by its digest: "}

    def test_copies_and_state_dicts(self, alone_in_group: ThreadGroup) -> None:
        opt = gs.Sharded(gs.Adam(0.1), alone_in_group)
        for whole in (opt, gs.Accumulate(opt, every=2)):
            with pytest.raises(
                gs.ConfigurationError, match=r"no one of them has a state dict; .* opt.save\(path, params"
            ):
                whole.state_dict()
            with pytest.raises(gs.ConfigurationError, match="cannot be copied, as its group cannot; make another one"):
                copy.deepcopy(whole)


# Damage


def test_a_bit_of_a_tensor_or_of_the_index_and_an_end_that_is_missing(path: Path) -> None:
    saved(path, 2)
    rng = np.random.default_rng(0)
    for file in (path, *(path.parent / "run.safetensors.shards").iterdir()):
        whole = file.read_bytes()
        first = 8 if file == path else 8 + int.from_bytes(whole[:8], "little")
        for at in (first, len(whole) - 1, *rng.integers(first, len(whole), 20)):
            content = bytearray(whole)
            content[at] ^= 4
            file.write_bytes(content)
            with pytest.raises(gs.CheckpointError):
                checkpoint_file.verify(path)
        for length in (0, 7, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(gs.CheckpointError):
                checkpoint_file.verify(path)
        file.write_bytes(whole)
    checkpoint_file.verify(path)


def test_a_shard_is_no_checkpoint(path: Path) -> None:
    saved(path, 2)
    shard = next((path.parent / "run.safetensors.shards").glob("*00001*"))
    with pytest.raises(
        gs.CheckpointError, match=r"is shard 1 of 2 of the checkpoint run.safetensors; pass the path of"
    ):
        gs.load(shard, blank())


def _without_pieces(index: Any) -> None:
    index["tensors"]["large.m"][2] = []


def _overlapping(index: Any) -> None:
    index["tensors"]["large.m"][2][0][2] += 1


def _reordered(index: Any) -> None:
    index["tensors"]["large.m"][2].reverse()


def _elsewhere(index: Any) -> None:
    index["shards"][0][0] = "../run.safetensors.shards/" + index["shards"][0][0]


def _absolute(index: Any) -> None:
    index["shards"][0][0] = "/" + index["shards"][0][0]


def _too_many(index: Any) -> None:
    index["tensors"]["large.m"][2][0][0] = 9


def _negative(index: Any) -> None:
    index["tensors"]["large.m"][2][0][1] = -1


def _huge(index: Any) -> None:
    index["tensors"]["large.m"][1] = [1 << 70]


def _unknown(index: Any) -> None:
    index["tensors"]["large.m"][0] = "F7"


def _no_list(index: Any) -> None:
    index["tensors"] = {"odd.m": 3}


def _swapped(index: Any) -> None:
    index["tensors"]["odd.m"], index["tensors"]["large.m"] = index["tensors"]["large.m"], index["tensors"]["odd.m"]


PIECES, NUMBERS = "has pieces that do not make up its 99900 elements", "must hold numbers of elements or bytes"
TAMPERINGS = [
    (_without_pieces, PIECES), (_overlapping, PIECES), (_reordered, PIECES), (_swapped, "does not hold the piece of"),
    (_elsewhere, "names a shard where none can be"), (_absolute, "names a shard where none can be"),
    (_too_many, "names 2 shards, but has pieces of tensor 'large.m' in others"), (_negative, NUMBERS),
    (_huge, NUMBERS), (_unknown, "has the unknown dtype 'F7'"), (_no_list, "must be a list of 3"),
]  # fmt: skip


@pytest.mark.parametrize(("tamper", "message"), TAMPERINGS)
def test_an_index_that_cannot_be_is_refused(tamper: Callable[[Any], None], message: str, path: Path) -> None:
    """Written as if it were whole, with a digest that fits."""
    saved(path, 2)
    with Container(path) as container:
        metadata = dict(container.metadata)
    index = json.loads(metadata[INDEX])
    tamper(index)
    metadata[INDEX] = json.dumps(index)
    metadata[DIGEST] = digest_of(metadata)
    with path.open("wb") as file:
        write(file, [], lambda _: metadata)
    with pytest.raises(gs.CheckpointError, match=message):
        checkpoint_file.verify(path)


# The command line


def run(*arguments: Any) -> tuple[int, str, str]:
    command = [sys.executable, "-c", "import gradstep.cli; gradstep.cli.main()", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_merge_makes_the_file_of_one_process(path: Path) -> None:
    one, expected = gs.Adam(0.1), arrays()
    train(one, expected, 0, 2)
    other = path.with_name("one.safetensors")
    one.save(other, expected)
    saved(path, 3)
    merged = path.with_name("merged.safetensors")
    code, output, errors = run("merge", path, merged)
    assert (code, errors) == (0, "")
    assert f"{merged}: 18 tensors of 3 shards" in output
    assert run("diff", merged, other)[0] == run("diff", path, other)[0] == 0
    assert gs.load(merged, blank()).step == 2
    assert run("merge", path, merged)[0::2] == (
        2,
        f"error: {merged} is there already; remove it, or name another file\n",
    )


def test_inspect_reads_an_index(path: Path) -> None:
    saved(path, 3)
    code, output, _ = run("inspect", path, "--verify")
    assert code == 0
    assert " in 3 shards and this index, written by" in output
    assert "Verified: the header and 18 tensors" in output
    document = json.loads(run("inspect", path, "--json")[1])
    total = sum(file.stat().st_size for file in [path, *(path.parent / "run.safetensors.shards").iterdir()])
    assert (document["shards"], document["bytes"], document["tensors"]) == (3, total, 18)
    shard = next((path.parent / "run.safetensors.shards").glob("*00002*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, output, _ = run("inspect", path, "--verify")
    assert (code, "1 of 18 tensors" in output) == (1, True)
    shard.unlink()
    code, _, errors = run("merge", path, path.with_name("merged.safetensors"))
    assert (code, "is missing; an index and the folder run.safetensors.shards" in errors) == (2, True)
    assert not path.with_name("merged.safetensors").exists()
