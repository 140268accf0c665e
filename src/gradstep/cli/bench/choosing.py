"""What the options ask for, made out before anything is measured; what cannot be had is a complaint."""

import importlib.util
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradstep.cli.bench.case import Case
from gradstep.cli.bench.families import BY_NAME, FAMILIES, Family
from gradstep.cli.bench.libraries import LIBRARIES
from gradstep.cli.bench.peers import PEERS, Peer
from gradstep.cli.complaint import Complaint, needs_extra, unknown

LARGEST = 10**8
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    family: str | None
    sizes: str
    tensors: int
    library: str | None
    dtype: str
    clip: bool
    peers: str | None
    compiled: bool
    rounds: int
    threads: int | None
    output: Path


@dataclass(frozen=True)
class Chosen:
    """What will be measured."""

    cases: list[Case]
    families: list[Family]
    libraries: list[str]
    peers: list[Peer]
    others: dict[str, list[str]]  # peers that are left out unless they are asked for, by what would bring them in


def choose(options: Options) -> Chosen:
    """The cases, from small to large, and the peers."""
    families = [BY_NAME[name] for name in _names("--family", options.family, list(BY_NAME))] or list(FAMILIES)
    libraries = _libraries(options.library)
    dtype = _one("--dtype", options.dtype, DTYPES)
    if dtype == "bfloat16" and "numpy" in libraries and importlib.util.find_spec("ml_dtypes") is None:
        raise needs_extra("bfloat16 in NumPy", "bfloat16", "ml_dtypes")
    peers = _peers(options.peers, libraries, compiled=options.compiled)
    cases: dict[tuple[str, str, int], Case] = {}
    for size in _sizes(options.sizes, options.tensors):
        for library in libraries:
            for family in families:
                case = Case(family, library, dtype, size, options.tensors, options.clip)
                cases.setdefault((family.name, library, case.elements), case)
    others = _others(peers, libraries) if options.peers is None else {}
    return Chosen(list(cases.values()), families, libraries, peers, others)


def _names(option: str, text: str | None, known: Collection[str]) -> list[str]:
    """The names in a list, in lower case and each once."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise Complaint(f"{option} names nothing; choose from {', '.join(known)}")
    return list(dict.fromkeys(_one(option, part, known) for part in parts))


def _one(option: str, name: str, known: Collection[str]) -> str:
    if name.lower() in known:
        return name.lower()
    raise unknown(option, name, known, ", ".join(known))


def _libraries(text: str | None) -> list[str]:
    chosen = _names("--library", text, LIBRARIES)
    for name in chosen:
        if importlib.util.find_spec(name) is None:
            raise needs_extra(f"--library {name}", name, name)
    return chosen or [name for name in ("numpy", "torch") if importlib.util.find_spec(name) is not None]


def _peers(text: str | None, libraries: Sequence[str], *, compiled: bool) -> list[Peer]:
    known = {peer.name: peer for peer in PEERS}
    if text is None:
        chosen = [peer for peer in PEERS if peer.installed and not peer.asked and peer.library in libraries]
    else:
        chosen = [known[name] for name in _names("--peers", text, [*known, "none"]) if name != "none"]
    if compiled and known["torch-compile"] not in chosen:
        chosen.append(known["torch-compile"])
    for peer in chosen:
        option = "--compile" if peer.asked and compiled else "--peers"
        if not peer.installed:
            raise Complaint(f"{option}: {peer.name} is not installed: pip install {peer.package}")
        if peer.library not in libraries:
            raise Complaint(f"{option}: {peer.name} takes arrays of {peer.library}; add it: --library {peer.library}")
    return chosen


def _others(chosen: Collection[Peer], libraries: Collection[str]) -> dict[str, list[str]]:
    others: dict[str, list[str]] = {}
    for peer in PEERS:
        if peer not in chosen:
            library = "" if peer.library in libraries else f"--library {peer.library}"
            remedy = f"pip install {peer.package}" if not peer.installed else library or "--compile"
            others.setdefault(remedy, []).append(peer.name)
    return others


def _sizes(text: str, tensors: int) -> list[int]:
    sizes: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            size = float(part)
        except ValueError:
            size = math.nan
        if not (1 <= size <= LARGEST and size.is_integer()):
            raise Complaint(
                f"--sizes: {part!r} is no size; write whole numbers of elements from 1 to 1e8: --sizes 1e4,1e6"
            )
        if size < tensors:
            raise Complaint(f"--sizes: {part} elements cannot be split in --tensors {tensors}; write larger sizes")
        sizes.add(int(size))
    if not sizes:
        raise Complaint("--sizes is empty; write whole numbers of elements from 1 to 1e8: --sizes 1e4,1e6")
    return sorted(sizes)
