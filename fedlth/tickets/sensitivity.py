"""Scores that ask the network: gradients, curvature, flow, the scale of norm layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlth.errors import wrong
from fedlth.tickets.evidence import Evidence, needed


@dataclass(frozen=True)
class Snip:
    """|gradient x weight| at the training's start. Lee et al., SNIP, ICLR 2019, arXiv 1810.02340."""

    rows: ClassVar[tuple[int, ...]] = (19, 21)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.gradient(evidence.start) * evidence.start))


@dataclass(frozen=True)
class GradientWeight:
    """|gradient x weight| at the training's end. Mozer & Smolensky, Skeletonization, NeurIPS 1988."""

    rows: ClassVar[tuple[int, ...]] = (11, 19)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        slope = needed(evidence.at_now, self).gradient(evidence.now)
        return np.asarray(np.abs(slope * evidence.now))


@dataclass(frozen=True)
class Grasp:
    """w x (H g) at the start, of logits / temperature. Wang, Zhang, Grosse, GraSP, ICLR 2020, arXiv 2002.07376.

    The paper writes -w (H g) and removes the top; this is the same set with the sign of "higher is kept".
    """

    temperature: float = 200.0
    rows: ClassVar[tuple[int, ...]] = (19, 21)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise wrong("finder.score.temperature", "above 0", self.temperature)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        network = needed(evidence.at_start, self)
        return np.asarray(evidence.start * network.hessian_gradient(evidence.start, temperature=self.temperature))


@dataclass(frozen=True)
class SynFlow:
    """Synaptic flow: |w| x dR/d|w|, without data. Tanaka et al., NeurIPS 2020, arXiv 2006.05467.

    One shot of it empties layers first of all scores; with `schedule: rescore` (100 steps) it empties none.
    """

    rows: ClassVar[tuple[int, ...]] = (20, 21)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        flow = needed(evidence.at_start, self).flow(evidence.start)
        return np.asarray(np.abs(evidence.start.astype(np.float64)) * flow)


@dataclass(frozen=True)
class Fisher:
    """Mean (g w)^2 / 2 a FLOP: a Hessian-free saliency per cost. Theis et al., 2018, arXiv 1801.05787.

    g is one example's gradient at the training's end. Without `per_cost`, what a weight costs does not count.
    """

    per_cost: bool = True
    rows: ClassVar[tuple[int, ...]] = (11, 19)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        network = needed(evidence.at_now, self)
        saliency = 0.5 * network.squared_gradient(evidence.now) * evidence.now.astype(np.float64) ** 2
        return saliency / network.flops() if self.per_cost else saliency


@dataclass(frozen=True)
class Gamma:
    """|gamma| of the norm layer behind each channel. Liu et al., Network Slimming, ICCV 2017, arXiv 1708.06519.

    Early-Bird's score (You et al., ICLR 2020, arXiv 1909.11957), with `granularity: row` and `scope: global`.
    """

    rows: ClassVar[tuple[int, ...]] = (18,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return needed(evidence.at_now, self).gammas()
