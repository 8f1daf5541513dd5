"""The curve of a run: every evaluation between the rounds, and what the choice of a round is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlth.report.facts import Facts, grouped
from fedlth.report.known_arms import arm_of, arm_order
from fedlth.report.measure import Shown, shown_of
from fedlth.report.results import Results
from fedlth.report.tables import Table
from fedlth.report.traffic import Traffic
from fedlth.storage.records import EVALUATE, CurveRow

Values = NDArray[np.float64]
LAST, VALIDATED, TESTED = CHOICES = ("the last", "best on validation", "best on test (audit)")


@dataclass(frozen=True)
class Point:
    """One evaluation of one model: the round it followed, what had been spent until then, and what clients got.

    `rounds` counts step 1's rounds, `total_bytes` what they had moved both ways, evaluations left out, `simulated_s`
    the simulated time, where the run has one. `val` and `test` are the study's metric of the federation's clients that
    answered (`val` is empty where they have no validation data), `unseen` the others' on test data. Of `val_rank` and
    `test_rank` more is better; a run that keeps the best compares by the first: how many clients answered, then how
    well.
    """

    rounds: int
    total_bytes: int
    simulated_s: float | None
    val: Values
    test: Values
    unseen: Values
    val_rank: tuple[int, float]
    test_rank: float


@dataclass(frozen=True)
class Curve:
    """One model of one run over its evaluations, in order; at least one."""

    arm: str
    points: tuple[Point, ...]

    def chosen(self) -> dict[str, Point]:
        """Return the points of CHOICES, of equals the earlier one; without validation data there is no choice by it."""
        found = [
            self.points[-1],
            max(self.points, key=lambda point: point.val_rank),
            max(self.points, key=lambda point: point.test_rank),
        ]
        asked = all(len(point.val) for point in self.points)
        return {name: point for name, point in zip(CHOICES, found, strict=True) if asked or name != VALIDATED}


def curves(facts: Facts, moved: Traffic) -> tuple[Curve, ...]:
    """Return a run's curves, the global model's last; none where no client of the federation ever evaluated."""
    spent = _spent(facts, moved)
    found = []
    for arm, rows in sorted(grouped((row.arm, row) for row in facts.curve).items(), key=lambda one: arm_order(one[0])):
        by_round = grouped(((r.phase, r.round), r) for r in rows).items()
        points = [_point(shown_of([facts]), spent[place], of) for place, of in by_round]
        if points := [point for point in points if len(point.test)]:
            found.append(Curve(arm, tuple(points)))
    return tuple(found)


def _spent(facts: Facts, moved: Traffic) -> dict[tuple[str, int], tuple[int, int, float | None]]:
    """Return rounds, bytes and simulated seconds until the end of each round of step 1."""
    reached = {(one.phase, one.round): one.cumulative_bytes for one in moved.by_round}
    joining = facts.header.joining(1)
    found: dict[tuple[str, int], tuple[int, int, float | None]] = {}
    total_bytes, seconds = 0, 0.0
    for row in (row for row in facts.rounds if row.phase in joining):
        took = row.simulated_s
        seconds += took or 0.0
        total_bytes = reached.get((row.phase, row.round), total_bytes)  # a round that nobody took part in moves none
        found[row.phase, row.round] = len(found) + 1, total_bytes, None if took is None else seconds
    return found


def _point(shown: Shown, spent: tuple[int, int, float | None], rows: Sequence[CurveRow]) -> Point:
    seen = [row for row in rows if not row.unseen]
    val = np.array([shown.of(row, "val") for row in seen if row.num_val])
    test = np.array([shown.of(row) for row in seen])
    ranks = [float(shown.gain(values.mean())) if len(values) else 0.0 for values in (val, test)]
    unseen = np.array([shown.of(row) for row in rows if row.unseen])
    return Point(*spent, val=val, test=test, unseen=unseen, val_rank=(len(val), ranks[0]), test_rank=ranks[1])


def curves_of(results: Results) -> tuple[tuple[Curve, ...], ...]:
    """Return the curves of every run of a group; none where tasks have different metrics, which have no mean."""
    if not results.one_metric:
        return tuple(() for _ in results.group)
    return tuple(curves(*one) for one in zip(results.group, results.traffics, strict=True))


def curve_table(results: Results) -> Table:
    """Return each model at its last round, at its best on validation and at its best on test data; means over seeds."""
    shown, rows = results.shown, []
    of = shown.column if shown.measure.name == "accuracy" else f", {shown.column}"
    kinds = [f"{kind} {of}".replace(" ,", ",") for kind in ("validation", "test")]
    header = ("model", "round", "after rounds", *kinds, f"unseen clients, {kinds[1]}")
    for arm, held in _by_arm(results).items():
        chosen = [one.chosen() for one in held]
        for name in chosen[0]:
            points = [found[name] for found in chosen]
            places = ", ".join(dict.fromkeys(str(point.rounds) for point in points))
            values = (_mean([getattr(point, part) for point in points]) for part in ("val", "test", "unseen"))
            rows.append((arm_of(arm).label, name, places, *map(shown.text, values)))
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
    shown, chosen = results.shown, [one.chosen() for one in held]
    of = {name: _mean([found[name].test for found in chosen]) or 0.0 for name in chosen[0]}
    told = {name: f"{shown.text(value)}{shown.unit}" for name, value in of.items()}
    over = {name: _flattery(shown, abs(of[TESTED] - value)) for name, value in of.items()}
    mean = (
        f"{told[LAST]} mean test {shown.label}"
        if shown.measure.percent
        else f"a mean test {shown.label} of {told[LAST]}"
    )
    validated = f", and {told[VALIDATED]} at the round that validation data choose" if VALIDATED in of else ""
    more = f", and by {over[VALIDATED]} over the choice on validation data" if VALIDATED in of else ""
    unit = " points" if shown.measure.percent else ""
    text = (
        f"Over the clients of the federation the global model reaches {mean} after the last round{validated}. The best "
        f"round on test data reads {told[TESTED]}: that is an audit and no result, for nobody may choose by test data. "
        f"Reported as one, it would be inflated by {over[LAST]}{unit} over the last round{more}."
    )
    return f"{text} {_kept(results)}".strip()


def _flattery(shown: Shown, gap: float) -> str:
    return f"{100 * gap:.1f}" if shown.measure.percent else f"{gap:.3g}"


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
