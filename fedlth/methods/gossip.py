"""Federation without a server: a client averages what its neighbours last published with its own, then trains.

Sun, Li, Wang. Decentralized Federated Averaging. IEEE TPAMI 2022, arXiv 2104.11375. The paper trains, then averages;
here a visit averages, then trains, which is the same sequence cut at another place: the model that a client ends with
is not averaged once more, that of the arms `own` and `own_tuned` is. Weights of the mean are equal (the paper leaves
the mixing matrix open); with random neighbours they sum to one for who hears, not for who is heard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, join
from fedlth.methods.client_update import UPDATE, VALUES, Event, Inbox, Keep, Own, Update, private
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import OWN
from fedlth.methods.topology import topology_of
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import client_of
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class GossipUpdate:
    """Average over the holders among the neighbours and oneself, train under the mask, maybe move it, publish.

    The client keeps its model and its mask; what it publishes needs nothing else to be read. `after` may change the
    mask for the next visit: what is published is the trained model under the new one.
    """

    after: Event = field(default_factory=Keep)
    mean: Aggregate = field(default_factory=CountMean)
    sends: tuple[tuple[str, str], ...] = VALUES
    keeps: ClassVar[int] = 1

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held, task = self.own(local, inbox, state), local.task
        seen = local.visit_scores(held.params)
        trained = local.train(held.params, recipe=local.recipe, active=held.mask, snapshots=self.after.snapshots)
        params, mask = self.after(local, trained.params, held.mask, trained)
        sent, kept = task.shared_part(params), task.moving_part(params)
        new = replace(state, visits=state.visits + 1).with_(
            masks={"active": mask}, vectors={"private": kept.floats, "private_ints": kept.ints}
        )
        metrics = {"loss": trained.loss, **seen, "density": int(np.count_nonzero(mask)) / mask.size}
        return Update(new, {UPDATE: Content(task.shared_mask(mask), sent.floats, sent.ints)}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        task, mine = local.task, private(local, state)
        mask = state.masks.get("active", local.full)
        parts = neighbours(inbox)
        if local.client not in parts:  # else it has lost its state, and what it published came back
            own = task.shared_part(mine.masked(mask))
            parts[local.client] = Content(task.shared_mask(mask), own.floats, own.ints)
        else:
            mask = task.whole_mask(parts[local.client].mask, mask)
        came = (Contribution(client, 1, parts[client]) for client in sorted(parts))
        mean = join(self.mean, ServerState(task.shared_part(mine)), came, task.exchange).theta
        return Own(task.merge(mean, mine).masked(mask), mask)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.own(local, inbox, state)
        return Own(local.train(held.params, recipe=recipe, active=held.mask).params, held.mask)


def neighbours(inbox: Inbox) -> dict[int, Content]:
    """Return what came of clients, by client."""
    found: Mapping[int | None, Content] = {client_of(name): content for name, content in inbox.items()}
    return {client: content for client, content in found.items() if client is not None}


def gossip(
    update: GossipUpdate, topology: str | dict[str, Any], consensus: Aggregate, *, own_mask: bool
) -> Phase:  # fmt: skip
    """Return a phase in which clients send to one another; `consensus` makes of what they published the global model.

    Nobody holds that model: the reports' arms `global` and `dense` evaluate it.
    """
    return Phase(
        name="federate", update=update, join=consensus, down="nothing", own_mask=own_mask,
        topology=topology_of(topology),
    )  # fmt: skip


def dfedavg(topology: str | dict[str, Any] = "ring") -> FederatedMethod:
    return FederatedMethod(
        name="dfedavg", paper="Sun, Li, Wang, TPAMI 2022, arXiv 2104.11375",
        summary="no server: clients average with their neighbours, then train (the dense control of dispfl)",
        phases=(gossip(GossipUpdate(), topology, CountMean(), own_mask=False),), arms=OWN,
    )  # fmt: skip
