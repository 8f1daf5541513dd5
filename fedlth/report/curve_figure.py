"""The picture of a run's curve: all clients against rounds, bytes, and simulated time where the run has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.report.canvas import Picture, Theme, end_labels
from fedlth.report.curve import Curve, Point, curves_of
from fedlth.report.known_arms import arm_of
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
        "accuracy_curve", "The curve: all clients, evaluated between the rounds",
        f"Means over the clients of the federation: solid on validation data, dashed on test data; {spread}. A ring "
        "marks the round that is best on validation data. The bytes are those of the training; evaluation is not in "
        "them.",
        8.6, 4.0, CurveFigure(held, axes),
    )  # fmt: skip


@dataclass(frozen=True)
class CurveFigure:
    """A panel an axis, with the same heights; `held` are the curves of each run."""

    held: tuple[tuple[Curve, ...], ...]
    axes: tuple[Axis, ...]

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        panels = figure.subplots(1, len(self.axes), sharey=True, squeeze=False)[0]
        for panel, (label, place) in zip(panels, self.axes, strict=True):
            for of in self.held:
                for one in of:
                    self._line(panel, theme, one, place)
            panel.set_xlabel(label)
        panels[0].set_ylabel("accuracy (%)")
        labels: dict[str, list[float]] = {}
        for one in (one for of in self.held for one in of):
            labels.setdefault(one.arm, []).append(100 * float(one.points[-1].val.mean()))
        low, high = panels[-1].get_ylim()
        ends = [(float(np.mean(y)), arm_of(arm).label, theme.colour(arm)) for arm, y in labels.items()]
        end_labels(panels[-1], ends, gap=(high - low) * 0.065)
        panels[-1].set_ylim(low, high)

    def _line(self, panel: Axes, theme: Theme, one: Curve, place: Callable[[Point], float]) -> None:
        alone, colour = len(self.held) == 1, theme.colour(one.arm)
        x = [place(point) for point in one.points]
        val, test = (100 * np.array([y(p) for p in one.points]) for y in (_val, _test))
        if alone:
            ends = 100 * np.array([np.quantile(point.val, (0.1, 0.9)) for point in one.points]).T
            panel.fill_between(x, ends[0], ends[1], color=colour, alpha=0.1, linewidth=0)
        panel.plot(x, val, color=colour, marker=".", linewidth=1.8 if alone else 1, markersize=5 if alone else 3)
        panel.plot(x, test, color=colour, linestyle="--", linewidth=1.1, alpha=0.85)
        best = one.chosen()[1]
        panel.plot(
            [place(best)], [100 * _val(best)], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour
        )  # fmt: skip


def _val(point: Point) -> float:
    return float(point.val.mean())


def _test(point: Point) -> float:
    return float(point.test.mean())
