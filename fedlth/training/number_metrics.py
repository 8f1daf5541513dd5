"""Metrics of real numbers: outputs and targets (n,) or (n, k), filled batch by batch in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

NUMBERS = frozenset({"numbers"})
LARGEST = 1e30  # what stands in for an overflow: a record holds finite numbers


@dataclass(frozen=True)
class MeanError:
    """The mean over examples and outputs of the error's size to the `power` 1 or 2; `root`: its root."""

    name: str
    power: int
    root: bool = False
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (0.0, LARGEST)
    fits: ClassVar[frozenset[str]] = NUMBERS

    @property
    def summary(self) -> str:
        """What this one of several is, for `fedlth list metrics`."""
        error = "absolute" if self.power == 1 else "squared"
        return f"The {'root of the ' * self.root}mean {error} error, over examples and outputs."

    def add(self, state: tuple[float, int] | None, outputs: Tensor, y: Tensor, /) -> tuple[float, int]:
        total, count = state or (0.0, 0)
        return total + float((outputs.double() - y.double()).abs().pow(self.power).sum()), count + y.numel()

    def value(self, state: tuple[float, int], /) -> float:
        mean = min(state[0] / state[1], LARGEST)
        return math.sqrt(mean) if self.root else mean

    def chance(self, num_classes: int, /) -> float | None:
        return None


@dataclass(frozen=True)
class Determination:
    """R^2, the mean over outputs of 1 - squared error / squared distance to the mean; at least -1e30.

    Of an output whose targets are all equal: 1 where every prediction is exact, else 0.
    """

    name: ClassVar[str] = "r2"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (-LARGEST, 1.0)
    fits: ClassVar[frozenset[str]] = NUMBERS

    def add(self, state: _Moments | None, outputs: Tensor, y: Tensor, /) -> _Moments:
        return _Moments.of(outputs, y).after(state)

    def value(self, state: _Moments, /) -> float:
        found = torch.where(state.error == 0, 1.0, 0.0).double()
        varied = state.low_y != state.high_y
        found[varied] = 1 - state.error[varied] / state.square_y[varied]
        return max(float(found.mean()), -LARGEST)

    def chance(self, num_classes: int, /) -> float | None:
        return None


@dataclass(frozen=True)
class Pearson:
    """The mean over outputs of the correlation of predictions and targets; 0 where either are all equal."""

    name: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    fits: ClassVar[frozenset[str]] = NUMBERS

    def add(self, state: _Moments | None, outputs: Tensor, y: Tensor, /) -> _Moments:
        return _Moments.of(outputs, y).after(state)

    def value(self, state: _Moments, /) -> float:
        found = torch.zeros_like(state.error)
        varied = (state.low_y != state.high_y) & (state.low_o != state.high_o)
        found[varied] = state.product[varied] / (state.square_o[varied].sqrt() * state.square_y[varied].sqrt())
        return float(found.clamp(-1, 1).mean())

    def chance(self, num_classes: int, /) -> float | None:
        return 0.0


@dataclass(frozen=True)
class _Moments:
    """Of outputs o and targets y, (k,) float64 each: means, squares and products about them, error, and extremes."""

    count: int
    mean_o: Tensor
    mean_y: Tensor
    square_o: Tensor
    square_y: Tensor
    product: Tensor
    error: Tensor
    low_o: Tensor
    high_o: Tensor
    low_y: Tensor
    high_y: Tensor

    @classmethod
    def of(cls, outputs: Tensor, y: Tensor) -> _Moments:
        o, y = (part.double().cpu().reshape(len(part), -1) for part in (outputs, y))
        off_o, off_y = o - o.mean(0), y - y.mean(0)
        return cls(
            len(y), o.mean(0), y.mean(0), off_o.square().sum(0), off_y.square().sum(0), (off_o * off_y).sum(0),
            (o - y).square().sum(0), o.amin(0), o.amax(0), y.amin(0), y.amax(0),
        )  # fmt: skip

    def after(self, first: _Moments | None) -> _Moments:
        """Return the moments of `first` and these together (Chan, Golub, LeVeque, 1979): no cancellation."""
        if first is None:
            return self
        count = first.count + self.count
        share = first.count * self.count / count
        apart_o, apart_y = self.mean_o - first.mean_o, self.mean_y - first.mean_y
        return _Moments(
            count, first.mean_o + apart_o * (self.count / count), first.mean_y + apart_y * (self.count / count),
            first.square_o + self.square_o + share * apart_o.square(),
            first.square_y + self.square_y + share * apart_y.square(),
            first.product + self.product + share * apart_o * apart_y, first.error + self.error,
            torch.minimum(first.low_o, self.low_o), torch.maximum(first.high_o, self.high_o),
            torch.minimum(first.low_y, self.low_y), torch.maximum(first.high_y, self.high_y),
        )  # fmt: skip
