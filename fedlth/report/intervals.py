"""Bootstrap intervals over clients, and over seeds and then clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedlth.rng import stream

RESAMPLES = 9_999
AT_ONCE = 10**7  # draws held at a time
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a mean; both ends are nan where one value is all there is."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Say whether `value` lies outside."""
        return value < self.low or value > self.high


def interval(samples: Sequence[NDArray[np.float64]], *, what: str = "mean") -> Interval:
    """Return the 95 % bootstrap interval of the mean over seeds of the mean over clients.

    samples: one array (clients,) a seed, seeds without clients left out before. One seed: scipy's BCa bootstrap
    over clients (percentile where BCa is not defined). Several: hierarchical percentile bootstrap, seeds drawn
    with replacement, then the clients of each drawn seed. Draws come from a stream named by `what`: equal input
    gives equal intervals. With few seeds the interval is too narrow, as any bootstrap over few units is.
    """
    if sum(len(values) for values in samples) < 2:
        return Interval(float("nan"), float("nan"))
    rng = stream(0, f"report/bootstrap/{what}")
    if len(samples) == 1:
        return _over_clients(samples[0], rng)
    means = _over_seeds(samples, rng)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _over_clients(values: NDArray[np.float64], rng: np.random.Generator) -> Interval:
    from scipy.stats import bootstrap

    if np.ptp(values) < 1e-12:  # equal but for rounding; BCa divides by the spread of the jackknife
        return Interval(float(values[0]), float(values[0]))
    # the jackknife behind BCa needs more than two values to have a skewness
    method: Literal["BCa", "percentile"] = "BCa" if len(values) > 2 else "percentile"
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=max(1, AT_ONCE // len(values)), confidence_level=CONFIDENCE,
        method=method, rng=rng,
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


def _over_seeds(samples: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    seeds = len(samples)
    picked = rng.integers(0, seeds, size=(RESAMPLES, seeds))
    means = np.empty((RESAMPLES, seeds))
    for seed, values in enumerate(samples):
        places = picked == seed
        part = max(1, AT_ONCE // len(values))
        counts = [min(part, int(places.sum()) - at) for at in range(0, int(places.sum()), part)]
        draws = (rng.integers(0, len(values), size=(count, len(values))) for count in counts)
        means[places] = np.concatenate([values[drawn].mean(axis=1) for drawn in draws] or [np.zeros(0)])
    averaged: NDArray[np.float64] = means.mean(axis=1)
    return averaged
