"""How many random numbers hold a k-subset for every target: why sparse strong tickets need wide random nets.

Natale, Ferre', Giambartolomei, Giroire, Mallmann-Trenn. On the Sparsity of the Strong Lottery Ticket Hypothesis.
NeurIPS 2024, arXiv 2410.14754. Random Fixed-Size Subset Sum, by brute force.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fedlth import rng
from fedlth.errors import wrong

TARGETS = 201
MOST = 64


@dataclass(frozen=True)
class Needed:
    """How many numbers it took at subset size `k` and error `error`, draw by draw, and what the theorem demands."""

    k: int
    error: float
    counts: tuple[int, ...]

    @property
    def median(self) -> int:
        return int(np.median(self.counts))

    @property
    def bound(self) -> float:
        """Return log2(k / error) / H2(k / n) at the median n: no fewer can do, up to a constant."""
        room = entropy(self.k / self.median)
        return math.log2(self.k / self.error) / room if room else math.inf


def entropy(share: float) -> float:
    """Return the binary entropy in bits."""
    if share in (0.0, 1.0):
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def subset_sums(numbers: np.ndarray, k: int) -> np.ndarray:
    """Return the sums of all k-subsets, sorted."""
    return np.sort([math.fsum(chosen) for chosen in combinations(numbers.tolist(), k)])


def covered(sums: np.ndarray, targets: np.ndarray, error: float) -> float:
    """Return the share of targets within `error` of one of the sorted sums."""
    if not sums.size:
        return 0.0
    at = np.searchsorted(sums, targets)
    above = np.abs(sums[np.minimum(at, sums.size - 1)] - targets)
    below = np.abs(sums[np.maximum(at - 1, 0)] - targets)
    return float(np.mean(np.minimum(above, below) < error))


def needed(k: int, error: float, *, share: float = 0.95, draws: int = 5, seed: int = 0) -> Needed:
    """Return the least n of Uniform[-1, 1] numbers whose k-subsets reach `share` of the targets in [-sqrt k, sqrt k].

    One stream a draw, read from its start: n + 1 numbers are the n before and one more, so the search can go upward.
    Raises StudyError at a k below 1 or an error that is not positive.
    """
    if k < 1:
        raise wrong("subset_sum.k", "at least 1", k)
    if not 0 < error < 1:
        raise wrong("subset_sum.error", "in (0, 1)", error)
    targets = np.linspace(-math.sqrt(k), math.sqrt(k), TARGETS)
    counts = []
    for draw in range(draws):
        numbers = rng.stream(seed, "subset sum", draw).uniform(-1, 1, MOST)
        reached = (n for n in range(k, MOST + 1) if covered(subset_sums(numbers[:n], k), targets, error) >= share)
        if (count := next(reached, None)) is None:
            raise wrong("subset_sum.error", f"so large that {MOST} numbers are enough at k = {k}", error)
        counts.append(count)
    return Needed(k, error, tuple(counts))
