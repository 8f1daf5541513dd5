"""Sub-FedAvg's prune: after local training, while the mask still moves between epochs. No rewind.

Vahidian, Morafah, Lin. Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity. ICDCS workshop 2021, arXiv 2105.00562.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlth.methods.client_update import MaskedUpdate, Shrinking, geometric
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, check, density_of, score_of, share_of, sliced
from fedlth.methods.prune import passes, shrink
from fedlth.models.layout import Params
from fedlth.tickets.scope import Layerwise, Scope
from fedlth.tickets.score import Magnitude, Score
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult


@dataclass(frozen=True)
class PruneWhenMaskMoves:
    """Cut `rate` of the survivors when the masks after the first and the last epoch differ by more than `distance`.

    The cut is kept only if validation accuracy under it exceeds the gate (the released code looks at test data).
    The distance is the mean over layers of the share of weights in which the two masks differ. With one local epoch
    the two masks are the same model's: the distance is zero and nothing is ever pruned, so the recipe wants two.
    """

    rate: float
    density: float
    val_accuracy: float
    distance: float
    score: Score = field(default_factory=Magnitude)
    scope: Scope = field(default_factory=Layerwise)
    snapshots: tuple[int, ...] = (1,)

    @property
    def shrinking(self) -> Shrinking:
        return Shrinking(geometric(self.rate, self.density), sure=self.val_accuracy < 0 and self.distance < 0)

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        if trained is None:
            raise ValueError("this prune follows a training")
        target = max(self.density, float(mask.mean()) * (1 - self.rate))
        if round(target * mask.size) >= int(mask.sum()):
            return params, mask
        early = replace(params, floats=trained.snapshots[1])
        first = shrink(self.score, self.scope, local, start=early, now=early, mask=mask, density=target)
        last = shrink(self.score, self.scope, local, start=early, now=params, mask=mask, density=target)
        apart = [float(np.mean(first[e.slice] != last[e.slice])) for e in local.task.layout.prunable]
        if float(np.mean(apart)) <= self.distance:
            return params, mask
        pruned = params.masked(last)
        return (pruned, last) if passes(local, pruned, self.val_accuracy) else (params, mask)


def sub_fedavg(
    rate: float = 0.1, density: float = 0.3, val_accuracy: float = 0.5, distance: float = 1e-4,
    score: str | dict[str, Any] = "magnitude",
) -> FederatedMethod:  # fmt: skip
    check(rate=share_of(rate), density=density_of(density))
    after = PruneWhenMaskMoves(rate, density, val_accuracy, distance, score_of(score))
    return FederatedMethod(
        name="sub_fedavg", paper="Vahidian et al., ICDCS-W 2021, arXiv 2105.00562",
        summary="clients prune after training, without rewind; holders of a weight average it",
        phases=(sliced(MaskedUpdate(after=after)),), arms=(*OWN, "own_random"),
    )  # fmt: skip
