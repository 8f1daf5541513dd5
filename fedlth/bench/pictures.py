"""A leaderboard's pictures: what bytes buy, where a personal mask wins, and whose ranks are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from fedlth.bench.board import Board, Line
from fedlth.bench.contrasts import FEWEST, Values
from fedlth.bench.drawing import MARKS, MEGA, beyond, control_legend, stretch
from fedlth.bench.mask_picture import Tickets, crossing, height, mask_lines, scale_of
from fedlth.report.canvas import Picture, Theme, spread
from fedlth.report.intervals import Interval
from fedlth.report.measure import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_MARKS = 20  # controls that the picture of what bytes buy has room for


def pictures(board: Board) -> tuple[Picture, ...]:
    """Return the pictures that these results allow."""
    found: list[Picture] = []
    if board.shown is None:
        return ()
    word = "highest" if board.shown.measure.higher_is_better else "lowest"
    rows = (
        f"One row a method, best on top, its number the same in every picture. Left, the mean test {board.shown.label} "
        f"over clients (the {word} is best) with its 95 % interval, and the controls of its masks at the same bytes: a "
        "random mask of equal density (or a row of the bench that is its control, at its own bytes), the global "
        "model's own mask, the dense twin. A mask buys something where its disc is clear of the marks just below it (a "
        "control with the very same mask is left out). Right, all payload bytes that its run moved, both ways and "
        "for every receiver. Filled: on the Pareto front, where no other method is better for as few bytes. An arrow "
        "stands for a value beyond the axis, which is written beside it."
    )
    front = (
        "The same means against the same bytes, one numbered dot a method. The line is the Pareto front: a method on "
        "it (filled) has no better one for as few bytes. Right of a dot, joined to it, the controls of its masks, "
        f"where they are at most {MOST_MARKS} in all. Bars are 95 % intervals over seeds, of these clients (Student's "
        f"t; none below {FEWEST} seeds). What cost the same bytes stands side by side; a row of the bench "
        "that is a control has bytes of its own. A number that has no room beside its dot hangs on a thread; an arrow "
        "with a value stands for a method beyond the axis, which then ends at the outermost of the others."
    )
    tickets = (
        "Methods whose clients end with masks of their own. Left, each one's mean for its bytes, joined to its "
        "controls, which cost as many: a random mask, the global model's own mask of the same density, the dense twin. "
        "Right, the personal mask less the global model's own, on the same clients, over density: above zero a "
        "personal mask is better. Bars are 95 % intervals, filled where they exclude zero; a dotted line stands where "
        "a method with several densities begins to win. "
    )
    for partition in board.entries:
        tall = 1.5 + 0.21 * len(board.entries[partition])
        found += [
            Picture(f"rows_{partition}", f"{partition}: methods and their controls", rows, 8.6, tall,
                    Rows(board, partition)),
            Picture(f"pareto_{partition}", f"{partition}: what bytes buy", front, 8.6, 6.0, Pareto(board, partition)),
        ]  # fmt: skip
        lines = [line for line in mask_lines(board) if line.partition == partition]
        if lines:
            found.append(Picture(
                f"tickets_{partition}", f"{partition}: what personal tickets buy, and where",
                f"{tickets}{scale_of(lines)}{crossing(lines)}", 8.6, height(lines),
                Tickets(board, partition, tuple(lines), numbers(board)),
            ))  # fmt: skip
        rows = front = "As above."
        tickets = "As above. "
    if board.ranking is not None:
        found.append(Picture(
            "critical_difference", "Whose ranks are told apart",
            "Average rank over blocks (partition, seed), best on the left. Methods under one bar are not told apart: "
            "their ranks differ by less than Nemenyi's critical difference at 5 % (Demsar, 2006).",
            8.6, 1.5 + 0.23 * len(board.ranking.names), RankAxis(board),
        ))  # fmt: skip
    return tuple(found)


def numbers(board: Board) -> dict[str, int]:
    """Return each method's number, one for all pictures: by its place on the first partition that has it."""
    ranked = [line.method for lines in board.lines.values() for line in lines if not line.control]
    return {method: number for number, method in enumerate(dict.fromkeys(ranked), start=1)}


