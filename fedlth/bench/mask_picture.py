"""What personal masks buy: accuracy for bytes beside their controls, and their gain over the global model's mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.bench.board import Board, Entry, Line
from fedlth.bench.contrasts import Contrast, contrast, gains, masked
from fedlth.bench.drawing import MARKS, MEGA, control_legend, stretch
from fedlth.report.canvas import Theme, end_labels, spread
from fedlth.report.choice import Choice
from fedlth.report.intervals import Interval
from fedlth.report.measure import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAIRS = (("ticket", "global_mask"), ("own_tuned", "own_global_mask"))  # a personal mask, and the global model's


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
            if entry.one_mask:
                continue
            points = [point for pair in PAIRS for point in _points(entry, *pair)]
            if points:
                found.append(MaskLine(partition, label, tuple(sorted(points, key=lambda point: -point[0]))))
    return found


def _points(entry: Entry, personal: str, general: str) -> list[tuple[float, float, Interval]]:
    shown = entry.results.shown
    points: list[tuple[float, float, Interval]] = []
    for one, density in sparse(entry, personal):
        other = control_at(entry, general, one.target_density)
        found = None if other is None else less(entry, one, other)
        if found is not None:
            sign = shown.factor if shown.measure.higher_is_better else -shown.factor
            ends = sorted((sign * found.interval.low, sign * found.interval.high))
            points.append((density, sign * found.mean, Interval(*ends)))
    return points


def sparse(entry: Entry, personal: str) -> list[tuple[Choice, float]]:
    """Return the densities at which a personal mask was evaluated, with what it kept there."""
    found = ((summary.choice, summary.density) for summary in entry.results.summaries)
    return [(one, kept) for one, kept in found if one.arm == personal and not one.chosen and kept <= 1 - 1e-9]


def control_at(entry: Entry, arm: str, target_density: float) -> Choice | None:
    """Return a control at a density; one whose clients each have a density of their own is there once."""
    known = [summary.choice for summary in entry.results.summaries if summary.choice.arm == arm]
    alone = known[:1] if arm.startswith("own_") else []
    return next((one for one in known if one == Choice(arm, target_density)), next(iter(alone), None))


def less(entry: Entry, one: Choice, other: Choice) -> Contrast | None:
    """Return a personal mask less a control, by seed and by the clients that can have such a mask."""
    group = masked(entry.group, one.arm)
    return contrast(gains(group, one, group, other), better=entry.results.shown.measure.higher_is_better)


def wins_below(line: MaskLine) -> float | None:
    """Return the largest density from which on, to the sparsest measured, the whole interval is above zero."""
    found = None
    for density, _, interval in reversed(line.points):  # from the sparsest on
        if not interval.low > 0:  # of too few pairs it is NaN
            break
        found = density
    return found


def crossing(lines: Sequence[MaskLine]) -> str:
    """Say from which density on a personal mask wins, line by line."""
    wins = {line.method: wins_below(line) for line in lines}
    told = [f"{method} from density {density:.2g} on" for method, density in wins.items() if density is not None]
    if not told:
        return "No uncorrected 95 % interval is above zero as a whole down to the sparsest density."
    more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
    return (
        "By the uncorrected 95 % interval alone, which is no test (the sentences on top are of one density a method), "
        f"the personal mask is the better one in {'; '.join(told[:6])}{more}."
    )


def height(lines: Sequence[MaskLine]) -> float:
    """Return the picture's height in inches: of its panels, and of its legend."""
    return max(4.6, 1.4 + 0.2 * len(lines))


def _bend(lines: Sequence[MaskLine]) -> float | None:
    """Return beyond which difference the axis is logarithmic; None where no few points would flatten the others."""
    sizes = [abs(gain) for line in lines for _, gain, _ in line.points]
    usual = float(np.percentile(sizes, 75))
    if not usual or max(sizes) <= 4 * usual:
        return None
    power = 10.0 ** np.floor(np.log10(usual))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= usual))


def scale_of(lines: Sequence[MaskLine]) -> str:
    bend = _bend(lines)
    return "" if bend is None else f"The axis is linear up to {bend:g} on either side of zero, logarithmic beyond. "


