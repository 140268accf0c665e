"""The measurement from the first check to the last file."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.text import Text

from gradstep.cli.bench.case import Case, check_memory
from gradstep.cli.bench.choosing import Chosen, Options, choose
from gradstep.cli.bench.libraries import LIBRARIES, Library, set_threads
from gradstep.cli.bench.machine import busy, describe, processor
from gradstep.cli.bench.measuring import UNCOUNTED, Result, measure
from gradstep.cli.bench.peers import Peer
from gradstep.cli.bench.record import document
from gradstep.cli.bench.sides import Action, Side, Stage, our_sides
from gradstep.cli.bench.table import Watch, show
from gradstep.cli.files import check_folder, encode, write_or_complain, write_whole
from gradstep.cli.terminal import INTERRUPTED, InterruptSwitch, console, quiet, show_files

FILES = ("bench.json", "bench.png")


def run_bench(options: Options) -> int:
    """Measure, show the table, write the files; returns the exit code."""
    chosen = choose(options)
    check_folder(options.output, FILES)
    sides = {case: [*our_sides(case), *_peer_sides(case, chosen.peers)] for case in chosen.cases}
    check_memory([(case, len(of_case)) for case, of_case in sides.items()])
    libraries = {name: LIBRARIES[name](chosen.cases[0].dtype) for name in chosen.libraries}
    threads = set_threads(libraries.values(), options.threads)
    machine, used = describe(*_packages(chosen)), ", ".join(f"{name} {count}" for name, count in threads.items())
    surroundings = {"processor": processor(), "described": machine, "threads": threads}
    screen, record, picture = console(), *(options.output / name for name in FILES)
    screen.print(Text(f"{machine}\n{_what(options)}; threads: {used}"), soft_wrap=True)
    if line := busy():
        screen.print(Text(line, "yellow"), soft_wrap=True)
    screen.print(Text("".join(f"{line}\n" for line in _absent(chosen, sides)), "dim"), soft_wrap=True)

    results: list[Result] = []
    with InterruptSwitch() as interrupts:
        interrupted = _measure(results, sides, libraries, options.rounds)
        interrupts.held = True
        if not results:
            print("Stopped before the first case had finished: nothing was written.", file=sys.stderr)
            return INTERRUPTED
        write_or_complain(record, encode(document(_asked(options, chosen), surroundings, results, len(sides))))
        interrupts.held = False
        if interrupted:
            counted = f"Cut short by Ctrl-C: {len(results)} of {len(sides)} cases are finished and count.\n"
            screen.print(Text(counted, "yellow"), soft_wrap=True)
        show(results, screen)
        code = _draw(picture, f"gradstep bench: {_what(options)}", f"{machine}; threads: {used}", results)
        show_files([record] if code else [record, picture], screen)
    return INTERRUPTED if interrupted else code


def _measure(results: list[Result], sides: dict[Case, list[Side]], libraries: dict[str, Library], rounds: int) -> bool:
    """Measure case after case; returns whether Ctrl-C ended it."""
    try:
        with quiet(), Watch(len(sides), UNCOUNTED + rounds) as watch:
            for case, of_case in sides.items():
                watch.begin(case)
                results.append(measure(case, libraries[case.library], of_case, rounds, watch.tick))
    except KeyboardInterrupt:
        return True
    return False


def _peer_sides(case: Case, peers: Sequence[Peer]) -> list[Side]:
    sides: list[Side] = []
    for peer in peers:
        if peer.library == case.library:
            try:
                side = peer.side(case.family.name)
            except Exception as error:  # while it is imported
                side = Side(peer.name, "peer", _raising(error))
            sides += [side] if side else []
    return sides


def _absent(chosen: Chosen, sides: dict[Case, list[Side]]) -> list[str]:
    """A line for the peers that have none of the families, and one for those that would have to be asked for."""
    present = {side.name for of_case in sides.values() for side in of_case}
    idle = [peer.name for peer in chosen.peers if peer.name not in present]
    others = "; ".join(f"{', '.join(names)} ({remedy})" for remedy, names in chosen.others.items())
    lines = [f"without these families: {', '.join(idle)}"] if idle else []
    return [*lines, f"not measured: {others}"] if others else lines


def _raising(error: Exception) -> Callable[[Stage], Action]:
    def make(stage: Stage) -> Action:
        raise error

    return make


def _packages(chosen: Chosen) -> list[str]:
    """Everybody else who takes part, by the names under which versions are known."""
    names = dict.fromkeys([*chosen.libraries, *(peer.package for peer in chosen.peers)])
    return [name for name in names if name != "numpy" and _known(name)]


def _known(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _what(options: Options) -> str:
    tensors = "1 tensor" if options.tensors == 1 else f"{options.tensors} tensors"
    rounds = "1 round" if options.rounds == 1 else f"medians of {options.rounds} rounds"
    clipped = ", gradients clipped by their norm" if options.clip else ""
    return f"{options.dtype.lower()} in {tensors}{clipped}, {rounds}"


def _asked(options: Options, chosen: Chosen) -> dict[str, object]:
    asked = {name: value for name, value in asdict(options).items() if name != "output"}
    return {
        **asked,
        "family": [family.name for family in chosen.families],
        "library": chosen.libraries,
        "peers": [peer.name for peer in chosen.peers],
        "sizes": list(dict.fromkeys(case.size for case in chosen.cases)),
    }


def _draw(path: Path, title: str, subtitle: str, results: Sequence[Result]) -> int:
    """Draw and write the picture; whatever goes wrong costs only the picture. Returns the exit code."""
    try:
        from gradstep.cli.bench.picture import draw

        write_whole(path, draw(title, subtitle, results))
    except KeyboardInterrupt:
        print("The picture was skipped by Ctrl-C.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        print(f"The picture could not be drawn: {type(error).__name__}: {error}.", file=sys.stderr)
        return 1
    return 0
