"""Controls: what every claim about a ticket must beat. Each changes one thing and leaves the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlth.errors import wrong
from fedlth.params import Layout
from fedlth.parts import make
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.granularity import Element, Granularity
from fedlth.tickets.select import keep_top


@dataclass(frozen=True)
class Random:
    """A uniform draw: the control for every other score."""

    rows: ClassVar[tuple[int, ...]] = (2, 11, 14, 19)

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return evidence.rng.random(evidence.now.size).astype(np.float32)


class _OfAnother:
    """A score made of another: it asks for what that one asks for, and learns where that one learns."""

    of: Any

    def __getattr__(self, name: str) -> Any:
        if name == "window":
            return getattr(self.of, name, 0)
        if name in ("weights", "epochs"):
            return getattr(self.of, name)
        raise AttributeError(name)


@dataclass(frozen=True)
class Inverted(_OfAnother):
    """Another score turned round: its worst stay. Frankle et al., Missing the Mark, ICLR 2021, arXiv 2009.08576."""

    of: Any = "magnitude"
    rows: ClassVar[tuple[int, ...]] = (21,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", _part(self.of))

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return -np.asarray(self.of(evidence))


@dataclass(frozen=True)
class Shuffled(_OfAnother):
    """Another score's mask, shuffled inside each layer: same counts. Frankle et al., ICLR 2021, arXiv 2009.08576.

    The scores change places among a layer's living weights (or groups), so any scope gives every layer the count
    that it had.
    """

    of: Any = "magnitude"
    rows: ClassVar[tuple[int, ...]] = (5, 14, 21)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", _part(self.of))

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        groups = evidence.groups or Element().groups(evidence.layout)
        score = np.array(groups.reduced(self.of(evidence)))
        alive = groups.reduced(evidence.mask)
        for e in groups.layout.prunable:
            where = e.offset + np.flatnonzero(alive[e.slice])
            score[where] = score[evidence.rng.permutation(where)]
        return groups.spread(score)


def shuffled_mask(
    mask: np.ndarray, layout: Layout, rng: np.random.Generator, granularity: Granularity | None = None
) -> np.ndarray:
    """Return a random mask with the same count in every layer, of whole groups where the mask is of groups."""
    groups = (granularity or Element()).groups(layout)
    alive = groups.reduced(mask)
    out = np.zeros(alive.size, bool)
    for e in groups.layout.prunable:
        here = alive[e.slice] > 0
        out[e.slice] = keep_top(rng.random(e.size), np.ones(e.size, bool), int(here.sum()))
    return groups.spread(out)


def _part(spec: Any) -> Any:
    """Build the score that a study names; a score that is one already passes."""
    from fedlth.tickets.score import SCORES

    if isinstance(spec, (str, dict)):
        spec = {"name": spec} if isinstance(spec, str) else spec
        return make(SCORES, spec, "finder.score.of", has="__call__(evidence)")
    if not callable(spec):
        raise wrong("finder.score.of", "a score", spec)
    return spec
