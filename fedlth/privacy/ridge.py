"""Ridge regression on mask bits in its dual form: few clients, very many bits. Saunders et al., ICML 1998."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
COLUMNS = 1 << 16  # bits at a time: float32 counts up to 2**24 exactly
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # of the penalty, relative to a client's own share


def counts(left: Values | np.ndarray, right: np.ndarray, places: Sequence[slice]) -> Values:
    """Return (n, m): how many bits of `places` two masks both keep, of (n, bits) and (m, bits); exact."""
    found = np.zeros((len(left), len(right)))
    for place in places:
        for at in range(place.start, place.stop, COLUMNS):
            part = slice(at, min(at + COLUMNS, place.stop))
            found += left[:, part].astype(np.float32) @ right[:, part].astype(np.float32).T
    return found


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fit of (n, classes) targets: weights of the n examples, and what centres a new example's counts."""

    weights: Values
    mean: Values
    columns: Values
    whole: float
    strength: float

    def scores(self, shared: Values) -> Values:
        """Return (m, classes) for the counts (m, n) that new masks share with those of the fit."""
        centred = shared - shared.mean(axis=1, keepdims=True) - self.columns + self.whole
        found: Values = centred @ self.weights + self.mean
        return found


def fitted(shared: Values, targets: Values) -> Ridge:
    """Fit targets (n, classes) to the counts (n, n), both centred; leaving one out chooses the penalty.

    The error of leaving each example out is had from one fit: residual / (1 - leverage).
    """
    n = len(shared)
    columns, whole = shared.mean(axis=0), float(shared.mean())
    kernel = shared - columns - columns[:, None] + whole
    mean = targets.mean(axis=0)
    values, vectors = np.linalg.eigh(kernel)
    values = np.maximum(values, 0.0)
    scale = float(values.sum()) / n or 1.0  # masks that are all equal have no spread
    rotated, best = vectors.T @ (targets - mean), (np.inf, STRENGTHS[-1])
    for strength in STRENGTHS:
        shrunk = values / (values + strength * scale)
        left = targets - mean - vectors @ (shrunk[:, None] * rotated)
        leverage = (vectors**2) @ shrunk + 1 / n
        error = float(((left / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).sum())
        best = min(best, (error, strength))
    weights = vectors @ (rotated / (values + best[1] * scale)[:, None])
    return Ridge(weights, mean, columns, whole, best[1])


def hits(scores: Values, present: np.ndarray) -> int:
    """Return how many of the classes that are present (classes,) are among as many with the highest scores.

    Of equal scores the lower class comes first.
    """
    first = np.argsort(-scores, kind="stable")[: int(np.count_nonzero(present))]
    return int(np.count_nonzero(present[first]))
