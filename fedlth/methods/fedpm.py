"""FedPM: weights never change; what is learnt is the probability that each one is there. Bits up, scores down.

Isik, Pase, Gunduz, Weissman, Zorzi. Sparse Random Networks for Communication-Efficient Federated Learning.
ICLR 2023, arXiv 2209.15328.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fedlth import rng
from fedlth.methods.aggregate import MaskMean
from fedlth.methods.client_update import THETA_G, UPDATE, Inbox, Own, Update
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import check, positive
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.tickets.evidence import Lesson
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.wire.payload import Content


def frozen_weights(task: Task) -> Params:
    """Return the frozen net: each prunable weight plus or minus its layer's Kaiming constant sqrt(2 / fan_in).

    Signs come from a stream of the run's seed, so seed and mask are the whole model. The rest is theta_0's.
    """
    floats = task.theta_0.floats.copy()
    signs = rng.stream(task.study.seed, "signed constant")
    for e in task.layout.prunable:
        fan_in = e.size // e.shape[0]
        floats[e.slice] = np.where(signs.random(e.size) < 0.5, -1.0, 1.0) * math.sqrt(2 / fan_in)
    return replace(task.theta_0, floats=floats)


def first_scores(task: Task) -> Params:
    """Return scores whose sigmoids are uniform in (0, 1): where FedPM starts."""
    draw = rng.stream(task.study.seed, "first scores").uniform(0.01, 0.99, task.layout.num_prunable)
    return Params(np.log(draw / (1 - draw)).astype(np.float32), np.zeros(0, np.int64))


@dataclass(frozen=True)
class ScoreUpdate:
    """Train scores through sampled masks (straight-through), send one sampled mask.

    Of a recipe only its length and batch size count: scores have another unit than weights, and their own rate `lr`.
    """

    lr: float
    sends: tuple[tuple[str, str], ...] = ((UPDATE, "mask"),)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        seen = local.visit_scores(self.own(local, inbox, state).params)
        scores, loss = self._train(local, _scores(inbox), local.recipe)
        mask = local.rng("upload mask").random(scores.size) < 1 / (1 + np.exp(-scores.astype(np.float64)))
        metrics = {"loss": loss, **seen, "density": float(mask.mean())}
        return Update(replace(state, visits=state.visits + 1), {UPDATE: Content(mask, None, None)}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return self._likely(local, _scores(inbox))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        return self._likely(local, self._train(local, _scores(inbox), recipe)[0])

    def _likely(self, local: LocalClient, scores: np.ndarray) -> Own:
        """Return the net of the weights that are more likely there than not (no dice in an evaluation)."""
        mask = scores > 0
        return Own(frozen_weights(local.task).masked(mask), mask)

    def _train(self, local: LocalClient, start: np.ndarray, recipe: TrainingRecipe) -> tuple[np.ndarray, float]:
        budget = recipe.budget
        lesson = Lesson(
            rule="bernoulli", alive=local.full, density=1.0, epochs=budget.epochs, steps=budget.steps, lr=self.lr
        )
        return local.learn(frozen_weights(local.task), start, lesson, batch_size=recipe.batch_size)


def _scores(inbox: Inbox) -> np.ndarray:
    scores = inbox[THETA_G].floats
    if scores is None:
        raise ValueError("expected scores, got a bare mask")
    return scores


def fedpm(score_lr: float = 50.0) -> FederatedMethod:
    check(score_lr=positive(score_lr))
    return FederatedMethod(
        name="fedpm", paper="Isik et al., ICLR 2023, arXiv 2209.15328",
        summary="frozen weights, learnt Bernoulli masks: bits up, scores down",
        phases=(Phase(name="federate", update=ScoreUpdate(score_lr), join=MaskMean(), own_mask=True),), space="scores",
        arms=("global", "local", "own_tuned", "frozen_random"),
    )  # fmt: skip
