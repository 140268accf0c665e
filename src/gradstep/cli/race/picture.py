"""`race.png`: the loss curves at each optimizer's best rate, and how much the rate matters."""

# pyright: reportUnknownMemberType=false
# Matplotlib leaves its keyword arguments without types, which makes every call of it partly unknown.

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from gradstep.cli.numbers import rate_text, short
from gradstep.cli.race.entrants import FAMILIES
from gradstep.cli.race.ranking import AtRate, Place

SMOOTHED = 0.08  # the share of the steps that a point of a curve is averaged over
NOTES = """band: the range over the seeds
ring: the best rate
\u00d7: diverged, or no better
    than at the start"""


class Style(NamedTuple):
    """How an optimizer is drawn in both panels."""

    color: str
    dash: Any
    marker: str


SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5))

# Distinct under the common colour deficiencies too; similar colours differ in dash. The first ten belong to
# the families, so that they look the same in every picture; the rest to rules of one's own.
STYLES = (
    Style("#56B4E9", SOLID, "o"),
    Style("#E69F00", SOLID, "s"),
    Style("#999933", DASHED, "D"),
    Style("#AA4499", DOTTED, "v"),
    Style("#0072B2", SOLID, "^"),
    Style("#332288", DASHED, "<"),
    Style("#117733", SOLID, "P"),
    Style("#D55E00", SOLID, "X"),
    Style("#808080", DASH_DOT, "h"),
    Style("#000000", SOLID, "*"),
    Style("#CC6677", DASHED, ">"),
    Style("#44AA99", DOTTED, "p"),
    Style("#882255", DASH_DOT, "d"),
)


def draw(title: str, places: Sequence[Place], same_rates: bool) -> bytes:
    """The picture as PNG.

    Args:
        title: what was raced.
        places: the ranking.
        same_rates: whether everyone had the same rates, so that they share an axis; otherwise
            rates are shown as multiples of each optimizer's usual one.
    """
    figure = Figure(figsize=(14, 6.4), dpi=110)
    FigureCanvasAgg(figure)
    figure.text(0.05, 0.955, title, fontsize=13, fontweight="bold", va="center")
    layout = {"left": 0.05, "right": 0.785, "bottom": 0.1, "top": 0.875, "wspace": 0.16}
    curves, sensitivity = figure.subplots(1, 2, width_ratios=(1.1, 1), gridspec_kw=layout)
    styles, ceiling = _styles(places), _ceiling(places)
    _draw_curves(curves, places, styles, ceiling)
    _draw_sensitivity(sensitivity, places, styles, ceiling, same_rates)
    _draw_legend(figure, [_label(place, same_rates) for place in places], styles)
    for axes in (curves, sensitivity):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _styles(places: Sequence[Place]) -> list[Style]:
    fixed = {family.name: style for family, style in zip(FAMILIES, STYLES, strict=False)}
    own = [place.entrant.name for place in places if place.entrant.name not in fixed]
    spare = STYLES[len(fixed) :]
    fixed.update({name: spare[order % len(spare)] for order, name in enumerate(own)})
    return [fixed[place.entrant.name] for place in places]


def _draw_curves(axes: Axes, places: Sequence[Place], styles: Sequence[Style], ceiling: float) -> None:
    lowest, over = math.inf, 1
    for order, (place, style) in enumerate(zip(places, styles, strict=True)):
        if not place.finished:
            continue
        steps, losses, over = _smooth(place)
        bottom, middle, top = losses.min(axis=0), np.median(losses, axis=0), losses.max(axis=0)
        lowest = min(lowest, float(middle.min()))
        above = 3 - order / len(places)
        axes.fill_between(steps, bottom, top, color=style.color, alpha=0.12, linewidth=0)
        axes.plot(steps, middle, color=style.color, linestyle=style.dash, linewidth=1.8, zorder=above)
    axes.set_title("Loss at each optimizer's best rate", loc="left", fontsize=11)
    axes.set_xlabel("steps (updates of the parameters)")
    axes.set_ylabel("training loss" if over == 1 else f"training loss, running mean over {over} steps")
    if math.isinf(lowest):
        axes.text(0.5, 0.5, "every run diverged", transform=axes.transAxes, ha="center", color="#808080")
    else:
        _scale(axes, lowest, ceiling)
        axes.set_xlim(left=0)


