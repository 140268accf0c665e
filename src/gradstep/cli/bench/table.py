"""What a person sees: progress while it is measured, then a table for each library."""

import sys
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gradstep.cli.bench.case import Case
from gradstep.cli.bench.measuring import Result, Spread
from gradstep.cli.bench.record import NOTES, PEER_NOTES
from gradstep.cli.terminal import console

MEASURED = ("bytes per\nelement", "limit", "GB/s", "gradstep", "of the\nlimit")  # before the peers


class Watch:
    """A bar on a terminal, nothing elsewhere. Writes to stderr."""

    def __init__(self, cases: int, rounds: int) -> None:
        columns = BarColumn(26), TextColumn("{task.description}; Ctrl-C keeps what is finished")
        self.bar = Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.rounds, self.begun = rounds, -1
        self.task = self.bar.add_task("", total=cases * rounds)

    def __enter__(self) -> "Watch":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, case: Case) -> None:
        """A case begins; the one before may have had fewer rounds."""
        self.begun += 1
        text = f"{case.family.name}, {case.elements:,} elements in {case.library}"
        self.bar.update(self.task, completed=self.begun * self.rounds, description=text)

    def tick(self) -> None:
        """A round has ended."""
        self.bar.advance(self.task)


def show(results: Sequence[Result], screen: Console) -> None:
    """A table for each library, what failed, and what the numbers mean."""
    for library in dict.fromkeys(result.case.library for result in results):
        title = f"{library}: time of a step, (its quartiles), ×: how often it is the time of gradstep's"
        screen.print(Text(title, "bold"), soft_wrap=True)
        for table in _tables([result for result in results if result.case.library == library], screen):
            screen.print(table)
            screen.print()
    failures: dict[tuple[str, str], list[Case]] = {}
    for result in results:
        for failed in result.failed:
            failures.setdefault((failed.side, failed.error), []).append(result.case)
    for (side, error), (case, *more) in failures.items():
        where = f"{case.family.name}, {case.elements:,} elements in {case.library}"
        others = f" and {len(more)} more {'case' if len(more) == 1 else 'cases'}" if more else ""
        screen.print(Text(f"{side} was not measured at {where}{others}: {error}", "yellow"), soft_wrap=True)
    with_peers = any(timed.kind == "peer" for result in results for timed in result.timed)
    for note in (*NOTES, *PEER_NOTES) if with_peers else NOTES:
        screen.print(Text(note, "dim"), soft_wrap=True)


def _tables(results: Sequence[Result], screen: Console) -> list[Table]:
    """One table, or as many as it takes to show every column on this screen; each begins with family and elements."""
    peers = list(dict.fromkeys(t.side for result in results for t in result.timed if t.kind == "peer"))
    order = {family: place for place, family in enumerate(dict.fromkeys(r.case.family.name for r in results))}
    rows = sorted(results, key=lambda result: (order[result.case.family.name], result.case.elements))
    cells = [_cells(result, peers) for result in rows]
    headings = ["family", "elements", *MEASURED, *(peer.replace("-", "\n", 1) for peer in peers)]
    kept, tables = [0, 1], list[Table]()
    for column in range(2, len(headings)):
        if len(kept) > 2 and _width(_table(headings, cells, [*kept, column]), screen) > screen.width:
            tables.append(_table(headings, cells, kept))
            kept = [0, 1]
        kept.append(column)
    return [*tables, _table(headings, cells, kept)]


def _table(headings: Sequence[str], cells: Sequence[Sequence[Text]], columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(headings[column], justify="right" if column else "left", vertical="bottom", no_wrap=True)
    for row in cells:
        table.add_row(*(row[column] for column in columns))
    return table


def _width(table: Table, screen: Console) -> int:
    return Measurement.get(screen, screen.options.update(max_width=10_000), table).maximum


def _cells(result: Result, peers: Sequence[str]) -> list[Text]:
    case, limit, ours = result.case, result.find("limit"), result.find("ours")
    moved = case.bytes_per_element * case.elements
    share = ours and result.share(ours)
    timed = {one.side: one.spread.median for one in result.timed}
    texts = [Text(case.family.name), Text(f"{case.elements:,}"), Text(f"{case.bytes_per_element:g}")]
    texts.append(Text(time_text(limit.spread.median) if limit else "failed"))
    texts.append(Text(f"{moved / limit.spread.median / 1e9:.3g}" if limit else "-"))
    texts.append(Text(_with_quartiles(ours.spread), "bold") if ours else Text("failed", "red"))
    texts.append(Text(f"{share.median:.{0 if share.median >= 0.1 else 1}%}" if share else "-"))
    for peer in peers:
        if peer not in timed:
            texts.append(Text("-", "dim"))
        else:
            ratio = f" ×{_digits(timed[peer] / ours.spread.median)}" if ours else ""
            texts.append(Text(time_text(timed[peer]) + ratio))
    return texts


def _with_quartiles(times: Spread) -> str:
    scale, unit = _unit(times.median)
    return f"{_digits(times.median * scale)} ({_digits(times.q1 * scale)}–{_digits(times.q3 * scale)}) {unit}"


def time_text(seconds: float) -> str:
    """A time in the unit that fits, in three digits."""
    scale, unit = _unit(seconds)
    return f"{_digits(seconds * scale)} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
