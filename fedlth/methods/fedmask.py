"""FedMask: every client has a mask of its own over weights that never change, and only masks cross: a bit a weight.

Li, Sun, Zeng, Zhang, Li, Chen. FedMask: Joint Computation and Communication-Efficient Personalized Federated Learning
via Heterogeneous Masking. SenSys 2021, doi 10.1145/3485730.3485929.

Read in its abstract and in others' descriptions only, so what follows is ours. The initial stage is a client's first
visit: it learns scores over the whole net, then drops for good the rows whose scores it raised least (structured, one
shot; the random start is everyone's and says nothing of a client); the output layer keeps its rows. From then on it
learns inside these rows, and its bits are the weights that are more likely there than not: no dice, straight-through.
The server takes the mean over the clients that hold a row; it goes down as scores, since a mean of bits is no bit (few
distinct numbers: a lossless wire packs them). No message names the rows: a row whose bits are all zero counts as not
held.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, as_chances, logit, mean_of
from fedlth.methods.client_update import THETA_G, UPDATE, Inbox, Own, Update
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import check, density_of, positive
from fedlth.methods.space import FROZEN, Frozen, Scores, received
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.evidence import Lesson
from fedlth.tickets.granularity import GRANULARITIES, Granularity, Groups, Row
from fedlth.tickets.select import keep_top
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.wire.payload import Content

HELD = "held"  # the client's mask of what it has not dropped


@dataclass(frozen=True)
class PersonalMask:
    """Learn a mask inside the rows that the client holds, send its bits; at the first visit choose the rows.

    Of a recipe only its length and batch size count: scores have their own rate `lr`. `density` is the share of each
    tensor's groups that a client holds; 1 for all.
    """

    lr: float
    density: float
    groups: Granularity = field(default_factory=Row)
    frozen: Frozen = field(default_factory=Frozen)
    sends: tuple[tuple[str, str], ...] = ((UPDATE, "mask"),)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        seen = local.visit_scores(self.own(local, inbox, state).params)
        scores, held, loss = self._learnt(local, inbox, state, local.recipe)
        mask = (scores > 0) & held
        new = replace(state, visits=state.visits + 1).with_(masks={HELD: held})
        metrics = {"loss": loss, **seen, "density": float(mask.mean())}
        return Update(new, {UPDATE: Content(mask, None, None)}, metrics)

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        mask = (received(inbox[THETA_G]) > 0) & state.masks.get(HELD, local.full)
        return self.frozen.under(local, mask)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        scores, held, _ = self._learnt(local, inbox, state, recipe)
        return self.frozen.under(local, (scores > 0) & held)

    def _learnt(
        self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Return scores after training, what the client then holds, and the loss."""
        held, budget = state.masks.get(HELD, local.full), recipe.budget
        lesson = Lesson(rule="threshold", alive=held, density=1.0, epochs=budget.epochs, steps=budget.steps, lr=self.lr)
        start = received(inbox[THETA_G])
        scores, loss = local.learn(self.frozen(local.task), start, lesson, batch_size=recipe.batch_size)
        if HELD not in state.masks:
            held = strongest(scores - start, local.task.layout, self.groups, self.density)
        return scores, held, loss


def strongest(scores: np.ndarray, layout: Layout, granularity: Granularity, density: float) -> np.ndarray:
    """Return (num_prunable,) bool: in each tensor the `density` of groups with the highest mean score.

    The output layer, the last in the model's own order, keeps all: a row of it is a class.
    """
    groups = granularity.groups(layout)
    mean, last = groups.reduced(scores), max(layout.prunable, key=lambda e: e.place)
    kept = np.zeros(mean.size, bool)
    for e in groups.layout.prunable:
        count = e.size if e.name == last.name else max(1, round(density * e.size))
        kept[e.slice] = keep_top(mean[e.slice], np.ones(e.size, bool), count)
    return groups.spread(kept)


@dataclass
class _Bits:
    state: ServerState
    groups: Groups
    mean: Any
    held: np.ndarray


@dataclass(frozen=True)
class OverlapMean:
    """Scores whose sigmoid is the mean mask of the clients that hold a group, kept within [clamp, 1 - clamp].

    A client holds a group in which it has a bit; a group that nobody holds keeps its scores. Where all hold all it is
    the plain mean.
    """

    groups: Granularity = field(default_factory=Row)
    clamp: float = 0.01
    mean: Aggregate = field(default_factory=CountMean)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        groups = self.groups.groups(layout)
        return _Bits(state, groups, self.mean.init(as_chances(state), layout), np.zeros(layout.num_prunable, bool))

    def add(self, so_far: Any, c: Contribution, /) -> None:
        held = so_far.groups.spread(so_far.groups.reduced(c.content.mask) > 0)
        self.mean.add(so_far.mean, c.as_numbers(c.content, c.content.mask.astype(np.float32), held))
        so_far.held |= held

    def result(self, so_far: Any, /) -> ServerState:
        old, scores = so_far.state.theta, logit(mean_of(self.mean, so_far.mean), self.clamp)
        return ServerState(Params(np.where(so_far.held, scores, old.floats), old.ints))


@dataclass(frozen=True)
class All:
    """Groups of what everybody holds: a tensor in one piece, so that a bit that is zero is a zero."""

    def groups(self, layout: Layout, /) -> Groups:
        entries, of = [], np.zeros(layout.num_prunable, np.int64)
        for i, e in enumerate(layout.prunable):
            of[e.slice] = i
            entries.append(replace(e, shape=(1,), offset=i))
        return Groups(Layout(tuple(entries)), of)


def fedmask(
    score_lr: float = 50.0, density: float = 0.5, granularity: str = "row", weights: str = "auto"
) -> FederatedMethod:
    choices = ("element", "row", "channel")
    check(score_lr=positive(score_lr), density=density_of(density))
    check(granularity=(granularity, granularity in choices, f"one of {', '.join(choices)}"))
    check(weights=(weights, weights in FROZEN, f"one of {', '.join(FROZEN)}"))
    groups = cast(Granularity, GRANULARITIES[granularity]())
    frozen = Frozen(weights)
    update = PersonalMask(score_lr, density, groups, frozen)
    # Of single weights nothing tells one that is dropped from a zero: all count as held.
    join = OverlapMean(All() if granularity == "element" else groups)
    return FederatedMethod(
        name="fedmask", paper="Li et al., SenSys 2021, doi 10.1145/3485730.3485929",
        summary="frozen weights, a structured mask a client, a bit a weight up; the mean over who holds a row down",
        phases=(Phase(name="federate", update=update, join=join, own_mask=True),), space=Scores(frozen),
        arms=("global", "local", "own", "own_tuned", "frozen_random"),
    )  # fmt: skip