@dataclass(frozen=True)
class Rows:
    """A partition's methods, one a row: the metric with its controls, and beside it the bytes."""

    board: Board
    partition: str

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        board, shown = self.board, self.board.shown
        assert shown is not None
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
        lines = [line for line in board.lines[self.partition] if not line.control]
        row = {line.method: place for place, line in enumerate(lines)}
        x, y = costs(board, self.partition), means(board, self.partition)
        front = pareto(x, y, higher_is_better=shown.measure.higher_is_better)
        drawn = [line for line in board.lines[self.partition] if not line.control or (line.control in MARKS
                                                                                     and not line.same)]  # fmt: skip
        values = [shown.factor * line.drawn for line in drawn]
        low, high = limits(values)
        # Intervals have room beyond the outermost means: a quarter of the axis on each side, the rest is cut off.
        bars = [
            end
            for line, value in zip(drawn, values, strict=True) if not line.control and low <= value <= high
            for end in _inside(shown, line.interval)
        ]  # fmt: skip
        room = 0.25 * (high - low)
        least = max(low - room, min([low, *bars]))
        most = min(high + room, max([high, *bars]))
        used: list[str] = []
        for line, value in zip(drawn, values, strict=True):
            place = row[line.method]
            if not low <= value <= high:
                colour = theme.colour(MARKS[line.control][1]) if line.control else theme.gain
                beyond(left, value, place, least if value < low else most, value < low, colour)
            elif line.control:
                marker, arm = MARKS[line.control]
                left.plot(
                    value,
                    place + 0.27,
                    marker,
                    color=theme.colour(arm),
                    markersize=8 if marker == "*" else 5.5,
                    zorder=3,
                )
            else:
                ends = np.clip(_inside(shown, line.interval), least, most)
                left.plot(ends, [place, place], color=theme.gain, linewidth=1.3, alpha=0.6, zorder=2)
                left.plot(value, place, "o", color=theme.gain if line.method in front else theme.page, markersize=7,
                          markeredgecolor=theme.gain, markeredgewidth=1.3, zorder=4)  # fmt: skip
            used += [line.control] if line.control else []
        for method, place in row.items():
            right.plot(x[method], place, "o", color=theme.gain if method in front else theme.page, markersize=7,
                       markeredgecolor=theme.gain, markeredgewidth=1.3, clip_on=False)  # fmt: skip
        number = numbers(board)
        left.set_yticks(range(len(lines)), [f"{line.method} {number[line.method]}" for line in lines], fontsize=8.5)
        left.set_ylim(len(lines) - 0.4, -0.6)
        pad = 0.05 * (high - low) or 1.0
        left.set_xlim(least - pad, most + pad)
        stretch(right, list(x.values()))
        for axes in (left, right):
            axes.grid(True, axis="x")
        left.set_xlabel(f"mean test {shown.axis}")
        right.set_xlabel("payload (MB)")
        control_legend(figure, theme, [kind for kind in MARKS if kind in used])


