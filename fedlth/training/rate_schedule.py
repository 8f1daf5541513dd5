"""Schedules of the learning rate: which share of it each step of a training takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class RateSchedule(Protocol):
    def __call__(self, step: int, steps: int, /) -> float:
        """Return the share of the learning rate at `step`, from 0, of a training of `steps` steps."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same rate at every step."""

    def __call__(self, step: int, steps: int, /) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine down to `final`, 1 %. Loshchilov & Hutter, ICLR 2017, arXiv 1608.03983.

    Of `warmup` and `start`, and of `final_at`, see Linear.
    """

    final: float = 0.01
    warmup: float = 0.0
    start: float | None = None
    final_at: str = "last"

    def __post_init__(self) -> None:
        _check(self.final, self.warmup, self.start, self.final_at)

    def __call__(self, step: int, steps: int, /) -> float:
        warm = _warm_steps(self.warmup, steps)
        if step < warm:
            return _warming(step, warm, self.start)
        progress = _progress(step - warm, steps - warm, self.final_at)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A line down to `final`, after a line up in the first steps: `warmup` of them, 1 is one step, 1.0 is all.

    The first step's share is `start`, by default 1 / (warm-up steps + 1); 0 wastes it. `final` is reached at the last
    step, or (`final_at: after`) would be at the step after it, as with BERT's schedule, whose last step still moves.
    """

    final: float = 0.0
    warmup: float = 0.0
    start: float | None = None
    final_at: str = "after"

    def __post_init__(self) -> None:
        _check(self.final, self.warmup, self.start, self.final_at)

    def __call__(self, step: int, steps: int, /) -> float:
        warm = _warm_steps(self.warmup, steps)
        if step < warm:
            return _warming(step, warm, self.start)
        return 1 + (self.final - 1) * _progress(step - warm, steps - warm, self.final_at)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The rate times `gamma` at each of the `milestones`, which are shares of the steps."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        numbers = isinstance(self.milestones, tuple) and all(isinstance(m, (int, float)) for m in self.milestones)
        if not numbers or not self.milestones or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones must be shares in (0, 1), got {self.milestones!r}")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")

    def __call__(self, step: int, steps: int, /) -> float:
        return float(self.gamma ** sum(step >= round(share * steps) for share in self.milestones))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """The same factor at every step, down to `final` at the last."""

    final: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.final < math.inf:
            raise ValueError(f"final must be above 0, got {self.final}")

    def __call__(self, step: int, steps: int, /) -> float:
        return float(self.final ** _progress(step, steps, "last"))


def _warm_steps(warmup: float, steps: int) -> int:
    """Return how many steps a warm-up takes: a whole number of them, or a share of all."""
    return warmup if isinstance(warmup, int) else round(warmup * steps)


def _warming(step: int, warm: int, start: float | None) -> float:
    first = 1 / (warm + 1) if start is None else start
    return first + (1 - first) * step / warm


def _progress(step: int, steps: int, final_at: str) -> float:
    """Return how far a step is on the way: 1 at the last step, or at the step after it."""
    return step / max(1, steps - (final_at == "last"))


def _check(final: float, warmup: float, start: float | None, final_at: str) -> None:
    if not 0 <= final < math.inf:
        raise ValueError(f"final must be at least 0, got {final}")
    if isinstance(warmup, bool) or not (0 <= warmup <= 1 or (isinstance(warmup, int) and warmup > 1)):
        raise ValueError(f"warmup must be a share of the steps in [0, 1], or a whole number of them, got {warmup}")
    if start is not None and not (isinstance(start, (int, float)) and 0 <= start <= 1):
        raise ValueError(f"start must be in [0, 1], got {start!r}")
    if final_at not in ("last", "after"):
        raise ValueError(f"final_at must be last or after, got {final_at!r}")
