"""Average ranks over blocks, Friedman's test and Nemenyi's critical difference (Demsar, JMLR 7, 2006)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05


@dataclass(frozen=True)
class Ranking:
    """Methods by average rank (1 is best) over `blocks`, names in that order.

    p_value: Friedman's test in the form of Iman and Davenport. critical: two methods whose average ranks lie closer
    than this are not told apart (Nemenyi, 5 %). groups: the longest runs of methods within it, as places in `names`.
    """

    names: tuple[str, ...]
    ranks: tuple[float, ...]
    blocks: tuple[str, ...]
    p_value: float
    critical: float

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        found: list[tuple[int, int]] = []
        for first in range(len(self.names)):
            last = max(i for i, rank in enumerate(self.ranks) if rank - self.ranks[first] < self.critical)
            if last > first and not any(a <= first and last <= b for a, b in found):
                found.append((first, last))
        return tuple(found)


def ranking(scores: Mapping[str, Mapping[str, float]], *, higher_is_better: bool) -> Ranking | None:
    """Return the ranking of `scores`, method -> block -> value, over the blocks that every method has.

    None for fewer than two methods or two blocks. Equal values (to 12 digits: means of equal accuracies may differ in
    their last bit) share the mean of their ranks.
    """
    from scipy.stats import rankdata

    blocks = [b for b in next(iter(scores.values()), {}) if all(b in values for values in scores.values())]
    if len(scores) < 2 or len(blocks) < 2:
        return None
    values = np.round([[scores[name][block] for block in blocks] for name in scores], 12)
    ranks: NDArray[np.float64] = rankdata(-values if higher_is_better else values, axis=0)
    means = ranks.mean(axis=1)
    order = np.argsort(means, kind="stable")
    names = list(scores)
    return Ranking(
        names=tuple(names[i] for i in order),
        ranks=tuple(float(means[i]) for i in order),
        blocks=tuple(blocks),
        p_value=friedman(means, len(blocks)),
        critical=critical_difference(len(names), len(blocks)),
    )


def friedman(means: Sequence[float] | NDArray[np.float64], blocks: int) -> float:
    """Return the p of equal average ranks: Iman and Davenport's F from Friedman's chi square (Demsar, 3.2.2)."""
    from scipy.stats import f

    k = len(means)
    square = 12 * blocks / (k * (k + 1)) * (float(np.square(means).sum()) - k * (k + 1) ** 2 / 4)
    rest = blocks * (k - 1) - square
    if rest < 1e-9:  # every block ranks the methods alike
        return 0.0
    return float(f.sf((blocks - 1) * square / rest, k - 1, (k - 1) * (blocks - 1)))


def critical_difference(methods: int, blocks: int) -> float:
    """Return q sqrt(k (k + 1) / (6 N)), q the 5 % point of the studentised range over sqrt 2 (Demsar, 3.2.2)."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - LEVEL, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))
