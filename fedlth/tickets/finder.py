"""A finder is score x schedule x scope x rewind; `find` walks it, given a way to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedlth.params import Layout, Params
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.rewind import Anchors, Rewind
from fedlth.tickets.schedule import Schedule
from fedlth.tickets.scope import Scope
from fedlth.tickets.score import Score

TrainFn = Callable[[Params, np.ndarray, bool], Params]  # (start, mask, replay_lr) -> trained, for the finder's epochs


@dataclass(frozen=True)
class Finder:
    """A ticket finder as a value; its repr is its name."""

    score: Score
    schedule: Schedule
    scope: Scope
    rewind: Rewind


@dataclass(frozen=True)
class Found:
    """A ticket at one target density: its mask (num_prunable,), the weights trained under it, what came before.

    `trainings` counts the trainings of the search, the last one (the ticket's own) not included.
    """

    target: float
    mask: np.ndarray
    params: Params
    start: str
    trainings: int


def find(
    finder: Finder,
    *,
    start: Params,
    start_name: str,
    targets: tuple[float, ...],
    layout: Layout,
    anchors: Anchors,
    train: TrainFn,
    gradient: Callable[[np.ndarray], np.ndarray],
    rng: Callable[[str], np.random.Generator],
) -> Iterator[Found]:
    """Yield a ticket a target density, in the schedule's order. `train` must be a pure function."""
    size = layout.num_prunable
    init = anchors("theta_0").floats[:size]
    full = np.ones(size, bool)
    for chain in finder.schedule(targets):
        mask, began = full, start
        now = train(start, full, True)
        trainings = 1
        for density in chain:
            evidence = Evidence(
                layout=layout,
                init=init,
                start=began.floats[:size],
                now=now.floats[:size],
                mask=mask,
                gradient=gradient,
                rng=rng(f"score@{density:.6f}"),
            )
            mask = finder.scope(finder.score(evidence), mask, layout, density)
            anchor = finder.rewind.anchor
            began = (now if anchor is None else anchors(anchor)).masked(mask)
            now = train(began, mask, finder.rewind.replay_lr)
            if density in targets:
                yield Found(density, mask, now, anchor or start_name, trainings)
            trainings += 1
