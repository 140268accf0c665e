"""`bench.png`: how near to the limit each family is, and the time of a step over the size."""

# pyright: reportUnknownMemberType=false
# Matplotlib leaves its keyword arguments without types, which makes every call of it partly unknown.

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gradstep.cli.bench.measuring import Result, Timed

# Distinct under the common colour deficiencies too; lines differ in dash and marker as well.
OURS = {"numpy": "#0072B2", "torch": "#D55E00", "jax": "#117733", "mlx": "#AA4499"}
LIMIT, PEERS = "#000000", ("#56B4E9", "#E69F00", "#999933", "#CC6677", "#332288", "#44AA99", "#882255")
DASHES: tuple[Any, ...] = ((0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)), (0, (8, 2, 1.5, 2, 1.5, 2)))
MARKERS = "svD^P<>"
SHOWN = "AdamW"  # in the panel of times, where it was measured
LINE = 190  # characters of the subtitle in a line
TOP = 1.6  # of the panel of bars, at most: whiskers beyond it are noise


def draw(title: str, subtitle: str, results: Sequence[Result]) -> bytes:
    """The picture as PNG; the panel of times shows one family in the library that has most peers."""
    figure = Figure(figsize=(15, 6.6), dpi=110)
    FigureCanvasAgg(figure)
    figure.text(0.05, 0.965, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.05, 0.94, fill(subtitle, LINE), fontsize=9, color="#606060", va="top")
    layout = {"left": 0.05, "right": 0.985, "bottom": 0.2, "top": 0.84, "wspace": 0.17}
    bars, times = figure.subplots(1, 2, width_ratios=(1.5, 1), gridspec_kw=layout)
    _draw_bars(bars, results)
    _draw_times(times, results)
    for axes in (bars, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_bars(axes: Axes, results: Sequence[Result]) -> None:
    """Each family at its largest size, one bar for each library."""
    families = list(dict.fromkeys(result.case.family.name for result in results))
    libraries = list(dict.fromkeys(result.case.library for result in results))
    width, highest = 0.84 / len(libraries), 1.0
    largest = {(r.case.family.name, r.case.library): r for r in sorted(results, key=lambda r: r.case.elements)}
    for place, library in enumerate(libraries):
        axes.bar(0, 0, color=OURS[library], label=f"gradstep on {library}")
        for at, family in enumerate(families):
            result = largest.get((family, library))
            ours = result and result.find("ours")
            share = result.share(ours) if result and ours else None
            if share is not None:
                x = at + (place - (len(libraries) - 1) / 2) * width
                whiskers = [[share.median - share.q1], [share.q3 - share.median]]
                axes.bar(x, share.median, width * 0.9, color=OURS[library])
                axes.errorbar(x, share.median, yerr=whiskers, color="#202020", capsize=2.5, linewidth=1)
                inside = share.median > 0.1
                axes.annotate(
                    f"{100 * share.median:.0f}", (x, 0 if inside else share.q3), xytext=(0, 4),
                    textcoords="offset points", ha="center", fontsize=9 if len(libraries) < 3 else 7,
                    color="white" if inside else "#202020",
                )  # fmt: skip
                highest = max(highest, share.q3)
    axes.axhline(1, color=LIMIT, linestyle="--", linewidth=1.2, label="limit: the same passes, no arithmetic")
    sizes = {family: max(r.case.elements for r in results if r.case.family.name == family) for family in families}
    axes.set_xticks(range(len(families)), [f"{name}\n{_count(sizes[name])}" for name in families], fontsize=9)
    axes.set_xlim(-0.6, len(families) - 0.4)
    axes.set_ylim(0, min(highest, TOP) * 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("family, and its largest number of elements")
    axes.set_ylabel("limit's time / step's time (median, quartiles)")
    axes.set_title("How near to the limit a step is, in percent of its speed", loc="left", fontsize=11)


def _count(elements: int) -> str:
    mantissa, _, exponent = f"{elements:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _draw_times(axes: Axes, results: Sequence[Result]) -> None:
    families = [result.case.family.name for result in results]
    family = SHOWN if SHOWN in families else families[0]
    mine = [result for result in results if result.case.family.name == family]
    peers = {r.case.library: sum(timed.kind == "peer" for timed in r.timed) for r in mine}
    library = max(peers, key=lambda name: peers[name])
    lines: dict[str, list[tuple[int, Timed]]] = {}
    for result in sorted(mine, key=lambda result: result.case.elements):
        for timed in result.timed if result.case.library == library else ():
            lines.setdefault(timed.side, []).append((result.case.elements, timed))
    styles = _styles(list(lines), {points[0][1].side: points[0][1].kind for points in lines.values()}, OURS[library])
    for side, points in lines.items():
        sizes, spreads = [size for size, _ in points], [timed.spread for _, timed in points]
        middle, look = [1e3 * s.median for s in spreads], styles[side]
        ends = [[1e3 * (s.median - s.q1) for s in spreads], [1e3 * (s.q3 - s.median) for s in spreads]]
        axes.errorbar(sizes, middle, yerr=ends, markersize=5, capsize=2.5, elinewidth=0.9, label=side, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of elements")
    axes.set_ylabel("time of a step in ms (median, quartiles)")
    axes.set_title(f"{family} on {library}: time of a step", loc="left", fontsize=11)


def _styles(sides: Sequence[str], kinds: dict[str, str], own: str) -> dict[str, dict[str, Any]]:
    peers = [side for side in sides if kinds[side] == "peer"]
    styles: dict[str, dict[str, Any]] = {
        side: {"color": color, "linestyle": dash, "marker": marker}
        for side, color, dash, marker in zip(peers, cycle(PEERS), cycle(DASHES), cycle(MARKERS), strict=False)
    }
    for side in sides:
        if kinds[side] == "ours":
            styles[side] = {"color": own, "linestyle": "-", "marker": "o", "linewidth": 2.4, "zorder": 3}
        elif kinds[side] == "limit":
            styles[side] = {"color": LIMIT, "linestyle": "--", "linewidth": 1.3, "zorder": 4}
    return styles
