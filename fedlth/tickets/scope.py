"""Scopes: where scores compete, and how many weights each place keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fedlth.errors import StudyError, wrong
from fedlth.models.layout import Layout
from fedlth.tickets.select import apportion, keep_top, keep_top_each


class Scope(Protocol):
    """An attribute `elements` that is True refuses every granularity but `element`."""

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray: ...


def survivors(layout: Layout, density: float) -> int:
    """Return the exact count that `density` means: round half to even, at least one."""
    return max(1, round(density * layout.num_prunable))


def _alive(alive: np.ndarray, layout: Layout) -> np.ndarray:
    return np.array([int(np.count_nonzero(alive[e.slice])) for e in layout.prunable])


def _floored(counts: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Give the layers below their floor what the largest layers can spare: an empty layer cuts the network in two."""
    for i in np.flatnonzero(counts < floor):
        counts[i] += 1
        counts[int(np.argmax(counts))] -= 1
    return counts


def _of_each(score: np.ndarray, alive: np.ndarray, layout: Layout, counts: np.ndarray) -> np.ndarray:
    mask = np.zeros(score.size, bool)
    for e, kept in zip(layout.prunable, counts, strict=True):
        mask[e.slice] = keep_top(score[e.slice], alive[e.slice], int(kept))
    return mask


def _pick(score: np.ndarray, alive: np.ndarray, layout: Layout, weights: np.ndarray, density: float) -> np.ndarray:
    """Keep each layer's best, the layers' counts proportional to `weights` and at least one where any is alive."""
    limits = _alive(alive, layout)
    total = survivors(layout, density)
    floor = np.minimum(limits, 1) if total >= np.count_nonzero(limits) else np.zeros_like(limits)
    return _of_each(score, alive, layout, _floored(apportion(total, weights, limits), floor))


@dataclass(frozen=True)
class Layerwise:
    """Every layer keeps the same share; Frankle & Carbin's choice for small nets, ICLR 2019, arXiv 1803.03635."""

    rows: ClassVar[tuple[int, ...]] = (11, 23)

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        return _pick(score, alive, layout, np.array([e.size for e in layout.prunable], float), density)


@dataclass(frozen=True)
class Global:
    """All layers compete in one list; each keeps at least `floor`. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    floor: int = 0
    rows: ClassVar[tuple[int, ...]] = (14, 18, 19, 20)

    def __post_init__(self) -> None:
        if self.floor < 0:
            raise wrong("finder.scope.floor", "at least 0", self.floor)

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        total = survivors(layout, density)
        if not self.floor:
            return keep_top(score, alive, total)
        floor = np.minimum(_alive(alive, layout), self.floor)
        if floor.sum() > total:
            raise StudyError(
                f"finder.scope.floor: {self.floor} of each layer is more than the {total} weights of density {density}"
            )
        first = _of_each(score, alive, layout, floor)
        rest = keep_top(score, alive & ~first, min(total, int(alive.sum())) - int(first.sum()))
        return np.asarray(first | rest)


@dataclass(frozen=True)
class Erk:
    """Layer densities by Erdos-Renyi-Kernel. Evci et al., RigL, ICML 2020, arXiv 1911.11134."""

    elements: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (19,)

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        raw = np.array([float(sum(e.shape)) for e in layout.prunable])
        return _pick(score, alive, layout, raw, density)


@dataclass(frozen=True)
class HalfOutput:
    """Layer-wise, the output layer pruned at half the rate. Frankle & Carbin, ICLR 2019, arXiv 1803.03635.

    A density means that of the other layers: 0.8^n is rung n of the ladder of `rate` 0.2. Each rung takes
    round(rate x survivors) from a layer and round(rate / 2 x survivors) from the output layer, which is the last
    prunable tensor in the module's own order unless `output` names it.
    """

    rate: float = 0.2
    output: str = ""
    rows: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 6)

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise wrong("finder.scope.rate", "in (0, 1)", self.rate)

    def counts(self, layout: Layout, density: float) -> np.ndarray:
        """Return how many weights each layer keeps, (num_layers,)."""
        names = [e.name for e in layout.prunable]
        last = max(layout.prunable, key=lambda e: e.place).name
        if self.output and self.output not in names:
            raise StudyError(f"finder.scope.output: must be one of {', '.join(names)}, got {self.output!r}")
        halves = np.array([0.5 if name == (self.output or last) else 1.0 for name in names])
        rungs = math.log(density) / math.log1p(-self.rate)
        whole = round(rungs) if abs(rungs - round(rungs)) < 1e-6 else math.floor(rungs)
        rates = [self.rate] * whole + [1 - density / (1 - self.rate) ** whole] * (rungs - whole >= 1e-6)
        kept = np.array([e.size for e in layout.prunable])
        for rate in rates:
            kept = kept - np.round(rate * halves * kept).astype(np.int64)
        return kept

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        return _of_each(score, alive, layout, self.counts(layout, density))


@dataclass(frozen=True)
class NOfM:
    """Weights compete in runs of `m` inputs of a unit: N:M. Zhou et al., ICLR 2021, arXiv 2102.04010.

    A run of a convolution lies along the input channels, at one place of the kernel; with fewer than `m` of them,
    along the kernel too. At a density of n / m every whole run keeps exactly n, as 2:4 hardware wants; in between some
    keep one more.
    """

    m: int = 4
    elements: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.m < 2:
            raise wrong("finder.scope.m", "at least 2", self.m)

    def __call__(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float, /) -> np.ndarray:
        place, runs = np.zeros(score.size, np.int64), 0
        for e in layout.prunable:
            outputs = e.outputs if len(e.shape) > 1 else 1
            inputs = e.size // (outputs * math.prod(e.shape[2:]))
            inputs = inputs if inputs >= self.m else e.size // outputs
            kernel, row = e.size // (outputs * inputs), -(-inputs // self.m)
            output, channel, spot = np.unravel_index(np.arange(e.size), (outputs, inputs, kernel))
            place[e.slice] = runs + e.as_stored((output * kernel + spot) * row + channel // self.m)
            runs += outputs * kernel * row
        sizes = np.bincount(place, minlength=runs).astype(float)
        limits = np.bincount(place[alive], minlength=runs)
        return keep_top_each(score, alive, place, apportion(survivors(layout, density), sizes, limits))


SCOPES = {"layerwise": Layerwise, "global": Global, "erk": Erk, "half_output": HalfOutput, "n_of_m": NOfM}