@dataclass(frozen=True)
class Pareto:
    """A partition's methods by total bytes and metric, with few controls beside them, and the Pareto front."""

    board: Board
    partition: str

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes, shown = figure.add_subplot(), self.board.shown
        assert shown is not None
        x, y = costs(self.board, self.partition), means(self.board, self.partition)
        front = pareto(x, y, higher_is_better=shown.measure.higher_is_better)
        number, lines = numbers(self.board), self._lines()
        values = [shown.factor * line.drawn for line in lines]
        low, high = limits(values)
        reach = _reach(shown)
        ends = [float(np.clip(end, *reach)) for line, value in zip(lines, values, strict=True) if low <= value <= high
                for end in _ends(line, shown.factor)]  # fmt: skip
        room = 0.5 * (high - low)  # a wide interval is cut off rather than that it flattens all means
        bottom, top = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
        pad = 0.07 * (top - bottom) or 1.0
        axes.set_ylim(bottom - pad, top + pad)
        stretch(axes, [self.board.cost_of(self.partition, line).total_bytes / MEGA for line in lines])
        if min(x.values()) <= 0 < max(x.values()):  # room for what costs nothing, side by side
            axes.set_xlim(left=2 * axes.get_xlim()[0])
        axes.set_xlabel("payload moved, down and up, every receiver counted (MB)")
        axes.set_ylabel(f"mean test {shown.axis}")
        used = [line.control for line in lines if line.control]
        if used:
            control_legend(figure, theme, [kind for kind in MARKS if kind in used])
        names = ", ".join(f"{number[name]}~{name}" for name in sorted(x, key=lambda one: number[one]))
        figure.supxlabel(fill(names, 130).replace("~", " "), fontsize=7.5, ha="left", x=0.02)
        figure.draw_without_rendering()  # so that places are known before anything is set beside anything
        paid = [self.board.cost_of(self.partition, line).total_bytes / MEGA for line in lines]
        places = dict(zip(((line.method, line.control, line.row) for line in lines), apart(axes, paid),
                          strict=True))  # fmt: skip
        step = [name for name in front if low <= y[name] <= high]
        axes.plot([places[one, "", ""] for one in step], [y[one] for one in step], color=theme.gain, linewidth=1.2,
                  zorder=1, drawstyle="steps-post")  # fmt: skip
        inside, bars = dict[str, tuple[float, float]](), list[tuple[float, float, float]]()
        for line, value in zip(lines, values, strict=True):
            name, place = line.method, places[line.method, line.control, line.row]
            marker, arm = MARKS[line.control] if line.control else ("o", "")
            colour = theme.colour(arm) if arm else theme.gain
            if not low <= value <= high:
                said = f"{'↓' if value < low else '↑'} {value:.3g}"
                edge = bottom - 0.5 * pad if value < low else top + 0.5 * pad
                axes.annotate(said if arm else f"{number[name]} {said}", (place, edge), ha="center", va="center",
                              fontsize=8, color=colour if arm else theme.ink)  # fmt: skip
                continue
            bar = np.clip(
                _ends(line, shown.factor) or [value] * 2, max(bottom - pad, reach[0]), min(top + pad, reach[1])
            )
            bars.append((place, float(bar[0]), float(bar[1])))
            axes.plot([place] * 2, bar, color=colour, linewidth=1.2, alpha=0.55, zorder=2)
            if arm and low <= y[name] <= high:
                axes.plot([places[name, "", ""], place], [y[name], value], color=theme.faint, linewidth=0.8, zorder=1)
            axes.plot(place, value, marker, color=theme.page if not arm and name not in front else colour,
                      markeredgecolor=colour, markersize=7 if marker == "*" else 5, markeredgewidth=1.2, zorder=3,
                      clip_on=False)  # fmt: skip
            inside |= {} if arm else {name: (place, value)}
        told = sorted(inside, key=lambda one: (one not in front, number[one]))
        dots = [inside[name] for name in told]
        for name, dot, (right, up) in zip(told, dots, beside(axes, dots, bars), strict=True):
            far = abs(right) > 14 or abs(up) > 14
            axes.annotate(str(number[name]), dot, (right, up), textcoords="offset points", ha="center", va="center",
                          fontsize=8, fontweight="bold" if name in front else "normal", color=theme.ink, zorder=5,
                          arrowprops={"arrowstyle": "-", "color": theme.ink, "lw": 0.5, "alpha": 0.5, "shrinkA": 5,
                                      "shrinkB": 2} if far else None)  # fmt: skip

    def _lines(self) -> list[Line]:
        """Return the rows of methods, each with its controls behind it where those are few enough to be told apart."""
        rows = [line for line in self.board.lines[self.partition] if line.control in ("", *MARKS) and not line.same]
        few = sum(line.control != "" for line in rows) <= MOST_MARKS
        return [line for line in rows if few or not line.control]


def _reach(shown: Shown) -> tuple[float, float]:
    """Return the least and the largest value that the metric can have, as it is drawn."""
    return (0.0, 100.0) if shown.measure.percent else (-np.inf, np.inf)


def _inside(shown: Shown, interval: Interval) -> list[float]:
    """Return the ends of an interval as they are drawn: no mean lies beyond what the metric can be."""
    return [float(np.clip(shown.factor * end, *_reach(shown))) for end in (interval.low, interval.high)]


def _ends(line: Line, factor: float) -> list[float]:
    """Return the ends of a row's interval over seeds, as they are drawn; nothing where there is none."""
    found = [factor * (end + line.shift) for end in (line.seeds.low, line.seeds.high)]
    return found if np.isfinite(found).all() else []


def apart(axes: Axes, x: Sequence[float]) -> list[float]:
    """Return the places of costs on an axis, equal ones side by side in their order."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = 72 / figure.dpi
    points = [float(scale * place) for place, _ in axes.transData.transform([(one, 0.0) for one in x])]
    moved = spread(points, gap=min(7.0, 200 / max(1, len(points))))
    return [float(axes.transData.inverted().transform((point / scale, 0.0))[0]) for point in moved]


def costs(board: Board, partition: str) -> dict[str, float]:
    """Return the bytes of each method's run, in MB."""
    return {label: entry.cost.total_bytes / MEGA for label, entry in board.entries[partition].items()}


