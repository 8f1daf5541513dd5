"""Controls: what every claim about a ticket must beat. Each changes one thing and leaves the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlth.models.layout import Layout
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.granularity import Element, Granularity
from fedlth.tickets.select import keep_top


@dataclass(frozen=True)
class Random:
    """A uniform draw: the control for every other score."""

    rows: ClassVar[tuple[int, ...]] = (2, 11, 14, 19)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return evidence.rng.random(evidence.now.size).astype(np.float32)


def shuffled_mask(
    mask: np.ndarray, layout: Layout, rng: np.random.Generator, granularity: Granularity | None = None
) -> np.ndarray:
    """Return a random mask with the same count in every layer, of whole groups where the mask is of groups."""
    groups = (granularity or Element()).groups(layout)
    alive = groups.reduced(mask)
    out = np.zeros(alive.size, bool)
    for e in groups.layout.prunable:
        here = alive[e.slice] > 0
        out[e.slice] = keep_top(rng.random(e.size), np.ones(e.size, bool), int(here.sum()))
    return groups.spread(out)


def permuted_values(weights: np.ndarray, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Return the (num_prunable,) weights with the values of every tensor in another order, pruned or not."""
    return np.concatenate([weights[:0], *(rng.permutation(weights[e.slice]) for e in layout.prunable)])


def recounted_mask(mask: np.ndarray, score: np.ndarray, layout: Layout, granularity: Granularity) -> np.ndarray:
    """Return the mask of the highest scores, with the same count in every layer (of whole groups) as `mask` has."""
    groups = granularity.groups(layout)
    alive, scores = groups.reduced(mask), groups.reduced(score)
    out = np.zeros(alive.size, bool)
    for e in groups.layout.prunable:
        out[e.slice] = keep_top(scores[e.slice], np.ones(e.size, bool), int((alive[e.slice] > 0).sum()))
    return groups.spread(out)
