"""LotteryFL's prune: when the model is good enough on validation data, cut a share and rewind to theta_0.

Li, Sun, Wang, Duan, Li, Chen, Li. LotteryFL: Personalized and Communication-Efficient Federated Learning with
Lottery Ticket Hypothesis on Non-IID Datasets. SEC 2021, arXiv 2008.03371.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlth.methods.client_update import MaskedUpdate, Shrinking, geometric
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, check, density_of, score_of, share_of, sliced
from fedlth.methods.prune import passes, rewound, shrink
from fedlth.models.layout import Params
from fedlth.tickets.scope import Layerwise, Scope
from fedlth.tickets.score import Magnitude, Score
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult


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
        return rewound(params, local.task, cut), cut


def lotteryfl(
    rate: float = 0.2, density: float = 0.1, val_accuracy: float = 0.5, score: str | dict[str, Any] = "magnitude"
) -> FederatedMethod:
    check(rate=share_of(rate), density=density_of(density))
    before = PruneAndRewind(rate, density, val_accuracy, score_of(score))
    return FederatedMethod(
        name="lotteryfl", paper="Li et al., SEC 2021, arXiv 2008.03371",
        summary="clients prune and rewind to theta_0 as accuracy allows; holders of a weight average it",
        phases=(sliced(MaskedUpdate(before=before)),), arms=(*OWN, "own_random"),
    )  # fmt: skip
