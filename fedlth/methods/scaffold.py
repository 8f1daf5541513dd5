"""SCAFFOLD: each client's drift is taken out of its gradients, by control variates of client and server (option II).

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
ICML 2020, arXiv 1910.06378. Where the paper leaves room: clients weigh by their examples, in c too, as in FedAvg here
(`weighted: false`: equally, as the paper's objective does), so that c is always the mean of all clients' c_k by the
same weights; a local rate that changes, and momentum, which the paper has not: what a client moved is divided by how
far the same steps carry a slope of one, with plain SGD at one rate K lr.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, FedAvg
from fedlth.methods.client_update import UPDATE, Inbox, MaskedUpdate, Own, Update, visited
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import check, positive
from fedlth.methods.server_optimizer import Momentum, ServerOptimizer, stepped
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import Sgd
from fedlth.training.pull import Correction
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.wire.payload import Content

C, DELTA_C = (
    "control_variate",
    "control_change",
)  # the server's control variate on its way down, and what a client changed of its own


def reach(recipe: TrainingRecipe, size: int) -> float:
    """Return how far a training on `size` examples goes along a gradient that is one at every step."""
    if type(recipe.optimizer) is not Sgd:
        raise TypeError(f"must be linear in its gradients, got {recipe.optimizer}")
    steps, gone = recipe.budget.total(size, recipe.batch_size), 0.0
    plain = replace(recipe.optimizer, weight_decay=0.0)  # decay is part of the gradients
    zero = torch.zeros(1, dtype=torch.float64)
    memory = plain.memory(zero)
    for step in range(steps):
        gone += recipe.rate(step, steps) * float(plain(torch.ones_like(zero), zero, memory, step + 1, None))
    return gone


@dataclass(frozen=True)
class ControlledUpdate(MaskedUpdate):
    """Add c - c_k to every gradient; c_k becomes the mean gradient of the visit, and what it changed by goes up."""

    sends: tuple[tuple[str, str], ...] = ((UPDATE, "values"), (DELTA_C, "values"))
    own_pull: ClassVar[bool] = True
    keeps: ClassVar[int] = 1

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held, task = self.own(local, inbox, state), local.task
        seen = local.visit_scores(held.params)
        nothing = np.zeros(task.exchange.num_floats, np.float32)
        ours, received = state.vectors.get(C, nothing), inbox[C].floats if C in inbox else nothing
        assert received is not None
        correction, recipe, anchor = received - ours, local.recipe, None
        if correction.any():
            still = Params(np.zeros_like(task.theta_0.floats), np.zeros_like(task.theta_0.ints))
            anchor = task.merge(Params(correction, np.zeros(task.exchange.num_ints, np.int64)), still)
            recipe = self.recipe(local, recipe)
        trained = local.train(held.params, recipe=recipe, active=held.mask, anchor=anchor)
        begin, end = task.shared_part(held.params), task.shared_part(trained.params)
        mask, moves = task.shared_mask(held.mask), task.exchange.num_params
        slope = nothing.copy()  # running statistics and what is pruned have none
        slope[:moves] = (begin.floats[:moves] - end.floats[:moves]) / np.float32(reach(recipe, local.num_train))
        now = Params(slope - correction, end.ints).masked(mask).floats
        now[moves:] = 0.0
        change = Content(mask, Params(now - ours, end.ints).masked(mask).floats, np.zeros_like(end.ints))
        update = visited(local, state, Own(trained.params, held.mask), {"loss": trained.loss, **seen})
        contents = {**update.contents, DELTA_C: change}
        return replace(update, state=update.state.with_(vectors={C: now}), contents=contents)

    def obstacle(self, recipe: TrainingRecipe) -> str:
        if type(recipe.optimizer) is Sgd:
            return ""
        return f"divides what a client moved by its rate: train.optimizer must be sgd, got {recipe.optimizer}"

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        return replace(recipe, pull=Correction())


@dataclass(frozen=True)
class ControlledMean:
    """theta goes lr times the mean change, c the mean change of the c_k times the share of clients that sent one.

    Models and changes are each joined by `mean`. Where it weighs by examples, so does the share: of `total`, the
    examples of all that take part, else their number. 0: what came is all.
    """

    lr: float = 1.0
    mean: Aggregate = field(default_factory=FedAvg)
    total: int = 0

    def of_task(self, task: Task, /) -> ControlledMean:
        sizes = [len(split.train) for k, split in enumerate(task.splits.clients) if k not in task.splits.unseen]
        return replace(self, total=sum(map(self._weight, sizes)))

    def _weight(self, num_examples: int) -> int:
        return num_examples if getattr(self.mean, "weighted", False) else 1

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        model = ServerOptimizer(Momentum(lr=self.lr), self.mean)
        still = ServerState(replace(state.theta, floats=np.zeros_like(state.theta.floats)))  # who tells no change
        return [state, layout, (model, model.init(state, layout)), self.mean.init(still, layout), 0]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        model, accumulator = so_far[2]
        model.add(accumulator, c)
        self.mean.add(so_far[3], replace(c, content=c.others[DELTA_C]))
        so_far[4] += self._weight(c.num_examples)

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, (model, accumulator), changes, came = so_far
        old = state.memory.get(C, np.float32(0))
        change = self.mean.result(changes).theta.floats.astype(np.float64)
        moves = np.zeros(layout.num_floats, bool)
        moves[: layout.num_params] = stepped(state, layout)
        share = came / max(came, self.total)
        new: ServerState = model.result(accumulator)
        return replace(new, memory={C: np.where(moves, old + share * change, 0.0).astype(np.float32)})


def scaffold(lr: float = 1.0, weighted: bool = True) -> FederatedMethod:
    check(lr=positive(lr))
    mean = FedAvg() if weighted else CountMean()
    phase = Phase(name="federate", update=ControlledUpdate(), join=ControlledMean(lr, mean), also=(C,))
    return FederatedMethod(
        name="scaffold", paper="Karimireddy et al., ICML 2020, arXiv 1910.06378",
        summary="FedAvg with control variates that take each client's drift out of its gradients; twice the bytes",
        phases=(phase,), arms=("global", "local", "dense"),
    )  # fmt: skip
