"""FedSelect: each client grows a personal set of weights that it no longer shares.

Tamirisa, Xie, Bao, Zhou, Arel, Shamsian. FedSelect: Personalized Federated Learning with Customized Selection of
Parameters for Fine-Tuning. CVPR 2024, arXiv 2404.02478.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlth.methods.client_update import (
    THETA_G,
    UPDATE,
    VALUES,
    Inbox,
    Own,
    Shrinking,
    Update,
    geometric,
    merged,
    private,
)
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, at_least, check, density_of, score_of, share_of, sliced
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.tickets.score import Movement, Score
from fedlth.tickets.select import keep_top
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class SelectUpdate:
    """Alternate an epoch on what is personal and one on what is shared, grow the personal set, send the shared.

    Personal is what does not cross: the personal weights, and norms where the buffer policy keeps them local. All else,
    biases and norms too, moves in the shared pass alone, and so do the norms' statistics. While nothing is personal
    there is no personal pass. Both passes draw the batches that any other training of the same length would.
    Every `every` own visits, in each tensor the `rate` share of shared weights that score highest (moved most) turns
    personal, until `limit` of the tensor is. Every weight stays alive: only the shared mask shrinks.
    """

    rate: float
    limit: float
    every: int
    score: Score = field(default_factory=Movement)
    sends: tuple[tuple[str, str], ...] = VALUES

    @property
    def shrinking(self) -> Shrinking:
        """How the shared mask shrinks."""
        return Shrinking(geometric(self.rate, 1 - self.limit), every=self.every)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held, shared = self.own(local, inbox, state), _shared(local, inbox)
        seen = local.visit_scores(held.params)
        params, loss = self._alternate(local, held.params, shared, local.recipe)
        visits = state.visits + 1
        if visits % self.every == 0:
            shared = self._grow(local, held.params, params, shared)
        own = local.task.moving_part(params)
        new = replace(state, visits=visits).with_(vectors={"private": own.floats, "private_ints": own.ints})
        sent = local.task.shared_part(params.masked(shared))
        metrics = {"loss": loss, **seen, "density": float(shared.mean())}
        return Update(new, {UPDATE: Content(local.task.shared_mask(shared), sent.floats, sent.ints)}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        shared, mine = _shared(local, inbox), private(local, state)
        whole = merged(local, inbox, state)
        floats = whole.floats.copy()
        floats[: shared.size][~shared] = mine.floats[: shared.size][~shared]
        return Own(replace(whole, floats=floats), local.full)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.own(local, inbox, state)
        return Own(self._alternate(local, held.params, _shared(local, inbox), recipe)[0], local.full)

    def passes(self, task: Task, visits: int) -> int:
        """Return how many trainings an epoch is to a client after so many own visits."""
        local_norms = not crossing(task, np.ones(task.layout.num_prunable, bool)).all()
        return 1 + (local_norms or self._grown(task, visits))

    def whole_passes(self, task: Task, visits: int) -> float:
        """Return how many of the whole network cost as much: local norms alone cost less, scattered weights do not."""
        crosses, passes = crossing(task, np.ones(task.layout.num_prunable, bool)), self.passes(task, visits)
        return passes if passes == 1 or self._grown(task, visits) else 1 + share_of_flops(task, ~crosses)

    def _grown(self, task: Task, visits: int) -> bool:
        """Say whether any weight is personal after so many own visits."""
        sizes = [e.size for e in task.layout.prunable]
        return visits >= self.every and any(min(round(self.rate * n), int(self.limit * n)) for n in sizes)

    def _alternate(
        self, local: LocalClient, params: Params, shared: np.ndarray, recipe: TrainingRecipe
    ) -> tuple[Params, float]:
        crosses, steps, loss = crossing(local.task, shared), local.steps_of(recipe), 0.0
        weights = crosses.size
        end = recipe.budget.total(local.num_train, recipe.batch_size)
        for first in range(0, end, steps):
            # An epoch is a piece of the whole recipe, so that batches and rates are those of any other training.
            piece = replace(recipe, first_step=first, last_step=min(first + steps, end))
            if not crosses.all():
                moved = local.train(params, recipe=piece, trainable=~crosses).params
                params = replace(params, floats=np.concatenate((moved.floats[:weights], params.floats[weights:])))
            trained = local.train(params, recipe=piece, trainable=crosses)
            params, loss = trained.params, trained.loss
        return params, loss

    def _grow(self, local: LocalClient, before: Params, after: Params, shared: np.ndarray) -> np.ndarray:
        evidence = local.evidence(start=before, now=after, mask=shared, density=1 - self.limit)
        score = self.score(evidence)
        grown = shared.copy()
        for e in local.task.layout.prunable:
            here = shared[e.slice]
            room = int(self.limit * e.size) - (e.size - int(here.sum()))
            count = min(round(self.rate * int(here.sum())), max(0, room))
            grown[e.slice] &= ~keep_top(score[e.slice], here, count)
        return grown


def crossing(task: Task, shared: np.ndarray) -> np.ndarray:
    """Return (num_params,) bool: the parameters that cross, given which weights do, `shared` (num_prunable,) bool."""
    names = {e.name for e in task.exchange.floats}
    crosses = np.ones(task.layout.num_params, bool)
    for e in task.layout.floats:
        if e.trainable and e.name not in names:  # a frozen part moves in neither pass, whether it crosses or not
            crosses[e.slice] = False
    crosses[: shared.size] &= shared
    return crosses


def share_of_flops(task: Task, trainable: np.ndarray) -> float:
    """Return what a training of some parameters, (num_params,) bool, costs of one of the whole network."""
    model = task.model
    return model.part_flops(trainable)[""] / (model.training_flops[""] or 1)  # of a network that counts as nothing: 0


def _shared(local: LocalClient, inbox: Inbox) -> np.ndarray:
    """Return (num_prunable,) bool over the whole model: the weights that this client shares."""
    return local.task.whole_mask(inbox[THETA_G].mask, np.zeros(local.full.size, bool))


def fedselect(
    rate: float = 0.25, limit: float = 0.8, every: int = 1, score: str | dict[str, Any] = "movement"
) -> FederatedMethod:
    check(rate=share_of(rate), limit=density_of(limit), every=at_least(1, every))
    return FederatedMethod(
        name="fedselect", paper="Tamirisa et al., CVPR 2024, arXiv 2404.02478",
        summary="clients turn their fastest-moving weights personal and share the rest (control: score: random)",
        phases=(sliced(SelectUpdate(rate, limit, every, score_of(score))),), arms=OWN,
    )  # fmt: skip
