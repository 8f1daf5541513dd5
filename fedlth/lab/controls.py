"""Controls of a mask: what an arm changes of a search's ticket, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.models.layout import Layout
from fedlth.tickets.controls import shuffled_mask
from fedlth.tickets.scope import Layerwise


class MaskControl(Protocol):
    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        """Return a mask with exactly as many survivors; a position is a group of the search's granularity."""
        ...


@dataclass(frozen=True)
class Keep:
    """The search's mask as it is."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        return mask


@dataclass(frozen=True)
class Shuffle:
    """The mask shuffled within every layer ("rearranged"): the same counts. Frankle et al., arXiv 2009.08576."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        return shuffled_mask(mask, layout, rng)


@dataclass(frozen=True)
class Uniform:
    """A random mask, every layer at the same density: the layers' own shares are forgotten too."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        kept = int(np.count_nonzero(mask))
        return Layerwise()(rng.random(mask.size), np.ones(mask.size, bool), layout, kept / mask.size)


@dataclass(frozen=True)
class Full:
    """No mask: the dense network, trained the arm's way."""

    def __call__(self, mask: np.ndarray, layout: Layout, rng: np.random.Generator, /) -> np.ndarray:
        return np.ones_like(mask)


MASKS: dict[str, type[MaskControl]] = {"keep": Keep, "shuffle": Shuffle, "random": Uniform, "full": Full}
