"""DTensors of torch: which elements of a whole tensor this rank has, and in which memory."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from gradstep.arrays.region import Region, Runs
from gradstep.errors import ConfigurationError


class Placed(NamedTuple):
    """Where one rank's elements of a parameter belong.

    Attributes:
        shape: of the whole tensor.
        text: how torch says it, for errors.
        region: what this rank has; None where it has no share in the tensor.
        mesh: the ranks among which the tensor is shared out, as `torch.distributed` numbers them.
    """

    shape: tuple[int, ...]
    text: str
    region: Region | None
    mesh: tuple[int, ...]


def is_dtensor(array: object) -> bool:
    """Whether an array is a DTensor; torch is not imported to find out."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(array, module.DTensor)


def part_of(array: Any) -> Any:
    """The memory that this rank has of a DTensor, as a plain tensor; any other array as it is."""
    return parts_of({"": array})[""]


def parts_of(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same for many, by name."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return arrays
    with cast("Any", sys.modules["torch"]).no_grad():  # or it would be an operation that autograd goes through
        return {
            name: _come(array.to_local()) if isinstance(array, tensors.DTensor) else array
            for name, array in arrays.items()
        }


def _come(local: Any) -> Any:
    """What has been sent for may not have come yet."""
    return local.wait() if hasattr(local, "wait") else local


def gradient_parts(grads: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The same for gradients, which must be placed like their parameters.

    Raises:
        ConfigurationError: one is not.
    """
    for name, gradient in grads.items():
        if is_dtensor(gradient) and name in params and not is_placed_like(gradient, params[name]):
            raise ConfigurationError(
                f"grads[{name!r}] is placed as {placing(gradient)}, and params[{name!r}] as {placing(params[name])}; "
                "micro-batches are added up where the parameter is: redistribute the gradient first, "
                "grad.redistribute(placements=param.placements)"
            )
    return dict(parts_of(grads))


def is_placed_like(gradient: Any, parameter: Any) -> bool:
    """Whether two DTensors are placed alike."""
    return (
        is_dtensor(parameter)
        and gradient.placements == parameter.placements
        and gradient.device_mesh == parameter.device_mesh
    )


def where(array: Any) -> object:
    """Equal for arrays that are placed alike."""
    return (array.placements, array.device_mesh) if is_dtensor(array) else None


def placing(array: Any) -> str:
    """How torch says where an array is."""
    if not is_dtensor(array):
        return "a plain tensor"
    return f"({', '.join(map(repr, array.placements))}) on a mesh of shape {tuple(array.device_mesh.shape)}"


def placed(name: str, parameter: Any, rank: int) -> Placed:
    """Where a parameter's elements belong; plain tensors are whole on every rank, `rank` being this one.

    Raises:
        ConfigurationError: the placement is one that cannot be stepped.
    """
    shape = tuple(int(length) for length in parameter.shape)
    if not is_dtensor(parameter):
        return Placed(shape, "a plain tensor", Region.all_of(shape), (rank,))
    mesh, text = parameter.device_mesh, placing(parameter)
    ranks = tuple(mesh.mesh.flatten().tolist())
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Placed(shape, text, None, ranks)
    indices = [np.arange(length) for length in shape]
    for placement, place, count in zip(parameter.placements, coordinate, tuple(mesh.shape), strict=True):
        _cut(name, placement, indices, place, count)
    region = Region(shape, tuple(map(_runs, indices)))
    if region.lengths != tuple(part_of(parameter).shape):
        raise ConfigurationError(
            f"params[{name!r}] is placed as {text}, so that this rank should have {region.lengths} of {shape}, but it "
            f"has {tuple(part_of(parameter).shape)}; make it by distribute_tensor or fully_shard"
        )
    return Placed(shape, text, region, ranks)


def _cut(name: str, placement: Any, indices: list[Any], place: int, count: int) -> None:
    """Leave of the indices along each axis what one placement leaves to its mesh's `place` of `count`."""
    kinds: Any = sys.modules["torch.distributed.tensor.placement_types"]
    if isinstance(placement, kinds.Replicate):
        return
    if isinstance(placement, kinds.Shard):
        indices[placement.dim] = _chunk(indices[placement.dim], count)[place]
        return
    if isinstance(placement, kinds._StridedShard):
        axis, factor = indices[placement.dim], placement.split_factor
        if len(axis) % factor == 0:
            indices[placement.dim] = np.concatenate([_chunk(part, count)[place] for part in _chunk(axis, factor)])
            return
        why = f"{len(axis)} does not divide into {factor} equal parts, and torch does not say which of them are whose"
    else:
        why = "its elements are not there before the ranks have added up what they have"
    raise ConfigurationError(
        f"params[{name!r}] is placed as {placement!r}, which cannot be stepped: {why}; place it as Shard(dim) or "
        "Replicate()"
    )


def _chunk(indices: Any, count: int) -> list[Any]:
    """So many pieces as torch makes them: equally long, but for the last ones, which are shorter or empty."""
    length = -(-len(indices) // count)
    return [indices[length * place : length * (place + 1)] for place in range(count)]


def _runs(indices: Any) -> Runs:
    """Indices as ranges; one range, if there are none."""
    if not len(indices):
        return ((0, 0),)
    breaks: Sequence[int] = (np.flatnonzero(np.diff(indices) != 1) + 1).tolist()
    edges = [0, *breaks, len(indices)]
    return tuple((int(indices[i]), int(indices[j - 1]) + 1) for i, j in itertools.pairwise(edges))
