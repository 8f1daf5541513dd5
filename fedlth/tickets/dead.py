"""Dead weights: what a pruned weight holds while the survivors train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np


class Dead(Protocol):
    @property
    def holds(self) -> bool:
        """Say whether a dead weight may be anything but zero."""
        ...

    def __call__(self, origin: np.ndarray, now: np.ndarray, /) -> np.ndarray:
        """Return what dead weights hold, (num_prunable,), from where weights began and where training left them."""
        ...


@dataclass(frozen=True)
class Zero:
    """A dead weight is zero. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    holds: ClassVar[bool] = False
    rows: ClassVar[tuple[int, ...]] = (12,)

    def __call__(self, origin: np.ndarray, now: np.ndarray, /) -> np.ndarray:
        return np.zeros_like(origin)


@dataclass(frozen=True)
class AtInit:
    """A dead weight stays frozen at what the survivors go back to. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    holds: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (12,)

    def __call__(self, origin: np.ndarray, now: np.ndarray, /) -> np.ndarray:
        return origin


@dataclass(frozen=True)
class ZeroIfShrunk:
    """Zero if training made it smaller, else frozen at its init. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    holds: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (12,)

    def __call__(self, origin: np.ndarray, now: np.ndarray, /) -> np.ndarray:
        return np.where(np.abs(now) < np.abs(origin), np.float32(0), origin)


DEADS = {"zero": Zero, "init": AtInit, "zero_if_shrunk": ZeroIfShrunk}
