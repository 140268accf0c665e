"""The peers of `gradstep bench` make our update: what is compared is the time of the same work."""

import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradstep.cli.bench.case import Case
from gradstep.cli.bench.families import BY_NAME
from gradstep.cli.bench.libraries import LIBRARIES
from gradstep.cli.bench.peers import PEERS, Peer
from gradstep.cli.bench.sides import LeftOut, Side, Stage, our_sides

STEPS = 5
# How far peers may be from where we are, relative to the way from the start; root mean squares over all elements.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3}
# Whose update is another one on purpose, and agrees in its direction.
CORRECTED = "corrects the bias of the first moment"
DECOUPLED = "decouples the weight decay"
DIFFERENT = {
    ("torch-foreach", "Adamax"): CORRECTED,
    ("torch-default", "Adamax"): CORRECTED,
    ("pytorch-optimizer", "Adamax"): CORRECTED,
    ("optax", "Adamax"): CORRECTED,
    ("torch-default", "Muon"): f"{DECOUPLED}, iterates in bfloat16",
    ("pytorch-optimizer", "Muon"): "iterates in bfloat16",
    ("optax", "Muon"): f"{DECOUPLED}, {CORRECTED}",
    ("torchao-8bit", "Adam"): "has 8-bit slots",
    ("torchao-8bit", "AdamW"): "has 8-bit slots",
}
COMPILING = ("torch-compile", "torchao-8bit", "deepspeed")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers warn of what they import and compile


def pairs(*dtypes: str) -> Iterator[Any]:
    """Each peer with each family that it has; of those that must be asked for, because they compile for long, one."""
    for dtype in dtypes:
        for peer in PEERS:
            for family in ["AdamW"] if peer.asked else peer.families:
                yield pytest.param(peer, family, dtype, id=f"{peer.name}-{family}-{dtype}")


def case(peer: Peer, family: str, dtype: str = "float32", size: int = 8192) -> tuple[Case, Side]:
    """Two tensors, and the peer's side."""
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    if peer.name in COMPILING and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip(f"{peer.name} needs a C++ compiler")
    side = peer.side(family)
    if side is None:
        pytest.skip(f"{peer.name} has no {family}")
    return Case(BY_NAME[family.lower()], peer.library, dtype, size, 2, clip=False), side


def way(side: Side, of: Case) -> NDArray[np.float64]:
    """From the start to where the parameters are after some steps."""
    library = LIBRARIES[of.library](of.dtype)
    params, rings = of.arrays()
    start, *grads = ([library.copy(array) for array in arrays] for arrays in (params, *rings))
    begun = values(start)
    action = side.make(Stage(of, library, start, grads))
    for _ in range(STEPS):
        action.prepare()
        action.step()
    return values(action.params()) - begun


def values(arrays: Iterable[Any]) -> NDArray[np.float64]:
    return np.array([array.tolist() for array in arrays])


def length(array: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(array))


@pytest.mark.parametrize(("peer", "family", "dtype"), list(pairs("float32", "bfloat16")))
def test_a_peer_goes_where_we_go(peer: Peer, family: str, dtype: str):
    of, side = case(peer, family, dtype)
    try:
        theirs = way(side, of)
    except LeftOut as reason:
        assert dtype != "float32"
        pytest.skip(str(reason))
    ours = way(our_sides(of)[0], of)
    apart = length(ours - theirs) / length(ours)
    if (peer.name, family) not in DIFFERENT:
        assert apart < TOLERANCES[dtype]
    elif dtype == "float32":
        assert apart > TOLERANCES[dtype]  # else it is different no more
        assert (ours * theirs).sum() / length(ours) / length(theirs) > 0.95


def test_torchao_is_left_out_where_it_has_no_8_bit_slots():
    of, side = case(next(peer for peer in PEERS if peer.name == "torchao-8bit"), "AdamW", size=10_000)
    with pytest.raises(LeftOut, match="multiples of 256"):
        way(side, of)
