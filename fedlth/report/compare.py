"""Runs against each other, paired by (seed, client): differences, intervals, tests, effect sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedlth.errors import StudyError, require
from fedlth.report.choice import Choice, main_choice, rows_of
from fedlth.report.facts import Facts, read_group
from fedlth.report.fleet import best_reached, duration, simulated_s, time_to
from fedlth.report.intervals import Interval, interval
from fedlth.report.known_arms import arm_of
from fedlth.report.measure import shown_of
from fedlth.report.statistics import Difference, over_seeds
from fedlth.report.tables import Table, aligned
from fedlth.report.units import signed

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Contestant:
    """One argument of a comparison: a run, or the seeds of one, and the arm and density that speak for it."""

    name: str
    group: tuple[Facts, ...]
    choice: Choice
    density: float
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Contrast:
    """One contestant against the first. p_value: Wilcoxon signed-rank, two-sided; p_holm: corrected over contrasts.

    effect: matched-pairs rank-biserial correlation, -1 (every pair worse) to 1 (every pair better).
    pairs: how many (seed, client) pairs. units: how many values the test saw (see `compare`).
    """

    contestant: Contestant
    difference: Difference
    pairs: int
    units: int
    better: int
    worse: int
    p_value: float
    p_holm: float
    effect: float


@dataclass(frozen=True)
class Comparison:
    """The first contestant, which the others are held against, and their contrasts in the order given.

    `target` is the best validation result of a round that every run reaches, None where one has no fleet.
    """

    reference: Contestant
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...]
    target: float | None = None

    def times(self) -> Table:
        """Return simulated time to the accuracy that the worst run reaches, and in all; no rows without a fleet."""
        shown = shown_of(self.reference.group)
        header = ("run", f"best round {shown.column}", "time to it", "step 1", "step 2")
        rows = []
        for one in [self.reference, *(c.contestant for c in self.contrasts)] if self.target is not None else []:
            best = [found for facts in one.group if (found := best_reached(facts)) is not None]
            reached = [found for facts in one.group if (found := time_to(facts, self.target or 0.0)) is not None]
            steps = [[simulated_s(facts, step=step) or 0.0 for facts in one.group] for step in (1, 2)]
            cells = (duration(float(np.mean(seconds))) for seconds in (reached, *steps))
            rows.append((one.name, shown.text(float(np.mean(best))), *cells))
        target = f"{shown.text(self.target)}{shown.unit}"
        title = f"Simulated time to a round of {target} validation {shown.label}, which every run reaches"
        return Table(title, header, tuple(rows))

    def table(self) -> Table:
        """Return the comparison as rows of text."""
        shown = shown_of(self.reference.group)
        header = ("run", "arm", "density", f"mean {shown.column}", "95 % interval", "difference", "95 % of difference",
                  "better / worse", "p", "p (Holm)", "effect")  # fmt: skip
        rows = [(*_cells(self.reference), "reference", "", "", "", "", "")]
        for one in self.contrasts:
            gap = (shown.difference(one.difference.mean), shown.bounds(one.difference.interval, signed=True))
            tests = (_p(one.p_value), _p(one.p_holm), signed(one.effect))
            rows.append((*_cells(one.contestant), *gap, f"{one.better} / {one.worse} of {one.pairs}", *tests))
        title = f"Test {shown.label}, paired by seed and client, against {self.reference.name}"
        return Table(title, header, tuple(rows), left=2)

    def text(self) -> str:
        """Return the comparison for a terminal."""
        times = self.times()
        more = ["", times.title, "", aligned(times)] if times.rows else []
        lines = [self.table().title, "", aligned(self.table()), *more, *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _cells(one: Contestant) -> tuple[str, ...]:
    arm, density, shown = arm_of(one.choice.arm).label, f"{one.density:.3g}", shown_of(one.group)
    return one.name, arm, density, shown.text(one.mean), shown.bounds(one.interval)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down correction (Scandinavian Journal of Statistics 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def signed_rank(gains: Values) -> tuple[float, float]:
    """Return (two-sided Wilcoxon p, rank-biserial effect) of paired gains; zeros are left out, all zero is (1, 0)."""
    from scipy.stats import rankdata, wilcoxon

    moved = gains[np.abs(gains) > 1e-12]
    if len(moved) == 0:
        return 1.0, 0.0
    ranks = rankdata(np.round(np.abs(moved), 12))
    effect = float((ranks[moved > 0].sum() - ranks[moved < 0].sum()) / ranks.sum())
    # an exact null needs ranks without ties; for 50 and more the normal form is as good
    tied = len(np.unique(ranks)) < len(ranks)
    method: Literal["approx", "exact"] = "approx" if tied or len(moved) > 50 else "exact"
    return float(wilcoxon(np.round(moved, 12), method=method).pvalue), effect


def _check(first: Contestant, other: Contestant) -> None:
    seeds = [[facts.header.seed for facts in one.group] for one in (first, other)]
    if seeds[0] != seeds[1]:
        raise StudyError(f"compare: {other.name}: expected seeds {seeds[0]} of {first.name}, got {seeds[1]}")
    for ours, theirs in zip(first.group, other.group, strict=True):
        place = f"compare: {theirs.path}"
        judged = [facts.header.judged[0].name for facts in (ours, theirs)]
        if judged[0] != judged[1]:
            raise StudyError(f"{place}: expected the metric {judged[0]} (that of {ours.path}), got {judged[1]}")
        for key in ("partition_digest", "data_digest"):
            one, two = getattr(ours.header, key), getattr(theirs.header, key)
            if one != two:
                raise StudyError(f"{place}: expected {key} {one[:16]} (that of {ours.path}), got {two[:16]}")
        clients = [set(rows_of(f, c.choice)) for f, c in ((ours, first), (theirs, other))]
        if clients[0] != clients[1]:
            odd = sorted(clients[0] ^ clients[1])
            raise StudyError(f"{place}: expected the clients of {ours.path}, got a difference in {odd[:10]}")


def _honest(groups: Sequence[tuple[Facts, ...]]) -> list[tuple[Facts, ...]]:
    """Return the groups without the clients that are hostile in any run of the same seed."""
    hostile: dict[int, set[int]] = {}
    for facts in (facts for group in groups for facts in group):
        hostile.setdefault(facts.header.seed, set()).update(facts.header.hostile)
    return [
        tuple(
            replace(facts, metrics=tuple(row for row in facts.metrics if row.client not in hostile[facts.header.seed]))
            for facts in group
        )
        for group in groups
    ]


def _contestant(
    path: Path, group: tuple[Facts, ...], *, name: str, arm: str | None, density: float | None
) -> Contestant:
    if len(group[0].header.judged) > 1:
        told = ", ".join(measure.name for measure in group[0].header.judged)
        raise StudyError(f"compare: {path}: clients must be judged by one metric, got {told}, by task")
    choice = main_choice(group, arm=arm, density=density)
    shown = shown_of(group)
    samples = [np.array([shown.of(row) for row in rows_of(facts, choice).values()]) for facts in group]
    if not all(len(values) for values in samples):
        at = f"{choice.arm} at {choice.target_density:.3g}"
        raise StudyError(f"compare: {path}: expected {at} in every seed, got a seed without it")
    density = float(np.mean([row.density for facts in group for row in rows_of(facts, choice).values()]))
    return Contestant(name, group, choice, density, over_seeds(np.mean, samples), interval(samples))


def _contrast(first: Contestant, other: Contestant) -> Contrast:
    gains: list[dict[int, float]] = []
    shown = shown_of(first.group)
    for ours, theirs in zip(first.group, other.group, strict=True):
        base, new = rows_of(ours, first.choice), rows_of(theirs, other.choice)
        gains.append({client: shown.of(new[client]) - shown.of(base[client]) for client in base})
    samples = [np.array(list(gain.values())) for gain in gains]
    one_partition = len({facts.header.partition_digest for facts in first.group}) == 1
    if one_partition and len({frozenset(gain) for gain in gains}) == 1:
        units = np.mean(samples, axis=0)
    else:
        units = np.concatenate(samples)
    # Ranks are taken of rounded gains: of a metric without a unit the largest is one.
    scale = 1.0 if shown.measure.percent else float(np.abs(units).max()) or 1.0
    p_value, effect = signed_rank(np.asarray(shown.gain(units / scale)))
    flat = np.asarray(shown.gain(np.concatenate(samples)))
    moved = Difference(over_seeds(np.mean, samples), interval(samples, what="difference"))
    better, worse = int((flat > 0).sum()), int((flat < 0).sum())
    return Contrast(other, moved, len(flat), len(units), better, worse, p_value, p_value, effect)


def compare(runs: Sequence[Path], *, arm: str | None = None, density: float | None = None) -> Comparison:
    """Return the comparison of runs (or folders of seeds) with the first one.

    arm, density: what speaks for each run; by default arms.main_choice decides for each (arms.PREFERENCE, at the
    density of its saved tickets). Pairs are (seed, client). Intervals: bootstrap over clients (one seed), or over
    seeds and then clients. Wilcoxon: where all seeds share one partition, each client's mean gain over seeds is
    one value, for the same client twice is not two; else every (seed, client) is one.

    Raises StudyError for fewer than two runs, and where seeds, partition or data digests, or clients differ.
    """
    require("fedlth compare", "scipy", extra="sim")
    if len(runs) < 2:
        raise StudyError(f"compare: expected two runs or more, got {len(runs)}")
    names = _names(runs)
    groups = _honest([read_group(run) for run in runs])
    found = [
        _contestant(run, group, name=name, arm=arm, density=density)
        for run, group, name in zip(runs, groups, names, strict=True)
    ]
    for other in found[1:]:
        _check(found[0], other)
    contrasts = [_contrast(found[0], other) for other in found[1:]]
    corrected = holm([one.p_value for one in contrasts])
    notes = [f"{one.name}: {note}" for one in found for facts in one.group for note in facts.notes]
    pairs = zip(contrasts, corrected, strict=True)
    best = [best_reached(facts) for one in found for facts in one.group]
    reached = [value for value in best if value is not None]
    target = shown_of(found[0].group).worst(reached) if reached and len(reached) == len(best) else None
    return Comparison(found[0], tuple(replace(one, p_holm=value) for one, value in pairs), tuple(notes), target)


def _names(runs: Sequence[Path]) -> list[str]:
    short = [run.resolve().name for run in runs]
    if len(set(short)) == len(short):
        return short
    longer = [f"{run.resolve().parent.name}/{name}" for run, name in zip(runs, short, strict=True)]
    return longer if len(set(longer)) == len(longer) else [str(run) for run in runs]
