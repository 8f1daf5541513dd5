"""Masks of constant density that move: random ERK at first, then the smallest leave and as many others come back.

Mocanu et al., SET, Nature Communications 2018, arXiv 1707.04780; Evci et al., RigL, ICML 2020, arXiv 1911.11134; in a
federation: Huang et al., FedSpa, 2022, arXiv 2201.11380, and Dai et al., DisPFL, ICML 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth import rng
from fedlth.errors import wrong
from fedlth.models.layout import Params
from fedlth.tickets.regrow import Regrow
from fedlth.tickets.scope import Erk
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task


@dataclass(frozen=True)
class RandomErk:
    """A first mask: random weights, exactly `density` of all, layers as dense as Erdos-Renyi-Kernel says.

    Each client has its own; `same`: all have the same.
    """

    density: float
    same: bool = False

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        layout = task.layout
        draw = rng.stream(task.study.seed, "first mask", client=-1 if self.same else client)
        alive = np.ones(layout.num_prunable, bool)
        return Erk()(draw.random(layout.num_prunable), alive, layout, self.density)


@dataclass(frozen=True)
class Evolve:
    """Move a mask after a training: of each layer's survivors the smallest leave, and as many others come back.

    The share that leaves falls from `drop` to 0 along a cosine over the federation's rounds. `by` says what comes back:
    where the "gradient" of one batch of the client's own data is largest, or a "random" choice. What has just left may
    come back; a layer that keeps all its weights has nowhere to move.
    """

    drop: float = 0.5
    by: str = "gradient"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise wrong("method.drop", "in [0, 1)", self.drop)
        if self.by not in ("gradient", "random"):
            raise wrong("method.by", "gradient or random", self.by)

    def __call__(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> np.ndarray:
        """Return the mask of the next visit, (num_prunable,) bool, given params as trained under `mask`."""
        if mask.all() or not self.drop:
            return mask
        rounds = local.task.study.federate.rounds
        moving = Regrow(rounds=rounds, drop=self.drop, by=self.by, first="random")
        if self.by == "gradient":
            (slope,) = local.gradients(params, count=1)
            growth = np.abs(slope)
        else:
            growth = local.rng("regrow").random(mask.size)
        size = np.abs(params.floats[: mask.size])
        return moving(size, growth, mask, local.task.layout, min(max(local.round, 1), rounds) - 1)[0]
