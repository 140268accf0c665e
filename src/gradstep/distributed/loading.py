"""Loading what will be spread over ranks: each reads the parts that will be its own."""
# pyright: reportPrivateUsage=false

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from gradstep.arrays.library import recognise
from gradstep.checkpoint.nodes import Document
from gradstep.checkpoint.restore import Restoration, prepare
from gradstep.checkpoint.snapshot import State, checked_arrays, snapshot
from gradstep.checkpoint.tensors import Tensors
from gradstep.checkpoint.wants import WantInMemory
from gradstep.distributed.council import Council, Facts, Said, word_of
from gradstep.distributed.dtensors import is_dtensor, unsaved
from gradstep.distributed.group import Group
from gradstep.distributed.partition import Partition
from gradstep.distributed.saving import forms_of
from gradstep.distributed.sharded_step import extent_of, unsharded
from gradstep.errors import ConfigurationError
from gradstep.optimizer import Optimizer
from gradstep.persistence import Loading
from gradstep.tree import named_arrays


class Source(NamedTuple):
    """A checkpoint that is open, and what tells it from others."""

    document: Document
    tensors: Tensors
    digest: str


class Loaded(NamedTuple):
    """A checkpoint of which a rank has read its part, and who will have what."""

    restoration: Restoration
    partition: Partition
    facts: Facts


def read_parts(
    whole: Optimizer, opened: Callable[[], AbstractContextManager[Source]], loading: Loading,
    group: Group, council: Council, partition: Partition, stack: contextlib.ExitStack,
) -> Loaded:  # fmt: skip
    """Read on every rank what will be its own; nothing changes yet.

    Args:
        whole: the outermost optimizer.
        opened: opens the checkpoint, of any number of ranks or of one process.
        loading: how it is loaded.
        group, council: the ranks.
        partition: who has what of the state that there is.
        stack: keeps the checkpoint open.
    """
    return council.attempt(
        lambda: _read(whole, stack.enter_context(opened()), loading, group, partition),
        lambda here: Said(word_of(here.facts), lambda: here.facts),
    )


def _read(whole: Optimizer, source: Source, loading: Loading, group: Group, partition: Partition) -> Loaded:
    likes = loading.params if loading.like is None else loading.like
    if likes is None:
        raise ConfigurationError(
            "a Sharded optimizer loads the part of the state that will be its own, which depends on the "
            "parameters: pass params to overwrite them too, or like=params"
        )
    if any(map(is_dtensor, named_arrays(likes, "params").values())):
        raise unsaved("these parameters are")
    named = checked_arrays(likes, "params" if loading.like is None else "like")
    library = recognise(params=named)
    if library.in_place is False:
        raise unsharded(library)
    larger = Partition(group.size) if loading.strict else partition

    def share(wants: Mapping[str, WantInMemory]) -> dict[str, tuple[int, int]]:
        nonlocal larger
        larger = larger.extended({name: extent_of(want.program, want.memory) for name, want in wants.items()})
        return {name: part[1:] for name, part in larger.of_rank(group.rank, wants).items()}

    empty: list[State] = [{} for _ in whole._leaves()]
    mine = snapshot(whole, {}, empty).document.optimizer
    restoration = prepare(whole, mine, source.document, source.tensors, loading, share)
    return Loaded(restoration, larger, {"the checkpoint, by its digest": source.digest, **_how(loading, named)})


def _how(loading: Loading, named: Mapping[str, Any]) -> Facts:
    given = {"params": loading.params is not None, "strict": loading.strict, "hyperparameters": loading.whose}
    return {**{f"load's {name}": repr(value) for name, value in given.items()}, **forms_of(named)}
