"""As a script, in one of several processes: steps of DTensors against steps of whole tensors in one process."""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from thread_group import group_of_one
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import gradstep as gs
from families import ELEMENTWISE_FAMILIES, MATRIX_FAMILIES, configurations, last_of_each
from gradstep.distributed.dtensors import placed
from gradstep.distributed.placed_step import PlacedPlan

Placements = Sequence[Any]
Make = Callable[[], gs.Optimizer]
Tree = dict[str, Any]

# Lengths that no number of ranks divides, fewer rows than ranks, more than one block of elements, and none.
SHAPES = {"large": (37, 1100), "odd": (7, 3), "vector": (5,), "row": (1, 4), "empty": (0, 3), "deep": (5, 6, 7)}
STEPS = 3


def tensors(seed: Any, shapes: Mapping[str, Any] = SHAPES, dtype: Any = torch.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.standard_normal(shape)).to(dtype) for name, shape in shapes.items()}


def spread(tree: Tree, mesh: DeviceMesh, placements: Placements) -> Tree:
    """Each tensor on the mesh; an axis that it does not have is not cut."""
    return {
        name: distribute_tensor(
            array.clone(), mesh, [Replicate() if getattr(p, "dim", -1) >= array.ndim else p for p in placements]
        )
        for name, array in tree.items()
    }


def assert_same(params: Tree, expected: Tree, *, near: bool = False) -> None:
    """Every rank's shards are those of the whole tensors."""
    for name, array in expected.items():
        there = params[name]
        if not isinstance(there, DTensor):
            here, wanted = there.detach(), array
        else:
            here = there.to_local().detach()
            wanted = distribute_tensor(array.clone(), there.device_mesh, there.placements).to_local()
        if near:
            torch.testing.assert_close(here, wanted, rtol=2e-6, atol=2e-7, msg=name)
        else:
            assert here.shape == wanted.shape, name
            assert torch.equal(bits(here), bits(wanted)), (name, getattr(there, "placements", None), here, wanted)


def bits(tensor: Any) -> Any:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def run(opt: Any, params: Tree, gradient: Callable[[int], Tree], steps: int = STEPS) -> Any:
    for step in range(1, steps + 1):
        opt.apply_gradients(gradient(step), params)
    return opt


def compare(
    make: Make, mesh: DeviceMesh, placements: Placements, *, dtype: Any = torch.float32, near: bool = False,
    shapes: Mapping[str, Any] = SHAPES, gradient_placements: Placements | None = None,
) -> Any:  # fmt: skip
    """Steps of DTensors give what steps of whole tensors give; returns both optimizers."""
    params, expected = spread(tensors(0, shapes, dtype), mesh, placements), tensors(0, shapes, dtype)

    def gradient(step: int) -> Tree:
        return spread(tensors(step, shapes, dtype), mesh, gradient_placements or placements)

    ours = run(gs.Sharded(make(), distributed.group.WORLD), params, gradient)
    one = run(make(), expected, lambda step: tensors(step, shapes, dtype))
    assert_same(params, expected, near=near)
    assert ours.step == one.step == STEPS
    if one.report.grad_norm is not None:
        assert ours.report.grad_norm == pytest.approx(one.report.grad_norm, rel=1e-6)
        told: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(told, ours.report)
        assert set(told) == {ours.report}
    return ours, one


def kinds_of(mesh: DeviceMesh) -> list[Placements]:
    if mesh.ndim == 1:
        return [[Shard(0)], [Shard(1)], [Replicate()]]
    return [
        [Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(0)],
        [Replicate(), Replicate()],
    ]  # fmt: skip


def meshes(ranks: int) -> list[DeviceMesh]:
    flat = init_device_mesh("cpu", (ranks,), mesh_dim_names=("all",))
    return [flat, init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))] if ranks == 4 else [flat]


def elementwise_rules_give_the_bits_of_one_process(mesh: DeviceMesh) -> None:
    kinds, rows = kinds_of(mesh), configurations(*ELEMENTWISE_FAMILIES)
    for number, row in enumerate(rows if mesh.size() == 2 else last_of_each(rows)):
        cls, kwargs = row.values
        dtype = torch.float64 if number % 5 == 0 else torch.float32
        compare(lambda cls=cls, kwargs=kwargs: cls(**kwargs), mesh, kinds[number % len(kinds)], dtype=dtype)


