"""FedLTN: tickets pruned after training without rewind, faster each time; norms stay local; the server has momentum.

Mugunthan, Lin, Gokul, Lau, Kagal, Pieper. FedLTN: Federated Learning for Sparse and Personalized Lottery Ticket
Networks. ECCV 2022.

What the summaries known to us leave open is chosen here: each prune's rate is `acceleration` times the one before,
weights of all layers compete (one stays in each), and the gate is LotteryFL's. Jump-Start is `jump_start` dense rounds
before the first prune. Momentum is on what holders of a weight average, not on buffers; a weight that nobody in a round
holds keeps its value and its velocity. A study's own `model.buffers` takes the place of local norms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlth.methods.client_update import MaskedUpdate, Shrinking
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import BY_HOLDERS, OWN, at_least, check, density_of, score_of, share_of, sliced
from fedlth.methods.prune import passes, shrink
from fedlth.methods.server_optimizer import Momentum, ServerOptimizer
from fedlth.models.layout import Params
from fedlth.tickets.scope import Global, Scope
from fedlth.tickets.score import Magnitude, Score
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult


def accelerated(rate: float, acceleration: float, density: float) -> tuple[float, ...]:
    """Return the densities of a mask whose k-th prune cuts rate x acceleration^k of the survivors, k = 0, 1, ..."""
    found = [1.0]
    while found[-1] > density * (1 + 1e-9):
        cut = rate * acceleration ** (len(found) - 1)
        found.append(max(density, found[-1] * (1 - cut)))
    return tuple(found)


@dataclass(frozen=True)
class PruneAfter:
    """Go to the next of `densities` where validation accuracy after training exceeds the gate; no rewind."""

    densities: tuple[float, ...]
    val_accuracy: float
    score: Score = field(default_factory=Magnitude)
    scope: Scope = field(default_factory=lambda: Global(floor=1))
    snapshots: tuple[int, ...] = ()

    @property
    def density(self) -> float:
        return self.densities[-1]

    @property
    def shrinking(self) -> Shrinking:
        return Shrinking(self.densities, sure=self.val_accuracy < 0)

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        alive = int(np.count_nonzero(mask))
        target = next((d for d in self.densities if round(d * mask.size) < alive), None)
        if target is None or not passes(local, params, self.val_accuracy):
            return params, mask
        cut = shrink(self.score, self.scope, local, start=params, now=params, mask=mask, density=target)
        return params.masked(cut), cut


def fedltn(
    rate: float = 0.2, acceleration: float = 1.5, density: float = 0.1, val_accuracy: float = 0.5,
    momentum: float = 0.9, jump_start: int = 2, score: str | dict[str, Any] = "magnitude",
) -> FederatedMethod:  # fmt: skip
    check(
        rate=share_of(rate), acceleration=at_least(1, acceleration), density=density_of(density),
        momentum=(momentum, 0 <= momentum < 1, "in [0, 1)"), jump_start=at_least(0, jump_start),
    )  # fmt: skip
    join = ServerOptimizer(Momentum(beta=momentum), BY_HOLDERS) if momentum else BY_HOLDERS
    after = PruneAfter(accelerated(rate, acceleration, density), val_accuracy, score_of(score))
    tickets = sliced(MaskedUpdate(after=after), join)
    dense = Phase(name="jump_start", update=MaskedUpdate(), join=join, rounds=jump_start)
    return FederatedMethod(
        name="fedltn", paper="Mugunthan et al., ECCV 2022",
        summary="clients prune after training, faster each time; norms stay local, the server has momentum",
        phases=(dense, tickets) if jump_start else (tickets,), arms=(*OWN, "own_random"), buffers="local_all",
    )  # fmt: skip
