"""Schedules: the densities through which a search passes on its way to the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedlth.errors import wrong


class Schedule(Protocol):
    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        """Return chains of falling densities; each chain starts anew from the dense training."""
        ...


@dataclass(frozen=True)
class Iterative:
    """Prune, rewind, train again, `rounds` times between one target and the next, geometrically spaced."""

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise wrong("finder.schedule.rounds", "at least 1", self.rounds)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        chain: list[float] = []
        above = 1.0
        for target in targets:
            ratio = target / above
            between = range(1, self.rounds) if ratio < 1 else range(0)
            chain += [above * ratio ** (i / self.rounds) for i in between] + [target]
            above = target
        return (tuple(chain),)


@dataclass(frozen=True)
class Shrink:
    """Remove `rate` of the survivors each time, and stop exactly at each target."""

    rate: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise wrong("finder.schedule.rate", "in (0, 1)", self.rate)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        chain: list[float] = []
        density = 1.0
        for target in targets:
            while density * (1 - self.rate) > target * (1 + 1e-9):
                density *= 1 - self.rate
                chain.append(density)
            density = target
            chain.append(target)
        return (tuple(chain),)


@dataclass(frozen=True)
class OneShot:
    """Prune once, straight from the dense training, for each target."""

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        return tuple((t,) for t in targets)


SCHEDULES = {"iterative": Iterative, "shrink": Shrink, "one_shot": OneShot}
