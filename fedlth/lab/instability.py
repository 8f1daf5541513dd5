"""Instability and linear mode connectivity: two copies, another order of batches, the error on the line between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.errors import wrong
from fedlth.lab.bench import Bench
from fedlth.lab.search import rounds
from fedlth.models.layout import Params

MIXED = "a network between two copies"


def between(one: Params, other: Params, alpha: float) -> Params:
    """Return (1 - alpha) x one + alpha x other; exactly one at 0 and other at 1."""
    if alpha in (0.0, 1.0):
        return other if alpha else one
    mixed = (1 - alpha) * one.floats.astype(np.float64) + alpha * other.floats
    return Params(mixed.astype(np.float32), one.ints)


def _own_norms(bench: Bench, point: Params, alpha: float) -> Params:
    return point if alpha in (0.0, 1.0) else bench.normalised(point, what=MIXED)


def barrier(errors: list[float]) -> float:
    """Return the worst error on the line over the mean of its two ends: instability, if a share of all examples."""
    return max(errors) - (errors[0] + errors[-1]) / 2


@dataclass(frozen=True)
class Instability:
    """Train two copies from W_k in different orders; test error between. Frankle et al., ICML 2020, arXiv 1912.05671.

    At each of `rounds` of a search's masks and each k of `steps`, trained as the search trains. Between the ends norms
    have the running statistics of their own network: those of the ends, mixed, are no network's, and show barriers that
    are not there (Jordan et al., REPAIR, ICLR 2023, arXiv 2211.08403). `stored_gap` is how far the line's ends are from
    the accuracies that the two trainings stored, which must be 0.
    """

    search: str
    rounds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (0,)
    alphas: int = 11

    def __post_init__(self) -> None:
        if self.alphas < 2:
            raise wrong("probes.instability.alphas", "at least 2", self.alphas)

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        config = bench.train_config(dict(bench.study.searches[self.search].train))
        for one in rounds(bench, self.search):
            if one.number not in self.rounds:
                continue
            for step in self.steps:
                start = bench.theta_0
                if step:
                    start = bench.trained(start, bench.full, replace(config, last=step)).final
                copies = [
                    bench.trained(start.masked(one.mask), one.mask, replace(config, first=step, order=f"order/{copy}"))
                    for copy in ("a", "b")
                ]
                ends = copies[0].final, copies[1].final
                line = [i / (self.alphas - 1) for i in range(self.alphas)]
                reached = [bench.accuracy(_own_norms(bench, between(*ends, a), a)) for a in line]
                gap = max(abs(reached[0] - copies[0].test_final), abs(reached[-1] - copies[1].test_final))
                errors = [1 - accuracy for accuracy in reached]
                worst = barrier(errors)
                place = {"round": one.number, "density": f"{one.mask.mean():.4f}", "rewind_step": step}
                for alpha, error in zip(line, errors, strict=True):
                    yield {**place, "alpha": f"{alpha:.2f}", "error": error, "barrier": worst, "stored_gap": gap}
