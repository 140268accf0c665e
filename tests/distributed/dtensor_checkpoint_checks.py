"""As a script, in one of several processes: checkpoints of DTensors, written on some placements and read on others."""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dtensor_checks import Net, assert_same, local, models, spread, tensors
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import gradstep as gs

Make = Callable[[], gs.Optimizer]
Tree = dict[str, Any]

SHAPES = {"large": (36, 1024), "odd": (7, 3), "vector": (5,), "row": (1, 4), "empty": (0, 3), "plain": (4, 3)}
MATRICES = {"wide": (12, 33), "tall": (41, 8), "deep": (3, 6, 5), "vector": (50,), "plain": (4, 3)}
BLOCKS = {"large": (36, 1024), "flat": (2048,), "plain": (4, 3)}  # shards of rows begin at multiples of 256
MAKERS: dict[str, Make] = {
    "Adam": lambda: gs.AdamW(gs.cosine_decay(0.1, 9), bias_correction=True),
    "int8": lambda: gs.Adam(0.1, slot_dtype="int8", rounding="stochastic"),
    "Adafactor": lambda: gs.MultiOptimizer([gs.Adam(0.1), gs.Adafactor(0.01)], ["v*"]),
    "Muon": lambda: gs.Muon(0.02),
    "Net": lambda: gs.Adam(0.1),
}
NEAR = ("Adafactor", "Muon")  # products of matrices, whose sums depend on memory
WRITTEN = [
    *((name, kind) for name in ("Adam", "Adafactor", "Muon") for kind in ("rows", "columns", "square")),
    ("int8", "rows"),
    ("Net", "model"),
]
BEGUN = 2  # steps before a checkpoint


def whole_parameters(name: str, seed: object = 0) -> Tree:
    if name == "Net":
        like = {key: array.detach() for key, array in Net().named_parameters()}
        return like if seed == 0 else tensors(seed, {key: tuple(array.shape) for key, array in like.items()})
    return tensors(seed, {"int8": BLOCKS, "Adam": SHAPES}.get(name, MATRICES))


def gradients(name: str, step: int) -> Tree:
    return whole_parameters(name, step + 1)


def blank(params: Mapping[str, Any]) -> Tree:
    return {name: torch.zeros_like(array) for name, array in params.items()}


def placed_like(tree: Tree, params: Tree) -> Tree:
    return {
        name: spread({name: array}, there.device_mesh, there.placements)[name]
        if isinstance(there := params[name], DTensor)
        else array
        for name, array in tree.items()
    }


def train(opt: Any, name: str, params: Tree, step: int) -> None:
    opt.apply_gradients(placed_like(gradients(name, step), params), params)


def steps_of_one(make: Make, steps: int) -> tuple[Any, Tree]:
    """What one process has after some steps."""
    name = next(name for name, maker in MAKERS.items() if maker is make)
    opt, params = make(), whole_parameters(name)
    for step in range(steps):
        train(opt, name, params, step)
    return opt, params


def compare_with_one(name: str, opt: Any, params: Tree, one: Any, expected: Tree) -> None:
    """Whole parameters, and the state if there is an optimizer."""
    assert_same(params, expected, near=name in NEAR)
    if opt is not None:
        assert (opt.step, opt.steps) == (one.step, one.steps)
        for key, slots in one.state.items():
            assert opt.state[key].keys() == slots.keys()
            for slot, array in slots.items():
                here, there = np.asarray(opt.state[key][slot]), array.numpy()
                if name in NEAR:
                    np.testing.assert_allclose(here, there, rtol=2e-6, atol=2e-7, err_msg=slot)
                else:
                    assert here.tobytes() == there.tobytes(), (key, slot)


def sharded(name: str) -> Any:
    return gs.Sharded(MAKERS[name](), distributed.group.WORLD)


class Meshes:
    """The placements of each kind that this number of ranks has; "plain" stays a plain tensor."""

    def __init__(self) -> None:
        ranks = distributed.get_world_size()
        self.flat = init_device_mesh("cpu", (ranks,))
        self.square = init_device_mesh("cpu", (2, 2)) if ranks == 4 else self.flat
        self.models = models(ranks)

    def placed(self, name: str, kind: str, seed: object = 0) -> Tree:
        if name == "Net":
            return dict(self.models[kind].named_parameters())
        tree = whole_parameters(name, seed)
        placements: dict[str, Any] = {
            "rows": (self.flat, [Shard(0)]),
            "columns": (self.flat, [Shard(1)]),
            "square": (self.square, [Shard(0), Shard(1)]),
            "replicas": (self.square, [Replicate(), Shard(0)]),
            "copies": (self.square, [Shard(1), Replicate()]),
        }
        return {**spread(tree, *placements[kind]), "plain": tree["plain"]}


def emptied(params: Tree) -> Tree:
    with torch.no_grad():
        for array in params.values():
            local(array).zero_()
    return params


