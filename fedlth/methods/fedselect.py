"""FedSelect: each client grows a personal set of weights that it no longer shares.

Tamirisa, Xie, Bao, Zhou, Arel, Shamsian. FedSelect: Personalized Federated Learning with Customized Selection of
Parameters for Fine-Tuning. CVPR 2024, arXiv 2404.02478.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.methods.local import Local
from fedlth.methods.state import ClientState
from fedlth.methods.visit import Own, Shrinking, Visited, geometric, private, received_params
from fedlth.params import Params
from fedlth.tickets.score import Movement, Score
from fedlth.tickets.select import keep_top
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class SelectVisit:
    """Alternate an epoch on the personal weights and one on the shared, grow the personal set, send the shared.

    Every `every` own visits, in each tensor the `rate` share of shared weights that score highest (moved most) turns
    personal, until `limit` of the tensor is. Every weight stays alive: only the shared mask shrinks.
    """

    rate: float
    limit: float
    every: int
    score: Score = field(default_factory=Movement)
    sends: str = "values"

    @property
    def shrinking(self) -> Shrinking:
        """How the shared mask shrinks."""
        return Shrinking(geometric(self.rate, 1 - self.limit), every=self.every)

    def __call__(self, local: Local, received: Content, state: ClientState, /) -> Visited:
        held = self.own(local, received, state)
        shared = state.masks.get("active", local.full)
        val_accuracy = local.val_accuracy(held.params)
        params, loss = self._alternate(local, held.params, shared, local.plan.epochs)
        visits = state.visits + 1
        if visits % self.every == 0:
            shared = self._grow(local, held.params, params, shared)
        own = local.world.moving_part(params)
        new = replace(state, visits=visits).with_(
            masks={"active": shared}, vectors={"private": own.floats, "private_ints": own.ints}
        )
        sent = local.world.shared_part(params.masked(shared))
        metrics = {"loss": loss, "val_accuracy": val_accuracy, "density": float(shared.mean())}
        return Visited(self.sends, Content(shared, sent.floats, sent.ints), new, metrics)

    def own(self, local: Local, received: Content, state: ClientState, /) -> Own:
        shared = state.masks.get("active", local.full)
        mine = private(local, state)
        merged = local.world.merge(received_params(received), mine)
        floats = merged.floats.copy()
        floats[: shared.size][~shared] = mine.floats[: shared.size][~shared]
        return Own(replace(merged, floats=floats), local.full)

    def tune(self, local: Local, received: Content, state: ClientState, epochs: int, /) -> Own:
        held = self.own(local, received, state)
        shared = state.masks.get("active", local.full)
        return Own(self._alternate(local, held.params, shared, epochs)[0], local.full)

    def _alternate(self, local: Local, params: Params, shared: np.ndarray, epochs: int) -> tuple[Params, float]:
        plan = replace(local.plan, epochs=1)
        loss = 0.0
        for epoch in range(epochs):
            if not shared.all():
                params = local.train(params, plan=plan, update=~shared, order=f"order/{epoch}/personal").params
            trained = local.train(params, plan=plan, update=shared, order=f"order/{epoch}/shared")
            params, loss = trained.params, trained.loss
        return params, loss

    def _grow(self, local: Local, before: Params, after: Params, shared: np.ndarray) -> np.ndarray:
        evidence = local.evidence(start=before, now=after, mask=shared, density=1 - self.limit)
        score = self.score(evidence)
        grown = shared.copy()
        for e in local.world.layout.prunable:
            here = shared[e.slice]
            room = int(self.limit * e.size) - (e.size - int(here.sum()))
            count = min(round(self.rate * int(here.sum())), max(0, room))
            grown[e.slice] &= ~keep_top(score[e.slice], here, count)
        return grown
