"""Constant density: after each training the worst leave and as many others come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlth.errors import wrong
from fedlth.models.layout import Layout
from fedlth.tickets.select import keep_top


@dataclass(frozen=True)
class Regrow:
    """Move a mask on: of each layer's survivors drop a share, the lowest scores, and bring back as many.

    `by` is "gradient" (Evci et al., RigL, ICML 2020, arXiv 1911.11134) or "random" (Mocanu et al., SET, Nature
    Communications 2018, arXiv 1707.04780). The share falls from `drop` to 0 along a cosine over `rounds`. `first` says
    whether the first mask is "random" or the "score"'s. `every` > 0: the moves lie that many steps apart in one
    training, whose batches and rates go on; 0: each comes after a whole training.
    """

    rounds: int
    drop: float
    by: str
    first: str
    every: int = 0

    def window(self, round: int) -> tuple[int, int | None]:
        """Return the first step of the part before move `round`, and where it ends (None: with the training)."""
        last = (round + 1) * self.every if self.every and round < self.rounds else None
        return round * self.every, last

    def share(self, round: int) -> float:
        """Return what is dropped at `round` = 0, 1, ..., rounds - 1."""
        return self.drop / 2 * (1 + math.cos(math.pi * round / self.rounds))

    def __call__(
        self, score: np.ndarray, growth: np.ndarray, alive: np.ndarray, layout: Layout, round: int, /
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (the new mask, which of it stayed). What was just dropped may come back, as in RigL."""
        stayed, grown = np.zeros(alive.size, bool), np.zeros(alive.size, bool)
        for e in layout.prunable:
            here = alive[e.slice]
            count = int(here.sum())
            moved = min(int(self.share(round) * count), here.size - count)
            stayed[e.slice] = keep_top(score[e.slice], here, count - moved)
            grown[e.slice] = keep_top(growth[e.slice], ~stayed[e.slice], moved)
        return stayed | grown, stayed


@dataclass(frozen=True)
class Constant:
    """Sparse from the start, and the mask moves: RigL, arXiv 1911.11134 (`by: random`: SET, arXiv 1707.04780).

    No dense training comes before the first mask, which is `first`: "random", as in the papers, or the "score"'s on
    the start weights. With `rewind: none` what comes back starts at zero, as in the papers. It moves `rounds` times,
    every `every` steps of one training, as in the papers, or (0) after each of as many trainings.
    """

    rounds: int = 5
    drop: float = 0.3
    by: str = "gradient"
    first: str = "random"
    every: int = 0
    dense_first: ClassVar[bool] = False
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise wrong("finder.schedule.rounds", "at least 1", self.rounds)
        if not 0 < self.drop < 1:
            raise wrong("finder.schedule.drop", "in (0, 1)", self.drop)
        if self.by not in ("gradient", "random"):
            raise wrong("finder.schedule.by", "gradient or random", self.by)
        if self.every < 0:
            raise wrong("finder.schedule.every", "at least 0", self.every)
        if self.first not in ("score", "random"):
            raise wrong("finder.schedule.first", "score or random", self.first)

    @property
    def regrow(self) -> Regrow:
        return Regrow(self.rounds, self.drop, self.by, self.first, self.every)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        return tuple((t,) * (self.rounds + 1) for t in targets)
