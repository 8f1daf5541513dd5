"""Scores that are learned: the mask is the optimisation variable, the weights never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from fedlth.errors import wrong
from fedlth.models.layout import Layout
from fedlth.tickets.evidence import Evidence, Lesson, needed

Frozen = Literal["init", "kaiming", "signed_constant", "binary"]


def frozen_values(kind: str, init: np.ndarray, mask: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the (num_prunable,) float32 values that masks are learned over, or that a learned ticket holds.

    "init" is theta_0; "kaiming" the same, each layer scaled to the standard deviation sqrt(2 / fan_in), since torch's
    own init is smaller and a signal that nothing trains would die in it; "signed_constant" its signs times that;
    "binary" its signs times the mean size, in "kaiming", of what `mask` keeps of the layer: 1 bit a weight and one
    number a layer.
    """
    if kind == "init":
        return np.asarray(init)
    values = init.astype(np.float32)
    for e in layout.prunable:
        here, constant = values[e.slice], np.sqrt(2 / e.fan_in)
        spread = float(here.std(dtype=np.float64))
        scaled = here * np.float32(constant / spread if spread else 1.0)
        if kind == "signed_constant":
            scaled = np.sign(here) * np.float32(constant)
        elif kind == "binary":
            kept = mask[e.slice]
            scaled = np.sign(here) * np.float32(np.abs(scaled[kept]).mean() if kept.any() else 0.0)
        values[e.slice] = scaled
    return values


@dataclass(frozen=True)
class EdgePopup:
    """Trained: each layer's best form a good net of frozen weights. Ramanujan et al., CVPR 2020, arXiv 1911.13299.

    Goes with `schedule: rescore` of one step and `rewind: frozen` of the same `weights`.
    """

    epochs: int = 3
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weights: Frozen = "signed_constant"
    rows: ClassVar[tuple[int, ...]] = (23,)

    def __post_init__(self) -> None:
        _check(self.epochs, self.lr, self.weights, ("init", "kaiming", "signed_constant"))
        _check_decay(self.momentum, self.weight_decay)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return _learned(self, evidence, "edge_popup", self.momentum, self.weight_decay)


@dataclass(frozen=True)
class Biprop:
    """Edge-popup over 1-bit weights, sign x mean size. Diffenderfer & Kailkhura, ICLR 2021, arXiv 2103.09377.

    Goes with `schedule: rescore` of one step and `rewind: {name: frozen, weights: binary}`.
    """

    epochs: int = 3
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weights: Frozen = "binary"
    rows: ClassVar[tuple[int, ...]] = (23,)

    def __post_init__(self) -> None:
        _check(self.epochs, self.lr, self.weights, ("binary",))
        _check_decay(self.momentum, self.weight_decay)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return _learned(self, evidence, "biprop", self.momentum, self.weight_decay)


@dataclass(frozen=True)
class Bernoulli:
    """Log-odds that a weight is there, by sampled masks. Zhou et al., 1905.01067; Isik et al., FedPM, arXiv 2209.15328.

    Goes with `schedule: rescore` of one step and `rewind: frozen` of the same `weights`.
    """

    epochs: int = 3
    lr: float = 50.0
    weights: Frozen = "signed_constant"
    rows: ClassVar[tuple[int, ...]] = (13, 23, 25)

    def __post_init__(self) -> None:
        _check(self.epochs, self.lr, self.weights, ("init", "kaiming", "signed_constant"))

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return _learned(self, evidence, "bernoulli", 0.0, 0.0)


def _learned(
    score: EdgePopup | Biprop | Bernoulli, evidence: Evidence, rule: str, momentum: float, weight_decay: float
) -> np.ndarray:
    lesson = Lesson(
        rule=rule, alive=evidence.mask, density=evidence.density, epochs=score.epochs, lr=score.lr, momentum=momentum,
        weight_decay=weight_decay,
    )  # fmt: skip
    # Biprop makes its binary values itself, since their size hangs on the mask of the moment.
    kind = "kaiming" if rule == "biprop" else score.weights
    values = frozen_values(kind, evidence.init, evidence.mask, evidence.layout)
    return needed(evidence.at_start, score).learn(values, lesson)


def _check(epochs: int, lr: float, weights: str, allowed: tuple[str, ...]) -> None:
    if epochs < 1:
        raise wrong("finder.score.epochs", "at least 1", epochs)
    if not 0 < lr < np.inf:
        raise wrong("finder.score.lr", "above 0", lr)
    if weights not in allowed:
        raise wrong("finder.score.weights", f"one of {', '.join(allowed)}", weights)


def _check_decay(momentum: float, weight_decay: float) -> None:
    if not 0 <= momentum < 1:
        raise wrong("finder.score.momentum", "in [0, 1)", momentum)
    if not 0 <= weight_decay < np.inf:
        raise wrong("finder.score.weight_decay", "at least 0", weight_decay)


def check_frozen(weights: str) -> None:
    """Raise StudyError at an unknown kind of frozen weights."""
    if weights not in get_args(Frozen):
        raise wrong("finder.rewind.weights", f"one of {', '.join(get_args(Frozen))}", weights)
