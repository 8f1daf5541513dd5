"""Simulated time to an accuracy: what every federated method of a partition reaches, and when each has reached it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedlth.report.curve import curves
from fedlth.report.facts import Facts
from fedlth.report.fleet import curve as of_rounds
from fedlth.report.measure import shown_of
from fedlth.report.traffic import traffic

Progress = list[tuple[float, float]]  # simulated seconds, and the study's metric on validation data
NEAREST = ("own", "global")  # of a curve's models: the method's own before the one that all share


@dataclass(frozen=True)
class Reached:
    """The value that the worst run reaches at its end, None without a fleet; seconds: mean over seeds, by method."""

    target: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def time_to_worst(groups: Mapping[str, Sequence[Facts]]) -> Reached:
    """Return when each federated method first is as good as the worst run of any is at its end.

    groups: the runs of each method on a partition. Of the curve over all clients where every run has one, else of the
    rounds, each of the clients in it. A method whose runs tell neither, or no simulated time, is left out.
    """
    whole = {name: [_of_curve(facts) for facts in group] for name, group in groups.items()}
    parts = {name: [list(zip(*of_rounds(facts), strict=True)) for facts in group] for name, group in groups.items()}
    timed = {name for name, held in parts.items() if all(held)} | {n for n, held in whole.items() if all(held)}
    if not timed:
        return Reached()
    held = whole if all(all(whole[name]) for name in timed) else parts
    known = {name: held[name] for name in groups if name in timed and all(held[name])}
    shown = shown_of(next(iter(groups.values())))
    target = shown.worst([run[-1][1] for runs in known.values() for run in runs])
    times = {
        name: [next(seconds for seconds, value in run if shown.reaches(value, target)) for run in runs]
        for name, runs in known.items()
    }
    return Reached(target, {name: float(np.mean(seconds)) for name, seconds in times.items()})


def _of_curve(facts: Facts) -> Progress:
    """Return the curve of a run's own model over the clients of the federation; [] without a curve or a fleet."""
    timed = facts.curve and any(row.simulated_s is not None for row in facts.rounds)
    held = {one.arm: one.points for one in curves(facts, traffic(facts))} if timed else {}
    points = next((held[arm] for arm in NEAREST if arm in held), ())
    return [
        (point.simulated_s, float(point.val.mean()))
        for point in points
        if point.simulated_s is not None and len(point.val)
    ]
