"""FedTiny: clients judge a pool of pruned models, and the best is pruned and grown on, block by block.

Huang, Zhang, Sun, Fang, Yuan, Wu. Distributed Pruning Towards Tiny Neural Networks in Federated Learning.
ICDCS 2023, arXiv 2212.01977.

Selection: both ends make the same `pool` of models from theta_0 and the study's seed. Each is the magnitude mask of
exactly `density`; tensors keep equal shares in the first, shares times a log-normal factor (`spread`) in the others. In
the first phase all clients send, of each candidate, the statistics that its norms have on their own data; the server
means them by examples. In the second, a round a candidate, the server sends the candidate with its mean statistics, and
clients send its loss on their validation part (their training part where they have none); the least mean loss by
examples is chosen. After a round in which nobody answers the same candidate is sent again; the last ones are then not
tried, and the one that would be next is taken.

Progressive pruning: every `every` rounds before round `end`, clients send the largest gradients of dead weights in one
block of tensors, as many as are to be adjusted; the server grows the largest of their mean and drops as many of the
smallest weights of the same tensor. Blocks are groups of tensors in the module's order, and the last comes first.

Left open, and chosen here: how candidates differ; `rate` of a tensor's weights is adjusted at first, less by a cosine
until `end`; gradients are those of `batches` minibatches after the local training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlth import rng
from fedlth.methods.aggregate import Aggregate, Contribution, FedAvg, mean_of
from fedlth.methods.client_update import VALUES, Inbox, MaskedUpdate, Update, merged
from fedlth.methods.global_mask import (
    ARMS,
    alive_counts,
    cosine,
    mean_gradient,
    numbers,
    numbers_layout,
    scores,
    scores_layout,
    told,
    top_of_each,
)
from fedlth.methods.method import FederatedMethod, Phase, Seen
from fedlth.methods.options import at_least, check, density_of, share_of
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import survivors
from fedlth.tickets.select import apportion
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire.payload import Content

MEASURED, JUDGED, GRADIENTS = "statistics", "loss", "gradients"


@dataclass(frozen=True)
class Pool:
    """The candidates: magnitude masks of theta_0, each of exactly `density`."""

    count: int
    density: float
    spread: float

    def __call__(self, task: Task, /) -> list[np.ndarray]:
        """Return the masks over what crosses, each (exchange.num_prunable,) bool; equal at both ends."""
        layout, size = task.exchange, np.abs(task.shared_part(task.theta_0).floats[: task.exchange.num_prunable])
        limits, found = np.array([e.size for e in layout.prunable]), []
        for number in range(self.count):
            draw = rng.stream(task.study.seed, "candidate", number)
            shares = np.exp(self.spread * (number > 0) * draw.standard_normal(limits.size))
            counts = apportion(survivors(layout, self.density), limits * shares, limits)
            found.append(top_of_each(size, np.ones(size.size, bool), layout, counts))
        return found


def _buffers(layout: Layout) -> slice:
    """Return where the float buffers of a layout lie: the statistics that norms keep."""
    return slice(layout.num_params, layout.num_floats)


def _statistics(task: Task) -> int:
    """Return how many numbers the norms of what crosses keep as statistics."""
    return task.exchange.num_floats - task.exchange.num_params


@dataclass(frozen=True)
class Measure:
    """Send the statistics that the norms of each candidate have on the client's own data; train nothing."""

    pool: Pool
    sends: tuple[tuple[str, str], ...] = ((MEASURED, "statistics"),)

    def layout(self, name: str, task: Task, /) -> Layout:
        return numbers_layout(name, self.pool.count * _statistics(task))

    def range(self, name: str, task: Task, /) -> tuple[np.ndarray, float]:
        """Return what statistics may be: variances are at least 0."""
        least = np.where(task.exchange.variances[_buffers(task.exchange)], 0.0, -np.inf)
        return np.tile(least, self.pool.count), np.inf

    def passes(self, task: Task, visits: int, /) -> int:
        return 0

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        whole, task, rows = merged(local, inbox, state), local.task, []
        for shared in self.pool(task):  # all candidates by the same batches: they are compared
            mask = task.whole_mask(shared, local.full)
            params = local.normalised(whole.masked(mask), mask)
            rows.append(task.shared_part(params).floats[_buffers(task.exchange)])
        return Update(state, {MEASURED: numbers(np.concatenate(rows))})


