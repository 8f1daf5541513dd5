"""Gates say when the next prune may happen, stops say when the last one was. Both see validation data only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from fedlth.errors import StudyError, wrong
from fedlth.models.layout import Params


@dataclass(frozen=True)
class Proposal:
    """What a prune would leave now: a mask over groups, and whether equal scores lay on both sides of a cut."""

    mask: np.ndarray
    ask_tied: Callable[[], bool]

    @cached_property
    def tied(self) -> bool:
        return self.ask_tied()


@dataclass(frozen=True)
class Look:
    """A model after one training: the density in force, the prunes so far; the rest is worked out when asked for.

    `val_accuracy` is the study's metric on validation data, turned so that more is better.
    An older one has let its model go, or a search would hold as many models as it trains: it keeps what it was asked.
    """

    density: float
    prunes: int
    params: Params | None
    measure: Callable[[Params], float]
    propose: Callable[[], Proposal]

    @cached_property
    def val_accuracy(self) -> float:
        return self.measure(self._there())

    @cached_property
    def proposal(self) -> Proposal:
        self._there()
        return self.propose()

    def _there(self) -> Params:
        if self.params is None:
            raise StudyError("finder.gate or stop: an older look has only what was asked of it while it was the newest")
        return self.params

    def let_go(self) -> Look:
        """Return the look without its model."""
        gone = Look(self.density, self.prunes, None, _nothing, _nothing)
        if "proposal" in self.__dict__:
            tied = self.proposal.tied
            gone.__dict__["proposal"] = Proposal(self.proposal.mask, lambda: tied)
        if "val_accuracy" in self.__dict__:
            gone.__dict__["val_accuracy"] = self.val_accuracy
        return gone


def _nothing(*_: object) -> Any:
    raise AssertionError("there is no model to evaluate")


class Gate(Protocol):
    def __call__(self, looks: Sequence[Look], /) -> bool:
        """Say whether to prune now; `looks` are the trainings since the last prune, the newest last.

        After a False the model trains once more at the density that it has.
        """
        ...


@dataclass(frozen=True)
class Always:
    """Prune after every training. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    rows: ClassVar[tuple[int, ...]] = (1,)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        return True


@dataclass(frozen=True)
class WarmUp:
    """Before the first prune, train `trainings` times. Zhu & Gupta, 2017, arXiv 1710.01878."""

    trainings: int = 2
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        _at_least_one("trainings", self.trainings)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        return looks[-1].prunes > 0 or len(looks) >= self.trainings


@dataclass(frozen=True)
class ValAccuracy:
    """Prune at validation accuracy `at_least`, or after `most` trainings. Li et al., LotteryFL, arXiv 2008.03371."""

    at_least: float = 0.5
    most: int = 5
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        _at_least_one("most", self.most)
        _share("gate.at_least", self.at_least)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        return len(looks) >= self.most or looks[-1].val_accuracy >= self.at_least


@dataclass(frozen=True)
class Adaptive:
    """The same, but each refusal lowers the threshold by `decay`. Seo et al., CELL, arXiv 2104.12501."""

    at_least: float = 0.5
    decay: float = 0.8
    most: int = 10
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        _at_least_one("most", self.most)
        _share("gate.at_least", self.at_least)
        if not 0 < self.decay < 1:
            raise wrong("finder.gate.decay", "in (0, 1)", self.decay)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        refused = len(looks) - 1
        return len(looks) >= self.most or looks[-1].val_accuracy >= self.at_least * self.decay**refused


@dataclass(frozen=True)
class EarlyBird:
    """Prune when proposed masks settle: Early-Bird. You et al., ICLR 2020, arXiv 1909.11957.

    That is when the last `fifo` of them lie within `distance` of the newest. Distance is the share of groups in which
    two masks differ. A mask whose cut falls between equal scores says nothing (all norm scales are alike at init):
    with one in the queue the gate stays shut. After `most` trainings it opens anyway.
    """

    fifo: int = 5
    distance: float = 0.1
    most: int = 50
    rows: ClassVar[tuple[int, ...]] = (18,)

    def __post_init__(self) -> None:
        _at_least_one("most", self.most)
        if self.fifo < 2:
            raise wrong("finder.gate.fifo", "at least 2", self.fifo)
        if not 0 < self.distance <= 1:
            raise wrong("finder.gate.distance", "in (0, 1]", self.distance)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        if len(looks) >= self.most:
            return True
        queue = [look.proposal for look in looks[-self.fifo :]]
        if len(queue) < self.fifo or any(p.tied for p in queue):
            return False
        return all(mask_distance(p.mask, queue[-1].mask) < self.distance for p in queue[:-1])


def mask_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of positions in which two masks differ: Hamming distance, in [0, 1]."""
    return float(np.mean(one != other))


GATES = {
    "always": Always,
    "warm_up": WarmUp,
    "val_accuracy": ValAccuracy,
    "adaptive": Adaptive,
    "early_bird": EarlyBird,
}


class Stop(Protocol):
    def __call__(self, looks: Sequence[Look], /) -> bool:
        """Say whether the newest ticket, `looks[-1]`, went too far; `looks[0]` is the model before the first prune.

        After a True the one before it stands in for all targets that were not reached.
        """
        ...


@dataclass(frozen=True)
class AtTarget:
    """Go on to the last target density. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    rows: ClassVar[tuple[int, ...]] = (1,)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        return False


@dataclass(frozen=True)
class ValDrop:
    """Stop at a ticket more than `drop` below the dense model's validation accuracy. Chen et al., arXiv 2007.12223."""

    drop: float = 0.02
    rows: ClassVar[tuple[int, ...]] = (14,)

    def __post_init__(self) -> None:
        _share("stop.drop", self.drop)

    def __call__(self, looks: Sequence[Look], /) -> bool:
        return looks[-1].val_accuracy < looks[0].val_accuracy - self.drop


STOPS = {"target": AtTarget, "val_drop": ValDrop}


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise wrong(f"finder.gate.{name}", "at least 1", value)


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise wrong(f"finder.{name}", "in [0, 1]", value)
