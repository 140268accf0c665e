"""The race from the first check to the last file."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.text import Text

from gradstep.cli.complaint import Complaint
from gradstep.cli.files import check_folder, encode, write_or_complain, write_whole
from gradstep.cli.numbers import duration_text
from gradstep.cli.race import SEEDS, STEPS
from gradstep.cli.race.contest import Heat, Run, plan, run
from gradstep.cli.race.entrants import Entrant, choose, read_rates, try_entrants
from gradstep.cli.race.ranking import Place, rank
from gradstep.cli.race.record import document
from gradstep.cli.race.screen import Progress, show_findings, show_ranking
from gradstep.cli.race.task import Problem, find_task, try_task
from gradstep.cli.terminal import INTERRUPTED, InterruptSwitch, console, show_files

FILES = ("race.json", "race.png")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    task: str
    optimizers: str | None
    rates: str | None
    seeds: int
    steps: int
    output: Path

    @property
    def command(self) -> str:
        """The command line that asks for the same, save for the optimizers and rates."""
        words = ["gradstep", "race"]
        words += [self.task] if self.task != "digits" else []
        words += ["--seeds", str(self.seeds)] if self.seeds != SEEDS else []
        words += ["--steps", str(self.steps)] if self.steps != STEPS else []
        words += ["--output", str(self.output)] if self.output != Path() else []
        return shlex.join(words)


@dataclass(frozen=True)
class Outcome:
    """What was run, and what ended the race early, if anything did."""

    runs: list[Run]
    heats: list[Heat]
    seconds: float
    ended_by: KeyboardInterrupt | Complaint | None


def run_race(options: Options) -> int:
    """Race, show the ranking, write the files; returns the exit code."""
    rates = read_rates(options.rates)
    entrants = choose(options.optimizers)
    check_folder(options.output, FILES)
    problem = find_task(options.task)
    try_entrants(entrants, rates, lambda: problem.init(0), try_task(problem))

    screen = console()
    with InterruptSwitch() as interrupts:
        outcome = _race(problem, options, entrants, plan(entrants, rates, options.seeds), interrupts)
        interrupts.held = True
        if not outcome.runs:
            return _nothing_finished(outcome)
        places = rank(outcome.runs, entrants, rates)
        title = _title(options, entrants, outcome)
        record = options.output / FILES[0]
        write_or_complain(record, encode(_document(options, entrants, rates, outcome, places)))
        interrupts.held = False
        _show(options, title, outcome, places, screen)
        picture = options.output / FILES[1]
        code = _draw(picture, title, places, same_rates=rates is not None)
        show_files([record] if code else [record, picture], screen)
    if isinstance(outcome.ended_by, Complaint):
        raise outcome.ended_by
    return INTERRUPTED if outcome.ended_by else code


def _race(
    problem: Problem,
    options: Options,
    entrants: list[Entrant],
    heats: list[Heat],
    interrupts: InterruptSwitch,
) -> Outcome:
    runs: list[Run] = []
    ended_by = None
    started = monotonic()
    try:
        with problem.surroundings(), Progress(entrants, heats, options.steps) as progress:
            for heat in heats:
                runs.append(run(problem, heat, options.steps, progress.tick))
                progress.finished(runs[-1])
    except (KeyboardInterrupt, Complaint) as error:
        interrupts.held = True
        ended_by = error
    return Outcome(runs, heats, monotonic() - started, ended_by)


def _show(options: Options, title: str, outcome: Outcome, places: list[Place], screen: Console) -> None:
    screen.print(Text(title, "bold"), soft_wrap=True)
    if outcome.ended_by is not None:
        why = "by a problem with the task" if isinstance(outcome.ended_by, Complaint) else "by Ctrl-C"
        counted = f"Cut short {why}: {len(outcome.runs)} of {len(outcome.heats)} runs are finished and count."
        screen.print(Text(counted, "yellow"), soft_wrap=True)
    screen.print()
    show_ranking(places, screen)
    show_findings(places, options.command, options.seeds, screen)


def _draw(path: Path, title: str, places: list[Place], same_rates: bool) -> int:
    """Draw and write the picture; whatever goes wrong costs only the picture. Returns the exit code."""
    try:
        from gradstep.cli.race.picture import draw

        write_whole(path, draw(title, places, same_rates))
    except KeyboardInterrupt:
        print(f"The picture was skipped by Ctrl-C.{_left_over(path)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        print(f"The picture could not be drawn: {type(error).__name__}: {error}.{_left_over(path)}", file=sys.stderr)
        return 1
    return 0


def _left_over(path: Path) -> str:
    return f" {path} is of an earlier race." if path.exists() else ""


def _document(
    options: Options,
    entrants: list[Entrant],
    rates: list[float] | None,
    outcome: Outcome,
    places: list[Place],
) -> dict[str, object]:
    asked = {
        "task": options.task,
        "optimizers": [entrant.spec for entrant in entrants],
        "rates": rates,
        "seeds": options.seeds,
        "steps": options.steps,
    }
    return document(asked, outcome.runs, places, planned=len(outcome.heats))


def _title(options: Options, entrants: list[Entrant], outcome: Outcome) -> str:
    def count(number: int, noun: str) -> str:
        return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

    rates = len({heat.rate for heat in outcome.heats if heat.entrant is entrants[0]})
    parts = [count(len(entrants), "optimizer"), count(rates, "rate"), count(options.seeds, "seed")]
    steps = count(options.steps, "step")
    return f"{options.task}: {', '.join(parts)}, {steps} each, in {duration_text(outcome.seconds)}"


def _nothing_finished(outcome: Outcome) -> int:
    if isinstance(outcome.ended_by, Complaint):
        raise outcome.ended_by
    print("Stopped before the first run had finished: nothing was written.", file=sys.stderr)
    return INTERRUPTED