def _draw_sensitivity(
    axes: Axes, places: Sequence[Place], styles: Sequence[Style], ceiling: float, same_rates: bool
) -> None:
    def across(place: Place, at: AtRate) -> float:
        return at.rate if same_rates else float(f"{at.rate / place.entrant.usual:.4g}")

    lowest = math.inf
    for order, (place, style) in enumerate(zip(places, styles, strict=True)):
        look: dict[str, Any] = {"color": style.color, "zorder": 3 - order / len(places)}
        rates = np.array([across(place, at) for at in place.tried])
        losses = np.array([at.final_loss for at in place.tried])
        lost = ~(losses < ceiling)
        lowest = min([lowest, *losses[~lost].tolist()])
        axes.plot(rates, np.where(lost, ceiling, losses), linestyle=style.dash, linewidth=1.5, **look)
        axes.plot(rates[~lost], losses[~lost], marker=style.marker, linestyle="", markersize=5, **look)
        axes.plot(rates[lost], np.full(lost.sum(), ceiling), "x", clip_on=False, **look)
        if place.best.final_loss < ceiling:
            best = across(place, place.best), place.best.final_loss
            axes.plot(*best, "o", markersize=12, markerfacecolor="none", markeredgewidth=1.6, **look)
    axes.set_title("How much the rate matters", loc="left", fontsize=11)
    axes.set_xlabel("learning rate" if same_rates else "learning rate, as a multiple of the usual one")
    axes.set_ylabel("final loss, median over seeds")
    _label_rates(axes, sorted({across(place, at) for place in places for at in place.tried}))
    if not math.isinf(lowest):
        _scale(axes, lowest, ceiling)


def _draw_legend(figure: Figure, labels: Sequence[str], styles: Sequence[Style]) -> None:
    lines = [
        Line2D([], [], color=color, linestyle=dash, marker=marker, linewidth=1.8, markersize=5)
        for color, dash, marker in styles
    ]
    numbered = [f"{number}  {label}" for number, label in enumerate(labels, 1)]
    figure.legend(
        lines, numbered, loc="upper left", bbox_to_anchor=(0.797, 0.885), frameon=False, fontsize=9,
        handlelength=3.2, labelspacing=0.6, borderaxespad=0,
    )  # fmt: skip
    figure.text(0.797, 0.1, NOTES, fontsize=9, color="#606060")


def _label(place: Place, same_rates: bool) -> str:
    if place.final_loss is None:
        return f"{place.entrant.name}\n    diverged at step {place.diverged_at}"
    usual = "" if same_rates else f" (usual {rate_text(place.entrant.usual)})"
    return f"{place.entrant.name}\n    {short(place.final_loss)} at {rate_text(place.best.rate)}{usual}"


def _label_rates(axes: Axes, rates: list[float]) -> None:
    """A logarithmic axis with a label at each rate that was tried, as long as they are few."""
    axes.set_xscale("log")
    if len(rates) <= 10:
        axes.set_xticks(rates, [rate_text(rate) for rate in rates])
        axes.minorticks_off()


def _smooth(place: Place) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Steps and running means of the losses, one row per seed, and over how many steps a mean runs."""
    curves = [run.curve for run in place.finished]
    losses = np.array([curve.losses for curve in curves])
    points = losses.shape[1]
    reach = int(SMOOTHED * points / 2)
    means: list[NDArray[np.float64]] = [
        losses[:, max(0, at - reach) : at + reach + 1].mean(axis=1) for at in range(points)
    ]
    window = curves[0].window
    steps = np.array([(at + 0.5) * window for at in range(points)])
    return steps, np.stack(means, axis=1), (2 * reach + 1) * window


def _ceiling(places: Sequence[Place]) -> float:
    """The top of both panels: a little above the loss before the first step."""
    top = float(np.median([run.first_loss for place in places for run in place.runs]))
    return top + 0.1 * abs(top) if top else 1.0


def _scale(axes: Axes, lowest: float, ceiling: float) -> None:
    """A logarithmic axis where the losses are positive and differ by more than a factor of ten."""
    if lowest > 0 and ceiling / lowest > 10:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.25, ceiling)
        if ceiling / lowest < 1e4:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
            axes.minorticks_off()
    else:
        axes.set_ylim(lowest - 0.05 * (ceiling - lowest), ceiling)
