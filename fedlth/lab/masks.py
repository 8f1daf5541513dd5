"""What masks have in common: overlap against chance, and how a mask settles while the network trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.lab.bench import Bench
from fedlth.lab.search import rounds
from fedlth.params import Layout
from fedlth.tickets.gate import mask_distance
from fedlth.tickets.scope import Layerwise


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
    """How far apart the magnitude masks of a dense training lie. You et al., ICLR 2020, arXiv 1909.11957."""

    density: float = 0.2
    every: int = 1

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        recipe = bench.recipe()
        states = bench.states(bench.theta_0, bench.full, recipe)[:: self.every]
        scope, size = Layerwise(), bench.layout.num_prunable
        masks = [scope(np.abs(state.floats[:size]), bench.full, bench.layout, self.density) for state in states]
        step = recipe.train.evaluate_every * self.every
        for i, one in enumerate(masks):
            for j, other in enumerate(masks):
                yield {"iteration": i * step, "other": j * step, "distance": mask_distance(one, other)}
