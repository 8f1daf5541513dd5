"""Metrics of classes: outputs (n, C) and classes (n,), filled batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedlth.training.number_metrics import LARGEST

CLASSES = frozenset({"classes", "positions"})


@dataclass(frozen=True)
class Accuracy:
    """The share of examples, or positions, whose largest output is their class."""

    name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: tuple[int, int] | None, outputs: Tensor, y: Tensor, /) -> tuple[int, int]:
        right, count = state or (0, 0)
        return right + int((outputs.argmax(-1) == y).sum()), count + y.numel()

    def value(self, state: tuple[int, int], /) -> float:
        return state[0] / state[1]

    def chance(self, num_classes: int, /) -> float | None:
        return 1 / num_classes


@dataclass(frozen=True)
class BalancedAccuracy:
    """The mean over the classes that are there of the share of each that is told right."""

    name: ClassVar[str] = "balanced_accuracy"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: Tensor | None, outputs: Tensor, y: Tensor, /) -> Tensor:
        return _counted(state, outputs, y)

    def value(self, state: Tensor, /) -> float:
        right, _, there = state
        return float((right[there > 0] / there[there > 0]).mean())

    def chance(self, num_classes: int, /) -> float | None:
        return 1 / num_classes


@dataclass(frozen=True)
class MacroF1:
    """The mean of the classes' F1 scores, over those that are there or are guessed; 2 right / (there + guessed)."""

    name: ClassVar[str] = "macro_f1"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: Tensor | None, outputs: Tensor, y: Tensor, /) -> Tensor:
        return _counted(state, outputs, y)

    def value(self, state: Tensor, /) -> float:
        right, guessed, there = state
        seen = (guessed + there) > 0
        return float((2 * right[seen] / (guessed + there)[seen]).mean())

    def chance(self, num_classes: int, /) -> float | None:
        return 1 / num_classes


@dataclass(frozen=True)
class Majority:
    """The share of the commonest class of the part: what telling it every time reaches, whatever the model says."""

    name: ClassVar[str] = "majority"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: Tensor | None, outputs: Tensor, y: Tensor, /) -> Tensor:
        found = torch.bincount(y, minlength=outputs.shape[-1]).cpu()
        return found if state is None else state + found

    def value(self, state: Tensor, /) -> float:
        return int(state.max()) / int(state.sum())

    def chance(self, num_classes: int, /) -> float | None:
        return None


HITS = (Accuracy, BalancedAccuracy, MacroF1)


def _counted(state: Tensor | None, outputs: Tensor, y: Tensor) -> Tensor:
    """Return (3, C) float64: of each class how many were told right, guessed, and there."""
    size, guess = outputs.shape[-1], outputs.argmax(-1)
    found = torch.stack([torch.bincount(part, minlength=size) for part in (y[guess == y], guess, y)]).double().cpu()
    return found if state is None else state + found


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean cross-entropy of the classes, at most 1e30."""

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (1.0, LARGEST)
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: tuple[float, int] | None, outputs: Tensor, y: Tensor, /) -> tuple[float, int]:
        total, count = state or (0.0, 0)
        lost = float(functional.cross_entropy(outputs.double(), y, reduction="sum"))
        return total + lost, count + len(y)

    def value(self, state: tuple[float, int], /) -> float:
        return math.exp(min(state[0] / state[1], math.log(LARGEST)))

    def chance(self, num_classes: int, /) -> float | None:
        return float(num_classes)
