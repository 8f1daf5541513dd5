"""Schedules: the densities through which a search passes on its way to the targets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from fedlth.errors import wrong
from fedlth.tickets.regrow import Constant


class Schedule(Protocol):
    """How often to prune. Three attributes may say more, where a schedule has them:

    `dense_first` False: the first prune is of the start weights, no dense training comes before it. `trains` False:
    nothing trains between two prunes, only the finished ticket does. `regrow`: the part that moves a mask on at
    constant density; without one a dead weight never comes back.
    """

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        """Return chains of falling densities; each chain starts anew from the dense training."""
        ...


@dataclass(frozen=True)
class Iterative:
    """Prune, rewind, train, `rounds` times from target to target, geometric. Frankle & Carbin, arXiv 1803.03635."""

    rounds: int = 1
    rows: ClassVar[tuple[int, ...]] = (2, 4, 6)

    def __post_init__(self) -> None:
        _at_least_one("rounds", self.rounds)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        chain: list[float] = []
        for above, target in _legs(targets):
            ratio = target / above
            between = range(1, self.rounds) if ratio < 1 else range(0)
            chain += [above * ratio ** (i / self.rounds) for i in between] + [target]
        return (tuple(chain),)


@dataclass(frozen=True)
class Shrink:
    """Remove `rate` of the survivors each time, and stop exactly at each target. Frankle & Carbin, arXiv 1803.03635."""

    rate: float = 0.2
    rows: ClassVar[tuple[int, ...]] = (1, 2, 3, 6)

    def __post_init__(self) -> None:
        _in_open_unit("rate", self.rate)

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
class Linear:
    """Remove `rate` of the original size each time. Chen et al., BERT-Tickets, NeurIPS 2020, arXiv 2007.12223."""

    rate: float = 0.1
    rows: ClassVar[tuple[int, ...]] = (14,)

    def __post_init__(self) -> None:
        _in_open_unit("rate", self.rate)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        chain: list[float] = []
        for above, target in _legs(targets):
            steps = (1 - k * self.rate for k in range(1, math.ceil(1 / self.rate)))
            chain += [d for d in steps if target * (1 + 1e-9) < d < above * (1 - 1e-9)] + [target]
        return (tuple(chain),)


@dataclass(frozen=True)
class Cubic:
    """Fast first, slow at the end: the gap to a target falls as (1 - t)^3. Zhu & Gupta, 2017, arXiv 1710.01878."""

    rounds: int = 5
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        _at_least_one("rounds", self.rounds)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        chain: list[float] = []
        for above, target in _legs(targets):
            between = range(1, self.rounds) if target < above else range(0)
            chain += [target + (above - target) * (1 - i / self.rounds) ** 3 for i in between] + [target]
        return (tuple(chain),)


@dataclass(frozen=True)
class OneShot:
    """Prune once, straight from the dense training, for each target. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    rows: ClassVar[tuple[int, ...]] = (4, 11, 16, 18)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        return tuple((t,) for t in targets)


@dataclass(frozen=True)
class Rescore:
    """Before any training: density^(k / steps), scored anew at each. Tanaka et al., SynFlow, arXiv 2006.05467.

    With one step this is pruning at initialisation as SNIP and GraSP do it.
    """

    steps: int = 100
    dense_first: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    rows: ClassVar[tuple[int, ...]] = (19, 20, 21, 23)

    def __post_init__(self) -> None:
        _at_least_one("steps", self.steps)

    def __call__(self, targets: tuple[float, ...], /) -> tuple[tuple[float, ...], ...]:
        between = [range(1, self.steps) if t < 1 else range(0) for t in targets]
        return tuple((*(t ** (k / self.steps) for k in ks), t) for t, ks in zip(targets, between, strict=True))


SCHEDULES = {
    "iterative": Iterative,
    "shrink": Shrink,
    "linear": Linear,
    "cubic": Cubic,
    "one_shot": OneShot,
    "rescore": Rescore,
    "constant": Constant,
}


def _legs(targets: tuple[float, ...]) -> Iterator[tuple[float, float]]:
    """Yield each target with the density that lies before it."""
    above = 1.0
    for target in targets:
        yield above, target
        above = target


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise wrong(f"finder.schedule.{name}", "at least 1", value)


def _in_open_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise wrong(f"finder.schedule.{name}", "in (0, 1)", value)
