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
        """Return the new global state. `old` and the contents lie in `layout`; sums are float64, cast once."""
        ...


def _floats(content: Content) -> np.ndarray:
    if content.floats is None:
        raise ValueError("a bare mask cannot be averaged as values")
    return content.floats


def _ints(old: Params, contributions: list[Contribution]) -> np.ndarray:
    """Counters (BatchNorm's num_batches_tracked) take the largest: a mean of counts counts nothing."""
    ints = old.ints
    for c in contributions:
        if c.content.ints is not None:
            ints = np.maximum(ints, c.content.ints)
    return ints


@dataclass(frozen=True)
class FedAvg:
    """Mean weighted by examples; a weight outside a client's mask counts as zero (CELL's rule).

    McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        got = list(contributions)
        total = sum(c.num_examples for c in got)
        mean = np.zeros(layout.num_floats)
        for c in got:
            mean += _floats(c.content).astype(np.float64) * (c.num_examples / total)
        return Params(mean.astype(np.float32), _ints(old, got))


@dataclass(frozen=True)
class CountMean:
    """Mean over the clients that hold a coordinate.

    `uncovered` says what a coordinate without a holder becomes: "keep" the old value (LotteryFL, Sub-FedAvg) or
    "zero" (FedDST). `weighted` weighs holders by their examples.
    """

    uncovered: str = "keep"
    weighted: bool = False

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        got = list(contributions)
        total, weight = np.zeros(layout.num_floats), np.zeros(layout.num_floats)
        for c in got:
            share = float(c.num_examples) if self.weighted else 1.0
            covered = np.ones(layout.num_floats)
            covered[: layout.num_prunable] = c.content.mask
            total += _floats(c.content).astype(np.float64) * covered * share
            weight += covered * share
        rest = old.floats.astype(np.float64) if self.uncovered == "keep" else np.zeros(layout.num_floats)
        mean = np.divide(total, weight, out=rest, where=weight > 0)
        return Params(mean.astype(np.float32), _ints(old, got))


@dataclass(frozen=True)
class Intersection:
    """Mean only where every contributor holds the coordinate; elsewhere the old value stays (Hermes, MobiCom 2021)."""

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        got = list(contributions)
        total, everyone = np.zeros(layout.num_floats), np.ones(layout.num_floats, bool)
        for c in got:
            total += _floats(c.content)
            everyone[: layout.num_prunable] &= c.content.mask
        mean = np.where(everyone, total / len(got), old.floats)
        return Params(mean.astype(np.float32), _ints(old, got))


@dataclass(frozen=True)
class MaskMean:
    """Scores whose sigmoid is the mean of the clients' sampled masks, kept within [clamp, 1 - clamp].

    The Beta(1, 1) posterior mode of FedPM with the prior reset every round: (alpha - 1) / (alpha + beta - 2) = mean.
    """

    clamp: float = 0.01

    def __call__(self, old: Params, contributions: Iterable[Contribution], layout: Layout, /) -> Params:
        got = list(contributions)
        ones = np.zeros(layout.num_prunable)
        for c in got:
            ones += c.content.mask
        theta = np.clip(ones / len(got), self.clamp, 1 - self.clamp)
        return Params(np.log(theta / (1 - theta)).astype(np.float32), old.ints)