def write(folder: Path, meshes: Meshes) -> None:
    for name, kind in WRITTEN:
        opt = sharded(name)
        params = meshes.placed(name, "both" if kind == "model" else kind)
        for step in range(BEGUN):
            train(opt, name, params, step)
        opt.save(folder / f"{name}.{kind}", params)


def goes_on(path: Path, name: str, params: Tree) -> None:
    """Load, save at once what has been loaded, and take a step."""
    opt, rank = sharded(name), distributed.get_rank()
    versions = {key: local(array)._version for key, array in emptied(params).items()}
    assert opt.load(path, params) == []
    one, expected = steps_of_one(MAKERS[name], BEGUN)
    assert opt.step == one.step
    assert_same(params, expected, near=name in NEAR)
    assert all(local(array)._version > versions[key] for key, array in params.items())
    again = path.with_name(f"{path.name}.again")
    opt.save(again, params)
    if rank == 0:
        there = blank(expected)
        compare_with_one(name, gs.load(again, there), there, one, expected)
    train(opt, name, params, BEGUN)
    train(one, name, expected, BEGUN)
    assert_same(params, expected, near=name in NEAR)
    assert opt.steps.keys() <= one.steps.keys()


def read(folder: Path, meshes: Meshes) -> None:
    kinds = ["square", "replicas", "copies"] if distributed.get_world_size() == 4 else ["rows", "columns"]
    others = [] if len(kinds) == 3 else [(name, "one") for name in MAKERS]
    for number, (name, kind) in enumerate([*WRITTEN, *others]):
        if name == "Net":
            chosen = ["tp", "hsdp"] if len(kinds) == 3 else ["fsdp", "tp"]
        elif name == "int8":
            chosen = ["replicas" if len(kinds) == 3 else "rows"]
        else:
            chosen = kinds[number % len(kinds) :][:1]
        for each in chosen:
            began = time.monotonic()
            goes_on(folder / f"{name}.{kind}", name, meshes.placed(name, each))
            print(f"{name}.{kind} {each} {time.monotonic() - began:.2f}", file=sys.stderr, flush=True)
    for check in CHECKS:
        began = time.monotonic()
        check(folder, meshes)
        distributed.barrier()
        print(check.__name__, time.monotonic() - began, file=sys.stderr, flush=True)


def all_raise(body: Callable[[], object], message: str) -> None:
    """The same error on every rank."""
    with pytest.raises((gs.GradstepError, OSError), match=re.escape(message)) as caught:
        body()
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, f"{caught.type.__name__}: {caught.value}")
    assert len(set(told)) == 1, told


def what_cannot_be(folder: Path, meshes: Meshes) -> None:
    columns, rows = [Shard(1)], [Shard(0)]
    wrong = {**spread(tensors(0, BLOCKS), meshes.flat, columns), "plain": tensors(0, BLOCKS)["plain"]}
    all_raise(lambda: sharded("int8").load(folder / "int8.one", wrong), "do not follow on each other in the whole")
    params = meshes.placed("Adam", "rows")
    kept = {name: local(array).clone() for name, array in params.items()}
    opt = sharded("Adam")
    train(opt, "Adam", params, 0)
    before = {name: local(array).clone() for name, array in params.items()}
    partial = {**params, "odd": DTensor.from_local(torch.ones(7, 3), meshes.flat, [Partial()])}
    all_raise(lambda: opt.save(folder / "refused", partial), "place it as Shard(dim) or Replicate()")
    all_raise(lambda: opt.load(folder / "Adam.rows", partial), "place it as Shard(dim) or Replicate()")
    assert not (folder / "refused").exists()
    other = {**params, "odd": spread(tensors(0, {"odd": (7, 4)}), meshes.flat, rows)["odd"]}
    all_raise(lambda: opt.load(folder / "Adam.columns", other), "params['odd']")
    plain = {**params, **({"odd": torch.ones(7, 3)} if distributed.get_rank() else {})}
    all_raise(lambda: opt.load(folder / "Adam.columns", plain), "load's DTensors: ")
    all_raise(lambda: opt.save(folder / "refused", plain), "of shape (7, 3), a DTensor on rank 0")
    all_raise(lambda: opt.load(folder / "none", params), "none")
    for name, array in before.items():
        assert torch.equal(local(params[name]), array)
    assert opt.step == 1 and kept.keys() == opt.state.keys()
    train(opt, "Adam", params, 1)
    assert_same(params, steps_of_one(MAKERS["Adam"], 2)[1])


def parameters_may_be_placed_otherwise_than_their_state(folder: Path, meshes: Meshes) -> None:
    opt, params = sharded("Adam"), meshes.placed("Adam", "rows")
    for step in range(BEGUN):
        train(opt, "Adam", params, step)
    params |= {n: p.redistribute(placements=[Replicate()]) for n, p in params.items() if isinstance(p, DTensor)}
    opt.save(folder / "otherwise", params)
    goes_on(folder / "otherwise", "Adam", meshes.placed("Adam", "columns"))
    like = meshes.placed("Adam", "rows")
    assert opt.load(folder / "Adam.columns", params, like=like) == []
    one, expected = steps_of_one(MAKERS["Adam"], BEGUN)
    assert_same(params, expected)
    params = meshes.placed("Adam", "rows")
    assert opt.load(folder / "Adam.columns", params, strict=False) == []
    train(opt, "Adam", params, BEGUN)
    train(one, "Adam", expected, BEGUN)
    assert_same(params, expected)


