"""What methods with one mask for all share: rules that find it, and how a mask is readjusted by gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlth import rng
from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, FedAvg, mean_of
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.options import OWN
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import Erk, survivors
from fedlth.tickets.select import apportion, keep_top
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.wire.payload import Content

ARMS = (*OWN, "own_random")
NO_INTS = np.zeros(0, np.int64)


def scores(values: np.ndarray, mask: np.ndarray | None = None) -> Content:
    """Return numbers, one a shared weight, as a message of kind scores; of a `mask`, only those inside."""
    kept = np.ones(values.size, bool) if mask is None else mask
    return Content(kept, np.where(kept, values, 0).astype(np.float32), NO_INTS)


def numbers(values: np.ndarray) -> Content:
    """Return a few numbers that belong to no weight as a message of kind statistics."""
    return Content(np.ones(0, bool), values.astype(np.float32), NO_INTS)


def told(values: np.ndarray) -> ServerState:
    """Return numbers as the state that a rule joins others of their kind to: what stays where nobody is believed."""
    return ServerState(Params(values.astype(np.float32), NO_INTS))


def scores_layout(layout: Layout) -> Layout:
    """Return the layout of scores of a model's prunable weights."""
    return layout.select(lambda e: e.prunable)


def numbers_layout(name: str, count: int) -> Layout:
    return Layout((Entry(name, (count,), "param", 0),))


def alive_counts(mask: np.ndarray, layout: Layout) -> np.ndarray:
    """Return how many weights of each prunable tensor a mask keeps, (num_layers,)."""
    return np.array([int(np.count_nonzero(mask[e.slice])) for e in layout.prunable])


def top_of_each(score: np.ndarray, alive: np.ndarray, layout: Layout, counts: np.ndarray) -> np.ndarray:
    """Return a mask that keeps each tensor's best `counts` among `alive`."""
    mask = np.zeros(score.size, bool)
    for e, count in zip(layout.prunable, counts, strict=True):
        mask[e.slice] = keep_top(score[e.slice], alive[e.slice], int(count))
    return mask


def random_mask(layout: Layout, counts: np.ndarray, seed: int, what: str) -> np.ndarray:
    """Return a random mask of so many weights in each prunable tensor, the same for everyone."""
    draw = rng.stream(seed, what).random(layout.num_prunable)
    return top_of_each(draw, np.ones(layout.num_prunable, bool), layout, counts)


def readjusted(
    weights: np.ndarray, mask: np.ndarray, gradient: np.ndarray, layout: Layout, rate: float, *, across: bool = False
) -> np.ndarray:
    """Return a mask that loses the smallest `rate` of each tensor's weights, and gains as many by |gradient|.

    Candidates are all that is then dead: what was just dropped may come back. With `across`, what all tensors lose
    together is handed out in proportion to each one's sensitivity, the mean |gradient| of what it kept.
    """
    alive = alive_counts(mask, layout)
    dropped = np.minimum(np.round(rate * alive).astype(np.int64), np.maximum(alive - 1, 0))
    kept = top_of_each(np.abs(weights), mask, layout, alive - dropped)
    grown = dropped
    if across:
        dead = alive_counts(~kept, layout)
        size = np.abs(gradient).astype(np.float64)
        sensitive = [
            float(size[e.slice][kept[e.slice]].mean()) if kept[e.slice].any() else 0.0 for e in layout.prunable
        ]
        grown = apportion(int(dropped.sum()), np.array(sensitive), dead)
    return np.asarray(kept | top_of_each(np.abs(gradient), ~kept, layout, grown))


def cosine(rate: float, round: int, end: int) -> float:
    """Return a rate that falls from `rate` to nothing at round `end` by a half cosine."""
    return rate / 2 * (1 + float(np.cos(np.pi * min(round, end) / end)))


@dataclass(frozen=True)
class Readjust:
    """Every `every` rounds before round `end`: after the first `after` of the local steps, drop and regrow.

    The share that is dropped begins at `rate` and falls by a cosine. The gradient is the mean over `batches`
    minibatches (0: one pass). A weight that comes back the same moment keeps its value; one that is new begins at 0.
    """

    every: int
    end: int
    rate: float
    after: float = 0.0
    batches: int = 1
    across: bool = False
    snapshots: tuple[int, ...] = ()

    def due(self, round: int) -> bool:
        return self.every > 0 and 0 < round < self.end and round % self.every == 0

    def first_step(self, local: LocalClient, recipe: TrainingRecipe) -> int:
        """Return how many local steps come before it, one less than all at the most."""
        total = recipe.budget.total(local.num_train, recipe.batch_size)
        return min(int(self.after * total), total - 1)

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: Any, /
    ) -> tuple[Params, np.ndarray]:
        if not self.due(local.round):
            return params, mask
        first = self.first_step(local, local.recipe)
        if first:
            params = local.train(params, recipe=replace(local.recipe, last_step=first), active=mask).params
        if mask.all():
            return params, mask
        rate = cosine(self.rate, local.round, self.end)
        slope = mean_gradient(local, params, self.batches)
        new = readjusted(params.floats[: mask.size], mask, slope, local.task.layout, rate, across=self.across)
        return params.masked(mask & new), new


