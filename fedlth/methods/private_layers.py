"""Methods that keep layers with the client: FedPer the head, FedRep the head in a pass of its own, FedBN the norms.

FedPer: Arivazhagan, Aggarwal, Singh, Choudhary. Federated Learning with Personalization Layers. 2019, arXiv 1912.00818.
FedRep: Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021, arXiv 2102.07089. Left open: how its two passes fit into a budget that all methods share. Here the body
trains by the study's (`train`), the head before it for `head_epochs`; in step 2 the head alone trains, as the paper's
new clients do. Both passes have the rate and the momentum of the study, each from the start, and batches in the order
of any other training.
FedBN: Li, Jiang, Zhang, Kamp, Dou. FedBN: Federated Learning on Non-IID Features via Local Batch Normalization.
ICLR 2021, arXiv 2102.07623. All of a norm stays: weights, biases, statistics. The server weighs by examples, as in
FedAvg here; the paper's mean is uniform.
The head is that of the network as it is exchanged, whatever its tensors are called (`model.personal: ["@head"]`);
`model.personal: []` and `model.buffers: aggregate` share all, which is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.methods.client_update import VALUES, Inbox, MaskedUpdate, Own, Update, visited
from fedlth.methods.fedselect import crossing, share_of_flops
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, at_least, averaged, check
from fedlth.models.layout import HEAD
from fedlth.storage.client_state import ClientState
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.study_recipe import budget_of
from fedlth.training.task import Task


@dataclass(frozen=True)
class HeadThenBody:
    """Train what stays with the client, all else fixed, then what crosses, the head fixed; send the body."""

    head_epochs: int
    shared: MaskedUpdate = field(default_factory=MaskedUpdate)
    sends: tuple[tuple[str, str], ...] = VALUES

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held, task = self.own(local, inbox, state), local.task
        seen, body = local.visit_scores(held.params), crossing(task, local.full)
        params, recipe = held.params, local.recipe
        if self.head_epochs and not body.all():
            first = replace(recipe, budget=Budget(epochs=self.head_epochs))
            moved, weights = local.train(params, recipe=first, active=held.mask, trainable=~body).params, body.size
            # Not the statistics: those of norms in the body are the body's.
            params = replace(params, floats=np.concatenate((moved.floats[:weights], params.floats[weights:])))
        trained = local.train(params, recipe=recipe, active=held.mask, trainable=body)
        return visited(local, state, Own(trained.params, held.mask), {"loss": trained.loss, **seen})

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return self.shared.own(local, inbox, state)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held, body = self.own(local, inbox, state), crossing(local.task, local.full)
        trainable = None if body.all() else ~body
        return replace(
            held, params=local.train(held.params, recipe=recipe, active=held.mask, trainable=trainable).params
        )

    def passes(self, task: Task, visits: int) -> float:
        return 1 if _body(task).all() else 1 + self.head_epochs / _epochs(task)

    def tune_passes(self, task: Task, visits: int) -> float:
        return 1

    def whole_passes(self, task: Task, visits: int) -> float:
        body, heads = _body(task), self.passes(task, visits) - 1
        return share_of_flops(task, body) + (heads * share_of_flops(task, ~body) if heads else 0)

    def whole_tune_passes(self, task: Task, visits: int) -> float:
        body = _body(task)
        return 1 if body.all() else share_of_flops(task, ~body)


def _body(task: Task) -> np.ndarray:
    return crossing(task, np.ones(task.layout.num_prunable, bool))


def _epochs(task: Task) -> float:
    """Return the mean over clients of the epochs of a visit's budget."""
    train = task.study.train
    sizes = [len(split.train) for split in task.splits.clients]
    return float(np.mean([budget_of(train).examples(size, train.batch_size) / size for size in sizes]))


def fedper() -> FederatedMethod:
    return FederatedMethod(
        name="fedper", paper="Arivazhagan et al., 2019, arXiv 1912.00818",
        summary="FedAvg of the body; every client keeps a head of its own",
        phases=(averaged(),), arms=OWN, personal=(HEAD,),
    )  # fmt: skip


def fedrep(head_epochs: int = 10) -> FederatedMethod:
    check(head_epochs=at_least(1, head_epochs))
    return FederatedMethod(
        name="fedrep", paper="Collins et al., ICML 2021, arXiv 2102.07089",
        summary="the client's own head trains first, then the body that all share",
        phases=(averaged(HeadThenBody(head_epochs)),), arms=OWN, personal=(HEAD,),
    )  # fmt: skip


def fedbn() -> FederatedMethod:
    return FederatedMethod(
        name="fedbn", paper="Li et al., ICLR 2021, arXiv 2102.07623",
        summary="FedAvg of all but the norms, which stay with the client",
        phases=(averaged(),), arms=OWN, buffers="local_all", needs_norms=True,
    )  # fmt: skip