def ranks_may_have_no_share(folder: Path, meshes: Meshes) -> None:
    few = DeviceMesh("cpu", [0])
    for name in ("Adam", "Muon"):
        params = {key: spread({key: a}, few, [Shard(0)])[key] for key, a in whole_parameters(name).items()}
        opt = sharded(name)
        assert opt.load(folder / f"{name}.columns", params) == []
        one, expected = steps_of_one(MAKERS[name], BEGUN)
        opt.save(folder / f"{name}.few", params)
        train(opt, name, params, BEGUN)
        if distributed.get_rank() == 0:
            there = blank(expected)
            compare_with_one(name, gs.load(folder / f"{name}.few", there), there, one, expected)
            train(one, name, expected, BEGUN)
            assert_same(params, expected, near=name in NEAR)


def rounds_go_on(folder: Path, meshes: Meshes) -> None:
    """Of one process, whose sum is whole; sums of several ranks are not saved."""
    path, rank = folder / "round", distributed.get_rank()
    one, expected = gs.Accumulate(MAKERS["Adam"](), every=2), whole_parameters("Adam")
    train(one, "Adam", expected, 0)
    if rank == 0:
        one.save(path, expected)
    distributed.barrier()
    params = emptied(meshes.placed("Adam", "columns"))
    opt = gs.Accumulate(sharded("Adam"), every=2)
    assert opt.load(path, params) == [] and opt.micro_step == 1
    all_raise(lambda: opt.save(folder / "refused", params), "save when opt.micro_step is 0")
    for step in (1, 2, 3):
        train(opt, "Adam", params, step)
        train(one, "Adam", expected, step)
    assert_same(params, expected)
    opt.save(path, params)
    if rank == 0:
        there = blank(expected)
        compare_with_one("Adam", gs.load(path, there), there, one, expected)


def nothing_changes_where_bytes_are_damaged(folder: Path, meshes: Meshes) -> None:
    opt, params = sharded("Adam"), meshes.placed("Adam", "rows")
    for step in range(BEGUN):
        train(opt, "Adam", params, step)
    path = folder / "damaged"
    opt.save(path, params)
    distributed.barrier()
    if distributed.get_rank() == 0:
        last = sorted((folder / "damaged.shards").iterdir(), key=lambda shard: shard.name[13:])[-1]
        content = bytearray(last.read_bytes())
        content[-1] ^= 1  # of the last rank's rows, or of a copy
        last.write_bytes(content)
    distributed.barrier()
    state = {name: {slot: a.clone() for slot, a in slots.items()} for name, slots in opt.state.items()}
    before = {name: local(array).clone() for name, array in params.items()}
    all_raise(lambda: opt.load(path, params), "are not those that were saved")
    for name, array in before.items():
        assert torch.equal(local(params[name]), array)
        assert all(torch.equal(opt.state[name][slot], a) for slot, a in state[name].items())


def state_dicts_are_shared_out(folder: Path, meshes: Meshes) -> None:
    for name in ("Adam", "Muon"):
        one, expected = steps_of_one(MAKERS[name], BEGUN)
        params = placed_like(expected, meshes.placed(name, "columns"))
        opt = sharded(name)
        assert opt.load_state_dict(one.state_dict(), like=params) == []
        train(opt, name, params, BEGUN)
        train(one, name, expected, BEGUN)
        assert_same(params, expected, near=name in NEAR)


def a_step_on_other_placements_leaves_the_state_as_it_is(folder: Path, meshes: Meshes) -> None:
    opt, params = sharded("Adam"), meshes.placed("Adam", "rows")
    for step in range(BEGUN):
        train(opt, "Adam", params, step)
    all_raise(lambda: train(opt, "Adam", meshes.placed("Adam", "columns"), BEGUN), "opt.init(params) begins anew")
    opt.save(folder / "as it is", params)
    goes_on(folder / "as it is", "Adam", meshes.placed("Adam", "columns"))


CHECKS = [
    state_dicts_are_shared_out, a_step_on_other_placements_leaves_the_state_as_it_is, what_cannot_be,
    parameters_may_be_placed_otherwise_than_their_state, ranks_may_have_no_share, rounds_go_on,
    nothing_changes_where_bytes_are_damaged,
]  # fmt: skip


def main(doing: str, folder: str) -> None:
    """Read what there is; or `write` it, and read it on other placements."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    meshes = Meshes()
    if doing == "write":
        write(Path(folder), meshes)
    read(Path(folder), meshes)
    print("checked", flush=True)
    distributed.barrier()
    os._exit(0)  # threads of the groups that meshes have made may abort a process that ends by itself


if __name__ == "__main__":
    main(*sys.argv[1:])
