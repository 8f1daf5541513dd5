"""pFedGate: a private gate looks at each batch and chooses the blocks of the model that this batch trains.

Chen, Yao, Gao, Ding, Li. Efficient Personalized Federated Learning via Sparse Model-Adaptation. ICML 2023, arXiv
2305.02776.

The gate is one linear layer on the mean of a batch, a score for each block; blocks are runs of a tensor's rows. The
paper's gates are continuous; here a block is there or not, with the score's gradient straight through, so that a
client with room for all trains as in FedAvg. Uploaded is what any batch of the visit has touched: the union of its
masks, whose density the ledger has; it may be the whole model. What no batch touched counts as it was sent. The model
that a client is judged by has one mask: what the gate chooses for the mean of its training data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlth import rng
from fedlth.data.examples import Examples
from fedlth.methods.aggregate import Aggregate, Contribution, FedAvg, values_of
from fedlth.methods.client_update import UPDATE, VALUES, Inbox, Own, Update, kept_private, merged
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import OWN, at_least, check, density_of, positive
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.granularity import Groups, Row
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class RunsOfRows:
    """Each tensor's rows in `pieces` runs of nearly equal length, as many as it has rows at most."""

    pieces: int

    def groups(self, layout: Layout, /) -> Groups:
        entries, of, before = [], np.zeros(layout.num_prunable, np.int64), 0
        for e in layout.prunable:
            rows = e.shape[0]
            count = min(rows, self.pieces)
            of[e.slice] = before + np.repeat(np.arange(rows) * count // rows, e.size // rows)
            entries.append(replace(e, shape=(count,), offset=before))
            before += count
        return Groups(Layout(tuple(entries)), of)


def chosen(score: np.ndarray, blocks: Layout, sizes: np.ndarray, room: int) -> np.ndarray:
    """Return (num_blocks,) bool: each tensor's best block, then by score a weight whatever still fits into `room`.

    The greedy answer to a knapsack; of equals the first. First blocks may take more than the room.
    """
    kept = np.zeros(score.size, bool)
    for e in blocks.prunable:
        kept[e.offset + int(np.argmax(score[e.slice]))] = True
    left = room - int(sizes[kept].sum())
    for i in np.argsort(-score / sizes, kind="stable"):
        if not kept[i] and sizes[i] <= left:
            kept[i] = True
            left -= int(sizes[i])
    return kept


@dataclass(frozen=True)
class Gate:
    """The masking of a batch: `extra` are a (blocks, features) matrix, then a bias (blocks,)."""

    density: float
    blocks: RunsOfRows

    def mask(self, weights: Tensor, extra: Tensor, batch: Examples, layout: Layout, /) -> Tensor:
        groups = self.blocks.groups(layout)
        assert groups.of is not None
        count = groups.layout.num_prunable
        seen = batch.tensor.float().flatten(1).mean(0)
        score = torch.sigmoid(extra[:-count].view(count, -1) @ seen + extra[-count:])
        sizes = np.bincount(groups.of, minlength=count)
        room = round(self.density * layout.num_prunable)
        kept = chosen(score.detach().cpu().numpy().astype(np.float64), groups.layout, sizes, room)
        hard = torch.from_numpy(kept.astype(np.float32)).to(weights.device)
        return (hard + (score - score.detach()))[torch.from_numpy(groups.of).to(weights.device)]

    def penalty(self, extra: Tensor, /) -> Tensor:
        return torch.zeros((), device=extra.device)

    def first(self, local: LocalClient) -> np.ndarray:
        """Return a client's own first gate, from a stream of its own: scores that differ a little."""
        features = local.train_part.tensor[0].numel()
        count = self.blocks.groups(local.task.layout).layout.num_prunable
        draw = rng.stream(local.task.study.seed, "gate", 0, local.client)
        matrix = draw.normal(0, 1 / math.sqrt(features), count * features)
        return np.concatenate((matrix, np.zeros(count))).astype(np.float32)


@dataclass(frozen=True)
class GatedUpdate:
    """Train the model through the gate's mask of each batch, and the gate with it; send what was touched.

    gate_lr: the gate's rate, by SGD; it follows the schedules of the weights' own, that over the steps and, in step 1,
    that over the rounds. A gate that has room for everything chooses nothing and is not trained.
    """

    gate: Gate
    gate_lr: float
    sends: tuple[tuple[str, str], ...] = VALUES
    granularity: ClassVar[Row] = Row()  # of its random control: blocks of unequal length would change the density

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        task, begin = local.task, merged(local, inbox, state)
        seen = local.visit_scores(self.own(local, inbox, state).params)
        recipe, lr = local.recipe, task.study.train.lr
        params, extra, touched, loss = self._train(local, begin, self._extra(local, state), recipe, lr)
        size = touched.size
        floats = params.floats.copy()
        floats[:size][~touched] = begin.floats[:size][~touched]  # a weight decay would have moved them too
        sent, shared = task.shared_part(Params(floats, params.ints).masked(touched)), task.shared_mask(touched)
        new = replace(state, visits=state.visits + 1).with_(vectors={"gate": extra})
        metrics = {"loss": loss, **seen, "density": float(touched.mean())}
        content = Content(shared, sent.floats, sent.ints)
        return Update(kept_private(local, new, Params(floats, params.ints)), {UPDATE: content}, metrics)

    def unfit(self, task: Task) -> str:
        """Say what of a task's inputs a gate of fixed width cannot take the mean of."""
        if self.gate.density == 1:
            return ""
        data = task.dataset
        if isinstance(data.x_train, Mapping):
            return f"gates the mean of one array of inputs: data.x must be no mapping, got {', '.join(data.x_train)}"
        if "x" in data.lengths_train:
            return "gates the mean of inputs of one shape: data.x must have rows of equal length, got ragged ones"
        return ""

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return self._of(local, merged(local, inbox, state), self._extra(local, state))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        done = self._train(local, merged(local, inbox, state), self._extra(local, state), recipe, recipe.lr)
        return self._of(local, done[0], done[1])

    def _extra(self, local: LocalClient, state: ClientState) -> np.ndarray:
        kept = state.vectors.get("gate")
        return self.gate.first(local) if kept is None else kept

    def _of(self, local: LocalClient, params: Params, extra: np.ndarray) -> Own:
        """Return the model under the gate's choice for all of the client's training data."""
        if self.gate.density == 1:
            return Own(params, local.full)
        with torch.no_grad():
            held = torch.from_numpy(extra).to(local.task.device)
            mask = self.gate.mask(held, held, local.train_part, local.task.layout).cpu().numpy() > 0.5
        return Own(params.masked(mask), mask)

    def _train(
        self, local: LocalClient, begin: Params, extra: np.ndarray, recipe: TrainingRecipe, lr: float
    ) -> tuple[Params, np.ndarray, np.ndarray, float]:
        """Return weights, gate, which weights any batch has touched, and the loss.

        `lr` is the weights' rate where the gate's is gate_lr, before any schedule.
        """
        if self.gate.density == 1:
            done = local.train(begin, recipe=recipe)
            return done.params, extra, local.full, done.loss
        masked = local.train_masking(begin, self.gate, extra, recipe=recipe, pace=self.gate_lr / lr)
        return masked.params, masked.extra, masked.often > 0, masked.loss


@dataclass(frozen=True)
class UntouchedMean:
    """Mean weighted by examples, where what a client did not send is as it was sent to it."""

    mean: Aggregate = field(default_factory=FedAvg)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state, self.mean.init(state, layout)

    def add(self, so_far: Any, c: Contribution, /) -> None:
        floats, mask = values_of(c.content), c.content.mask
        if not mask.all():
            floats = floats.copy()
            floats[: mask.size][~mask] = so_far[0].theta.floats[: mask.size][~mask]
        self.mean.add(so_far[1], c.as_numbers(c.content, floats))

    def result(self, so_far: Any, /) -> ServerState:
        return self.mean.result(so_far[1])


def pfedgate(density: float = 0.5, gate_lr: float = 0.1, blocks: int = 5) -> FederatedMethod:
    check(density=density_of(density), gate_lr=positive(gate_lr), blocks=at_least(1, blocks))
    gate = Gate(density, RunsOfRows(max(blocks, math.ceil(1 / density))))
    return FederatedMethod(
        name="pfedgate", paper="Chen et al., ICML 2023, arXiv 2305.02776",
        summary="a private gate chooses each batch's blocks; up goes the union of what batches touched",
        phases=(Phase(name="federate", update=GatedUpdate(gate, gate_lr), join=UntouchedMean(), own_mask=True),),
        arms=(*OWN, "own_random"),
    )  # fmt: skip
