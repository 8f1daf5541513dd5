"""What masks have in common: overlap against chance, and how a mask settles while the network trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.errors import wrong
from fedlth.lab.bench import Bench
from fedlth.lab.search import finder_of, network_of, rounds
from fedlth.lab.sensitivity import evidence_of
from fedlth.models.layout import Layout
from fedlth.tickets.gate import mask_distance


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return |one and other| / |one or other|; two empty masks are equal."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def chance(one: np.ndarray, other: np.ndarray, layout: Layout) -> float:
    """Return the Jaccard index that two random masks with these counts in every layer are expected to have."""
    both = either = 0.0
    for e in layout.prunable:
        a, b = float(np.count_nonzero(one[e.slice])), float(np.count_nonzero(other[e.slice]))
        both += a * b / e.size
        either += a + b - a * b / e.size
    return both / either if either else 1.0


@dataclass(frozen=True)
class Overlap:
    """How much of a mask two searches share at the same round, against what chance would give, layer by layer."""

    searches: tuple[str, ...]
    rounds: tuple[int, ...]

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        masks = {name: {r.number: r.mask for r in rounds(bench, name)} for name in self.searches}
        for number in self.rounds:
            for i, one in enumerate(self.searches):
                for other in self.searches[i + 1 :]:
                    a, b = masks[one][number], masks[other][number]
                    yield {
                        "round": number, "one": one, "other": other,
                        "overlap": jaccard(a, b), "chance": chance(a, b, bench.layout),
                    }  # fmt: skip


@dataclass(frozen=True)
class Settling:
    """How far apart the masks lie that a search's score would draw while the dense network trains.

    At every `every`-th evaluation of a training of `iterations`; distance is the share of groups (weights, or the
    finder's channels) in which two masks differ. You et al., Early-Bird Tickets, ICLR 2020, arXiv 1909.11957.
    """

    search: str
    density: float = 0.2
    every: int = 1
    iterations: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise wrong("probes.settling.every", "at least 1", self.every)
        if self.iterations < 0:
            raise wrong("probes.settling.iterations", "at least 0", self.iterations)
        if not 0 < self.density < 1:
            raise wrong("probes.settling.density", "in (0, 1)", self.density)

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        search = bench.study.searches[self.search]
        finder = finder_of(search, f"searches.{self.search}")
        config = bench.train_config({**search.train, **({"iterations": self.iterations} if self.iterations else {})})
        groups = finder.granularity.groups(bench.layout)
        masks = []
        theta_0 = bench.theta_0.floats[: bench.layout.num_prunable]
        for state in bench.states(bench.theta_0, bench.full, config)[:: self.every]:
            evidence = evidence_of(network_of(bench, state, "settling"), bench.layout, bench.rng("settling"))
            score = finder.score(replace(evidence, init=theta_0, start=theta_0, density=self.density))
            masks.append(groups.reduced(finder.pick(score, bench.full, bench.layout, self.density)) > 0)
        step = config.train.evaluate_every * self.every
        at = [min(i * step, config.end) for i in range(len(masks))]  # the last stretch may be shorter
        for i, one in zip(at, masks, strict=True):
            for j, other in zip(at, masks, strict=True):
                yield {"iteration": i, "other": j, "distance": mask_distance(one, other)}
