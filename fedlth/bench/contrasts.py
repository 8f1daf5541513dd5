"""Paired differences between rows of a leaderboard, tested over seeds: the seed is the unit, never the client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlth.report.choice import Choice, rows_of, with_mask
from fedlth.report.compare import holm
from fedlth.report.facts import Facts
from fedlth.report.intervals import Interval, interval
from fedlth.report.measure import shown_of

Values = NDArray[np.float64]
LEVEL = 0.05
NO_INTERVAL = Interval(math.nan, math.nan)
FEWEST = 3  # seeds below which nothing is tested: with two, a t distribution has one degree of freedom


@dataclass(frozen=True)
class Contrast:
    """One row less another, paired by (seed, client): the mean over seeds of the mean over clients.

    interval: 95 %, by a paired t over seeds; below FEWEST seeds a bootstrap over the clients of these seeds, which
    says nothing about another seed. p_value: paired t over seeds, None below FEWEST; p_holm: corrected over a family.
    level: whether all seeds differ by the same amount, so that there is no spread to test by; p_value is then None.
    hurt: share of clients that are strictly worse. better: whether more of the metric is.
    """

    mean: float
    interval: Interval
    num_seeds: int
    num_pairs: int
    hurt: float
    better: bool
    p_value: float | None = None
    p_holm: float | None = None
    level: bool = False

    @property
    def verdict(self) -> str:
        """Return ahead, behind, or no clear difference; in brackets where no test stands behind it."""
        if math.isnan(self.interval.low):
            return "too few to tell"
        clear = self.p_holm < LEVEL if self.p_holm is not None else self.interval.excludes(0)
        gain = self.mean if self.better else -self.mean
        found = ("ahead" if gain > 0 else "behind") if clear else "no clear difference"
        return found if self.tested else f"({found})"

    @property
    def tested(self) -> bool:
        return self.p_holm is not None

    def seen(self, tests: int) -> float:
        """Return the least difference that would have been clear among so many tests, of this spread over seeds."""
        from scipy.stats import t

        half, freedom = (self.interval.high - self.interval.low) / 2, self.num_seeds - 1
        return float(half * t.ppf(1 - LEVEL / max(1, tests) / 2, freedom) / t.ppf(1 - LEVEL / 2, freedom))

    @property
    def ahead(self) -> bool:
        return self.verdict.strip("()") == "ahead"

    @property
    def behind(self) -> bool:
        return self.verdict.strip("()") == "behind"


def gains(ours: Sequence[Facts], choice: Choice, theirs: Sequence[Facts], other: Choice) -> list[Values]:
    """Return the metric on test data of ours less theirs, one array (clients,) a seed that both have."""
    found, shown = [], shown_of(ours)
    others = {facts.header.seed: facts for facts in theirs}
    for facts in ours:
        if facts.header.seed not in others:
            continue
        mine, its = rows_of(facts, choice), rows_of(others[facts.header.seed], other)
        both = [client for client in mine if client in its]
        if both:
            found.append(np.array([shown.of(mine[c]) - shown.of(its[c]) for c in both]))
    return found


def masked(group: Sequence[Facts], arm: str) -> tuple[Facts, ...]:
    """Return the runs as a mask of this arm is held against its controls: with the clients that can have one."""
    return tuple(replace(facts, metrics=tuple(with_mask(facts.metrics, arm))) for facts in group)


def contrast(samples: Sequence[Values], *, better: bool) -> Contrast | None:
    """Return the contrast of paired differences, one array (clients,) a seed; None where there is no pair."""
    if not samples:
        return None
    means = np.array([float(values.mean()) for values in samples])
    worse = [float(np.mean(values < 0 if better else values > 0)) for values in samples]
    found, p_value = interval(samples, what="difference"), None
    if len(samples) >= FEWEST:
        found, p_value = paired_t(means)
    return Contrast(
        mean=float(means.mean()),
        interval=found,
        num_seeds=len(samples),
        num_pairs=sum(map(len, samples)),
        hurt=float(np.mean(worse)),
        better=better,
        p_value=p_value,
        level=len(samples) >= FEWEST and p_value is None,
    )


def paired_t(means: Values) -> tuple[Interval, float | None]:
    """Return the 95 % interval and two-sided p of the mean of differences, one a seed, by Student's t.

    Differences that are all equal have no spread to judge by: there is then no p.
    """
    from scipy.stats import t

    mean, error = float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means))
    if error < 1e-12:
        return Interval(mean, mean), None
    half = float(t.ppf(0.975, len(means) - 1)) * error
    return Interval(mean - half, mean + half), float(2 * t.sf(abs(mean) / error, len(means) - 1))


def over_seeds(means: Iterable[float]) -> Interval:
    """Return the 95 % interval of the mean of these, one a seed, by Student's t; none below FEWEST."""
    known = np.array(list(means))
    return paired_t(known)[0] if len(known) >= FEWEST else NO_INTERVAL


def corrected(family: Mapping[str, Contrast | None]) -> dict[str, Contrast]:
    """Return the contrasts of one family (one reference, all methods) with Holm's correction over those tested."""
    known = {name: one for name, one in family.items() if one is not None}
    tested = [name for name, one in known.items() if one.p_value is not None]
    values = holm([known[name].p_value or 0.0 for name in tested])
    return known | {name: replace(known[name], p_holm=p) for name, p in zip(tested, values, strict=True)}
