"""FedPM: weights never change; what is learnt is the probability that each one is there. Bits up, scores down.

Isik, Pase, Gunduz, Weissman, Zorzi. Sparse Random Networks for Communication-Efficient Federated Learning.
ICLR 2023, arXiv 2209.15328.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.methods.aggregate import MaskMean
from fedlth.methods.client_update import THETA_G, UPDATE, Inbox, Own, Update
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import check, positive
from fedlth.methods.space import Frozen, Scores, chances, received
from fedlth.storage.client_state import ClientState
from fedlth.tickets.evidence import Lesson
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class ScoreUpdate:
    """Train scores through sampled masks (straight-through), send one sampled mask.

    Of a recipe only its length and batch size count: scores have another unit than weights, and their own rate `lr`.
    """

    lr: float
    frozen: Frozen = field(default_factory=Frozen)
    sends: tuple[tuple[str, str], ...] = ((UPDATE, "mask"),)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        seen = local.visit_scores(self.own(local, inbox, state).params)
        scores, loss = self._train(local, received(inbox[THETA_G]), local.recipe)
        mask = self.drawn(local, inbox, scores)
        metrics = {"loss": loss, **seen, "density": float(mask.mean())}
        return Update(replace(state, visits=state.visits + 1), {UPDATE: Content(mask, None, None)}, metrics)

    def drawn(self, local: LocalClient, inbox: Inbox, scores: np.ndarray) -> np.ndarray:
        """Return the mask that goes up for scores after training."""
        return local.rng("upload mask").random(scores.size) < chances(scores)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return self._likely(local, received(inbox[THETA_G]))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        return self._likely(local, self._train(local, received(inbox[THETA_G]), recipe)[0])

    def _likely(self, local: LocalClient, scores: np.ndarray) -> Own:
        """Return the net of the weights that are more likely there than not (no dice in an evaluation)."""
        return self.frozen.under(local, scores > 0)

    def _train(self, local: LocalClient, start: np.ndarray, recipe: TrainingRecipe) -> tuple[np.ndarray, float]:
        budget = recipe.budget
        lesson = Lesson(
            rule="bernoulli", alive=local.full, density=1.0, epochs=budget.epochs, steps=budget.steps, lr=self.lr
        )
        return local.learn(self.frozen(local.task), start, lesson, batch_size=recipe.batch_size)


def fedpm(score_lr: float = 50.0) -> FederatedMethod:
    check(score_lr=positive(score_lr))
    return FederatedMethod(
        name="fedpm", paper="Isik et al., ICLR 2023, arXiv 2209.15328",
        summary="frozen weights, learnt Bernoulli masks: bits up, scores down",
        phases=(Phase(name="federate", update=ScoreUpdate(score_lr), join=MaskMean(), own_mask=True),), space=Scores(),
        arms=("global", "local", "own_tuned", "frozen_random"),
    )  # fmt: skip
