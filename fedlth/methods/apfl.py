"""APFL: a personal model that is a mixture of the shared one and one of the client's own, trained step by step.

Deng, Kamani, Mahdavi. Adaptive Personalized Federated Learning. 2020, arXiv 2003.13461.
Left open: when the mixture's share adapts; here at the first step of a visit, kept within [0, 1]. A client's own model
begins as the first shared one that it is sent. The server weighs by examples, as in FedAvg here; the paper's mean is
uniform.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedlth.methods.client_update import VALUES, Inbox, MaskedUpdate, Own, Update, visited
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, averaged, check
from fedlth.methods.proximal import personal_or, with_personal
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from fedlth.training.mixture import mixed
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task


@dataclass(frozen=True)
class MixtureUpdate:
    """Train the shared model and, through the mixture of the two, the client's own; send the shared one."""

    alpha: float
    adaptive: bool
    shared: MaskedUpdate = field(default_factory=MaskedUpdate)
    sends: tuple[tuple[str, str], ...] = VALUES
    own_pull: ClassVar[bool] = True
    keeps: ClassVar[int] = 1

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held = self.shared.own(local, inbox, state)
        seen = local.visit_scores(held.params)
        trained, personal, share = local.train_mixed(
            held.params, personal_or(local, state, held).params, self._share(state), recipe=local.recipe,
            active=held.mask, adapts=self.adaptive,
        )  # fmt: skip
        state = with_personal(local, state, personal).with_(vectors={"alpha": np.array([share])})
        return visited(local, state, Own(trained.params, held.mask), {"loss": trained.loss, **seen})

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        held, weights = self.shared.own(local, inbox, state), local.task.layout.num_params
        personal = personal_or(local, state, held).params
        return replace(held, params=mixed(held.params, personal, self._share(state), weights))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held, weights = self.shared.own(local, inbox, state), local.task.layout.num_params
        trained, personal, share = local.train_mixed(
            held.params, personal_or(local, state, held).params, self._share(state), recipe=recipe,
            active=held.mask, adapts=self.adaptive,
        )  # fmt: skip
        return replace(held, params=mixed(trained.params, personal, share, weights))

    def passes(self, task: Task, visits: int) -> int:
        return 2

    def _share(self, state: ClientState) -> float:
        return float(state.vectors["alpha"][0]) if "alpha" in state.vectors else self.alpha


def apfl(alpha: float = 0.5, adaptive: bool = False) -> FederatedMethod:
    check(alpha=(alpha, 0 <= alpha <= 1, "in [0, 1]"))
    return FederatedMethod(
        name="apfl", paper="Deng et al., 2020, arXiv 2003.13461",
        summary="each client mixes the shared model with one of its own, and trains the mixture",
        phases=(averaged(MixtureUpdate(alpha, adaptive)),), arms=OWN,
    )  # fmt: skip