@dataclass(frozen=True)
class Judge:
    """Send the loss of the candidate that came; train nothing."""

    sends: tuple[tuple[str, str], ...] = ((JUDGED, "statistics"),)

    def layout(self, name: str, task: Task, /) -> Layout:
        return numbers_layout(name, 1)

    def passes(self, task: Task, visits: int, /) -> int:
        return 0

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        part = local.val_part if len(local.val_part) else local.train_part
        return Update(state, {JUDGED: numbers(np.array([local.evaluate(merged(local, inbox, state), part).loss]))})


@dataclass(frozen=True)
class Choose:
    """Mean what clients measured of all candidates, then what they lose under each; go on with the best at the end.

    `judging`: what comes is the loss of the candidate that was sent, and the next one follows; else it is everyone's
    statistics, and the first one follows. The memory has all `statistics`, (count, number), and the `losses` so far.
    Where `mean` believes nobody, statistics are those that the state has, and a candidate is not chosen.
    """

    pool: Pool
    judging: bool = False
    task: Task | None = None
    mean: Aggregate = field(default_factory=FedAvg)
    masks: ClassVar[bool] = True

    def of_task(self, task: Task, /) -> Choose:
        return replace(self, task=task)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        before = np.tile(state.theta.floats[_buffers(layout)], self.pool.count)
        if self.judging:
            before = np.array([np.inf])
        return state, layout, self.mean.init(told(before), numbers_layout(MEASURED, before.size))

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c)

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, found = so_far
        mean = mean_of(self.mean, found)
        if not self.judging:
            return self._candidate(0, mean.reshape(self.pool.count, -1), np.zeros(0), layout)
        statistics, losses = state.memory["statistics"], np.append(state.memory["losses"], mean)
        if losses.size < self.pool.count:
            return self._candidate(losses.size, statistics, losses, layout)
        best = self._candidate(int(np.argmin(losses)), statistics, losses, layout)
        return replace(best, memory={})

    def _candidate(self, number: int, statistics: np.ndarray, losses: np.ndarray, layout: Layout) -> ServerState:
        assert self.task is not None
        mask, theta = self.pool(self.task)[number], self.task.shared_part(self.task.theta_0)
        floats = theta.floats.copy()
        floats[_buffers(layout)] = statistics[number]
        memory = {"statistics": statistics, "losses": losses}
        return ServerState(Params(floats, theta.ints).masked(mask), memory, mask)


