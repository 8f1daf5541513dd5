"""Scores: one number a weight, higher is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.tickets.evidence import Evidence


class Score(Protocol):
    def __call__(self, evidence: Evidence, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Magnitude:
    """|w| after training. Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019, arXiv 1803.03635."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.now))


@dataclass(frozen=True)
class MagnitudeIncrease:
    """|w| - |w_0|. Zhou et al., Deconstructing Lottery Tickets, NeurIPS 2019, arXiv 1905.01067."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.now) - np.abs(evidence.init))


@dataclass(frozen=True)
class Movement:
    """|w - w_start|: what moved most in this training stays. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.now - evidence.start))


@dataclass(frozen=True)
class Snip:
    """|gradient x weight| at the training's start. Lee et al., SNIP, ICLR 2019, arXiv 1810.02340."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.gradient(evidence.start) * evidence.start))


@dataclass(frozen=True)
class Random:
    """A uniform draw: the control for every other score."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return evidence.rng.random(evidence.now.size).astype(np.float32)


SCORES = {
    "magnitude": Magnitude,
    "magnitude_increase": MagnitudeIncrease,
    "movement": Movement,
    "snip": Snip,
    "random": Random,
}
