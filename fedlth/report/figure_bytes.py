"""The figure of accuracy at bytes: what the clients' validation accuracy was when that much had crossed the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.report.arms import arm_of
from fedlth.report.bytes import Traffic
from fedlth.report.canvas import end_labels
from fedlth.report.facts import Facts
from fedlth.report.palette import Theme
from fedlth.report.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEGA = 1e6


def curve(facts: Facts, moved: Traffic, *, phase: str) -> tuple[list[float], list[float]]:
    """Return cumulative megabytes (up and down) at the end of each round of a phase, and its validation accuracy.

    A round without an accuracy (no client answered) moves the bytes on and gives no point.
    """
    reached = {(one.round, one.phase): one.cumulative_bytes for one in moved.by_round}
    x, y = [], []
    for row in facts.rounds:
        place = (row.round, row.phase)
        if row.phase == phase and row.val_accuracy is not None and place in reached:
            x.append(reached[place] / MEGA)
            y.append(100 * row.val_accuracy)
    return x, y


@dataclass(frozen=True)
class AtBytes:
    """Validation accuracy against bytes: a line a seed for the rounds, a marker for each arm at the end."""

    results: Results

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        alone = len(self.results.group) == 1
        for facts, moved in zip(self.results.group, self.results.traffics, strict=True):
            for phase, arm in (("federate", "global"), ("refine", "refined")):
                x, y = curve(facts, moved, phase=phase)
                colour = theme.colour(arm)
                axes.plot(x, y, color=colour, linewidth=1.8 if alone else 1, alpha=1 if alone else 0.6)
                if alone:
                    axes.plot(x, y, ".", color=colour, markersize=5)
        total = float(np.mean([one.unicast.total_bytes for one in self.results.traffics])) / MEGA
        labels = []
        shown = [self.results.best_known(arm) for arm in ("global", "dense", "local")]
        for found in [self.results.summary(self.results.main), *shown]:
            if found is None or (found.choice == self.results.main and found in shown):
                continue
            arm = found.choice.arm
            # a local model needs no wire at all
            place = 0.0 if arm == "local" else total
            axes.plot(
                [place], [100 * found.val_mean], linestyle="", marker=theme.style(arm).marker, clip_on=False,
                color=theme.colour(arm), markersize=8, zorder=3,
            )  # fmt: skip
            at = "" if found.choice.target_density == 1 else f" at {found.density_text}"
            label = f"{arm_of(arm).label}{at}"
            if arm == "local":
                axes.annotate(label, (0, 100 * found.val_mean), (8, 0), textcoords="offset points", va="center",
                              color=theme.colour(arm), fontsize=9)  # fmt: skip
            else:
                labels.append((100 * found.val_mean, label, theme.colour(arm)))
        axes.set_xlim(0, total * 1.02)
        axes.set_xlabel("payload moved so far, up and down, every receiver counted (MB)")
        axes.set_ylabel("validation accuracy (%)")
        low, high = axes.get_ylim()
        end_labels(axes, labels, gap=(high - low) * 0.055)
