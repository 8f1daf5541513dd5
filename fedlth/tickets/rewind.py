"""Rewinds: what survivors start from after a prune, and whether the learning rate starts over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from fedlth.errors import wrong
from fedlth.models.layout import Layout, Params
from fedlth.tickets.checks import check_values
from fedlth.tickets.learned import Frozen, check_frozen, frozen_values


class Anchors(Protocol):
    """Named weights that a client can obtain: "theta_0", "theta_g@r", or "reinit", another draw of the init."""

    def __call__(self, name: str, /) -> Params: ...


class Rewind(Protocol):
    """Two attributes may say more: `steps`, go back to step `steps` of the dense training and go on from there;
    `trains` False, the ticket is not trained at all."""

    @property
    def anchor(self) -> str | None:
        """Name the weights to go back to; None keeps the trained ones."""
        ...

    @property
    def replay_lr(self) -> bool:
        """Say whether the learning-rate schedule starts over (else it stays at its last value)."""
        ...


@runtime_checkable
class Changes(Protocol):
    """A rewind that starts from something made of what it goes back to."""

    def changed(self, weights: np.ndarray, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        """Return the (num_prunable,) float32 start values, those that `mask` keeps; the rest does not count."""
        ...


def changed(rewind: Rewind, weights: Params, mask: np.ndarray, layout: Layout, rng: np.random.Generator) -> Params:
    """Return what survivors start from: `weights`, or what the rewind makes of them. Always a copy, never a view."""
    floats = weights.floats.copy()
    if isinstance(rewind, Changes):
        made = rewind.changed(floats[: mask.size].copy(), mask, layout, rng)
        floats[: mask.size] = check_values("rewind", rewind, made, mask.size)
    return replace(weights, floats=floats)


@dataclass(frozen=True)
class ToInit:
    """Back to theta_0. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    anchor: str | None = "theta_0"
    replay_lr: bool = True
    rows: ClassVar[tuple[int, ...]] = (2, 9)


@dataclass(frozen=True)
class ToGlobal:
    """Back to the global model at round `round` (-1: the last): late rewinding. Frankle et al., arXiv 1912.05671."""

    round: int = -1
    rows: ClassVar[tuple[int, ...]] = (9, 30)

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
class ToStep:
    """Back to step `step` of the dense training, the rates going on from there. Frankle et al., arXiv 1912.05671."""

    step: int = 100
    anchor: ClassVar[str | None] = None
    replay_lr: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (9, 10)

    def __post_init__(self) -> None:
        if self.step < 1:
            raise wrong("finder.rewind.step", "at least 1", self.step)

    @property
    def steps(self) -> int:
        return self.step


@dataclass(frozen=True)
class Stay:
    """Keep the trained weights and fine-tune at the schedule's last learning rate. Han et al., arXiv 1506.02626."""

    anchor: str | None = None
    replay_lr: bool = False
    rows: ClassVar[tuple[int, ...]] = (9, 18)


@dataclass(frozen=True)
class ReplayLr:
    """Keep the trained weights, replay the learning rates. Renda et al., ICLR 2020, arXiv 2003.02389."""

    anchor: str | None = None
    replay_lr: bool = True
    rows: ClassVar[tuple[int, ...]] = (9,)


@dataclass(frozen=True)
class Reinit:
    """Another draw of the initialisation: the control. Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    anchor: ClassVar[str | None] = "reinit"
    replay_lr: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (2, 12, 21)


@dataclass(frozen=True)
class SignedConstant:
    """Each sign of theta_0 times the standard deviation of its layer's init. Zhou et al., arXiv 1905.01067."""

    anchor: ClassVar[str | None] = "theta_0"
    replay_lr: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (12,)

    def changed(self, weights: np.ndarray, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        for e in layout.prunable:
            size = weights[e.slice].std(dtype=np.float64) or 1.0  # one weight has no spread, and must not die
            weights[e.slice] = np.sign(weights[e.slice]) * size
        return weights


@dataclass(frozen=True)
class Reshuffle:
    """theta_0's values, shuffled among the survivors of each layer. Zhou et al., NeurIPS 2019, arXiv 1905.01067."""

    anchor: ClassVar[str | None] = "theta_0"
    replay_lr: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (12,)

    def changed(self, weights: np.ndarray, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        for e in layout.prunable:
            where = e.offset + np.flatnonzero(mask[e.slice])
            weights[where] = weights[rng.permutation(where)]
        return weights


@dataclass(frozen=True)
class Noise:
    """theta_0 plus N(0, (sigmas x the layer's standard deviation)^2). Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    sigmas: float = 0.5
    anchor: ClassVar[str | None] = "theta_0"
    replay_lr: ClassVar[bool] = True
    rows: ClassVar[tuple[int, ...]] = (7,)

    def __post_init__(self) -> None:
        if not 0 <= self.sigmas < np.inf:
            raise wrong("finder.rewind.sigmas", "at least 0", self.sigmas)

    def changed(self, weights: np.ndarray, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        for e in layout.prunable:
            scale = self.sigmas * weights[e.slice].std(dtype=np.float64)
            weights[e.slice] += (scale * rng.standard_normal(e.size)).astype(np.float32)
        return weights


@dataclass(frozen=True)
class ToFrozen:
    """theta_0, or its signs at one size a layer, never trained: a strong ticket. Ramanujan et al., arXiv 1911.13299.

    Goes with the scores `edge_popup`, `biprop` and `bernoulli`, which learn the mask over the same `weights`.
    """

    weights: Frozen = "signed_constant"
    anchor: ClassVar[str | None] = "theta_0"
    replay_lr: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    rows: ClassVar[tuple[int, ...]] = (13, 23)

    def __post_init__(self) -> None:
        check_frozen(self.weights)

    def changed(self, weights: np.ndarray, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        return frozen_values(self.weights, weights, mask, layout)


REWINDS = {
    "init": ToInit,
    "global": ToGlobal,
    "step": ToStep,
    "none": Stay,
    "lr": ReplayLr,
    "reinit": Reinit,
    "signed_constant": SignedConstant,
    "reshuffle": Reshuffle,
    "noise": Noise,
    "frozen": ToFrozen,
}
