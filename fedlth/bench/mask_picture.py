"""Where a personal mask wins: its difference from the global model's own mask, over density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.bench.board import Board, Entry
from fedlth.bench.contrasts import contrast, gains
from fedlth.report.canvas import Theme
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


def crossing(lines: Sequence[MaskLine]) -> str:
    """Say at which densities a personal mask wins, line by line."""
    told = []
    for line in lines:
        wins = [f"{density:.2g}" for density, _, interval in line.points if interval.low > 0]
        if wins:
            told.append(f"{line.method} on {line.partition} at {', '.join(wins)}")
    if not told:
        return "No uncorrected 95 % interval is above zero as a whole, at any density."
    more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
    return (
        "By the uncorrected 95 % interval alone, which is no test (the sentences on top are of one density a method), "
        f"the whole interval is above zero at these densities: {'; '.join(told[:6])}{more}."
    )


def height(lines: Sequence[MaskLine]) -> float:
    """Return the picture's height in inches: of its rows of panels, and of its legend."""
    panels = len({line.partition for line in lines})
    return max(4.2 * -(-panels // 3), 0.8 + 0.2 * len({line.method for line in lines}))


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
class MaskGain:
    """The lines of `mask_lines` over density, sparser to the right."""

    shown: Shown
    lines: tuple[MaskLine, ...]
    number: Mapping[str, int]

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure: one panel a partition."""
        partitions = list(dict.fromkeys(line.partition for line in self.lines))
        columns = min(3, len(partitions))
        panels = figure.subplots(-(-len(partitions) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(partitions) :]:
            axes.set_visible(False)
        for axes, partition in zip(panels.flat, partitions, strict=False):
            self._panel(axes, theme, partition)
        if (bend := _bend(self.lines)) is not None:
            _bent(panels.flat[0], bend)
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
            label = f"{self.number[line.method]} {line.method}"
            shift = (number - (len(methods) - 1) / 2) * min(0.06, 0.5 / len(methods))
            x = [-np.log2(density) + shift for density, _, _ in line.points]
            axes.plot(x, [gain for _, gain, _ in line.points], color=colour, linewidth=1.1, marker=marker, markersize=5,
                      linestyle=dashes[number // len(colours) % len(dashes)], label=label)  # fmt: skip
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