def options_are_those_of_one_process(mesh: DeviceMesh) -> None:
    for number, placements in enumerate(kinds_of(mesh)):
        compare(lambda: gs.Adam(0.1, clip_norm=0.5), mesh, placements, near=True)
        compare(lambda: gs.Adam(0.1, clip_norm=0.5), mesh, placements, near=True, dtype=torch.float64)
        compare(lambda: gs.Adam(0.1, nonfinite="skip"), mesh, placements, dtype=torch.bfloat16)
        if number == 0:
            compare(lambda: gs.Adam(0.1, frozen=["o*"], slot_dtype="bfloat16"), mesh, placements)
            compare(lambda: gs.AdamW(0.1, master_weights=True), mesh, placements, dtype=torch.bfloat16)
    several = lambda: gs.MultiOptimizer(  # noqa: E731
        [gs.SGD(gs.linear_schedule(0.0, 0.1, 3), momentum=0.5), gs.Lion({"o*": 0.1, "*": 0.01})], ["large"]
    )
    compare(several, mesh, kinds_of(mesh)[0])


def storage_that_goes_by_the_order_of_elements(mesh: DeviceMesh) -> None:
    """Where shards follow on each other in the whole tensor, and for 8 bits begin at whole blocks."""
    rows = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    for dtype in (torch.bfloat16, torch.float16):
        make = lambda: gs.AdamW(0.1, rounding="stochastic", seed=3)  # noqa: E731
        compare(make, mesh, rows, dtype=dtype)
    shapes = {"large": (37, 512), "flat": (2048,), "row": (1, 300)}
    ours, one = compare(lambda: gs.Adam(0.1, slot_dtype="int8"), mesh, rows, shapes=shapes)
    start = -(-37 // mesh.shape[-1]) * 512
    if mesh.get_local_rank(mesh.ndim - 1) == 1:
        for slot, array in one.state["large"].items():
            here, there = ours.state["large"][slot].reshape(-1), array.reshape(-1)
            first = start * len(there) // (37 * 512)
            assert len(here) and torch.equal(here, there[first : first + len(here)]), slot


def refusals(mesh: DeviceMesh) -> None:
    """The same error on every rank, and nothing has changed."""
    columns = [Shard(1)] if mesh.ndim == 1 else [Shard(1), Replicate()]
    rows = [Shard(0)] if mesh.ndim == 1 else [Shard(0), Replicate()]
    rounding = lambda: gs.Adam(0.1, rounding="stochastic")  # noqa: E731
    refused(rounding, mesh, columns, "do not follow on each other", dtype=torch.bfloat16)
    refused(lambda: gs.Adam(0.1, slot_dtype="int8"), mesh, columns, "do not follow on each other")
    refused(lambda: gs.Adam(0.1, slot_dtype="int8"), mesh, rows, "must begin at a multiple of 256")

    def wrong(grads: Tree, params: Tree) -> None:
        if distributed.get_rank() == 1:
            grads["odd"] = torch.ones(2, 2)

    refused(lambda: gs.Adam(0.1), mesh, rows, "grads['odd'] has shape (2, 2), but params['odd'] has", wrong)

    def absent(grads: Tree, params: Tree) -> None:
        if distributed.get_rank() == 1:
            del grads["odd"]

    refused(lambda: gs.Adam(0.1), mesh, rows, "grads['odd']: float32, (Shard(dim=0)", absent)

    def other(grads: Tree, params: Tree) -> None:
        if distributed.get_rank() == 1:
            params["odd"] = params["odd"].to_local()
            grads["odd"] = grads["odd"].to_local()

    refused(lambda: gs.Adam(0.1), mesh, rows, "but float32, a plain tensor on rank 1", other)

    def partial(grads: Tree, params: Tree) -> None:
        placements = [Partial(), *rows[1:]]
        params["odd"] = DTensor.from_local(torch.ones(7, 3), mesh, placements)
        grads["odd"] = DTensor.from_local(torch.ones(7, 3), mesh, placements)

    refused(lambda: gs.Adam(0.1), mesh, rows, "which cannot be stepped", partial)

    def uneven(grads: Tree, params: Tree) -> None:
        if mesh.ndim == 2:
            placements = [_StridedShard(0, split_factor=2), Shard(0)]
            params["odd"] = DTensor.from_local(torch.ones(2, 3), mesh, placements, shape=(7, 3), stride=(3, 1))
            grads["odd"] = torch.ones(2, 3)

    if mesh.ndim == 2:
        refused(lambda: gs.Adam(0.1), mesh, rows, "7 does not divide into 2 equal parts", uneven)

    def plain(grads: Tree, params: Tree) -> None:
        params["odd"], grads["odd"] = torch.ones(7, 3), torch.ones(7, 3) * (1 + distributed.get_rank())

    refused(lambda: gs.Adam(0.1), mesh, rows, "grads['odd'] differs between rank 0 and rank 1", plain)

    def elsewhere(grads: Tree, params: Tree) -> None:
        params["odd"], grads["odd"] = torch.ones(7, 3) * (1 + distributed.get_rank()), torch.ones(7, 3)

    refused(lambda: gs.Adam(0.1), mesh, rows, "params['odd'] differs between rank 0 and rank 1", elsewhere)
    params, grads = spread(tensors(0), mesh, rows), spread(tensors(1), mesh, rows)
    with pytest.raises(gs.ArgumentTypeError, match=r"params\['large'\] is a DTensor.* gs.Sharded\(opt, group\)"):
        gs.Adam(0.1).apply_gradients(grads, params)


def groups_that_do_not_fit(mesh: DeviceMesh) -> None:
    params, grads = (spread(tensors(seed), mesh, kinds_of(mesh)[0]) for seed in (0, 1))
    with pytest.raises(gs.ConfigurationError, match=r"DTensors belong to torch.distributed: pass .*WORLD"):
        gs.Sharded(gs.SGD(0.1), group_of_one()).apply_gradients(grads, params)
    few = distributed.new_group([0])
    if distributed.get_rank() == 0:
        with pytest.raises(gs.ConfigurationError, match=r"a mesh with rank 1, which is not in the group"):
            gs.Sharded(gs.SGD(0.1), few).apply_gradients(grads, params)


def ranks_may_have_no_share(mesh: DeviceMesh) -> None:
    few = DeviceMesh("cpu", [0])
    for make in (lambda: gs.Adam(0.1, clip_norm=1.0), lambda: gs.Muon(0.1)):
        params, expected = spread(tensors(0), few, [Shard(0)]), tensors(0)
        opt = run(gs.Sharded(make(), distributed.group.WORLD), params, lambda s: spread(tensors(s), few, [Shard(0)]))
        run(make(), expected, tensors)
        assert opt.step == STEPS
        if distributed.get_rank() == 0:
            for name, array in expected.items():
                torch.testing.assert_close(local(params[name]), array, rtol=2e-6, atol=2e-7)


def plans_are_made_once(mesh: DeviceMesh) -> None:
    placements = kinds_of(mesh)[0]
    opt, params = gs.Sharded(gs.Adam(0.1), distributed.group.WORLD), spread(tensors(0), mesh, placements)
    opt.apply_gradients(spread(tensors(1), mesh, placements), params)
    plan = opt._planned_step.plan
    opt.apply_gradients(spread(tensors(2), mesh, placements), params)
    assert opt._planned_step.plan is plan


def refused(
    make: Make, mesh: DeviceMesh, placements: Placements, expected: str,
    spoil: Callable[[Tree, Tree], None] = lambda grads, params: None, dtype: Any = torch.float32,
) -> None:  # fmt: skip
    opt = gs.Sharded(make(), distributed.group.WORLD)
    params, grads = spread(tensors(0, dtype=dtype), mesh, placements), spread(tensors(1, dtype=dtype), mesh, placements)
    spoil(grads, params)
    before = {name: local(array).clone() for name, array in params.items()}
    for _ in range(2):
        with pytest.raises((gs.GradstepError, RuntimeError), match=re.escape(expected)) as caught:
            opt.apply_gradients(grads, params)
        told: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(told, f"{caught.type.__name__}: {caught.value}")
        assert len(set(told)) == 1, told
        assert opt.step == 0 and not opt.state
        for name, array in before.items():
            assert torch.equal(local(params[name]), array)


def local(array: Any) -> Any:
    return (array.to_local() if isinstance(array, DTensor) else array).detach()


def replicas_begin_alike(mesh: DeviceMesh) -> None:
    rank = distributed.get_rank()
    everywhere = [Replicate()] * mesh.ndim
    own = {"w": DTensor.from_local(torch.full((3, 2), float(rank == 1)), mesh, everywhere, run_check=False)}
    opt = gs.Sharded(gs.AdamW(0.1), distributed.group.WORLD)
    with pytest.raises(gs.ConfigurationError, match=r"params\['w'\] differs between rank 0 and rank 1"):
        opt.apply_gradients(spread({"w": torch.ones(3, 2)}, mesh, everywhere), own)
    assert local(own["w"]).tolist() == [[float(rank == 1)] * 2] * 3
    assert opt.step == 0


def a_failure_before_shards_are_brought_to_their_owners(mesh: DeviceMesh) -> None:
    """One rank fails while it fills a buffer: nobody waits for it where owners gather."""
    rank, kinds = distributed.get_rank(), [Shard(0)] * mesh.ndim
    params, before = spread(tensors(0), mesh, kinds), spread(tensors(0), mesh, kinds)
    partial = [Partial()] * mesh.ndim
    grads = {name: DTensor.from_local(array, mesh, partial, run_check=False) for name, array in tensors(1).items()}
    opt = gs.Sharded(gs.Muon(0.1), distributed.group.WORLD)
    filled = PlacedPlan._fill
    if rank == 1:
        PlacedPlan._fill = broken
    began = time.monotonic()
    try:
        with pytest.raises(MemoryError, match="rank 1: no room"):
            opt.apply_gradients(grads, params)
    finally:
        PlacedPlan._fill = filled
    assert time.monotonic() - began < 10
    for name in params:
        assert torch.equal(local(params[name]), local(before[name]))
    opt.apply_gradients(grads, params)


def broken(*_: Any) -> None:
    raise MemoryError("no room")


def gradients_that_are_placed_otherwise(mesh: DeviceMesh) -> None:
    """A sum that is still to be made, and gradients that lie elsewhere, are brought to their parameter's placement."""
    last = [Replicate()] * (mesh.ndim - 1)
    compare(lambda: gs.Adam(0.1), mesh, [Shard(0), *last], gradient_placements=[Replicate(), *last])
    shapes = {"odd": (7, 3)}
    params, expected = spread(tensors(0, shapes), mesh, [Replicate(), *last]), tensors(0, shapes)
    opt, one = gs.Sharded(gs.Adam(0.1, clip_norm=1.0), distributed.group.WORLD), gs.Adam(0.1, clip_norm=1.0)
    place = mesh.get_local_rank(0)
    for step in range(1, 3):
        parts = [torch.full((7, 3), float(part + step)) for part in range(mesh.shape[0])]
        opt.apply_gradients({"odd": DTensor.from_local(parts[place], mesh, [Partial(), *last])}, params)
        one.apply_gradients({"odd": sum(parts)}, expected)
    assert_same(params, expected, near=True)


def a_gradient_that_is_not_finite_on_one_rank(mesh: DeviceMesh) -> None:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    placements = kinds_of(mesh)[0]
    for policy in ("skip", "raise"):
        opt = gs.Sharded(gs.Adam(0.1, nonfinite=policy, clip_norm=1.0), distributed.group.WORLD)
        params, grads = spread(tensors(0), mesh, placements), spread(tensors(1), mesh, placements)
        if rank == ranks - 1:
            grads["large"].to_local()[-1, -1] = float("nan")
        before = {name: local(array).clone() for name, array in params.items()}
        if policy == "skip":
            opt.apply_gradients(grads, params)
            assert not opt.report.applied and opt.report.culprits == ("large",)
        else:
            with pytest.raises(gs.NonFiniteGradientError, match=rf"large \(on rank {ranks - 1}\);"):
                opt.apply_gradients(grads, params)
        assert opt.step == 0
        for name, array in before.items():
            assert torch.equal(local(params[name]), array)
        opt.apply_gradients(spread(tensors(1), mesh, placements), params)
        assert opt.step == 1


def huge_gradients_have_a_norm(mesh: DeviceMesh) -> None:
    opt = gs.Sharded(gs.SGD(1e-200, clip_norm=1e300), distributed.group.WORLD)
    whole = {"w": torch.full((6, 2), 1e200, dtype=torch.float64)}
    opt.apply_gradients(spread(whole, mesh, kinds_of(mesh)[0]), spread(whole, mesh, kinds_of(mesh)[0]))
    assert opt.report.grad_norm == pytest.approx(12**0.5 * 1e200, rel=1e-12)


MATRICES = {"wide": (12, 33), "tall": (41, 8), "deep": (3, 6, 5), "vector": (50,), "row": (1, 4), "scalar": ()}


@gs.rule
def Normed(w: Any, g: Any, *, learning_rate: Any) -> Any:
    return w - learning_rate * g / (1 + gs.norm(g))


def rules_of_whole_tensors(mesh: DeviceMesh) -> None:
    kinds = kinds_of(mesh)
    rows = configurations(*MATRIX_FAMILIES)
    rows = [row.values for row in (rows if mesh.size() == 2 else last_of_each(rows))]
    for number, (cls, kwargs) in enumerate([*rows, (Normed, {"learning_rate": 0.1})]):
        for placements in kinds if number in (0, len(rows) - 1) else kinds[:1]:
            make = lambda cls=cls, kwargs=kwargs: cls(**kwargs, clip_norm=2.0)  # noqa: E731
            ours, _ = compare(make, mesh, placements, shapes=MATRICES, near=True)
        if cls is gs.Adafactor:
            told: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(told, sorted(ours.state))
            owned = [name for names in told for name in names if name in ("wide", "tall", "deep")]
            assert sorted(owned) == ["deep", "tall", "wide"]
    compare(lambda: gs.Adafactor(1e-2), mesh, kinds[0], shapes=MATRICES, dtype=torch.bfloat16, near=True)


def micro_batches_are_added_up(mesh: DeviceMesh) -> None:
    for make in (lambda: gs.Adam(0.1, clip_norm=1.0), lambda: gs.Muon(0.02)):
        for placements in kinds_of(mesh)[:2]:
            params, expected = spread(tensors(0), mesh, placements), tensors(0)
            ours = gs.Accumulate(gs.Sharded(make(), distributed.group.WORLD), every=2)
            one = gs.Accumulate(make(), every=2)
            for step in range(1, 5):
                whole = tensors(step)
                if step % 2 == 0:
                    del whole["odd"]
                ours.apply_gradients(spread(whole, mesh, placements), params, grad_scale=0.5)
                one.apply_gradients(whole, expected, grad_scale=0.5)
            assert ours.step == one.step == 2
            assert_same(params, expected, near=True)
    opt = gs.Accumulate(gs.Sharded(gs.SGD(0.1), distributed.group.WORLD), every=2)
    params, grads = (spread(tensors(seed), mesh, kinds_of(mesh)[0]) for seed in (0, 1))
    for _ in range(2):
        with pytest.raises(gs.UnknownParameterError, match="strange"):
            opt.apply_gradients({**grads, "strange": grads["odd"]}, params)
        opt.apply_gradients(grads, params)
    assert opt.step == 1
    with pytest.raises(gs.ConfigurationError, match="redistribute the gradient first"):
        opt.apply_gradients(spread(tensors(1), mesh, kinds_of(mesh)[1]), spread(tensors(0), mesh, kinds_of(mesh)[0]))


def memory_is_predicted(mesh: DeviceMesh) -> None:
    placements = kinds_of(mesh)[0]
    opt, params = gs.Sharded(gs.AdamW(0.1), distributed.group.WORLD), spread(tensors(0), mesh, placements)
    predicted = opt.memory(params).slots
    opt.apply_gradients(spread(tensors(1), mesh, placements), params)
    slots = [array for slots in opt.state.values() for array in slots.values()]
    assert (
        predicted == sum(array.nbytes for array in slots) == 2 * sum(local(array).nbytes for array in params.values())
    )
    muon = gs.Sharded(gs.Muon(0.1), distributed.group.WORLD).memory(params)
    assert muon.total > 0


def autograd_notices_the_write(mesh: DeviceMesh) -> None:
    (weight,) = spread({"w": torch.ones(4, 4)}, mesh, kinds_of(mesh)[0]).values()
    weight = nn.Parameter(weight)
    loss = (weight * weight).sum()
    version = weight.to_local()._version
    opt = gs.Sharded(gs.SGD(0.1), distributed.group.WORLD)
    opt.apply_gradients({"w": weight.detach().clone()}, {"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert weight.to_local()._version > version


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Any) -> Any:
        return self.norm(self.down(torch.tanh(self.up(x))) + 0)


def trains_like_one_process(model: nn.Module, make: Make, *, near: bool) -> None:
    """Five steps, with the gradients that the model has on all ranks together."""
    ours, one = gs.Sharded(make(), distributed.group.WORLD), make()
    params = dict(model.named_parameters())
    expected = {name: whole(parameter).clone() for name, parameter in params.items()}
    torch.manual_seed(1)
    errors: list[float] = []
    for _ in range(5):
        x = torch.randn(16, 6)
        loss = (model(x) - x[:, :3]).square().mean()
        model.zero_grad()
        loss.backward()
        grads = {name: parameter.grad for name, parameter in params.items()}
        one.apply_gradients({name: whole(gradient) for name, gradient in grads.items()}, expected)
        ours.apply_gradients(grads, params)
        plain = Net()
        plain.load_state_dict(expected)
        with torch.no_grad():
            errors.append(float((model(x) - plain(x)).abs().max()))
        for name, array in expected.items():
            torch.testing.assert_close(whole(params[name]), array, rtol=2e-6 if near else 0, atol=2e-7 if near else 0)
    assert max(errors) < 1e-5, errors  # the next forward uses what the step has written


def whole(array: Any) -> Any:
    return (array.full_tensor() if isinstance(array, DTensor) else array).detach()


def models(ranks: int) -> dict[str, nn.Module]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("all",))
    found = {"fsdp": Net(), "tp": Net()}
    for part in (found["fsdp"].up, found["fsdp"]):
        fully_shard(part, mesh=mesh)
    parallelize_module(found["tp"], mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        found |= {"hsdp": Net(), "both": Net()}
        fully_shard(found["hsdp"], mesh=square)
        parallelize_module(found["both"], square["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(found["both"], mesh=square["outer"])
        kinds = {type(p) for array in found["both"].parameters() for p in array.placements}
        assert _StridedShard in kinds
    return found


def regions_are_those_of_torch(ranks: int) -> None:
    for model in models(ranks).values():
        for name, parameter in model.named_parameters():
            region = placed(name, parameter, distributed.get_rank()).region
            assert np.array_equal(whole(parameter).numpy()[region.picked], local(parameter).numpy()), name


def models_train_like_in_one_process(ranks: int) -> None:
    makers: dict[str, Make] = {
        "bits": lambda: gs.AdamW(gs.cosine_decay(0.1, 10), bias_correction=True),
        "clipped": lambda: gs.Adam(0.1, clip_norm=0.1),
        "Muon": lambda: gs.Muon(0.02),
    }
    for name, make in makers.items():
        for model in models(ranks).values():
            trains_like_one_process(model, make, near=name != "bits")


ON_A_MESH = [
    replicas_begin_alike, a_failure_before_shards_are_brought_to_their_owners,
    elementwise_rules_give_the_bits_of_one_process, options_are_those_of_one_process,
    storage_that_goes_by_the_order_of_elements, refusals, groups_that_do_not_fit,
    ranks_may_have_no_share, plans_are_made_once, gradients_that_are_placed_otherwise,
    a_gradient_that_is_not_finite_on_one_rank, huge_gradients_have_a_norm, rules_of_whole_tensors,
    micro_batches_are_added_up, memory_is_predicted, autograd_notices_the_write,
]  # fmt: skip

ON_ONE_MESH = [
    replicas_begin_alike, a_failure_before_shards_are_brought_to_their_owners,
    refusals, groups_that_do_not_fit, ranks_may_have_no_share, micro_batches_are_added_up,
    a_gradient_that_is_not_finite_on_one_rank, memory_is_predicted, autograd_notices_the_write,
    options_are_those_of_one_process, storage_that_goes_by_the_order_of_elements, plans_are_made_once,
    huge_gradients_have_a_norm,
]  # fmt: skip


def main(*wanted: str) -> None:
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    ranks = distributed.get_world_size()
    for mesh in meshes(ranks):
        for check in ON_A_MESH:
            if check.__name__ in wanted or not (wanted or (check in ON_ONE_MESH and mesh.shape == (4,))):
                began = time.monotonic()
                check(mesh)
                print(f"{check.__name__} {mesh.ndim} {time.monotonic() - began:.2f}", file=sys.stderr, flush=True)
    for check in (regions_are_those_of_torch, models_train_like_in_one_process):
        if not wanted or check.__name__ in wanted:
            check(ranks)
    print("checked", flush=True)
    distributed.barrier()
    os._exit(0)  # threads of the groups that meshes have made may abort a process that ends by itself


if __name__ == "__main__":
    main(*sys.argv[1:])
