"""The figures of a report in reading order, each with one sentence on how to read it; those of the metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.report.canvas import Picture, Theme, end_labels
from fedlth.report.choice import Choice, baseline_of, rows_of
from fedlth.report.curve_figure import curve_picture
from fedlth.report.facts import Facts
from fedlth.report.fleet import AtTime
from fedlth.report.fleet import curve as curve_at_time
from fedlth.report.known_arms import arm_of
from fedlth.report.measure import shown_of
from fedlth.report.results import Results
from fedlth.report.statistics import ArmSummary
from fedlth.report.ticket_figures import LayerDensity, OverlapMaps, OverlapScatter
from fedlth.report.traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGA = 1e6


def pictures(results: Results) -> tuple[Picture, ...]:
    """Return the figures that these results allow; an unfinished or dense-only run has fewer.

    The ticket figures are of the first seed: masks of two seeds start from different weights and do not compare.
    """
    found: list[Picture] = []
    shown = results.shown
    units = "seeds and clients" if len(results.group) > 1 else "clients"
    own = any(summary.choice.chosen for summary in results.summaries)
    hollow = " Hollow markers are means at each client's own density, at the mean of those." if own else ""
    if any(summary.choice.target_density < 1 for summary in results.summaries):
        found.append(Picture(
            f"{shown.slug}_by_density", "What sparsity costs, arm by arm",
            f"{shown.better} is better, sparser is to the right; whiskers are 95 % bootstrap intervals over {units}, "
            "and horizontal lines are the dense models. Arms are compared on the same clients, so whiskers that "
            "overlap can still hide a clear paired difference: those are given in the text above." + hollow,
            8.6, 4.8, ByDensity(results),
        ))  # fmt: skip
    dumbbells = before_after(results)
    if dumbbells is not None:
        after = results.summary(dumbbells.after)
        at = "" if after is None else after.at_text
        found.append(Picture(
            f"{shown.slug}_by_client", f"Every client, before and after: {arm_of(dumbbells.after.arm).label}{at}",
            "One line for each client, from the global model (hollow) to its own model (filled); an orange line is "
            "a client that was hurt.",
            8.6, 4.2, dumbbells,
        ))  # fmt: skip
    moved = any(facts.rounds for facts in results.group) and any(t.unicast.total_bytes for t in results.traffics)
    if moved and results.one_metric:
        found.append(Picture(
            f"{shown.slug}_at_bytes", "What the bytes buy",
            f"The line is the {shown.label} of the model that the sampled clients received, on their validation data, "
            "as bytes add up over the rounds; the markers at the right end are the arms on the validation data of all "
            "clients after the last byte.",
            8.6, 4.2, AtBytes(results),
        ))  # fmt: skip
    if (curve_of_all := curve_picture(results)) is not None:
        found.append(curve_of_all)
    if any(curve_at_time(facts)[0] for facts in results.group):
        found.append(Picture(
            f"{shown.slug}_at_time", "What simulated time buys",
            f"The {shown.label} of the model that a round's sampled clients received, on their validation data, at the "
            "start of that round on the study's fleet.",
            8.6, 4.2, AtTime(results),
        ))  # fmt: skip
    if results.overlaps:
        first = results.overlaps[0]
        of = f", seed {results.group[0].header.seed}" if len(results.group) > 1 else ""
        layers = len(first.layer_density)
        found.append(Picture(
            "density_by_layer", f"Where the tickets keep their weights{of}",
            "A dot is the mean over clients, the bar behind it reaches from the sparsest client to the densest; no "
            "bar means that every client keeps the same number.",
            8.6, 1.2 + 0.34 * max(layers, 2), LayerDensity(first),
        ))  # fmt: skip
        found.append(Picture(
            "overlap_maps", f"Do similar clients get similar tickets?{of}",
            "Both maps list the clients in the same order; if labels shape tickets, the blocks on the left appear "
            "again on the right.",
            8.6, 4.2, OverlapMaps(first),
        ))  # fmt: skip
        found.append(Picture(
            "overlap_by_labels", f"Overlap of two tickets against the labels of their clients{of}",
            "One dot for each pair of clients. Height above the chance lines is mostly what tickets inherit from the "
            "shared start; the slope is what the clients' own data add.",
            8.6, 4.2, OverlapScatter(first),
        ))  # fmt: skip
    return tuple(found)


@dataclass(frozen=True)
class ByDensity:
    """The metric's mean on test data by density: a line with intervals for each sparse arm, a level for dense ones."""

    results: Results

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes, shown = figure.add_subplot(), self.results.shown
        levels = [one for one in self.results.summaries if one.choice.target_density == 1 and not one.choice.chosen]
        sparse = [one for one in self.results.summaries if one.choice.target_density < 1 and not one.choice.chosen]
        arms = list(dict.fromkeys(found.choice.arm for found in sparse))
        densities = sorted({found.choice.target_density for found in sparse}, reverse=True)
        labels: list[tuple[float, str, str]] = []
        for level in levels:
            colour, dashes = theme.colour(level.choice.arm), theme.style(level.choice.arm).dashes
            axes.axhline(shown.factor * level.mean, color=colour, linestyle=dashes, linewidth=1.2)
            labels.append((shown.factor * level.mean, arm_of(level.choice.arm).label, colour))
        for rank, arm in enumerate(arms):
            line = [found for found in sparse if found.choice.arm == arm]
            self._line(axes, theme, line, shift=(rank - (len(arms) - 1) / 2) * 0.05)
            labels.append((shown.factor * line[-1].mean, arm_of(arm).label, theme.colour(arm)))
        for found in (one for one in self.results.summaries if one.choice.chosen):
            x, colour = _place(found.choice.target_density), theme.colour(found.choice.arm)
            marker = theme.style(found.choice.arm).marker
            axes.plot([x], [shown.factor * found.mean], marker, color=theme.page, markeredgecolor=colour, markersize=9)
        self._density_axis(axes, densities)
        axes.set_ylabel(f"mean test {shown.label} over clients{' (%)' if shown.measure.percent else ''}")
        low, high = axes.get_ylim()
        end_labels(axes, labels, gap=(high - low) * 0.052)
        axes.set_ylim(low, high)

    def _line(self, axes: Axes, theme: Theme, line: list[ArmSummary], *, shift: float) -> None:
        style, colour = theme.style(line[0].choice.arm), theme.colour(line[0].choice.arm)
        x = np.array([_place(found.choice.target_density) for found in line]) + shift
        factor = self.results.shown.factor
        y = factor * np.array([found.mean for found in line])
        ends = factor * np.array([(found.interval.low, found.interval.high) for found in line]).T
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
    """Every client's metric on test data under the global model and under the main arm, clients sorted by the first."""

    results: Results
    before: Choice
    after: Choice

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        from matplotlib.lines import Line2D

        axes, shown = figure.add_subplot(), self.results.shown
        pairs = []
        for facts in self.results.group:
            first, second = rows_of(facts, self.before), rows_of(facts, self.after)
            both = [client for client in first if client in second]
            pairs += [(shown.of(first[c]), shown.of(second[c]), first[c].unseen) for c in both]
        pairs.sort(key=lambda pair: pair[:2])
        x = np.arange(len(pairs))
        start, end = (shown.factor * np.array([pair[place] for pair in pairs]) for place in (0, 1))
        unseen = np.array([pair[2] for pair in pairs], dtype=bool)
        size = 6.5 if len(pairs) <= 40 else 4.5 if len(pairs) <= 120 else 3
        hurt = np.asarray(shown.gain(end - start)) < 0
        for rows, colour in ((~hurt, theme.gain), (hurt, theme.loss)):
            axes.vlines(x[rows], start[rows], end[rows], color=colour, linewidth=size / 3, alpha=0.5)
            for marker, kept in (("o", rows & ~unseen), ("s", rows & unseen)):
                axes.plot(x[kept], end[kept], marker, color=colour, markersize=size)
        axes.plot(x, start, "o", color=theme.page, markeredgecolor=theme.ink, markersize=size * 0.8, alpha=0.9)
        axes.set_ylabel(f"test {shown.axis}")
        axes.set_xlabel(
            f"{len(pairs)} clients, sorted by their {shown.label} under the {arm_of(self.before.arm).label}"
        )
        axes.set_xticks([])
        axes.margins(x=0.02)
        before, after = arm_of(self.before.arm).label, arm_of(self.after.arm).label
        keys = [("o", theme.page, theme.ink, f"before: {before}"), ("o", theme.gain, theme.gain, f"after: {after}")]
        if hurt.any():
            keys.append(("o", theme.loss, theme.loss, f"after, and {shown.worse} than before"))
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
    if before is None or results.main is None or results.main.arm == "global" or not results.one_metric:
        return None
    return BeforeAfter(results, before, results.main)


