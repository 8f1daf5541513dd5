"""CELL: the dense model is broadcast; each client draws its ticket of it anew every round, behind a gate that adapts.

Seo, Ko, Park, Kim, Bennis. Communication-Efficient and Personalized Federated Lottery Ticket Learning. 2021, arXiv
2104.12501.

Left open: alpha, here 0.9. A straggler, one that misses the gate, trains and sends the dense model, whatever it had
pruned before; its ticket meanwhile (the arm `own`) is that of the share it had reached.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedlth.methods.aggregate import FedAvg
from fedlth.methods.client_update import UPDATE, VALUES, Inbox, Own, Update, kept_private, merged
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import OWN, check, density_of, score_of, share_of
from fedlth.methods.prune import rewound, shrink
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.tickets.scope import Layerwise, Scope
from fedlth.tickets.score import Magnitude, Score
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class Turn:
    """What a client does in a round: train from "theta_0" or from "theta_g" at `density`; `gate` is the next one."""

    start: Literal["theta_0", "theta_g"]
    density: float
    gate: float


@dataclass(frozen=True)
class AdaptiveGate:
    """Prune `rate` of all weights more where the metric exceeds the client's own gate, else lower that: decay x it.

    The gate begins at `val_accuracy` and is there again after each prune; below zero it is open.
    """

    rate: float
    density: float
    val_accuracy: float
    decay: float

    def __call__(self, density: float, gate: float, score: float, /) -> Turn:
        """Return what comes next of a client at `density`, whose metric under theta_g is `score`."""
        if self.done(density):
            return Turn("theta_g", self.density, gate)
        if gate < 0 or score > gate:
            left = density - self.rate
            return Turn("theta_0", self.density if self.done(left) else left, self.val_accuracy)
        return Turn("theta_g", 1.0, self.decay * gate)

    def done(self, density: float) -> bool:
        """Say whether a density is the target but for rounding: 1 less four times .2 is above .2, by a last bit."""
        return density <= self.density * (1 + 1e-9)


@dataclass(frozen=True)
class CellUpdate:
    """Redraw the mask from theta_g at the density that the gate allows; rewind to theta_0 until that is the target."""

    gate: AdaptiveGate
    score: Score = field(default_factory=Magnitude)
    scope: Scope = field(default_factory=Layerwise)
    sends: tuple[tuple[str, str], ...] = VALUES

    @property
    def val_accuracy(self) -> float:
        """The gate on validation data, as a study's checks look for it."""
        return self.gate.val_accuracy

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        theta, task = merged(local, inbox, state), local.task
        density, gate = _reached(state), _gate(state, self.gate.val_accuracy)
        asks = gate >= 0 and not self.gate.done(density)
        turn = self.gate(density, gate, local.val_score(theta) if asks else 0.0)
        seen = local.visit_scores(theta)
        mask = self._mask(local, theta, turn.density)
        start = rewound(theta, task, mask) if turn.start == "theta_0" else theta.masked(mask)
        trained = local.train(start, recipe=local.recipe, active=mask)
        sent, shared = task.shared_part(trained.params), task.shared_mask(mask)
        straggler = turn.density > density
        numbers = np.array([density if straggler else turn.density, turn.gate])
        new = replace(state, visits=state.visits + 1).with_(vectors={"cell": numbers})
        metrics = {"loss": trained.loss, **seen, "density": int(np.count_nonzero(mask)) / mask.size}
        content = Content(shared, sent.floats, sent.ints)
        return Update(kept_private(local, new, trained.params), {UPDATE: content}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        theta = merged(local, inbox, state)
        mask = self._mask(local, theta, _reached(state))
        return Own(theta.masked(mask), mask)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.own(local, inbox, state)
        return Own(local.train(held.params, recipe=recipe, active=held.mask).params, held.mask)

    def _mask(self, local: LocalClient, theta: Params, density: float) -> np.ndarray:
        if density >= 1:
            return local.full
        return shrink(self.score, self.scope, local, start=theta, now=theta, mask=local.full, density=density)


def _reached(state: ClientState) -> float:
    """Return the density that a client has pruned to so far."""
    return float(state.vectors["cell"][0]) if "cell" in state.vectors else 1.0


def _gate(state: ClientState, first: float) -> float:
    return float(state.vectors["cell"][1]) if "cell" in state.vectors else first


def cell(
    rate: float = 0.2, density: float = 0.2, val_accuracy: float = 0.5, decay: float = 0.9,
    score: str | dict[str, Any] = "magnitude",
) -> FederatedMethod:  # fmt: skip
    check(rate=share_of(rate), density=density_of(density), decay=density_of(decay))
    update = CellUpdate(AdaptiveGate(rate, density, val_accuracy, decay), score_of(score))
    return FederatedMethod(
        name="cell", paper="Seo et al., 2021, arXiv 2104.12501",
        summary="dense model down, tickets drawn anew each round up; an adaptive gate; zeros count in the mean",
        phases=(Phase(name="federate", update=update, join=FedAvg(), own_mask=True),), arms=(*OWN, "own_random"),
    )  # fmt: skip
