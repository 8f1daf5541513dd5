"""LotteryFL's prune: when the model is good enough on validation data, cut a share and rewind to theta_0.

Li, Sun, Wang, Duan, Li, Chen, Li. LotteryFL: Personalized and Communication-Efficient Federated Learning with
Lottery Ticket Hypothesis on Non-IID Datasets. SEC 2021, arXiv 2008.03371.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedlth.methods.client_update import Shrinking, geometric
from fedlth.models.layout import Params
from fedlth.tickets.scope import Layerwise, Scope
from fedlth.tickets.score import Magnitude, Score
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult
from fedlth.training.task import Task


def shrink(
    score: Score, scope: Scope, local: LocalClient, *, start: Params, now: Params, mask: np.ndarray, density: float
) -> np.ndarray:
    """Return the mask of exactly `density`, picked among what `mask` holds alive, by `score` at `now`."""
    evidence = local.evidence(start=start, now=now, mask=mask, density=density)
    return scope(score(evidence), mask, local.task.layout, density)


@dataclass(frozen=True)
class PruneAndRewind:
    """Cut `rate` of the survivors while the study's metric on validation data exceeds the gate, down to the target.

    The released code gates on test images and overshoots its target (0.8^11 for 0.1); here the gate sees the
    validation part and the last cut stops exactly at `density`.
    """

    rate: float
    density: float
    val_accuracy: float
    score: Score = field(default_factory=Magnitude)
    scope: Scope = field(default_factory=Layerwise)
    snapshots: tuple[int, ...] = ()

    @property
    def shrinking(self) -> Shrinking:
        return Shrinking(geometric(self.rate, self.density), sure=self.val_accuracy < 0)

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        now = float(mask.mean())
        target = max(self.density, now * (1 - self.rate))
        if round(target * mask.size) >= int(mask.sum()) or not passes(local, params, self.val_accuracy):
            return params, mask
        cut = shrink(self.score, self.scope, local, start=params, now=params, mask=mask, density=target)
        return _rewound(params, local.task, cut), cut


def passes(local: LocalClient, params: Params, gate: float) -> bool:
    """Say whether the study's metric on validation data exceeds a gate; one below zero is open."""
    return gate < 0 or local.val_score(params) > gate


def _rewound(params: Params, task: Task, mask: np.ndarray) -> Params:
    """Return theta_0's parameters under `mask`; buffers are statistics of data, not weights, and stay."""
    floats, weights = params.floats.copy(), task.layout.num_params
    floats[:weights] = task.theta_0.floats[:weights]
    return Params(floats, params.ints).masked(mask)
