"""FedSpa: sparse from the start to the end; each client's random mask keeps its density and moves every round.

Huang, Liu, Shen, He, Lin, Tao. Achieving Personalized Federated Learning with Sparse Local Models. 2022, arXiv
2201.11380.

A weight that comes back has the server's value where others hold it. Left open: a weight that nobody in a round holds
keeps its old value at the server. Biases and norms are not pruned, as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.methods.aggregate import CountMean
from fedlth.methods.client_update import NEXT_MASK, UPDATE, Inbox, MaskedUpdate, Own, Update, kept_private
from fedlth.methods.evolve import Evolve, RandomErk
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, check, density_of, sliced
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.wire.payload import Content

MASKED = MaskedUpdate()


@dataclass(frozen=True)
class EvolvingUpdate:
    """Train under the mask that came, send that, and name the mask of the next download."""

    evolve: Evolve = field(default_factory=Evolve)
    sends: tuple[tuple[str, str], ...] = ((UPDATE, "values"), (NEXT_MASK, "mask"))

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held, task = MASKED.own(local, inbox, state), local.task
        seen = local.visit_scores(held.params)
        trained = local.train(held.params, recipe=local.recipe, active=held.mask)
        following = self.evolve(local, trained.params, held.mask)
        sent, shared, named = (
            task.shared_part(trained.params), task.shared_mask(held.mask), task.shared_mask(following)
        )  # fmt: skip
        metrics = {"loss": trained.loss, **seen, "density": int(np.count_nonzero(held.mask)) / held.mask.size}
        new = replace(state, visits=state.visits + 1)
        if named is not following and not following.all():
            new = new.with_(masks={"active": following})  # of personal tensors only the client knows what is alive
        contents = {UPDATE: Content(shared, sent.floats, sent.ints), NEXT_MASK: Content(named, None, None)}
        return Update(kept_private(local, new, trained.params), contents, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return MASKED.own(local, inbox, state)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        return MASKED.tune(local, inbox, state, recipe)


def fedspa(
    density: float = 0.5, drop: float = 0.5, by: str = "gradient", same: bool = False, uncovered: str = "keep"
) -> FederatedMethod:
    check(
        density=density_of(density), same=(same, isinstance(same, bool), "true or false"),
        uncovered=(uncovered, uncovered in ("keep", "zero"), "keep or zero"),
    )  # fmt: skip
    return FederatedMethod(
        name="fedspa", paper="Huang et al., 2022, arXiv 2201.11380",
        summary="random personal masks of constant density that move; holders average (control: by: random)",
        phases=(sliced(EvolvingUpdate(Evolve(drop, by)), CountMean(uncovered)),), arms=(*OWN, "own_random"),
        first_mask=RandomErk(density, same),
    )  # fmt: skip