@dataclass(frozen=True)
class Blocks:
    """Which tensors are adjusted in a round, and how many weights of each."""

    count: int
    every: int
    end: int
    rate: float

    def due(self, round: int) -> bool:
        return 0 < round < self.end and round % self.every == 0

    def counts(self, mask: np.ndarray, layout: Layout, round: int) -> np.ndarray:
        """Return how many weights of each prunable tensor are adjusted, (num_layers,): none outside the block."""
        places = np.argsort([e.place for e in layout.prunable], kind="stable")
        blocks = np.array_split(places, min(self.count, places.size))
        block = blocks[-1 - (round // self.every - 1) % len(blocks)]
        alive = alive_counts(mask, layout)
        wanted = np.round(cosine(self.rate, round, self.end) * alive).astype(np.int64)
        inside = np.isin(np.arange(alive.size), block)
        sizes = np.array([e.size for e in layout.prunable])
        return np.where(inside, np.minimum(wanted, np.minimum(sizes - alive, np.maximum(alive - 1, 0))), 0)


@dataclass(frozen=True)
class GradientsUpdate(MaskedUpdate):
    """Train under everyone's mask; in rounds that adjust, send the largest gradients of the block's dead weights."""

    blocks: Blocks = Blocks(1, 1, 1, 0.0)
    batches: int = 1
    sends: tuple[tuple[str, str], ...] = (*VALUES, (GRADIENTS, "scores"))

    def skips(self, round: int) -> Sequence[str]:
        return () if self.blocks.due(round) else (GRADIENTS,)

    def also(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> Mapping[str, Content]:
        if not self.blocks.due(local.round):
            return {}
        slope = local.task.shared_mask(mean_gradient(local, params, self.batches))
        shared, layout = local.task.shared_mask(mask), local.task.exchange
        counts = self.blocks.counts(shared, layout, local.round)
        return {GRADIENTS: scores(slope, top_of_each(np.abs(slope), ~shared, layout, counts))}


@dataclass(frozen=True)
class GrowAndPrune:
    """FedAvg; in the rounds in which gradients came, grow by their mean and drop as many by magnitude.

    A weight that a client has not named counts as a gradient of zero, and one of which that is all that comes out does
    not grow. How many are grown of a tensor is what a client names of it: all name equally many. Weights, gradients and
    these numbers are each joined by `mean`.
    """

    mean: Aggregate = field(default_factory=FedAvg)
    masks: ClassVar[bool] = True

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        slopes = self.mean.init(told(np.zeros(layout.num_prunable)), scores_layout(layout))
        tensors = len(layout.prunable)
        counts = self.mean.init(told(np.zeros(tensors)), numbers_layout(GRADIENTS, tensors))
        return [state, layout, self.mean.init(state, layout), slopes, counts, False]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c)
        if GRADIENTS in c.others:
            found = c.others[GRADIENTS]
            self.mean.add(so_far[3], c.as_numbers(found))
            self.mean.add(so_far[4], c.as_numbers(numbers(alive_counts(found.mask, so_far[1]))))
            so_far[5] = True

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, mean, slopes, many, came = so_far
        new = self.mean.result(mean)
        if not came or state.mask is None:
            return new
        mask, theta, slope = state.mask, new.theta, mean_of(self.mean, slopes)
        counts = np.rint(mean_of(self.mean, many)).astype(np.int64)
        grown = top_of_each(np.abs(slope), (slope != 0) & ~mask, layout, counts)
        left = np.maximum(alive_counts(mask, layout) - alive_counts(grown, layout), 0)
        kept = top_of_each(np.abs(theta.floats[: mask.size]), mask, layout, left)
        return ServerState(theta.masked(kept), mask=kept | grown)


def fedtiny(
    density: float = 0.01, pool: int = 10, spread: float = 0.5, every: int = 10, end: int = 300, rate: float = 0.15,
    blocks: int = 5, batches: int = 1,
) -> FederatedMethod:  # fmt: skip
    check(
        density=density_of(density), pool=at_least(1, pool), spread=at_least(0, spread), every=at_least(1, every),
        end=at_least(1, end), rate=share_of(rate), blocks=at_least(1, blocks), batches=at_least(0, batches),
    )  # fmt: skip
    candidates, plan = Pool(pool, density, spread), Blocks(blocks, every, end, rate)
    first = Phase(
        name="measure", rounds=1, who=Seen(), update=Measure(candidates), join=Choose(candidates), must_count=True
    )  # fmt: skip
    second = Phase(
        name="select", rounds=pool, who=Seen(), update=Judge(), join=Choose(candidates, judging=True), must_count=True
    )  # fmt: skip
    update = GradientsUpdate(blocks=plan, batches=batches)
    rounds = Phase(name="federate", update=update, join=GrowAndPrune())
    return FederatedMethod(
        name="fedtiny", paper="Huang et al., ICDCS 2023, arXiv 2212.01977",
        summary="the best of a pool of pruned models, then pruned and grown block by block by clients' top gradients",
        phases=(first, second, rounds), arms=ARMS,
    )  # fmt: skip