def means(board: Board, partition: str) -> dict[str, float]:
    """Return each method's mean, as it is drawn."""
    factor = board.shown.factor if board.shown else 1.0
    return {line.method: factor * line.drawn for line in board.lines[partition] if not line.control}


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value that an axis shows.

    Values more than three interquartile ranges outside the quartiles (Tukey's far out) are left to arrows where they
    are at most a tenth of all and would take more than half of the axis.
    """
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return 0.0, 1.0
    first, third = np.percentile(known, (25, 75))
    reach = 3 * (third - first)
    kept = [value for value in known if first - reach <= value <= third + reach]
    whole, few = max(known) - min(known), len(known) - len(kept) <= max(1, len(known) // 10)
    if few and len(known) >= 4 and max(kept) - min(kept) < 0.5 * whole:
        return min(kept), max(kept)
    return min(known), max(known)


def beside(
    axes: Axes, places: Sequence[tuple[float, float]], bars: Sequence[tuple[float, float, float]]
) -> list[tuple[float, float]]:
    """Return where each dot's number goes, in points from it: the nearest room that covers no dot, bar or number.

    bars: (x, low, high).
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = 72 / figure.dpi
    dots = scale * axes.transData.transform(np.array(places).reshape(-1, 2))
    ends = scale * axes.transData.transform([(x, y) for x, *both in bars for y in both]).reshape(-1, 2, 2)
    box = [scale * end for end in axes.bbox.extents]
    angles = np.deg2rad([135, 90, 45, 315, 0, 180, 225, 270, 20, 160, 200, 340, 70, 110, 250, 290])
    rays = [(r * np.cos(a), r * np.sin(a)) for r in range(10, 260, 5) for a in angles]
    taken: list[tuple[float, float]] = []
    found = []
    for dot in dots:

        def free(ray: tuple[float, float], dot: Values = dot) -> bool:
            a, b = dot + ray
            within = box[0] + 8 < a < box[2] + 12 and box[1] + 6 < b < box[3] + 4
            clear = all(abs(a - c) > 9 or abs(b - d) > 8 for c, d in dots)
            clear &= all(abs(a - x) > 7 or not low - 5 < b < high + 5 for (x, low), (_, high) in ends)
            return bool(within and clear and all(abs(a - c) > 15 or abs(b - d) > 10 for c, d in taken))

        ray = next((ray for ray in rays if free(ray)), rays[0])
        taken.append((float(dot[0] + ray[0]), float(dot[1] + ray[1])))
        found.append((float(ray[0]), float(ray[1])))
    return found


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
class RankAxis:
    """Demsar's diagram: average ranks on an axis, a bar over methods that are not told apart."""

    board: Board

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        found = self.board.ranking
        assert found is not None
        axes, count, number_of = figure.add_subplot(), len(found.names), numbers(self.board)
        axes.set_xlim(0.9, count + 0.1)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(False)
        axes.set_yticks([])
        axes.xaxis.set_ticks_position("top")
        axes.spines["top"].set_visible(True)
        axes.set_xticks(range(1, count + 1, 1 if count <= 15 else 3))
        left = (count + 1) // 2
        for place, (name, rank) in enumerate(zip(found.names, found.ranks, strict=True)):
            row = place if place < left else count - 1 - place
            height = -1.6 - row - 0.45 * len(found.groups)
            side = 0.9 if place < left else count + 0.1
            axes.plot([rank, rank, side], [0, height, height], color=theme.faint, linewidth=1)
            axes.plot(rank, 0, "o", color=theme.gain, markersize=5, clip_on=False)
            text = f"{number_of[name]} {name}: {rank:.2f}"
            axes.annotate(text, (side, height), (-4 if place < left else 4, 0), va="center", fontsize=9,
                          textcoords="offset points", ha="right" if place < left else "left",
                          annotation_clip=False)  # fmt: skip
        for number, (first, last) in enumerate(found.groups):
            height = -0.7 - 0.45 * number
            axes.plot([found.ranks[first] - 0.03, found.ranks[last] + 0.03], [height] * 2, color=theme.ink,
                      linewidth=3.2, solid_capstyle="butt")  # fmt: skip
        axes.set_ylim(-1.6 - left - 0.45 * len(found.groups), 0)
        axes.set_title(f"critical difference {found.critical:.2f}, {len(found.blocks)} blocks", fontsize=9, loc="left",
                       color=theme.ink, pad=14)  # fmt: skip
