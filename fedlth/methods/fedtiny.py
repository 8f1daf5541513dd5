"""FedTiny: clients judge a pool of pruned models, and the best is pruned and grown on, block by block.

Huang, Zhang, Sun, Fang, Yuan, Wu. Distributed Pruning Towards Tiny Neural Networks in Federated Learning.
ICDCS 2023, arXiv 2212.01977.

Selection: both ends make the same `pool` of models from theta_0 and the study's seed, so that no candidate crosses.
Each is the magnitude mask of exactly `density`; tensors keep equal shares in the first, and shares times a log-normal
factor (`spread`) in the others. A client sends, of each, the statistics that its norms have on its own data, and the
loss under them on its validation part (its training part where it has none). The server takes the candidate of the
least mean loss, and the mean of its statistics, both by examples. Progressive pruning: every `every` rounds up to
round `end`, clients send the largest gradients of dead weights in one block of tensors, as many as are to be adjusted;
the server grows the largest of their mean and drops as many of the smallest weights of the same tensor. Blocks are
groups of tensors in the module's order, and the last comes first.

Left open or other than in the paper, and chosen here. The paper means the statistics first and asks for the loss under
the mean in a second exchange; here it is the loss under the client's own, in one. `rate` of a tensor's weights is
adjusted at first, less by a cosine until `end`. Gradients are those of `batches` minibatches after the local training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedlth import rng
from fedlth.methods.aggregate import Contribution, FedAvg
from fedlth.methods.client_update import VALUES, Inbox, MaskedUpdate, Update, merged
from fedlth.methods.global_mask import (
    ARMS,
    alive_counts,
    cosine,
    mean_gradient,
    numbers,
    numbers_layout,
    scores,
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

JUDGED, GRADIENTS = "candidates", "gradients"


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


@dataclass(frozen=True)
class Judge:
    """Send the loss of each candidate on the client's own data, and the statistics that its norms then have."""

    pool: Pool
    sends: tuple[tuple[str, str], ...] = ((JUDGED, "statistics"),)

    def layout(self, name: str, task: Task, /) -> Layout:
        where = _buffers(task.exchange)
        return numbers_layout(name, self.pool.count * (1 + where.stop - where.start))

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        whole, task = merged(local, inbox, state), local.task
        part = local.val_part if len(local.val_part) else local.train_part
        rows = []
        for shared in self.pool(task):
            mask = task.whole_mask(shared, local.full)
            params = local.normalised(whole.masked(mask), mask)
            loss = local.evaluate(params, part, ()).loss
            rows.append(np.concatenate(([loss], task.shared_part(params).floats[_buffers(task.exchange)])))
        return Update(state, {JUDGED: numbers(np.concatenate(rows))})


@dataclass(frozen=True)
class Choose:
    """Take the candidate of the least mean loss, ties to the first, with the mean of its statistics."""

    pool: Pool
    task: Task | None = None
    masks: ClassVar[bool] = True

    def of_task(self, task: Task, /) -> Choose:
        return replace(self, task=task)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return [state, layout, 0.0, 0]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        assert c.content.floats is not None
        so_far[2] = so_far[2] + c.content.floats.astype(np.float64) * c.num_examples
        so_far[3] += c.num_examples

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, total, examples = so_far
        rows = (total / examples).reshape(self.pool.count, -1)
        best = int(np.argmin(rows[:, 0]))
        assert self.task is not None
        mask, floats = self.pool(self.task)[best], state.theta.floats.copy()
        floats[_buffers(layout)] = rows[best, 1:]
        return ServerState(Params(floats, state.theta.ints).masked(mask), mask=mask)


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

    A weight that a client has not named counts as a gradient of zero. How many are grown of a tensor is what a client
    names of it: all name equally many.
    """

    masks: ClassVar[bool] = True

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        named = np.zeros(layout.num_prunable, bool)
        return [state, layout, FedAvg().init(state, layout), np.zeros(named.size), named, [0] * len(layout.prunable)]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        FedAvg().add(so_far[2], c)
        if GRADIENTS in c.others:
            found = c.others[GRADIENTS]
            assert found.floats is not None
            so_far[3] += found.floats * np.float64(c.num_examples)
            so_far[4] |= found.mask
            so_far[5] = np.maximum(so_far[5], alive_counts(found.mask, so_far[1]))

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, mean, slope, named, counts = so_far
        new = FedAvg().result(mean)
        if not named.any() or state.mask is None:
            return new
        mask, theta = state.mask, new.theta
        grown = top_of_each(np.abs(slope), named & ~mask, layout, counts)
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
    first = Phase(name="select", rounds=1, who=Seen(), update=Judge(candidates), join=Choose(candidates))
    update = GradientsUpdate(blocks=plan, batches=batches)
    rounds = Phase(name="federate", update=update, join=GrowAndPrune())
    return FederatedMethod(
        name="fedtiny", paper="Huang et al., ICDCS 2023, arXiv 2212.01977",
        summary="the best of a pool of pruned models, then pruned and grown block by block by clients' top gradients",
        phases=(first, rounds), arms=ARMS,
    )  # fmt: skip
