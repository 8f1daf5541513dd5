"""Scores from where weights began and where they are: magnitude and the criteria of Zhou et al."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlth.errors import StudyError, wrong
from fedlth.tickets.evidence import Evidence


@dataclass(frozen=True)
class Magnitude:
    """|w| after training (Zhou's large_final). Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    rows: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 6, 11, 14)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.now))


@dataclass(frozen=True)
class SmallFinal:
    """-|w| after training: the inverse of magnitude. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    rows: ClassVar[tuple[int, ...]] = (11,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(-np.abs(evidence.now))


@dataclass(frozen=True)
class LargeInit:
    """|w_0|. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    rows: ClassVar[tuple[int, ...]] = (11,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.init))


@dataclass(frozen=True)
class SmallInit:
    """-|w_0|. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    rows: ClassVar[tuple[int, ...]] = (11,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(-np.abs(evidence.init))


@dataclass(frozen=True)
class LargeInitLargeFinal:
    """min(alpha |w|, |w_0|): large at both ends. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    alpha: float = 1.0
    rows: ClassVar[tuple[int, ...]] = (11,)

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.minimum(np.float32(self.alpha) * np.abs(evidence.now), np.abs(evidence.init)))


@dataclass(frozen=True)
class SmallInitSmallFinal:
    """-max(alpha |w|, |w_0|): small at both ends. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    alpha: float = 1.0
    rows: ClassVar[tuple[int, ...]] = (11,)

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(-np.maximum(np.float32(self.alpha) * np.abs(evidence.now), np.abs(evidence.init)))


@dataclass(frozen=True)
class MagnitudeIncrease:
    """|w| - |w_0|. Zhou et al., Deconstructing Lottery Tickets, NeurIPS 2019, arXiv 1905.01067."""

    rows: ClassVar[tuple[int, ...]] = (11,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.now) - np.abs(evidence.init))


@dataclass(frozen=True)
class Movement:
    """|w - w_start|: what moved most in this training stays. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    rows: ClassVar[tuple[int, ...]] = (11,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.asarray(np.abs(evidence.now - evidence.start))


@dataclass(frozen=True)
class SameSign:
    """|w|, and below every other a weight whose sign turned since theta_0. Zhou et al., arXiv 1905.01067."""

    rows: ClassVar[tuple[int, ...]] = (13,)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        size = np.abs(evidence.now)
        # Among the turned the largest goes first, as it does the most harm at its old sign.
        return np.asarray(np.where(np.sign(evidence.now) == np.sign(evidence.init), size, -size), np.float32)


@dataclass(frozen=True)
class SlowMovement:
    """Mean |change| an epoch over the last `window` epochs: the slowest goes. After Zhou et al., arXiv 1905.01067.

    `decay` weighs an older epoch's change against the next one's (1: all alike). A weight that is already right and
    rests scores lowest, and Adam's normalised steps make all weights alike: meant for SGD.
    """

    window: int = 1
    decay: float = 0.5
    rows: ClassVar[tuple[int, ...]] = (11,)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise wrong("finder.score.window", "at least 1", self.window)
        if not 0 < self.decay <= 1:
            raise wrong("finder.score.decay", "in (0, 1]", self.decay)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        if not evidence.previous:
            raise StudyError(
                "finder.score: slow_movement needs the weights of earlier epochs, which are not available here"
            )
        path = [*evidence.previous[-self.window :], evidence.now]
        weight, total, score = 1.0, 0.0, np.zeros(evidence.now.size)
        for older, newer in zip(path[-2::-1], path[:0:-1], strict=True):
            score += weight * np.abs(newer.astype(np.float64) - older)
            total += weight
            weight *= self.decay
        return np.asarray(score / total, np.float32)


def _positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise wrong(f"finder.score.{name}", "above 0", value)
