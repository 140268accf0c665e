"""What a person sees of a race: progress while it runs, then the ranking and what follows from it."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from time import monotonic
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gradstep.cli.numbers import bytes_text, decimals, duration_text, rate_text, short, with_spread
from gradstep.cli.race.contest import Heat, Run
from gradstep.cli.race.entrants import Entrant
from gradstep.cli.race.ranking import Place, close_to_the_winner
from gradstep.cli.terminal import console

REFRESH = 0.1  # seconds
SPARSE_LINES = 10  # of progress, where there is no terminal


class Progress:
    """The race while it runs: a live board on a terminal, a line now and then elsewhere. Writes to stderr."""

    def __init__(self, entrants: Sequence[Entrant], heats: Sequence[Heat], steps: int) -> None:
        self.heats, self.steps = heats, steps
        self.planned = {entrant.name: sum(heat.entrant is entrant for heat in heats) for entrant in entrants}
        self.done: list[Run] = []
        self.current: Heat | None = None
        self.fraction = 0.0
        self.started = self.drawn = monotonic()
        self.console = console(stderr=True)
        on_terminal = sys.stderr.isatty() and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if on_terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def tick(self, heat: Heat, step: int) -> None:
        """A step was taken."""
        if self.live and monotonic() - self.drawn >= REFRESH:
            self.current, self.fraction = heat, step / self.steps
            self._draw(self.live)

    def finished(self, run: Run) -> None:
        """A run has ended."""
        self.done.append(run)
        self.fraction = 0.0
        if self.live:
            if monotonic() - self.drawn >= REFRESH:
                self._draw(self.live)
        elif len(self.done) * SPARSE_LINES // len(self.heats) > (len(self.done) - 1) * SPARSE_LINES // len(self.heats):
            self.console.print(f"{len(self.done)}/{len(self.heats)} runs{self._leader()}", markup=False)

    def _draw(self, live: Live) -> None:
        live.update(
            Group(self._board(), Text(), self._bar(), Text("Ctrl-C keeps what is finished", "dim")),
            refresh=True,
        )
        self.drawn = monotonic()

    def _board(self) -> Table:
        board = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        board.add_column("optimizer", no_wrap=True)
        board.add_column("runs", width=16)
        board.add_column("", justify="right", no_wrap=True)
        board.add_column("best loss", justify="right", no_wrap=True)
        board.add_column("at rate", justify="right", no_wrap=True)
        leader = min((run.final_loss for run in self.done), default=None)
        for name, planned in self.planned.items():
            runs = [run for run in self.done if run.entrant == name]
            best = min(runs, key=lambda run: run.final_loss, default=None)
            loss, rate = ("", "") if best is None else (short(best.final_loss), rate_text(best.rate))
            loss, rate = ("diverged", "") if best and best.diverged_at is not None else (loss, rate)
            running = self.current is not None and self.current.entrant.name == name
            board.add_row(
                Text(name, style="bold cyan" if running else ""),
                ProgressBar(planned, len(runs) + (self.fraction if running else 0), width=16, complete_style="cyan"),
                f"{len(runs)}/{planned}",
                Text(loss, style="bold green" if best and best.final_loss == leader else ""),
                rate,
            )
        return board

    def _bar(self) -> Table:
        done = len(self.done) + self.fraction
        elapsed = monotonic() - self.started
        left = f", about {duration_text(elapsed / done * (len(self.heats) - done))} left" if done >= 1 else ""
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            ProgressBar(len(self.heats), done, width=26, complete_style="cyan"),
            f"{len(self.done)}/{len(self.heats)} runs, {duration_text(elapsed)}{left}",
        )
        return line

    def _leader(self) -> str:
        best = min(self.done, key=lambda run: run.final_loss)
        if best.diverged_at is not None:
            return ", all diverged so far"
        return f", best so far {best.entrant} with {short(best.final_loss)} at {rate_text(best.rate)}"


def show_ranking(places: Sequence[Place], screen: Console) -> None:
    """The table, best first; metrics move to a table of their own where the terminal is narrow."""
    metrics = list(dict.fromkeys(name for place in places for name in place.metrics))
    whole = _ranking(places, metrics, with_results=True)
    unbounded = screen.options.update(max_width=10_000)
    if screen.measure(whole, options=unbounded).maximum <= screen.width or not metrics:
        screen.print(whole)
    else:
        screen.print(_ranking(places, [], with_results=True))
        screen.print()
        screen.print(_ranking(places, metrics, with_results=False))


def show_findings(places: Sequence[Place], command: str, seeds: int, screen: Console) -> None:
    """The winner as code, who is too close to call, and which grids were too narrow."""
    for line in _legend(places, seeds):
        screen.print(Text(line, "dim"))
    winner = places[0]
    if winner.final_loss is None:
        lowest = min(place.grid[0] for place in places)
        rates = ",".join(rate_text(float(f"{lowest * factor:.2g}")) for factor in (1e-3, 1e-2, 1e-1))
        entrants = shlex.quote(",".join(place.entrant.spec for place in places))
        advice = f"try lower rates: {command} --optimizers {entrants} --rates {rates}"
        screen.print(Text(f"\nEvery run diverged; {advice}", "bold red"), soft_wrap=True)
        return
    screen.print()
    screen.print(Text.assemble("Winner: ", (winner.best.runs[0].configuration, "bold green")), soft_wrap=True)
    if len(winner.finished) == 1:
        screen.print(Text("One seed only: small differences may be chance (more --seeds tell)"))
    elif close := close_to_the_winner(places):
        names = ", ".join(place.entrant.name for place in close)
        more = " (more --seeds tell)" if seeds < 10 else ""
        screen.print(Text(f"Too close to call{more}: {names}"))
    if edges := [place for place in places if place.edge]:
        screen.print()
        screen.print(Text("Best at the edge of the grid; a better rate may lie beyond. Widen with:", "yellow"))
        for place in edges:
            screen.print(Text("  " + _widen(place, command), "yellow"), soft_wrap=True)


def _ranking(places: Sequence[Place], metrics: Sequence[str], with_results: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("optimizer", no_wrap=True)
    results = ("final loss", "best\nrate", "µs/\nstep", "state", "diverged") if with_results else ()
    for heading in (*results[:2], *(name.replace(" ", "\n", 1) for name in metrics), *results[2:]):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for number, place in enumerate(places, 1):
        cells = _result_cells(place, decimals(places[0].final_loss or 0.0)) if with_results else []
        values = [short(place.metrics[name]) if name in place.metrics else "-" for name in metrics]
        table.add_row(
            str(number),
            place.entrant.name,
            *cells[:2],
            *values,
            *cells[2:],
            style="bold" if number == 1 else "",
        )
    return table


def _result_cells(place: Place, places: int | None) -> list[Text]:
    if place.final_loss is None or place.range is None:
        loss, rate = Text(f"diverged at step {place.diverged_at}", "red"), Text("-")
    else:
        lowest, highest = place.range
        one = len(place.finished) == 1
        loss = Text(with_spread(place.final_loss, None if one else (highest - lowest) / 2, places))
        mark = {"lowest": "<", "highest": ">"}.get(place.edge or "", "")
        rate = Text(mark + rate_text(place.best.rate), "yellow" if mark else "")
    step = "-" if place.step_us is None else f"{place.step_us:.0f}"
    lost = Text(f"{place.diverged}/{len(place.runs)}", "red" if place.diverged else "dim")
    return [loss, rate, Text(step), Text(bytes_text(place.state_bytes)), lost]


def _widen(place: Place, command: str) -> str:
    """The command that looks beyond the end of the grid."""
    rate = place.best.rate
    beyond = (rate / 10, rate / 3, rate) if place.edge == "lowest" else (rate, rate * 3, rate * 10)
    rates = ",".join(rate_text(float(f"{value:.2g}")) for value in beyond)
    return f"{command} --optimizers {shlex.quote(place.entrant.spec)} --rates {rates}"


def _legend(places: Sequence[Place], seeds: int) -> Iterator[str]:
    if seeds > 1:
        yield "final loss: mean over the last tenth of steps, median over seeds ± half range"
    else:
        yield "final loss: mean over the last tenth of steps"
    if any(place.edge for place in places):
        yield "> <: the best rate is the highest or the lowest of the grid"
    yield from (place.entrant.note for place in places if place.entrant.note)
