"""A leaderboard's pictures: what bytes buy, where a personal mask wins, and whose ranks are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from fedlth.bench.board import Board, Entry, Line
from fedlth.bench.contrasts import contrast, gains
from fedlth.bench.controls import DENSE, GLOBAL, RANDOM
from fedlth.report.canvas import Picture, Theme
from fedlth.report.choice import Choice
from fedlth.report.intervals import Interval
from fedlth.report.measure import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGA = 1e6
# Distinct marks: which kind of model a point is, whatever method it stands beside.
MARKS = {RANDOM: ("v", "random"), GLOBAL: ("D", "global_mask"), DENSE: ("*", "dense")}
PAIRS = (("ticket", "global_mask"), ("own_tuned", "own_global_mask"))  # a personal mask, and the global model's


def pictures(board: Board) -> tuple[Picture, ...]:
    """Return the pictures that these results allow."""
    found: list[Picture] = []
    if board.shown is None:
        return ()
    word = "highest" if board.shown.measure.higher_is_better else "lowest"
    guide = (
        f"One numbered disc a method: the mean test {board.shown.label} over clients (the {word} is best) against all "
        "payload bytes that its run moved, both ways and for every receiver; a disc that would cover another is moved "
        "aside, on a thread from its true place. The line is the Pareto front: a method on it (filled) has no better "
        "one for as few bytes. Small marks, right of a disc and with its number, are its controls at the same bytes: a "
        "random mask of equal density, the global model's own mask, the dense twin. A ticket buys something where its "
        "disc is clear of them."
    )
    for partition in board.entries:
        picture = Picture(
            f"pareto_{partition}", f"{partition}: what bytes buy", guide, 8.6, 5.4, Pareto(board, partition)
        )
        found.append(picture)
        guide = "As above."
    lines = mask_lines(board)
    if lines:
        found.append(Picture(
            "personal_less_global_mask", "Where a personal mask wins",
            "The personal mask less the global model's own mask of the same density, on the same clients. Above the "
            "zero line a personal mask is better; sparser is to the right. Bars are 95 % intervals, filled where they "
            f"exclude zero (not corrected for their number). {_crossing(lines)}",
            8.6, 4.2 * -(-len(board.entries) // 3), MaskGain(board.shown, tuple(lines)),
        ))  # fmt: skip
    if board.ranking is not None:
        found.append(Picture(
            "critical_difference", "Whose ranks are told apart",
            "Average rank over blocks (partition, seed), best on the left. Methods under one bar are not told apart: "
            "their ranks differ by less than Nemenyi's critical difference at 5 % (Demsar, 2006).",
            8.6, 1.5 + 0.23 * len(board.ranking.names), RankAxis(board),
        ))  # fmt: skip
    return tuple(found)


@dataclass(frozen=True)
class Pareto:
    """A partition's methods by total bytes and metric, with their controls and the Pareto front."""

    board: Board
    partition: str

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes, shown = figure.add_subplot(), self.board.shown
        assert shown is not None
        lines = [line for line in self.board.lines[self.partition] if not line.control]
        held = self.board.entries[self.partition]
        x = {line.method: held[line.method].cost.total_bytes / MEGA for line in lines}
        y = {line.method: shown.factor * line.summary.mean for line in lines}
        front = pareto(x, y, higher_is_better=shown.measure.higher_is_better)
        self._scale(axes, list(x.values()))
        axes.plot([x[one] for one in front], [y[one] for one in front], color=theme.gain, linewidth=1.2, zorder=1,
                  drawstyle="steps-post")  # fmt: skip
        axes.plot(
            [x[line.method] for line in self._all], [shown.factor * line.summary.mean for line in self._all], alpha=0
        )  # the limits must be known before discs are moved apart
        axes.margins(x=0.08, y=0.1)
        on_front = [number for number, line in enumerate(lines) if line.method in front]
        moved = _apart(axes, [(x[line.method], y[line.method]) for line in lines], on_front)
        shifts = dict(zip((line.method for line in lines), moved, strict=True))
        used: list[str] = []
        for number, line in enumerate(lines, start=1):
            place, on, shift = (x[line.method], y[line.method]), line.method in front, shifts[line.method]
            _mark(axes, place, shift, "o", size=14, zorder=4, edge=theme.gain, colour=theme.gain if on else theme.page)
            if shift:  # a disc that was moved aside hangs on a thread from its true place
                axes.annotate("", place, (shift, 0), textcoords="offset points", zorder=2,
                              arrowprops={"arrowstyle": "-", "color": theme.ink, "lw": 0.7, "alpha": 0.6,
                                          "shrinkA": 0, "shrinkB": 0})  # fmt: skip
                axes.plot(*place, "o", color=theme.ink, markersize=3, zorder=2)
            axes.annotate(str(number), place, (shift, 0), ha="center", va="center", fontsize=8, zorder=5,
                          textcoords="offset points", color=theme.page if on else theme.ink)  # fmt: skip
            used += self._controls(axes, theme, number, line.method, x[line.method], shift + 13)
        axes.set_xlabel("payload moved, down and up, every receiver counted (MB)")
        axes.set_ylabel(f"mean test {shown.axis}")
        self._legend(axes, theme, [line.method for line in lines], [kind for kind in MARKS if kind in used])

    @property
    def _all(self) -> list[Line]:
        """Methods and controls that are drawn."""
        return [line for line in self.board.lines[self.partition] if not line.control or line.control in MARKS]

    def _scale(self, axes: Axes, x: Sequence[float]) -> None:
        """Stretch few bytes apart; a method that moves nothing has its place at zero."""
        moved = [value for value in x if value > 0]
        if moved and max(moved) > 8 * min(moved):
            axes.set_xscale("symlog", linthresh=min(moved), linscale=0.5)
            low = -0.25 * min(moved)
            axes.set_xlim(low if min(x) <= 0 else 0.6 * min(moved), 1.8 * max(moved))
            from matplotlib.ticker import FuncFormatter

            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    def _controls(self, axes: Axes, theme: Theme, number: int, method: str, x: float, shift: float) -> list[str]:
        """Draw a method's controls right of its disc; return which kinds they are."""
        shown, used = self.board.shown, []
        assert shown is not None
        for line in self._all:
            if line.method == method and line.control:
                (marker, arm), place = MARKS[line.control], (x, shown.factor * line.summary.mean)
                _mark(axes, place, shift, marker, size=9 if marker == "*" else 6, zorder=3, colour=theme.colour(arm))
                axes.annotate(
                    str(number), place, (shift + 5, 0), textcoords="offset points", fontsize=6.5, va="center",
                    color=theme.colour(arm), zorder=3,
                )  # fmt: skip
                used.append(line.control)
        return used

    def _legend(self, axes: Axes, theme: Theme, methods: Sequence[str], used: Sequence[str]) -> None:
        from matplotlib.lines import Line2D

        marks = [
            Line2D([], [], marker=MARKS[kind][0], color=theme.colour(MARKS[kind][1]), linestyle="", label=kind)
            for kind in used
        ]
        names = [
            Line2D([], [], linestyle="", marker=f"${number}$", color=theme.ink, markersize=7, label=name)
            for number, name in enumerate(methods, start=1)
        ]
        axes.legend(handles=[*names, *marks], loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5,
                    handletextpad=0.3, ncols=1 + (len(names) + len(marks)) // 24)  # fmt: skip


def _mark(
    axes: Axes, place: tuple[float, float], shift: float, marker: str, *, size: float, zorder: float, colour: str,
    edge: str | None = None,
) -> None:  # fmt: skip
    """Draw a mark `shift` points right of its place."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    at = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    axes.plot(*place, marker, transform=at, color=colour, markersize=size, zorder=zorder, clip_on=False,
              markeredgecolor=edge or colour, markeredgewidth=1.4 if edge else 0)  # fmt: skip


def _apart(axes: Axes, places: Sequence[tuple[float, float]], first: Sequence[int]) -> list[float]:
    """Return how many points each disc moves aside so that none covers another; those in `first` stay if they can."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.get_xlim(), axes.get_ylim()  # these settle the limits
    points = 72 / figure.dpi * axes.transData.transform(np.array(places))
    end = 72 / figure.dpi * axes.bbox.x1
    taken: list[tuple[float, float]] = []
    moved = [0.0] * len(points)
    for number in sorted(range(len(points)), key=lambda i: i not in first):
        x, y = points[number]
        beside = [a for a, b in taken if abs(y - b) < 16]
        steps = (sign * 32.0 * step for step in count() for sign in (1, -1))  # there is always room on the left
        inside = (shift for shift in steps if not shift or x + shift < end - 24)
        moved[number] = next(shift for shift in inside if all(abs(x + shift - a) >= 30 for a in beside))
        taken.append((x + moved[number], y))
    return moved


def pareto(x: dict[str, float], y: dict[str, float], *, higher_is_better: bool) -> list[str]:
    """Return who no other beats in cost `x` (less is better) and value `y` both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front: list[str] = []
    best = -np.inf
    for name in sorted(x, key=lambda one: (x[one], -sign * y[one])):
        if sign * y[name] > best:
            front.append(name)
            best = sign * y[name]
    return front


@dataclass(frozen=True)
class MaskLine:
    """A method's personal mask less the global model's own, by density: (density, difference, interval)."""

    partition: str
    method: str
    points: tuple[tuple[float, float, Interval], ...]


def mask_lines(board: Board) -> list[MaskLine]:
    """Return a line for every method and partition that has both masks at a density."""
    found = []
    for partition, held in board.entries.items():
        for label, entry in held.items():
            points = [point for pair in PAIRS for point in _points(entry, *pair)]
            if points:
                found.append(MaskLine(partition, label, tuple(sorted(points, key=lambda point: -point[0]))))
    return found


def _points(entry: Entry, personal: str, general: str) -> list[tuple[float, float, Interval]]:
    points, shown = [], entry.results.shown
    choices = {summary.choice: summary for summary in entry.results.summaries}
    for one, summary in choices.items():
        if one.arm != personal or one.chosen or summary.density > 1 - 1e-9:
            continue
        other = Choice(general, one.target_density)
        if other not in choices:
            alone = [choice for choice in choices if choice.arm == general] if general == "own_global_mask" else []
            if not alone:
                continue
            other = alone[0]
        found = contrast(gains(entry.group, one, entry.group, other), better=shown.measure.higher_is_better)
        if found is not None:
            sign = shown.factor if shown.measure.higher_is_better else -shown.factor
            ends = sorted((sign * found.interval.low, sign * found.interval.high))
            points.append((summary.density, sign * found.mean, Interval(*ends)))
    return points


def _crossing(lines: Sequence[MaskLine]) -> str:
    """Say at which densities a personal mask wins, line by line."""
    told = []
    for line in lines:
        wins = [f"{density:.2g}" for density, _, interval in line.points if interval.low > 0]
        told.append(f"{line.method} on {line.partition} {'at ' + ', '.join(wins) if wins else 'nowhere'}")
    more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
    return f"Above zero with its whole interval: {'; '.join(told[:6])}{more}."


@dataclass(frozen=True)
class MaskGain:
    """The lines of `mask_lines` over density, sparser to the right."""

    shown: Shown
    lines: tuple[MaskLine, ...]

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure: one panel a partition."""
        partitions = list(dict.fromkeys(line.partition for line in self.lines))
        columns = min(3, len(partitions))
        panels = figure.subplots(-(-len(partitions) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(partitions) :]:
            axes.set_visible(False)
        for axes, partition in zip(panels.flat, partitions, strict=False):
            self._panel(axes, theme, partition)
        unit = "points" if self.shown.measure.percent else self.shown.label
        figure.supylabel(f"personal less global mask ({unit})", fontsize=10)
        figure.supxlabel("density (share of prunable weights kept; sparser to the right)", fontsize=10)
        handles = {text: handle for axes in panels.flat for handle, text in zip(*axes.get_legend_handles_labels(),
                                                                                strict=True)}  # fmt: skip
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8.5)

    def _panel(self, axes: Axes, theme: Theme, partition: str) -> None:
        methods = list(dict.fromkeys(line.method for line in self.lines))
        colours, markers, dashes = _colours(theme), "osD^vPX<>h", ("-", "--", ":")
        axes.set_title(partition)
        axes.axhline(0, color=theme.ink, linewidth=1)
        for line in (line for line in self.lines if line.partition == partition):
            number = methods.index(line.method)
            colour, marker = colours[number % len(colours)], markers[number % len(markers)]
            shift = (number - (len(methods) - 1) / 2) * min(0.06, 0.5 / len(methods))
            x = [-np.log2(density) + shift for density, _, _ in line.points]
            axes.plot(x, [gain for _, gain, _ in line.points], color=colour, linewidth=1.1, marker=marker, markersize=5,
                      linestyle=dashes[number // len(colours) % len(dashes)], label=line.method)  # fmt: skip
            for at, (_, gain, ends) in zip(x, line.points, strict=True):
                axes.plot([at, at], [ends.low, ends.high], color=colour, linewidth=1.1, alpha=0.6)
                if not ends.excludes(0):
                    axes.plot(at, gain, marker, color=theme.page, markeredgecolor=colour, markersize=5, zorder=4)
        ticks: dict[str, float] = {}
        for density in sorted({d for line in self.lines for d, _, _ in line.points}, reverse=True):
            place = float(-np.log2(density))
            if all(abs(place - other) > 0.4 for other in ticks.values()):  # else one would be written over another
                ticks[f"{density:.2g}"] = place
        axes.set_xticks(list(ticks.values()), list(ticks))
        axes.margins(x=0.1, y=0.1)


def _colours(theme: Theme) -> list[str]:
    names = ("ticket", "one_shot", "global", "local", "refined", "global_mask", "own", "ticket_0")
    return [theme.colour(name) for name in names]


@dataclass(frozen=True)
class RankAxis:
    """Demsar's diagram: average ranks on an axis, a bar over methods that are not told apart."""

    board: Board

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        found = self.board.ranking
        assert found is not None
        axes, count = figure.add_subplot(), len(found.names)
        axes.set_xlim(0.9, count + 0.1)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(False)
        axes.set_yticks([])
        axes.xaxis.set_ticks_position("top")
        axes.spines["top"].set_visible(True)
        axes.set_xticks(range(1, count + 1))
        left = (count + 1) // 2
        for place, (name, rank) in enumerate(zip(found.names, found.ranks, strict=True)):
            row = place if place < left else count - 1 - place
            height = -1.6 - row - 0.45 * len(found.groups)
            side = 0.9 if place < left else count + 0.1
            axes.plot([rank, rank, side], [0, height, height], color=theme.faint, linewidth=1)
            axes.plot(rank, 0, "o", color=theme.gain, markersize=5, clip_on=False)
            axes.annotate(f"{name} {rank:.2f}", (side, height), (-4 if place < left else 4, 0), va="center", fontsize=9,
                          textcoords="offset points", ha="right" if place < left else "left",
                          annotation_clip=False)  # fmt: skip
        for number, (first, last) in enumerate(found.groups):
            height = -0.7 - 0.45 * number
            axes.plot([found.ranks[first] - 0.03, found.ranks[last] + 0.03], [height] * 2, color=theme.ink,
                      linewidth=3.2, solid_capstyle="butt")  # fmt: skip
        axes.set_ylim(-1.6 - left - 0.45 * len(found.groups), 0)
        axes.set_title(f"critical difference {found.critical:.2f}, {len(found.blocks)} blocks", fontsize=9, loc="left",
                       color=theme.ink, pad=14)  # fmt: skip
