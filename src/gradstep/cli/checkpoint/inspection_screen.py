"""What a person sees of one checkpoint: the tree of optimizers, the table of parameters, the sums."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from gradstep.checkpoint.matching import title_of
from gradstep.checkpoint.nodes import FORMAT, AccumulateNode, DiLoCoNode, RuleNode
from gradstep.cli.checkpoint.contents import Array, Contents, Parameter, Part, all_parts, changed_options, totals
from gradstep.cli.checkpoint.schedules import POINTS, Scheduled, schedules_of
from gradstep.cli.checkpoint.screen import ROWS, table
from gradstep.cli.checkpoint.sparkline import sparkline
from gradstep.cli.checkpoint.spelling import by_glob, kind_of, printable, spelled
from gradstep.cli.checkpoint.verification import Verification
from gradstep.cli.numbers import bytes_text

FEWEST_POINTS = 8  # of a curve
BESIDE = 44  # columns, at most, that stand beside a curve


class _Drawing(NamedTuple):
    """How curves are drawn."""

    points: int
    ascii_only: bool


def show(contents: Contents, screen: Console, *, everything: bool, repeated: bool) -> None:
    """All of it; long tables in short unless `everything` is asked for.

    Names are `repeated` on each of their lines where these may be searched.
    """
    drawing = _Drawing(max(FEWEST_POINTS, min(POINTS, screen.width - BESIDE)), screen.options.ascii_only)
    screen.print(Text(printable(str(contents.path)), "bold"), soft_wrap=True)
    files = f" in {_count(contents.shards, 'shard')} and this index" if contents.shards else ""
    screen.print(
        f"{bytes_and_count(contents.size)}{files}, written by gradstep {printable(contents.version)}, format {FORMAT}\n"
    )
    screen.print(_tree(contents.tree, drawing))
    screen.print()
    if not contents.parameters:
        screen.print("No parameters yet.")
        return
    _show_parameters(contents, screen, everything, repeated)
    if contents.arrays:
        _show_totals(contents, screen)
    else:
        screen.print("No tensors.")


def show_verification(verification: Verification, screen: Console) -> None:
    """What was checked, and what is damaged."""
    what = f"{_count(verification.tensors, 'tensor')}, {bytes_and_count(verification.bytes)}"
    if not verification.damaged:
        screen.print(Text(f"\nVerified: the header and {what}, each by its SHA-256.", "green"))
        return
    damaged = f"{len(verification.damaged)} of {what} are damaged; their bytes are not those that were saved:"
    screen.print(Text(f"\n{damaged}", "bold red"))
    for key in verification.damaged:
        screen.print(Text(f"  {printable(key)}", "red"), soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def bytes_and_count(count: int) -> str:
    """A number of bytes, rounded and in full."""
    return f"{bytes_text(count)} ({count:,} bytes)" if count >= 1000 else _count(count, "byte")


def _tree(part: Part, drawing: _Drawing) -> Tree:
    tree = Tree(_optimizer(part, drawing), guide_style="dim")
    stack = [(tree, part)]
    while stack:
        branch, above = stack.pop()
        stack += [(branch.add(_optimizer(child, drawing)), child) for child in above.children]
    return tree


def _optimizer(part: Part, drawing: _Drawing) -> Group:
    node = part.node
    title = Text()
    if part.is_route:
        route = "the rest" if part.filter is None else spelled(part.filter)
        title.append(f"{route}: ", "dim")
    if part.name:
        title.append(f"{part.name}: ", "dim")
    title.append(printable(title_of(node)), "bold cyan")
    if isinstance(node, DiLoCoNode):
        since = f"{node.taken} of {node.every} inner ones since"
        return Group(title.append(f"  {_count(node.round, 'outer step')}, {since}, wire {node.wire!r}", "default"))
    if isinstance(node, AccumulateNode):
        sums = f", sums of {_count(len(node.sums), 'parameter')}" if node.sums else ""
        return Group(title.append(f"  micro_step {node.micro_step} of {node.every}{sums}", "default"))
    title.append(f"  step {node.step}")
    values = Table.grid(padding=(0, 2, 0, 0))
    values.add_column(style="dim", overflow="fold")
    values.add_column(overflow="fold")
    if isinstance(node, RuleNode):
        scheduled = schedules_of(node)
        for name, data in node.hyperparameters.items():
            own = [one for one in scheduled if one.hyperparameter == name]
            values.add_row(Text(printable(name)), Text("\n").join(_value(data, own, node.step, drawing)))
    for name, value in changed_options(node).items():
        values.add_row(Text(printable(name)), Text(repr(value)))
    return Group(title, values) if values.row_count else Group(title)


def _value(data: Any, scheduled: Sequence[Scheduled], step: int, drawing: _Drawing) -> Iterator[Text]:
    """The lines of a hyperparameter: each of its values, and below it what follows a schedule."""
    if kind_of(data) == "globs":
        for glob, part in by_glob(data).items():
            yield Text(f"{glob!r}: {spelled(part)}")
            for one in scheduled:
                if one.glob == glob:
                    yield from _schedule(one, step, drawing)
    else:
        yield Text(spelled(data))
        for one in scheduled:
            yield from _schedule(one, step, drawing)


def _schedule(scheduled: Scheduled, step: int, drawing: _Drawing) -> Iterator[Text]:
    place = "" if scheduled.place is None else f"[{scheduled.place}] "
    curve = scheduled.curve(step, drawing.points)
    facts = _last(scheduled)
    if curve is not None:
        line = sparkline(curve, step, drawing.ascii_only)
        yield Text.assemble(
            place, f"{curve.values[0]:.4g} ", (line.taken, "cyan"), (line.mark, "bold yellow"), (line.coming, "dim"),
            f" {curve.values[-1]:.4g}",
        )  # fmt: skip
        place = " " * len(place)
        facts = f"steps 0 to {curve.steps[-1]}; {facts}, next {curve.coming:.4g}"
    yield Text(place + facts, "dim")


def _last(scheduled: Scheduled) -> str:
    resolved = scheduled.resolved
    if resolved is None:
        return "last value not known"
    waiting = "" if resolved.pending is None else f", {resolved.pending[1]:.4g} waits for step {resolved.pending[0]}"
    return f"last {resolved.value:.4g} at step {resolved.stamp}{waiting}"


@dataclass
class _Shown:
    """Parameters that are shown together: those that differ only in the numbers of their names."""

    parameters: list[Parameter]

    @property
    def first(self) -> Parameter:
        return self.parameters[0]

    @property
    def name(self) -> Text:
        if len(self.parameters) == 1:
            return Text(printable(self.first.name))
        return Text.assemble(printable(_pattern(self.first.name)), (f" x {len(self.parameters)}", "yellow"))

    @property
    def lines(self) -> int:
        return max(1, len(self.first.arrays))

    def cells(self, array: Array) -> list[Text]:
        size = array.bytes * len(self.parameters)
        form = array.shape
        return [Text(printable(array.label)), Text(form.dtype), Text(str(form.shape)), Text(bytes_text(size))]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _grouped(parameters: Sequence[Parameter]) -> list[_Shown]:
    alike: dict[object, _Shown] = {}
    for one in parameters:
        forms = tuple((array.label, array.shape) for array in one.arrays)
        key = one.optimizer, _pattern(one.name), one.steps, forms
        alike.setdefault(key, _Shown([])).parameters.append(one)
    return list(alike.values())


def _show_parameters(contents: Contents, screen: Console, everything: bool, repeated: bool) -> None:
    shown = [_Shown([one]) for one in contents.parameters]
    notes: list[str] = []
    if not everything and _lines(shown) >= ROWS:
        shown = _grouped(contents.parameters)
        if len(shown) < len(contents.parameters):
            notes.append("Parameters that differ only in the numbers of their names are shown as one, with all bytes.")
        while _lines(shown) >= ROWS and len(shown) > 1:
            shown.pop()
        if left := len(contents.parameters) - sum(len(group.parameters) for group in shown):
            notes.append(f"{_count(left, 'more parameter')} not shown.")
    parts = [part for part in all_parts(contents.tree) if isinstance(part.node, RuleNode)]
    for part in (*parts, None):
        own = [group for group in shown if group.first.optimizer == (part and part.where)]
        if own and part is None:
            screen.print(Text("no optimizer has state for these", "bold"))
        elif own and part and len(parts) > 1:
            screen.print(Text(f"{part.where}: {printable(title_of(part.node))}", "bold cyan"))
        if own:
            screen.print(_parameters(own, repeated))
            screen.print()
    if notes:
        screen.print(Text(f"{' '.join(notes)} --all shows each.\n", "yellow"))


def _lines(shown: Sequence[_Shown]) -> int:
    return sum(group.lines for group in shown)


def _parameters(shown: Sequence[_Shown], repeated: bool) -> Table:
    made = table("parameter", "steps", "array", "dtype", "shape", "bytes", numbers=("steps", "bytes"))
    for group in shown:
        steps = "-" if group.first.steps is None else f"{group.first.steps}"
        arrays = [group.cells(array) for array in group.first.arrays] or [[Text("none", "dim")]]
        made.add_row(group.name, steps, *arrays[0])
        for cells in arrays[1:]:
            made.add_row(*((group.name, steps) if repeated else ("", "")), *cells)
    return made


def _show_totals(contents: Contents, screen: Console) -> None:
    made = table("array", "tensors", "bytes", "", numbers=("tensors", "bytes", ""))
    arrays = contents.arrays
    for total in totals(arrays):
        made.add_row(Text(printable(total.label)), f"{total.tensors:,}", f"{total.bytes:,}", bytes_text(total.bytes))
    size = sum(array.bytes for array in arrays)
    made.add_row("all", f"{len(arrays):,}", f"{size:,}", bytes_text(size), style="bold")
    screen.print(made)
