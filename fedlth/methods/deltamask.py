"""DeltaMask: FedPM's masks, of which only what differs from a mask that both ends have drawn goes up.

Tsouvalas, Asano, Saeed. Federated Fine-Tuning of Foundation Models via Probabilistic Masking. ICML 2024 workshop on
Foundation Models in the Wild, arXiv 2311.17299.

The differences go up in the wire's own coding of a mask against a known one, not in the paper's binary fuse filters
inside a PNG, which answer for a position that was not sent with a small chance of a wrong yes: here what arrives is
what was sent, and bits per weight are those of the ledger. The prior of the server's mean is reset every round, as in
FedPM. `top` is constant over the rounds, and its default ours. Both ends draw from sigmoids of float64: a processor
that rounds one of them otherwise would have its mask refused by name, never read as another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth.methods.aggregate import MaskMean
from fedlth.methods.client_update import THETA_G, Inbox
from fedlth.methods.fedpm import ScoreUpdate
from fedlth.methods.method import KNOWN, FederatedMethod, Phase
from fedlth.methods.options import check, density_of, positive
from fedlth.methods.space import FROZEN, Frozen, Scores, chances, received
from fedlth.tickets.select import keep_top
from fedlth.training.local_client import LocalClient


@dataclass(frozen=True)
class Drawn:
    """The mask drawn from the scores that came down."""

    def __call__(
        self, rng: np.random.Generator, mask: np.ndarray | None, floats: np.ndarray | None, /
    ) -> np.ndarray | None:
        return None if floats is None else rng.random(floats.size) < chances(floats)


@dataclass(frozen=True)
class DeltaUpdate(ScoreUpdate):
    """Train scores as FedPM does, draw a mask from them by the known mask's own dice, send its surest differences.

    Of the positions where it differs from the known mask, the `top` share whose probabilities moved most: by the
    Kullback-Leibler divergence of the client's from the server's.
    """

    top: float = 0.8

    def drawn(self, local: LocalClient, inbox: Inbox, scores: np.ndarray) -> np.ndarray:
        dice = local.rng(KNOWN).random(scores.size)
        before, after = chances(received(inbox[THETA_G])), chances(scores)
        known = dice < before
        differs = known != (dice < after)
        count = round(self.top * int(np.count_nonzero(differs)))
        mask: np.ndarray = known ^ keep_top(divergence(after, before), differs, count)
        return mask


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(Bernoulli(p) || Bernoulli(q)), in nats, for chances that may be 0 or 1 after rounding."""
    least = 1e-12
    p, q = np.clip(p, least, 1 - least), np.clip(q, least, 1 - least)
    found: np.ndarray = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return found


def deltamask(score_lr: float = 50.0, top: float = 0.8, weights: str = "auto") -> FederatedMethod:
    check(score_lr=positive(score_lr), top=density_of(top))
    check(weights=(weights, weights in FROZEN, f"one of {', '.join(FROZEN)}"))
    update = DeltaUpdate(score_lr, Frozen(weights), top=top)
    return FederatedMethod(
        name="deltamask", paper="Tsouvalas et al., ICML-W 2024, arXiv 2311.17299",
        summary="FedPM's masks; up go the surest differences from a mask that both ends draw",
        phases=(Phase(name="federate", update=update, join=MaskMean(), own_mask=True, known=Drawn()),),
        space=Scores(Frozen(weights)), arms=("global", "local", "own_tuned", "frozen_random"),
    )  # fmt: skip
