"""Scopes: where scores compete, and how many weights each place keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.params import Layout
from fedlth.tickets.select import apportion, keep_top


class Scope(Protocol):
    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray: ...


def survivors(layout: Layout, density: float) -> int:
    """Return the exact count that `density` means: round half to even, at least one."""
    return max(1, round(density * layout.num_prunable))


def _pick(score: np.ndarray, alive: np.ndarray, layout: Layout, weights: np.ndarray, density: float) -> np.ndarray:
    """Keep each layer's best, the layers' counts proportional to `weights` and at least one where any is alive."""
    limits = np.array([int(np.count_nonzero(alive[e.slice])) for e in layout.prunable])
    total = survivors(layout, density)
    floor = np.minimum(limits, 1) if total >= np.count_nonzero(limits) else np.zeros_like(limits)
    counts = apportion(total, weights, limits)
    # Largest layers give up what the floor takes: an empty layer cuts the network in two.
    for i in np.flatnonzero(counts < floor):
        counts[i] += 1
        counts[int(np.argmax(counts))] -= 1
    mask = np.zeros(score.size, bool)
    for e, kept in zip(layout.prunable, counts, strict=True):
        mask[e.slice] = keep_top(score[e.slice], alive[e.slice], int(kept))
    return mask


@dataclass(frozen=True)
class Layerwise:
    """Every layer keeps the same share; Frankle & Carbin's choice for small nets."""

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        return _pick(score, alive, layout, np.array([e.size for e in layout.prunable], float), density)


@dataclass(frozen=True)
class Global:
    """All layers compete in one list."""

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        return keep_top(score, alive, survivors(layout, density))


@dataclass(frozen=True)
class Erk:
    """Layer densities by Erdos-Renyi-Kernel. Evci et al., RigL, ICML 2020, arXiv 1911.11134."""

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        raw = np.array([float(sum(e.shape)) for e in layout.prunable])
        return _pick(score, alive, layout, raw, density)


SCOPES = {"layerwise": Layerwise, "global": Global, "erk": Erk}
