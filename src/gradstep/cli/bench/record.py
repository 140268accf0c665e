"""What `bench.json` holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from gradstep.cli.bench.measuring import Result, Timed
from gradstep.cli.files import made

SCHEMA = 1
NOTES = (
    "gradients: other arrays in each step, as after a backward pass; parameters and slots stay in place",
    "limit: a rule of gradstep that reads and writes the same arrays in the same passes and computes next to nothing",
    "the limit is called like a step, on the same threads: for small sizes it is the limit of the call and not of the "
    "memory, and a peer that uses its threads better can be faster than it",
    "of the limit: the limit's time over the step's, round by round; median and quartiles",
    "Adafactor and Muon: square matrices; Muon is bound by arithmetic, and its limit leaves out the iterations",
)
PEER_NOTES = (
    "peers: gradstep's hyperparameters; their update is gradstep's, except that torch, optax and pytorch-optimizer "
    "correct the bias of Adamax, and of Muon decouple the weight decay or iterate in bfloat16",
    "bfloat16 and float16: gradstep's slots are float32, those of most peers are as narrow as the parameters; slots of "
    "torchao-8bit have 8 bits",
)


def document(
    options: Mapping[str, object], surroundings: Mapping[str, object], results: Sequence[Result], planned: int
) -> dict[str, object]:
    """Everything that was measured, as plain values; `complete` is false when it was cut short."""
    return {
        "schema": SCHEMA,
        "complete": len(results) == planned,
        "planned_cases": planned,
        "made": {**made(), **surroundings},
        "options": dict(options),
        "notes": [*NOTES, *PEER_NOTES],
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> dict[str, object]:
    case = result.case
    return {
        "family": case.family.name,
        "library": case.library,
        "dtype": case.dtype,
        "size": case.size,
        "elements": case.elements,
        "tensors": case.tensors,
        "shape": list(case.shape),
        "clip": case.clip,
        "gradient_sets": case.rings,
        "bytes_per_element": case.bytes_per_element,
        "bytes": case.bytes_per_element * case.elements,
        "sides": [_side(result, timed) for timed in result.timed],
        "failed": [asdict(failed) for failed in result.failed],
    }


def _side(result: Result, timed: Timed) -> dict[str, object]:
    spread, share = timed.spread, result.share(timed)
    moved = result.case.bytes_per_element * result.case.elements
    return {
        "side": timed.side,
        "kind": timed.kind,
        "seconds": asdict(spread),
        # What a peer moves, nobody has counted.
        "gb_per_s": None if timed.kind == "peer" else moved / spread.median / 1e9,
        "fraction_of_limit": share and asdict(share),
        "times": [float(f"{seconds:.4g}") for seconds in timed.times],
    }
