"""Methods with a proximal term: FedProx pulls the shared model, Ditto a personal one, pFedMe has an envelope of it.

FedProx: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. MLSys 2020,
arXiv 1812.06127. Clients are drawn without replacement and weighted by examples, as in FedAvg here (mu 0 is FedAvg);
partial work of slow devices is the study's fleet and budget, not the method's.
Ditto: Li, Hu, Beirami, Smith. Ditto: Fair and Robust Federated Learning Through Personalization. ICML 2021, arXiv
2012.04221. A client's personal model begins as the first global model that it is sent.
pFedMe: Dinh, Tran, Nguyen. Personalized Federated Learning with Moreau Envelopes. NeurIPS 2020, arXiv 2006.08848. Left
open: where an inner problem starts; here a visit's first at what was received, each other where the last one ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedlth.methods.aggregate import CountMean
from fedlth.methods.client_update import (
    VALUES,
    Inbox,
    MaskedUpdate,
    Own,
    Update,
    visited,
)
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, at_least, averaged, check, positive
from fedlth.methods.server_optimizer import Momentum, ServerOptimizer
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from fedlth.training.pull import Proximal
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task


@dataclass(frozen=True)
class ProximalUpdate(MaskedUpdate):
    """Train with a pull to what was received."""

    mu: float = 0.0
    own_pull: ClassVar[bool] = True

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        return replace(recipe, pull=Proximal(mu=self.mu))


def with_personal(local: LocalClient, state: ClientState, params: Params) -> ClientState:
    """Return the state with a whole personal model beside the shared one."""
    own = local.task.moving_part(params)
    return state.with_(vectors={"personal": own.floats, "personal_ints": own.ints})


def personal_or(local: LocalClient, state: ClientState, received: Own) -> Own:
    """Return the client's personal model under the mask of what was received, which it begins as."""
    if "personal" not in state.vectors:
        return received
    own = local.task.whole(Params(state.vectors["personal"], state.vectors["personal_ints"]))
    return Own(own.masked(received.mask), received.mask)


@dataclass(frozen=True)
class DittoUpdate:
    """Train the shared model as FedAvg does, and beside it a personal one with a pull to what was received.

    Both draw the same batches: twins that the pull alone tells apart.
    """

    strength: float
    shared: MaskedUpdate = field(default_factory=MaskedUpdate)
    sends: tuple[tuple[str, str], ...] = VALUES
    own_pull: ClassVar[bool] = True
    keeps: ClassVar[int] = 1

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        personal = self.tune(local, inbox, state, local.recipe)
        update = self.shared(local, inbox, state)
        return replace(update, state=with_personal(local, update.state, personal.params))

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return personal_or(local, state, self.shared.own(local, inbox, state))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        received, held = self.shared.own(local, inbox, state), self.own(local, inbox, state)
        recipe = self.recipe(local, recipe)
        return replace(
            held, params=local.train(held.params, recipe=recipe, active=held.mask, anchor=received.params).params
        )

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        """Return how the personal model trains."""
        return replace(recipe, pull=Proximal(mu=self.strength))

    def passes(self, task: Task, visits: int) -> int:
        return 2

    def tune_passes(self, task: Task, visits: int) -> int:
        return 1


@dataclass(frozen=True)
class EnvelopeUpdate:
    """Descend the Moreau envelope of the loss: w goes outer_lr strength (w - theta) towards theta, batch by batch.

    theta is the personal model: `inner_steps` steps on one batch, at the study's rate, with a pull of `strength` to w.
    Running statistics that are sent are those of theta's forward passes.
    """

    strength: float
    inner_steps: int
    outer_lr: float
    shared: MaskedUpdate = field(default_factory=MaskedUpdate)
    sends: tuple[tuple[str, str], ...] = VALUES
    own_pull: ClassVar[bool] = True
    keeps: ClassVar[int] = 1

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held = self.shared.own(local, inbox, state)
        seen = local.visit_scores(held.params)
        shared, personal, loss = self._descend(local, held, local.recipe)
        state = with_personal(local, state, personal)
        return visited(local, state, Own(shared, held.mask), {"loss": loss, **seen})

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return personal_or(local, state, self.shared.own(local, inbox, state))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.shared.own(local, inbox, state)
        return replace(held, params=self._descend(local, held, recipe)[1])

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        """Return how theta trains: every batch of the study's budget `inner_steps` times."""
        return replace(recipe, pull=Proximal(mu=self.strength), budget=replace(recipe.budget, repeats=self.inner_steps))

    def passes(self, task: Task, visits: int) -> int:
        return self.inner_steps

    def _descend(self, local: LocalClient, held: Own, recipe: TrainingRecipe) -> tuple[Params, Params, float]:
        """Return w, theta, and the mean loss of the last epoch."""
        inner, steps = self.recipe(local, recipe), self.inner_steps
        weights, moved = local.task.layout.num_params, np.float32(self.outer_lr * self.strength)
        shared = personal = held.params
        losses = list[float]()
        for first in range(0, inner.steps(local.num_train), steps):
            piece = replace(inner, first_step=first, last_step=first + steps)
            trained = local.train(personal, recipe=piece, active=held.mask, anchor=shared)
            personal, floats = trained.params, trained.params.floats.copy()
            floats[:weights] = shared.floats[:weights] - moved * (shared.floats[:weights] - floats[:weights])
            shared = replace(personal, floats=floats)
            losses.append(trained.loss)
        return shared, personal, float(np.mean(losses[-local.steps_of(recipe) :]))


def fedprox(mu: float = 0.01) -> FederatedMethod:
    check(mu=at_least(0, mu))
    return FederatedMethod(
        name="fedprox", paper="Li et al., MLSys 2020, arXiv 1812.06127",
        summary="FedAvg whose clients are pulled to what they received",
        phases=(averaged(ProximalUpdate(mu=mu)),), arms=("global", "local", "dense", "own_tuned"),
    )  # fmt: skip


def ditto(strength: float = 0.1) -> FederatedMethod:
    check(strength=at_least(0, strength))
    return FederatedMethod(
        name="ditto", paper="Li et al., ICML 2021, arXiv 2012.04221",
        summary="FedAvg, and beside it a personal model of each client that is pulled to the global one",
        phases=(averaged(DittoUpdate(strength)),), arms=OWN,
    )  # fmt: skip


def pfedme(strength: float = 15.0, inner_steps: int = 5, outer_lr: float = 0.005, beta: float = 1.0) -> FederatedMethod:
    check(
        strength=positive(strength), inner_steps=at_least(1, inner_steps), outer_lr=positive(outer_lr),
        beta=positive(beta),
    )  # fmt: skip
    join = ServerOptimizer(Momentum(lr=beta), CountMean())
    return FederatedMethod(
        name="pfedme", paper="Dinh et al., NeurIPS 2020, arXiv 2006.08848",
        summary="personal models in a Moreau envelope around the shared one, which follows them",
        phases=(averaged(EnvelopeUpdate(strength, inner_steps, outer_lr), join),), arms=OWN,
    )  # fmt: skip
