"""The study's metric as people read it: its name, its unit, and which way is better."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlth.report.facts import Facts
from fedlth.report.intervals import Interval
from fedlth.report.units import NOTHING, bounds, percent, points
from fedlth.storage.header import Measure
from fedlth.storage.records import CurveRow, MetricRow, RoundRow

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Shown:
    """One metric in tables, figures and sentences."""

    measure: Measure

    @property
    def label(self) -> str:
        """The name in words; of a user's own the part behind the colon."""
        return self.measure.name.rpartition(":")[2].replace("_", " ")

    @property
    def slug(self) -> str:
        """The name as a part of a file's name."""
        return re.sub(r"[^A-Za-z0-9]+", "_", self.measure.name.rpartition(":")[2])

    @property
    def column(self) -> str:
        """What follows "mean" or an arm's name at the head of a column."""
        return "%" if self.measure.name == "accuracy" else f"{self.label} %" if self.measure.percent else self.label

    @property
    def unit(self) -> str:
        return " %" if self.measure.percent else ""

    @property
    def axis(self) -> str:
        """The name with its unit, behind which data it is of."""
        return f"{self.label} (%)" if self.measure.percent else self.label

    @property
    def factor(self) -> float:
        """What a value is multiplied by to be drawn."""
        return 100.0 if self.measure.percent else 1.0

    @property
    def better(self) -> str:
        return "Higher" if self.measure.higher_is_better else "Lower"

    @property
    def worse(self) -> str:
        return "lower" if self.measure.higher_is_better else "higher"

    @property
    def tail(self) -> str:
        """The percentile behind which the worst tenth of clients lies."""
        return "10th pct" if self.measure.higher_is_better else "90th pct"

    def of(self, row: MetricRow | CurveRow, part: str = "test") -> float:
        """Return a row's value of the metric."""
        return row.value(part, self.measure.name)

    def of_round(self, row: RoundRow) -> float | None:
        """Return a round's value of the metric on its clients' validation data."""
        return row.val_accuracy if self.measure.name == "accuracy" else row.val_metric

    def reaches(self, value: float, target: float) -> bool:
        """Say whether a value is as good as another."""
        return value >= target if self.measure.higher_is_better else value <= target

    def best(self, values: Sequence[float]) -> float:
        return max(values) if self.measure.higher_is_better else min(values)

    def worst(self, values: Sequence[float]) -> float:
        return min(values) if self.measure.higher_is_better else max(values)

    def gain(self, difference: float | Values) -> float | Values:
        """Return a difference so that above zero is better."""
        return difference if self.measure.higher_is_better else -difference

    def text(self, value: float | None) -> str:
        if self.measure.percent:
            return percent(value)
        return NOTHING if value is None or math.isnan(value) else f"{value:.4g}".replace("-", "−")

    def difference(self, value: float) -> str:
        """Return a difference with its sign, in points of a percentage or in the metric's own unit."""
        if self.measure.percent:
            return points(value)
        text = f"{value:+.3g}"
        return "0" if text in ("+0", "-0") else text.replace("-", "−")

    def bounds(self, found: Interval, *, signed: bool = False) -> str:
        """Return an interval as [low, high], of values or of differences."""
        if self.measure.percent:
            return bounds(found, signed=signed)
        if math.isnan(found.low):
            return NOTHING
        told = self.difference if signed else self.text
        return f"[{told(found.low)}, {told(found.high)}]"

    def worst_decile(self, values: Values) -> float:
        """Return the mean of the worst ceil(n / 10) values."""
        ranked = np.sort(values) if self.measure.higher_is_better else -np.sort(-values)
        return float(ranked[: math.ceil(len(values) / 10)].mean())

    def tail_of(self, values: Values) -> float:
        return float(np.percentile(values, 10 if self.measure.higher_is_better else 90))


def shown_of(group: Sequence[Facts]) -> Shown:
    """Return the metric that a run is judged by."""
    return Shown(group[0].header.judged[0])


def others_of(group: Sequence[Facts]) -> tuple[Shown, ...]:
    """Return the run's further metrics, in the study's order."""
    return tuple(map(Shown, group[0].header.metrics[1:]))
