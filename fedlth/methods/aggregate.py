"""How the server joins what clients sent. "Averaging the overlap" is four different rules; each has its name here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.params import Layout, Params
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class Contribution:
    """One valid reply in client order: its decoded content and its number of training examples."""

    client: int
    num_examples: int
    content: Content


class Aggregate(Protocol):
    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        """Return the new global state. `old` and the contents lie in `layout`; sums are float64, cast once.

        Contributions come one by one, in client order, while clients are still at work: take each once and let it go.
        """
        ...


def _floats(content: Content) -> np.ndarray:
    if content.floats is None:
        raise ValueError("a bare mask cannot be averaged as values")
    return content.floats


def _largest(ints: np.ndarray, content: Content) -> np.ndarray:
    """Counters (BatchNorm's num_batches_tracked) take the largest: a mean of counts counts nothing."""
    return ints if content.ints is None else np.maximum(ints, content.ints)


@dataclass(frozen=True)
class FedAvg:
    """Mean weighted by examples; a weight outside a client's mask counts as zero (CELL's rule).

    McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        total, examples, ints = np.zeros(layout.num_floats), 0, old.ints
        weighted = np.empty(layout.num_floats)
        for c in contributions:
            total += np.multiply(_floats(c.content), c.num_examples, out=weighted, dtype=np.float64)
            examples += c.num_examples
            ints = _largest(ints, c.content)
        return Params((total / examples).astype(np.float32), ints)


@dataclass(frozen=True)
class CountMean:
    """Mean over the clients that hold a coordinate.

    `uncovered` says what a coordinate without a holder becomes: "keep" the old value (LotteryFL, Sub-FedAvg) or
    "zero" (FedDST). `weighted` weighs holders by their examples.
    """

    uncovered: str = "keep"
    weighted: bool = False

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        total, ints = np.zeros(layout.num_floats), old.ints
        weight: np.ndarray = np.zeros(layout.num_floats, np.float64 if self.weighted else np.int32)
        size = layout.num_prunable
        for c in contributions:
            share, floats = c.num_examples if self.weighted else 1, _floats(c.content)  # zero where the mask is False
            total += floats if share == 1 else floats.astype(np.float64) * share
            weight[:size] += c.content.mask if share == 1 else c.content.mask * share
            weight[size:] += share
            ints = _largest(ints, c.content)
        rest = old.floats.astype(np.float64) if self.uncovered == "keep" else np.zeros(layout.num_floats)
        mean = np.divide(total, weight, out=rest, where=weight > 0)
        return Params(mean.astype(np.float32), ints)


@dataclass(frozen=True)
class Intersection:
    """Mean only where every contributor holds the coordinate; elsewhere the old value stays (Hermes, MobiCom 2021)."""

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        total, everyone = np.zeros(layout.num_floats), np.ones(layout.num_floats, bool)
        count, ints = 0, old.ints
        for c in contributions:
            total += _floats(c.content)
            everyone[: layout.num_prunable] &= c.content.mask
            count += 1
            ints = _largest(ints, c.content)
        mean = np.where(everyone, total / count, old.floats)
        return Params(mean.astype(np.float32), ints)


@dataclass(frozen=True)
class MaskMean:
    """Scores whose sigmoid is the mean of the clients' sampled masks, kept within [clamp, 1 - clamp].

    The Beta(1, 1) posterior mode of FedPM with the prior reset every round: (alpha - 1) / (alpha + beta - 2) = mean.
    """

    clamp: float = 0.01

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        ones, count = np.zeros(layout.num_prunable), 0
        for c in contributions:
            ones += c.content.mask
            count += 1
        theta = np.clip(ones / count, self.clamp, 1 - self.clamp)
        return Params(np.log(theta / (1 - theta)).astype(np.float32), old.ints)
