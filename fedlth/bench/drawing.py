"""What a leaderboard's pictures share: the marks of controls, and axes that hold a few far values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlth.bench.controls import DENSE, GLOBAL, RANDOM
from fedlth.report.canvas import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGA = 1e6
# Distinct marks: which kind of model a point is, whatever method it stands beside.
MARKS = {RANDOM: ("v", "random"), GLOBAL: ("D", "global_mask"), DENSE: ("*", "dense")}


def beyond(axes: Axes, value: float, row: float, edge: float, below: bool, colour: str) -> None:
    """Write a value that the axis does not reach at its end, with an arrow."""
    axes.annotate(f"◂ {value:.3g}" if below else f"{value:.3g} ▸", (edge, row), ha="left" if below else "right",
                  va="center", fontsize=7.5, color=colour, zorder=5)  # fmt: skip


def stretch(axes: Axes, x: Sequence[float]) -> None:
    """Set an axis of bytes for all of `x`, few bytes stretched apart; what moves nothing has its place at zero."""
    from matplotlib.ticker import FuncFormatter

    moved = [value for value in x if value > 0]
    if moved and max(moved) > 8 * min(moved):
        axes.set_xscale("symlog", linthresh=min(moved), linscale=0.4)
        powers = [10.0**n for n in range(-6, 9) if 1.5 * min(moved) < 10.0**n <= 2 * max(moved)]
        axes.set_xticks([0.0, *powers] if min(x) <= 0 else powers)
        axes.set_xlim(-0.25 * min(moved) if min(x) <= 0 else 0.6 * min(moved), 2.5 * max(moved))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
    else:
        room = 0.1 * (max(x) - min(x)) or 1.0
        axes.set_xlim(min(x) - room, max(x) + room)


def control_legend(figure: Figure, theme: Theme, used: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    own = Line2D([], [], marker="o", color=theme.page, markeredgecolor=theme.gain, linestyle="", label="the method")
    marks = [
        Line2D([], [], marker=MARKS[kind][0], color=theme.colour(MARKS[kind][1]), linestyle="", label=kind)
        for kind in used
    ]
    figure.legend(handles=[own, *marks], loc="outside upper center", ncols=4, fontsize=8.5, handletextpad=0.3)