def curve(facts: Facts, moved: Traffic, *, phase: str) -> tuple[list[float], list[float]]:
    """Return cumulative megabytes (up and down) at the end of each round of a phase, and its metric on validation data.

    A round without one (no client answered) moves the bytes on and gives no point.
    """
    reached = {(one.round, one.phase): one.cumulative_bytes for one in moved.by_round}
    x, y, shown = [], [], shown_of([facts])
    for row in facts.rounds:
        place = (row.round, row.phase)
        value = shown.of_round(row)
        if row.phase == phase and value is not None and place in reached:
            x.append(reached[place] / MEGA)
            y.append(shown.factor * value)
    return x, y


@dataclass(frozen=True)
class AtBytes:
    """The metric on validation data against bytes: a line a seed for the rounds, a marker for each arm at the end."""

    results: Results

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes, factor = figure.add_subplot(), self.results.shown.factor
        alone = len(self.results.group) == 1
        for facts, moved in zip(self.results.group, self.results.traffics, strict=True):
            for phase in (one for one in facts.header.phases if one.joins):
                x, y = curve(facts, moved, phase=phase.name)
                colour = theme.colour("global" if phase.step == 1 else "refined")
                axes.plot(x, y, color=colour, linewidth=1.8 if alone else 1, alpha=1 if alone else 0.6)
                if alone:
                    axes.plot(x, y, ".", color=colour, markersize=5)
        total = float(np.mean([one.unicast.total_bytes for one in self.results.traffics])) / MEGA
        labels = []
        shown = [self.results.best_known(arm) for arm in ("global", "dense", "local")]
        for found in [self.results.summary(self.results.main), *shown]:
            if found is None or found.val_mean is None or (found.choice == self.results.main and found in shown):
                continue
            arm = found.choice.arm
            # a local model needs no wire at all
            place = 0.0 if arm == "local" else total
            axes.plot(
                [place], [factor * found.val_mean], linestyle="", marker=theme.style(arm).marker, clip_on=False,
                color=theme.colour(arm), markersize=8, zorder=3,
            )  # fmt: skip
            at = "" if found.choice.target_density == 1 and not found.choice.chosen else f" at {found.density_text}"
            label = f"{arm_of(arm).label}{at}"
            if arm == "local":
                axes.annotate(label, (0, factor * found.val_mean), (8, 0), textcoords="offset points", va="center",
                              color=theme.colour(arm), fontsize=9)  # fmt: skip
            else:
                labels.append((factor * found.val_mean, label, theme.colour(arm)))
        axes.set_xlim(0, total * 1.02)
        axes.set_xlabel("payload moved so far, up and down, every receiver counted (MB)")
        axes.set_ylabel(f"validation {self.results.shown.axis}")
        low, high = axes.get_ylim()
        end_labels(axes, labels, gap=(high - low) * 0.055)
