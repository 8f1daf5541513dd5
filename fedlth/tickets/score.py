"""Scores: one number a weight, higher is kept. A score never sees a threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from fedlth.errors import wrong
from fedlth.study.parts import make
from fedlth.tickets.controls import Random
from fedlth.tickets.criteria import (
    LargeInit,
    LargeInitLargeFinal,
    Magnitude,
    MagnitudeIncrease,
    Movement,
    SameSign,
    SlowMovement,
    SmallFinal,
    SmallInit,
    SmallInitSmallFinal,
)
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.granularity import Element
from fedlth.tickets.learned import Bernoulli, Biprop, EdgePopup
from fedlth.tickets.sensitivity import Fisher, Gamma, GradientWeight, Grasp, Snip, SynFlow

__all__ = ["SCORES", "Magnitude", "Movement", "Score"]


class Score(Protocol):
    """An attribute `window` asks for the weights after that many earlier epochs, as `evidence.previous`."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray: ...


class _OfAnother:
    """A score made of another: it asks for what that one asks for, and learns where that one learns."""

    of: Any

    def __getattr__(self, name: str) -> Any:
        if name == "window":
            return getattr(self.of, name, 0)
        if name in ("weights", "epochs"):
            return getattr(self.of, name)
        raise AttributeError(name)


@dataclass(frozen=True)
class Inverted(_OfAnother):
    """Another score turned round: its worst stay. Frankle et al., Missing the Mark, ICLR 2021, arXiv 2009.08576."""

    of: Any = "magnitude"
    rows: ClassVar[tuple[int, ...]] = (21,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", _part(self.of))

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return -np.asarray(self.of(evidence))


@dataclass(frozen=True)
class Shuffled(_OfAnother):
    """Another score's mask, shuffled inside each layer: same counts. Frankle et al., ICLR 2021, arXiv 2009.08576.

    The scores change places among a layer's living weights (or groups), so any scope gives every layer the count
    that it had.
    """

    of: Any = "magnitude"
    rows: ClassVar[tuple[int, ...]] = (5, 14, 21)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", _part(self.of))

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        groups = evidence.groups or Element().groups(evidence.layout)
        score = np.array(groups.reduced(self.of(evidence)))
        alive = groups.reduced(evidence.mask)
        for e in groups.layout.prunable:
            where = e.offset + np.flatnonzero(alive[e.slice])
            score[where] = score[evidence.rng.permutation(where)]
        return groups.spread(score)


SCORES: Mapping[str, Callable[..., Score]] = {
    "magnitude": Magnitude,
    "large_final": Magnitude,
    "small_final": SmallFinal,
    "large_init": LargeInit,
    "small_init": SmallInit,
    "large_init_large_final": LargeInitLargeFinal,
    "small_init_small_final": SmallInitSmallFinal,
    "magnitude_increase": MagnitudeIncrease,
    "movement": Movement,
    "large_final_same_sign": SameSign,
    "slow_movement": SlowMovement,
    "snip": Snip,
    "gradient_weight": GradientWeight,
    "grasp": Grasp,
    "synflow": SynFlow,
    "fisher": Fisher,
    "gamma": Gamma,
    "edge_popup": EdgePopup,
    "biprop": Biprop,
    "bernoulli": Bernoulli,
    "random": Random,
    "inverted": Inverted,
    "shuffled": Shuffled,
}


def _part(spec: Any) -> Any:
    """Build the score that a study names; a score that is one already passes."""
    if isinstance(spec, (str, dict)):
        spec = {"name": spec} if isinstance(spec, str) else spec
        return make(SCORES, spec, "finder.score.of", has="__call__(evidence)")
    if not callable(spec):
        raise wrong("finder.score.of", "a score", spec)
    return spec
