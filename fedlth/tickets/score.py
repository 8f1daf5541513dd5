"""Scores: one number a weight, higher is kept. A score never sees a threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from fedlth.tickets.controls import Inverted, Random, Shuffled
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
from fedlth.tickets.learned import Bernoulli, Biprop, EdgePopup
from fedlth.tickets.sensitivity import Fisher, Gamma, GradientWeight, Grasp, Snip, SynFlow

__all__ = ["SCORES", "Magnitude", "Movement", "Score"]


class Score(Protocol):
    """An attribute `window` asks for the weights after that many earlier epochs, as `evidence.previous`."""

    def __call__(self, evidence: Evidence, /) -> np.ndarray: ...


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
