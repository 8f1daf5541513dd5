"""Hermes: clients prune whole rows; only what is in every client's mask is averaged, the rest stays private.

Li, Sun, Li, Pu, Li, Chen. Hermes: An Efficient Federated Learning Framework for Heterogeneous Mobile Clients. MobiCom
2021.

The paper's server keeps a model for each client; here the client keeps what is its own, and the download names what is
everyone's, with the same models. What a client has not told yet, it holds whole. Rows that it cuts keep their last
values in its state, for controls alone. Left open: holders average unweighted; rows compete within their layer, and
those of the output layer, which are classes, are never pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlth.methods.aggregate import Aggregate, Contribution, CountMean
from fedlth.methods.client_update import (
    THETA_G,
    UPDATE,
    VALUES,
    Event,
    Inbox,
    Keep,
    Own,
    Update,
    merged,
    private,
)
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import OWN, check, density_of, score_of, share_of
from fedlth.methods.prune import passes
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.granularity import Granularity, Row
from fedlth.tickets.score import Magnitude, Score
from fedlth.tickets.select import keep_top
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class PruneRows:
    """Cut `rate` of each layer's rows while the metric on validation data exceeds the gate, down to `density` of them.

    The lowest mean scores leave (of magnitude: L1 norms). At least one row stays. No rewind.
    """

    rate: float
    density: float
    val_accuracy: float
    score: Score = field(default_factory=Magnitude)
    snapshots: tuple[int, ...] = ()

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        layout = local.task.layout
        groups = Row().groups(layout)
        alive = groups.reduced(mask) > 0
        kept = self._counts(groups.layout, alive)
        if kept == [int(alive[e.slice].sum()) for e in groups.layout.prunable]:
            return params, mask
        if not passes(local, params, self.val_accuracy):
            return params, mask
        evidence = local.evidence(start=params, now=params, mask=mask, density=self.density)
        score = groups.reduced(self.score(evidence))
        for e, count in zip(groups.layout.prunable, kept, strict=True):
            alive[e.slice] = keep_top(score[e.slice], alive[e.slice], count)
        cut: np.ndarray = groups.spread(alive)
        return params.masked(cut), cut

    def _counts(self, rows: Layout, alive: np.ndarray) -> list[int]:
        """Return how many rows each layer keeps after a cut."""
        output, found = max(rows.prunable, key=lambda e: e.place), []
        for e in rows.prunable:
            now, least = int(alive[e.slice].sum()), max(1, round(self.density * e.size))
            found.append(now if e is output else min(now, max(least, round(now * (1 - self.rate)))))
        return found


@dataclass(frozen=True)
class OverlapUpdate:
    """Take what is everyone's as it came and the rest as it was left, maybe prune, train, send what may be everyone's.

    What it sends is what came, as far as the client still holds it: of the rest, nothing is averaged.
    """

    before: Event = field(default_factory=Keep)
    sends: tuple[tuple[str, str], ...] = VALUES
    keeps: ClassVar[int] = 1

    @property
    def granularity(self) -> Granularity:
        """Of what its masks are made."""
        return Row()

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        whole, task = self.weights(local, inbox, state), local.task
        active = state.masks.get("active", local.full)
        held = whole.masked(active)
        seen = local.visit_scores(held)
        params, mask = self.before(local, held, active, None)
        trained = local.train(params, recipe=local.recipe, active=mask)
        own = task.moving_part(_uncut(trained.params, whole, mask))
        new = replace(state, visits=state.visits + 1).with_(
            masks={"active": mask}, vectors={"private": own.floats, "private_ints": own.ints}
        )
        shared = mask & _came(local, inbox)
        sent = task.shared_part(trained.params.masked(shared))
        metrics = {"loss": trained.loss, **seen, "density": int(np.count_nonzero(mask)) / mask.size}
        return Update(new, {UPDATE: Content(task.shared_mask(shared), sent.floats, sent.ints)}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        mask = state.masks.get("active", local.full)
        return Own(self.weights(local, inbox, state).masked(mask), mask)

    def weights(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Params:
        """Return the client's weights, cut ones too: what is everyone's as it came, else as it was last trained."""
        return _uncut(merged(local, inbox, state), private(local, state), _came(local, inbox))

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.own(local, inbox, state)
        return Own(local.train(held.params, recipe=recipe, active=held.mask).params, held.mask)


def _uncut(params: Params, other: Params, mask: np.ndarray) -> Params:
    """Return params with those of `other` in place of the prunable weights outside `mask`."""
    floats = params.floats.copy()
    floats[: mask.size][~mask] = other.floats[: mask.size][~mask]
    return replace(params, floats=floats)


def _came(local: LocalClient, inbox: Inbox) -> np.ndarray:
    """Return (num_prunable,) bool over the whole model: the weights that the server sent, which are everyone's."""
    return local.task.whole_mask(inbox[THETA_G].mask, np.zeros(local.full.size, bool))


@dataclass
class _Overlap:
    old: ServerState
    mask: np.ndarray
    mean: Any


@dataclass(frozen=True)
class OverlapMean:
    """The mean of what all clients hold that were ever heard; that mask is the state's. All else keeps its value."""

    mean: Aggregate = field(default_factory=CountMean)
    masks: ClassVar[bool] = True

    def init(self, state: ServerState, layout: Layout, /) -> _Overlap:
        mask = np.ones(layout.num_prunable, bool) if state.mask is None else state.mask.copy()
        return _Overlap(state, mask, self.mean.init(state, layout))

    def add(self, so_far: _Overlap, c: Contribution, /) -> None:
        so_far.mask &= c.content.mask
        self.mean.add(so_far.mean, c)

    def result(self, so_far: _Overlap, /) -> ServerState:
        old, mask, mean = so_far.old.theta.floats, so_far.mask, self.mean.result(so_far.mean).theta
        everyones = np.concatenate((mask, np.ones(old.size - mask.size, bool)))
        return ServerState(Params(np.where(everyones, mean.floats, old), mean.ints), mask=mask)


def hermes(
    rate: float = 0.2, density: float = 0.3, val_accuracy: float = 0.5, score: str | dict[str, Any] = "magnitude"
) -> FederatedMethod:
    check(rate=share_of(rate), density=density_of(density))
    update = OverlapUpdate(PruneRows(rate, density, val_accuracy, score_of(score)))
    return FederatedMethod(
        name="hermes", paper="Li et al., MobiCom 2021",
        summary="clients prune rows; what all hold is averaged, the rest stays private (control: score: random)",
        phases=(Phase(name="federate", update=update, join=OverlapMean(), own_mask=True),),
        arms=(*OWN, "own_random"),
    )  # fmt: skip
