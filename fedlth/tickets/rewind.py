"""Rewinds: what survivors start from after a prune, and whether the learning rate starts over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedlth.errors import wrong
from fedlth.params import Params


class Anchors(Protocol):
    """Named weights that a client can obtain: "theta_0" or "theta_g@r"."""

    def __call__(self, name: str, /) -> Params: ...


class Rewind(Protocol):
    @property
    def anchor(self) -> str | None:
        """Name the weights to go back to; None keeps the trained ones."""
        ...

    @property
    def replay_lr(self) -> bool:
        """Say whether the learning-rate schedule starts over (else it stays at its last value)."""
        ...


@dataclass(frozen=True)
class ToInit:
    """Back to theta_0. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    anchor: str | None = "theta_0"
    replay_lr: bool = True


@dataclass(frozen=True)
class ToGlobal:
    """Back to the global model at round `round` (-1: the last): late rewinding. Frankle et al., arXiv 1912.05671."""

    round: int = -1

    def __post_init__(self) -> None:
        if self.round < -1:
            raise wrong("finder.rewind.round", "a round, or -1 for the last", self.round)

    @property
    def anchor(self) -> str | None:
        return "theta_g" if self.round < 0 else f"theta_g@{self.round}"

    @property
    def replay_lr(self) -> bool:
        return True


@dataclass(frozen=True)
class Stay:
    """Keep the trained weights and fine-tune at the schedule's last learning rate."""

    anchor: str | None = None
    replay_lr: bool = False


@dataclass(frozen=True)
class ReplayLr:
    """Keep the trained weights, replay the learning rates. Renda et al., ICLR 2020, arXiv 2003.02389."""

    anchor: str | None = None
    replay_lr: bool = True


REWINDS = {"init": ToInit, "global": ToGlobal, "none": Stay, "lr": ReplayLr}