def mean_gradient(local: LocalClient, params: Params, batches: int) -> np.ndarray:
    """Return the mean gradient over so many minibatches, (num_prunable,) float64."""
    total, count = np.zeros(local.full.size), 0
    for slope in local.gradients(params, count=batches):
        total += slope
        count += 1
    return np.asarray(total / count)


@dataclass(frozen=True)
class ReadjustUpdate(MaskedUpdate):
    """Train under everyone's mask; in some rounds readjust it on the way, and send what came of it."""

    before: Readjust = Readjust(0, 1, 0.0)

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        # What the readjustment has trained before is part of this round's training, and not of any other.
        due = self.before.due(local.round)
        return replace(recipe, first_step=self.before.first_step(local, recipe)) if due else recipe


@dataclass(frozen=True)
class TopMask:
    """Everyone keeps the `density` of weights whose scores, meant over clients, are highest: all tensors compete.

    `random` keeps as many of each tensor by chance: the control of the scores. Where `mean` believes nobody's scores,
    they are the sizes of the weights.
    """

    density: float
    mean: Aggregate = field(default_factory=CountMean)
    random: bool = False
    seed: int = 0
    masks: ClassVar[bool] = True

    def of_task(self, task: Task, /) -> TopMask:
        return replace(self, seed=task.study.seed)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        size = np.abs(state.theta.floats[: layout.num_prunable])
        return state, layout, self.mean.init(told(size), scores_layout(layout))

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c.as_numbers(c.content))

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, found = so_far
        score = mean_of(self.mean, found)
        mask = keep_top(score, np.ones(score.size, bool), survivors(layout, self.density))
        if self.random:
            mask = random_mask(layout, alive_counts(mask, layout), self.seed, "random global mask")
        return ServerState(state.theta.masked(mask), mask=mask)


@dataclass(frozen=True)
class HeldMean:
    """The mean, weighted by examples, over who holds a weight; what nobody holds is zero, and dead for everyone.

    Weights that at most `min_votes` clients hold are dropped; where no more than that reply, those that not all of them
    hold. Of what is left each tensor keeps the largest, as many as before the round at the most; with `across` all
    tensors compete for what they had together.
    """

    min_votes: int = 0
    across: bool = False
    mean: Aggregate = CountMean("zero", weighted=True)
    masks: ClassVar[bool] = True

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return [state, layout, self.mean.init(state, layout), np.zeros(layout.num_prunable, np.int32), 0]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c)
        so_far[3] += c.content.mask
        so_far[4] += 1

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, mean, votes, came = so_far
        theta = self.mean.result(mean).theta
        old = np.ones(votes.size, bool) if state.mask is None else state.mask
        # Else nothing is elected when few reply, and a model that is all zero stays so.
        elected, size = votes > min(self.min_votes, came - 1), np.abs(theta.floats[: votes.size])
        if self.across:
            mask = keep_top(size, elected, int(old.sum()))
        else:
            mask = top_of_each(size, elected, layout, alive_counts(old, layout))
        return ServerState(theta.masked(mask), mask=mask)


@dataclass(frozen=True)
class UnionMean:
    """FedAvg's mean, zeros counted; its mask is the union of what came. Of one client: its model and mask, taken over.

    `masks`: whether that mask is everyone's to train under, as in `FederatedMethod.masks_all`.
    """

    masks: bool = True
    mean: Aggregate = field(default_factory=FedAvg)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return [self.mean.init(state, layout), np.zeros(layout.num_prunable, bool)]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[0], c)
        so_far[1] |= c.content.mask

    def result(self, so_far: Any, /) -> ServerState:
        new, union = self.mean.result(so_far[0]), so_far[1]
        return replace(new, theta=new.theta.masked(union), mask=union)  # a mean may keep what nobody sent


@dataclass(frozen=True)
class ErkMask:
    """A random mask of `density`, tensors by Erdos-Renyi-Kernel, drawn from the study's seed: the same for everyone."""

    density: float

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        size = task.layout.num_prunable
        draw = rng.stream(task.study.seed, "erk mask").random(size)
        return Erk()(draw, np.ones(size, bool), task.layout, self.density)
