"""The curve of a run: every evaluation between the rounds, and what the choice of a round is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlth.report.facts import Facts, grouped
from fedlth.report.known_arms import arm_of, arm_order
from fedlth.report.results import Results
from fedlth.report.tables import Table
from fedlth.report.traffic import Traffic
from fedlth.report.units import percent
from fedlth.storage.records import EVALUATE, CurveRow

Values = NDArray[np.float64]
CHOICES = ("the last", "best on validation", "best on test (audit)")


@dataclass(frozen=True)
class Point:
    """One evaluation of one model: the round it followed, what had been spent until then, and accuracies of clients.

    `rounds` counts step 1's rounds, `total_bytes` what they had moved both ways, evaluations left out, `simulated_s`
    the simulated time, where the run has one. `val` and `test` are those of the federation's clients that answered,
    `unseen` the others' test accuracies.
    """

    rounds: int
    total_bytes: int
    simulated_s: float | None
    val: Values
    test: Values
    unseen: Values

    @property
    def rank(self) -> tuple[int, float]:
        """By which a run that keeps the best compares two: first how many clients answered."""
        return len(self.val), float(self.val.mean())


@dataclass(frozen=True)
class Curve:
    """One model of one run over its evaluations, in order; at least one."""

    arm: str
    points: tuple[Point, ...]

    def chosen(self) -> tuple[Point, Point, Point]:
        """Return the points of CHOICES; of equals the earlier one."""
        return (
            self.points[-1],
            max(self.points, key=lambda point: point.rank),
            max(self.points, key=lambda point: float(point.test.mean())),
        )


def curves(facts: Facts, moved: Traffic) -> tuple[Curve, ...]:
    """Return a run's curves, the global model's last; none where no client of the federation ever evaluated."""
    spent = _spent(facts, moved)
    found = []
    for arm, rows in sorted(grouped((row.arm, row) for row in facts.curve).items(), key=lambda one: arm_order(one[0])):
        points = [_point(spent[place], of) for place, of in grouped(((r.phase, r.round), r) for r in rows).items()]
        if points := [point for point in points if len(point.val)]:
            found.append(Curve(arm, tuple(points)))
    return tuple(found)


def _spent(facts: Facts, moved: Traffic) -> dict[tuple[str, int], tuple[int, int, float | None]]:
    """Return rounds, bytes and simulated seconds until the end of each round of step 1."""
    reached = {(one.phase, one.round): one.cumulative_bytes for one in moved.by_round}
    joining = facts.header.joining(1)
    found: dict[tuple[str, int], tuple[int, int, float | None]] = {}
    total_bytes, seconds = 0, 0.0
    for row in (row for row in facts.rounds if row.phase in joining):
        took = getattr(row, "simulated_s", None)
        seconds += took or 0.0
        total_bytes = reached.get((row.phase, row.round), total_bytes)  # a round that nobody took part in moves none
        found[row.phase, row.round] = len(found) + 1, total_bytes, None if took is None else seconds
    return found


def _point(spent: tuple[int, int, float | None], rows: Sequence[CurveRow]) -> Point:
    seen = [row for row in rows if not row.unseen]
    return Point(
        *spent,
        val=np.array([row.val_accuracy for row in seen]),
        test=np.array([row.test_accuracy for row in seen]),
        unseen=np.array([row.test_accuracy for row in rows if row.unseen]),
    )


def curves_of(results: Results) -> tuple[tuple[Curve, ...], ...]:
    """Return the curves of every run of a group."""
    return tuple(curves(*one) for one in zip(results.group, results.traffics, strict=True))


def curve_table(results: Results) -> Table:
    """Return each model at its last round, at its best on validation and at its best on test data; means over seeds."""
    header = ("model", "round", "after rounds", "validation %", "test %", "unseen clients, test %")
    rows = []
    for arm, held in _by_arm(results).items():
        for name, points in zip(CHOICES, zip(*(one.chosen() for one in held), strict=True), strict=True):
            places = ", ".join(dict.fromkeys(str(point.rounds) for point in points))
            accuracies = (percent(_mean([p.val for p in points])), percent(_mean([p.test for p in points])))
            rows.append((arm_of(arm).label, name, places, *accuracies, percent(_mean([p.unseen for p in points]))))
    return Table("The curve: all clients, by the round that is looked at", header, tuple(rows), left=2)


def _by_arm(results: Results) -> dict[str, list[Curve]]:
    return grouped((one.arm, one) for held in curves_of(results) for one in held)


def _mean(values: Sequence[Values]) -> float | None:
    """Return the mean over seeds of the mean over clients."""
    means = [float(of.mean()) for of in values if len(of)]
    return float(np.mean(means)) if means else None


def inflation(results: Results) -> str:
    """Say what a choice on test data would have added to the global model's result; "" where there is no curve."""
    held = _by_arm(results).get("global")
    if held is None:
        return ""
    last, validated, tested = (
        _mean([p.test for p in points]) or 0.0 for points in zip(*(one.chosen() for one in held), strict=True)
    )
    text = (
        f"Over the clients of the federation the global model reaches {percent(last)} % mean test accuracy after the "
        f"last round, and {percent(validated)} % at the round that validation data choose. The best round on test "
        f"data reads {percent(tested)} %: that is an audit and no result, for nobody may choose by test data. Reported "
        f"as one, it would be inflated by {100 * (tested - last):.1f} points over the last round, and by "
        f"{100 * (tested - validated):.1f} over the choice on validation data."
    )
    return f"{text} {_kept(results)}".strip()


def _kept(results: Results) -> str:
    """Say with which model step 2 began, where the evaluations chose it."""
    several = len(results.group) > 1
    kept = [
        f"{row.kept_best} (seed {facts.header.seed})" if several else row.kept_best
        for facts in results.group
        for row in facts.rounds
        if row.kept_best
    ]
    return f"Step 2 began with the model that was best on validation data: {', '.join(kept)}." if kept else ""


def lost_evaluations(facts: Facts) -> int:
    """Return how many evaluations between the rounds never came, or were refused."""
    return sum(len(row.failed) for row in facts.rounds if row.phase == EVALUATE)
