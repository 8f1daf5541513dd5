"""DisPFL: no server, and a personal sparse mask of constant density that moves after every visit.

Dai, Shen, He, Tian, Tao. DisPFL: Towards Communication-Efficient Personalized Federated Learning via Decentralized
Sparse Training. ICML 2022, arXiv 2206.00187. A client averages each of its weights over those of its neighbours that
hold it, trains, then drops its smallest weights and regrows as many, at zero. Left open, or different here: biases and
norms are dense (the released code masks them too, at ERK's density of one or close to it); clients take part as
federate.clients_per_round says (the paper: all); gradients are clipped where train.clip_norm says (the code: at 10).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fedlth.methods.aggregate import CountMean
from fedlth.methods.evolve import Evolve, RandomErk
from fedlth.methods.gossip import GossipUpdate, gossip
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, check, density_of
from fedlth.models.layout import Params
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult


@dataclass(frozen=True)
class Moved:
    """The mask moves after the training; what has just come back is zero, and held."""

    evolve: Evolve = field(default_factory=Evolve)
    snapshots: tuple[int, ...] = ()
    keeps_density: ClassVar[bool] = True

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        new = self.evolve(local, params, mask)
        return params.masked(new), new


def dispfl(
    density: float = 0.5, drop: float = 0.5, by: str = "gradient", same: bool = False,
    topology: str | dict[str, Any] = "random",
) -> FederatedMethod:  # fmt: skip
    check(density=density_of(density))
    update = GossipUpdate(after=Moved(Evolve(drop, by)))
    return FederatedMethod(
        name="dispfl", paper="Dai et al., ICML 2022, arXiv 2206.00187",
        summary="no server: neighbours average what they hold, under personal masks that move at constant density",
        phases=(gossip(update, topology, CountMean(uncovered="zero"), own_mask=True),),
        first_mask=RandomErk(density, same), arms=(*OWN, "own_random"),
    )  # fmt: skip
