"""SpaFL: weights never leave their client; all that crosses is a threshold for each row of them.

Kim, Saad, Debbah, Hong. SpaFL: Communication-Efficient Federated Learning with Sparse Models and Low Computational
Overhead. NeurIPS 2024, arXiv 2406.00431.

All begin at theta_0, drawn from the seed. A row is alive where the mean size of its weights is above its threshold;
the step has the gradient of a line, for the threshold and for the weights of the row alike. Where the paper's code
moves the weights of every client in every round, which is a download for each, a client here moves them when it next
takes part, by all that the thresholds have changed since it last did, with its row's sign then. The released code's
ramp on the penalty is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.methods.client_update import THETA_G, UPDATE, Inbox, Own, Update, private
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import BY_HOLDERS, at_least, check
from fedlth.methods.space import Thresholds, above, follow, received
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.tickets.granularity import Row
from fedlth.training.local_client import LocalClient
from fedlth.training.masked_training import Masked
from fedlth.training.recipe import TrainingRecipe
from fedlth.wire.payload import Content

LEAST_KEPT = 0.01  # a layer of which no more is alive begins again with thresholds of zero


@dataclass(frozen=True)
class RowThresholds:
    """Rows are alive where their mean |weight| is above their threshold; the penalty is `coefficient` sum exp(-tau)."""

    coefficient: float

    def mask(self, weights: Tensor, extra: Tensor, batch: Examples, layout: Layout, /) -> Tensor:
        parts = []
        for e, rows in zip(layout.prunable, layout.rows.floats, strict=True):
            size = e.by_output(weights[e.slice]).abs().mean(1)
            if float((size > extra[rows.slice]).float().mean()) <= LEAST_KEPT:
                with torch.no_grad():
                    extra[rows.slice].zero_()
            away = size - extra[rows.slice]
            alive = (away.detach() > 0).float() + (away - away.detach())
            parts.append(e.as_stored(alive.repeat_interleave(e.fan_in)))
        return torch.cat(parts)

    def penalty(self, extra: Tensor, /) -> Tensor:
        return self.coefficient * torch.exp(-extra).sum()


@dataclass(frozen=True)
class ThresholdUpdate:
    """Let the weights follow the thresholds, train both, keep the weights, send the thresholds."""

    coefficient: float
    sends: tuple[tuple[str, str], ...] = ((UPDATE, "thresholds"),)
    granularity: ClassVar[Row] = Row()
    keeps: ClassVar[int] = 1
    tunes_mask: ClassVar[bool] = True

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        begin = self.own(local, inbox, state)
        seen = local.visit_scores(begin.params)
        done = self._train(local, inbox, state, local.recipe)
        moving, came = local.task.moving_part(done.params), received(inbox[THETA_G])
        kept = {"private": moving.floats, "private_ints": moving.ints, "thresholds": came}
        alive = above(local.task.layout, done.params.floats, done.extra)
        metrics = {"loss": done.loss, **seen, "density": float(alive.mean())}
        content = Content(np.ones(0, bool), done.extra, np.zeros(0, np.int64))
        return Update(replace(state, visits=state.visits + 1).with_(vectors=kept), {UPDATE: content}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        whole = self.weights(local, inbox, state)
        mask = above(local.task.layout, whole.floats, received(inbox[THETA_G]))
        return Own(whole.masked(mask), mask)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        done = self._train(local, inbox, state, recipe)
        mask = above(local.task.layout, done.params.floats, done.extra)
        return Own(done.params.masked(mask), mask)

    def weights(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Params:
        """Return the client's weights, dead ones too, after the thresholds that came."""
        now = received(inbox[THETA_G])
        return follow(
            local.task.layout, private(local, state), now - state.vectors.get("thresholds", np.zeros_like(now))
        )

    def _train(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe) -> Masked:
        start, masking = self.weights(local, inbox, state), RowThresholds(self.coefficient)
        return local.train_masking(start, masking, received(inbox[THETA_G]), recipe=recipe)


def spafl(coefficient: float = 0.002) -> FederatedMethod:
    check(coefficient=at_least(0, coefficient))
    return FederatedMethod(
        name="spafl", paper="Kim et al., NeurIPS 2024, arXiv 2406.00431",
        summary="weights stay with their client from theta_0 on; a threshold for each row goes up and down",
        phases=(Phase(name="federate", update=ThresholdUpdate(coefficient), join=BY_HOLDERS, own_mask=True),),
        space=Thresholds(), arms=("global", "local", "own", "own_tuned", "own_random"),
    )  # fmt: skip
