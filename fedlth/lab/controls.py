"""Controls: what an arm changes of a ticket, its mask or its starting weights, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedlth.params import Layout, Params
from fedlth.tickets.scope import Layerwise

if TYPE_CHECKING:
    from fedlth.lab.bench import Bench


class MaskControl(Protocol):
    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        """Return a mask (num_prunable,) with exactly as many survivors."""
        ...


@dataclass(frozen=True)
class Keep:
    """The search's mask as it is."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        return mask


@dataclass(frozen=True)
class Shuffle:
    """The mask's bits permuted within every layer ("rearranged"). Frankle et al., ICLR 2021, arXiv 2009.08576."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        out = mask.copy()
        for e in layout.prunable:
            out[e.slice] = rng.permutation(mask[e.slice])
        return out


@dataclass(frozen=True)
class Uniform:
    """A random mask of the same density in every layer: also the layers' shares are forgotten."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        kept = int(np.count_nonzero(mask))
        return Layerwise()(rng.random(mask.size), np.ones(mask.size, bool), layout, kept / mask.size)


MASKS = {"keep": Keep, "shuffle": Shuffle, "random": Uniform}


class Start(Protocol):
    def __call__(self, bench: Bench, mask: np.ndarray, searched: Params, /) -> Params:
        """Return whole params to begin at; `searched` is where the search's own training of this round began."""
        ...


@dataclass(frozen=True)
class Init:
    """theta_0, or what the search rewound to."""

    def __call__(self, bench: Bench, mask: np.ndarray, searched: Params, /) -> Params:
        return searched


@dataclass(frozen=True)
class Reinit:
    """A fresh draw of all weights: the control of Frankle & Carbin, ICLR 2019, arXiv 1803.03635."""

    draw: int = 0

    def __call__(self, bench: Bench, mask: np.ndarray, searched: Params, /) -> Params:
        return bench.fresh(f"reinit/{self.draw}")


STARTS = {"init": Init, "reinit": Reinit}
