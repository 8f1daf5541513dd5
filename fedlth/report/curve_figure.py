"""The picture of a run's curve: all clients against rounds, bytes, and simulated time where the run has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.report.canvas import Picture, Theme, end_labels
from fedlth.report.curve import VALIDATED, Curve, Point, curves_of
from fedlth.report.known_arms import arm_of
from fedlth.report.measure import Shown
from fedlth.report.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Axis = tuple[str, Callable[[Point], float]]
ROUNDS: Axis = ("rounds of step 1", lambda point: point.rounds)
BYTES: Axis = ("payload up and down (MB)", lambda point: point.total_bytes / 1e6)
TIME: Axis = ("simulated time (s)", lambda point: point.simulated_s or 0.0)


def curve_picture(results: Results) -> Picture | None:
    """Return the picture of the curve, None where no client evaluated between the rounds."""
    held = curves_of(results)
    if not any(held):
        return None
    timed = all(point.simulated_s is not None for of in held for one in of for point in one.points)
    axes = (ROUNDS, BYTES, TIME) if timed else (ROUNDS, BYTES)
    spread = (
        "one line a seed" if len(held) > 1 else "the band holds the clients from the 10th to the 90th percentile of it"
    )
    return Picture(
        f"{results.shown.slug}_curve", "The curve: all clients, evaluated between the rounds",
        f"Means over the clients of the federation: solid on validation data, dashed on test data; {spread}. A ring "
        "marks the round that is best on validation data. The bytes are those of the training; evaluation is not in "
        "them.",
        8.6, 4.0, CurveFigure(held, axes, results.shown),
    )  # fmt: skip


@dataclass(frozen=True)
class CurveFigure:
    """A panel an axis, with the same heights; `held` are the curves of each run."""

    held: tuple[tuple[Curve, ...], ...]
    axes: tuple[Axis, ...]
    shown: Shown

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        panels = figure.subplots(1, len(self.axes), sharey=True, squeeze=False)[0]
        for panel, (label, place) in zip(panels, self.axes, strict=True):
            for of in self.held:
                for one in of:
                    self._line(panel, theme, one, place)
            panel.set_xlabel(label)
        panels[0].set_ylabel(self.shown.axis)
        labels: dict[str, list[float]] = {}
        for one in (one for of in self.held for one in of):
            labels.setdefault(one.arm, []).append(self.shown.factor * _main(one.points[-1]))
        low, high = panels[-1].get_ylim()
        ends = [(float(np.mean(y)), arm_of(arm).label, theme.colour(arm)) for arm, y in labels.items()]
        end_labels(panels[-1], ends, gap=(high - low) * 0.065)
        panels[-1].set_ylim(low, high)

    def _line(self, panel: Axes, theme: Theme, one: Curve, place: Callable[[Point], float]) -> None:
        alone, colour = len(self.held) == 1, theme.colour(one.arm)
        x = [place(point) for point in one.points]
        asked, factor = all(len(point.val) for point in one.points), self.shown.factor
        if alone:
            of = [point.val if asked else point.test for point in one.points]
            ends = factor * np.array([np.quantile(values, (0.1, 0.9)) for values in of]).T
            panel.fill_between(x, ends[0], ends[1], color=colour, alpha=0.1, linewidth=0)
        test = factor * np.array([_test(point) for point in one.points])
        panel.plot(x, test, color=colour, linestyle="--", linewidth=1.1, alpha=0.85)
        if not asked:
            return
        val = factor * np.array([_main(point) for point in one.points])
        panel.plot(x, val, color=colour, marker=".", linewidth=1.8 if alone else 1, markersize=5 if alone else 3)
        best = one.chosen()[VALIDATED]
        panel.plot(
            [place(best)], [factor * _main(best)], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour
        )  # fmt: skip


def _main(point: Point) -> float:
    """Return the mean on validation data, on test data where there are none."""
    return float((point.val if len(point.val) else point.test).mean())


def _test(point: Point) -> float:
    return float(point.test.mean())