def _bent(axes: Axes, bend: float) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("symlog", linthresh=bend, linscale=1.5)
    low, high = axes.get_ylim()
    steps = [bend * step for step in (0.5, 1, 2, 5, 10, 20, 50)]
    axes.set_yticks([step for step in (*(-one for one in steps), 0, *steps) if low <= step <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


@dataclass(frozen=True)
class Tickets:
    """A partition's personal masks. Left: what they reach for their bytes, with their controls; right: `mask_lines`."""

    board: Board
    partition: str
    lines: tuple[MaskLine, ...]
    number: Mapping[str, int]

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        shown = self.board.shown
        assert shown is not None
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        self._reached(left, theme, shown)
        self._gains(right, theme, shown)
        used = {line.control for line in self._drawn()}
        control_legend(figure, theme, [kind for kind in MARKS if kind in used])
        handles, names = right.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", fontsize=8.5)

    def _drawn(self) -> list[Line]:
        """Return the rows of these methods and of their controls; one with the very same mask is no control."""
        known = {line.method for line in self.lines}
        rows = [line for line in self.board.lines[self.partition] if line.method in known and not line.same]
        return [line for line in rows if not line.control or line.control in MARKS]

    def _reached(self, axes: Axes, theme: Theme, shown: Shown) -> None:
        drawn, held = self._drawn(), self.board.entries[self.partition]
        x = {line.method: held[line.method].cost.total_bytes / MEGA for line in self.lines}
        points: dict[str, tuple[float, float]] = {}
        for method, (colour, marker, _) in _styles(theme, self.lines).items():
            rows = [line for line in drawn if line.method == method]
            values = [shown.factor * line.drawn for line in rows]
            same = [value for line, value in zip(rows, values, strict=True) if not line.row]
            axes.plot([x[method]] * 2, [min(same), max(same)], color=colour, linewidth=1, alpha=0.6, zorder=1)
            for line, value in zip(rows, values, strict=True):
                if line.control:
                    control, arm = MARKS[line.control]
                    paid = self.board.cost_of(self.partition, line).total_bytes / MEGA
                    axes.plot(paid, value, control, color=theme.colour(arm), alpha=0.8, zorder=2,
                              markersize=8 if control == "*" else 5)  # fmt: skip
                else:
                    axes.plot(x[method], value, marker, color=colour, markersize=7, zorder=4)
                    points[str(self.number[method])] = (x[method], value)
        stretch(axes, [self.board.cost_of(self.partition, line).total_bytes / MEGA for line in drawn])
        ends = []
        for line in self.board.lines[self.partition]:
            if line.method in ("local", "fedavg_ft") and not line.control:
                value = shown.factor * line.summary.mean
                axes.axhline(value, color=theme.ink, linewidth=1, linestyle="--", alpha=0.7, zorder=0)
                ends.append((value, line.method, theme.ink))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high)
        end_labels(axes, ends, gap=0.04 * (high - low))
        _number(axes, points, theme.ink)
        axes.set_xlabel("payload, down and up (MB)")
        axes.set_ylabel(f"mean test {shown.axis}")

    def _gains(self, axes: Axes, theme: Theme, shown: Shown) -> None:
        axes.axhline(0, color=theme.ink, linewidth=1)
        styles = _styles(theme, self.lines)
        for at, line in enumerate(self.lines):
            colour, marker, dash = styles[line.method]
            shift = (at - (len(self.lines) - 1) / 2) * min(0.06, 0.5 / len(self.lines))
            x = [-np.log2(density) + shift for density, _, _ in line.points]
            axes.plot(x, [gain for _, gain, _ in line.points], color=colour, linewidth=1.1, marker=marker, markersize=5,
                      linestyle=dash, label=f"{self.number[line.method]} {line.method}")  # fmt: skip
            for place, (_, gain, ends) in zip(x, line.points, strict=True):
                axes.plot([place, place], [ends.low, ends.high], color=colour, linewidth=1.1, alpha=0.6)
                if not ends.excludes(0):
                    axes.plot(place, gain, marker, color=theme.page, markeredgecolor=colour, markersize=5, zorder=4)
            if len(line.points) > 1 and (wins := wins_below(line)) is not None:
                begins = shift - np.log2(wins)
                axes.axvline(begins, color=colour, linewidth=1, linestyle=":", zorder=0)
                axes.annotate(f"{line.method} wins →", (begins, 0.985), (3, 0), va="top", color=theme.ink,
                              xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8)  # fmt: skip
        ticks: dict[str, float] = {}
        places = {float(-np.log2(density)): density for line in self.lines for density, _, _ in line.points}
        room = 0.18 * (max(places) - min(places))  # else one would be written over another
        for place, density in sorted(places.items()):
            if all(abs(place - other) > room for other in ticks.values()):
                ticks[f"{density:.2g}"] = place
        axes.set_xticks(list(ticks.values()), list(ticks))
        axes.margins(x=0.1, y=0.15)
        if (bend := _bend(self.lines)) is not None:
            _bent(axes, bend)
        unit = "points" if shown.measure.percent else shown.label
        axes.set_ylabel(f"personal less global mask ({unit})")
        axes.set_xlabel("density kept (sparser to the right)")


def _number(axes: Axes, points: Mapping[str, tuple[float, float]], colour: str) -> None:
    """Write each point's name to its right; names of points that lie close in x are moved apart."""
    there = axes.transAxes.inverted()
    near: list[list[tuple[float, float, str]]] = []  # by place on the axes, from 0 to 1
    for x, y, name in sorted((*there.transform(axes.transData.transform(at)), name) for name, at in points.items()):
        if near and x - near[-1][-1][0] < 0.06:
            near[-1].append((x, y, name))
        else:
            near.append([(x, y, name)])
    for group in near:
        for (x, _, name), y in zip(group, spread([y for _, y, _ in group], gap=0.034), strict=True):
            axes.annotate(name, (x + 0.025, y), xycoords="axes fraction", va="center", fontsize=8, color=colour)


def _styles(theme: Theme, lines: Sequence[MaskLine]) -> dict[str, tuple[str, str, str]]:
    """Return each method's colour, mark and dashes, the same in both panels."""
    names = ("ticket", "one_shot", "global", "local", "refined", "own", "ticket_0")
    colours, markers, dashes = [theme.colour(name) for name in names], "os^vPX<>hp", ("-", "--", ":")
    return {
        line.method: (colours[at % len(colours)], markers[at % len(markers)], dashes[at // len(colours) % len(dashes)])
        for at, line in enumerate(lines)
    }
