"""The two figures of accuracy: by density for every arm, and client by client before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.report.arms import Choice, arm_of
from fedlth.report.canvas import end_labels
from fedlth.report.palette import Theme
from fedlth.report.results import Results
from fedlth.report.statistics import ArmSummary, baseline_of, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ByDensity:
    """Mean test accuracy against density: a line with intervals for each sparse arm, a level for each dense one."""

    results: Results

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        levels = [found for found in self.results.summaries if found.choice.target_density == 1]
        sparse = [found for found in self.results.summaries if found.choice.target_density < 1]
        arms = list(dict.fromkeys(found.choice.arm for found in sparse))
        densities = sorted({found.choice.target_density for found in sparse}, reverse=True)
        labels: list[tuple[float, str, str]] = []
        for level in levels:
            colour, dashes = theme.colour(level.choice.arm), theme.style(level.choice.arm).dashes
            axes.axhline(100 * level.mean, color=colour, linestyle=dashes, linewidth=1.2)
            labels.append((100 * level.mean, arm_of(level.choice.arm).label, colour))
        for rank, arm in enumerate(arms):
            line = [found for found in sparse if found.choice.arm == arm]
            self._line(axes, theme, line, shift=(rank - (len(arms) - 1) / 2) * 0.05)
            labels.append((100 * line[-1].mean, arm_of(arm).label, theme.colour(arm)))
        self._density_axis(axes, densities)
        axes.set_ylabel("mean test accuracy over clients (%)")
        low, high = axes.get_ylim()
        end_labels(axes, labels, gap=(high - low) * 0.052)
        axes.set_ylim(low, high)

    def _line(self, axes: Axes, theme: Theme, line: list[ArmSummary], *, shift: float) -> None:
        style, colour = theme.style(line[0].choice.arm), theme.colour(line[0].choice.arm)
        x = np.array([_place(found.choice.target_density) for found in line]) + shift
        y = 100 * np.array([found.mean for found in line])
        ends = 100 * np.array([(found.interval.low, found.interval.high) for found in line]).T
        whiskers = np.nan_to_num(np.abs(ends - y))
        axes.errorbar(x, y, yerr=whiskers, color=colour, fmt="none", elinewidth=1.1, capsize=0, alpha=0.55)
        axes.plot(x, y, color=colour, marker=style.marker, linestyle=style.dashes, markersize=6)

    def _density_axis(self, axes: Axes, densities: list[float]) -> None:
        # densities that read the same share a tick
        ticks = {f"{density:.3g}": _place(density) for density in densities}
        axes.set_xticks(list(ticks.values()), list(ticks))
        axes.set_xlabel("density (share of prunable weights kept; sparser to the right)")
        if densities:
            axes.set_xlim(_place(densities[0]) - 0.35, _place(densities[-1]) + 0.35)
        else:
            axes.set_xlabel("no sparse arm was evaluated")


def _place(density: float) -> float:
    # halvings are equal steps, and sparser lies to the right
    return float(-np.log2(density))


@dataclass(frozen=True)
class BeforeAfter:
    """Every client's test accuracy under the global model and under the main arm, clients sorted by the first."""

    results: Results
    before: Choice
    after: Choice

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        from matplotlib.lines import Line2D

        axes = figure.add_subplot()
        pairs = []
        for facts in self.results.group:
            first, second = rows_of(facts, self.before), rows_of(facts, self.after)
            both = [client for client in first if client in second]
            pairs += [(first[c].test_accuracy, second[c].test_accuracy, first[c].unseen) for c in both]
        pairs.sort(key=lambda pair: pair[:2])
        x = np.arange(len(pairs))
        start, end = (100 * np.array([pair[place] for pair in pairs]) for place in (0, 1))
        unseen = np.array([pair[2] for pair in pairs], dtype=bool)
        size = 6.5 if len(pairs) <= 40 else 4.5 if len(pairs) <= 120 else 3
        for rows, colour in ((end >= start, theme.gain), (end < start, theme.loss)):
            axes.vlines(x[rows], start[rows], end[rows], color=colour, linewidth=size / 3, alpha=0.5)
            for marker, kept in (("o", rows & ~unseen), ("s", rows & unseen)):
                axes.plot(x[kept], end[kept], marker, color=colour, markersize=size)
        axes.plot(x, start, "o", color=theme.page, markeredgecolor=theme.ink, markersize=size * 0.8, alpha=0.9)
        axes.set_ylabel("test accuracy (%)")
        axes.set_xlabel(f"{len(pairs)} clients, sorted by their accuracy under the {arm_of(self.before.arm).label}")
        axes.set_xticks([])
        axes.margins(x=0.02)
        before, after = arm_of(self.before.arm).label, arm_of(self.after.arm).label
        keys = [("o", theme.page, theme.ink, f"before: {before}"), ("o", theme.gain, theme.gain, f"after: {after}")]
        if (end < start).any():
            keys.append(("o", theme.loss, theme.loss, "after, and lower than before"))
        if unseen.any():
            keys.append(("s", theme.gain, theme.gain, "a client unseen in the rounds"))
        handles = [
            Line2D([], [], linestyle="", marker=marker, color=fill, markeredgecolor=edge, label=text, markersize=6)
            for marker, fill, edge, text in keys
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9, handletextpad=0.2)


def before_after(results: Results) -> BeforeAfter | None:
    """Return the figure where both the global model and a main arm other than it were evaluated."""
    before = baseline_of(results.group, "global")
    if before is None or results.main is None or results.main.arm == "global":
        return None
    return BeforeAfter(results, before, results.main)
