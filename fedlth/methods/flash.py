"""FLASH: some clients say how dense each tensor should be; a mask of those densities is drawn once, and kept.

Babakniya, Kundu, Prakash, Niu, Avestimehr. Revisiting Sparsity Hunting in Federated Learning: Why does Sparsity
Consensus Matter? TMLR 2023, arXiv 2208.13092. SPDST is this method with `every: 0`, JMWST with `every` above 0.

Stage 1: a `share` of the clients begin with a random mask of `density` on theta_0; after each of `stage1` trainings
they drop `rate` of each tensor's smallest weights and grow as many where |gradient| is largest, tensors sharing in
proportion to their sensitivity. Only the densities of their tensors go up. The server means them by clients, and draws
a random mask of exactly `density` in that proportion. Stage 2 begins at theta_0, which stage 1 has not changed, under
that mask. Every `every` rounds (JMWST) clients readjust it in the same way before they train, and the server elects
the largest weights of what they send, all tensors competing, as many as before.

Left open, and chosen here: sensitivity is the mean |gradient| of what a tensor keeps; the gradient is that of `batches`
minibatches; one training of stage 1 is one local training of the study; readjustments end at round `end`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, mean_of
from fedlth.methods.client_update import Inbox, Update, merged
from fedlth.methods.global_mask import (
    ARMS,
    HeldMean,
    Readjust,
    ReadjustUpdate,
    alive_counts,
    mean_gradient,
    numbers,
    numbers_layout,
    random_mask,
    readjusted,
    told,
)
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import at_least, averaged, check, density_of, share_of
from fedlth.models.layout import Layout
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import Layerwise, survivors
from fedlth.tickets.select import apportion
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task

DENSITIES = "densities"


@dataclass(frozen=True)
class FindDensities:
    """Train and readjust a mask of one's own `times` times, each on batches drawn anew; send the density of each shared
    tensor, nothing else."""

    density: float
    times: int
    rate: float
    batches: int
    sends: tuple[tuple[str, str], ...] = ((DENSITIES, "statistics"),)

    def layout(self, name: str, task: Task, /) -> Layout:
        return numbers_layout(name, len(task.exchange.prunable))

    def range(self, name: str, task: Task, /) -> tuple[float, float]:
        return 0.0, 1.0

    def passes(self, task: Task, visits: int, /) -> int:
        return self.times

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        params, layout = merged(local, inbox, state), local.task.layout
        mask = Layerwise()(local.rng("first mask").random(local.full.size), local.full, layout, self.density)
        loss = 0.0
        for i in range(self.times):
            # Of each its own streams: else all would train in one order, and readjust by one minibatch's gradient.
            again = replace(local, stage=f"{local.stage} {i + 1}")
            trained = again.train(params.masked(mask), recipe=local.recipe, active=mask)
            slope = mean_gradient(again, trained.params, self.batches)
            weights = trained.params.floats[: mask.size]
            mask = readjusted(weights, mask, slope, layout, self.rate, across=True)
            params, loss = trained.params, trained.loss
        shared, crossing = local.task.shared_mask(mask), local.task.exchange
        found = alive_counts(shared, crossing) / np.array([e.size for e in crossing.prunable])
        new = replace(state, visits=state.visits + 1)
        return Update(new, {DENSITIES: numbers(found)}, {"loss": loss, "density": float(mask.mean())})


@dataclass(frozen=True)
class DrawMask:
    """Draw everyone's mask, of exactly `density`, tensors in proportion to the mean of what clients found.

    Where `mean` believes nobody, all tensors are as dense.
    """

    density: float
    seed: int = 0
    mean: Aggregate = field(default_factory=CountMean)
    masks: ClassVar[bool] = True

    def of_task(self, task: Task, /) -> DrawMask:
        return replace(self, seed=task.study.seed)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        tensors = len(layout.prunable)
        return state, layout, self.mean.init(told(np.full(tensors, self.density)), numbers_layout(DENSITIES, tensors))

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c)

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, densities = so_far
        found = mean_of(self.mean, densities)
        sizes = np.array([e.size for e in layout.prunable])
        counts = apportion(survivors(layout, self.density), np.clip(found, 0, None) * sizes, sizes)
        mask = random_mask(layout, counts, self.seed, "flash mask")
        return ServerState(state.theta.masked(mask), mask=mask)


@dataclass(frozen=True)
class ShareOf:
    """A share of the federation's clients, at least one, drawn anew each round without replacement."""

    share: float

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        count = min(len(seen), max(1, math.ceil(self.share * len(seen))))
        return sorted(seen[int(i)] for i in rng.choice(len(seen), size=count, replace=False))


def flash(
    density: float = 0.05, share: float = 0.1, stage1: int = 10, rate: float = 0.5, batches: int = 1, every: int = 0,
    end: int = 400,
) -> FederatedMethod:  # fmt: skip
    check(
        density=density_of(density), share=density_of(share), stage1=at_least(1, stage1), rate=share_of(rate),
        batches=at_least(0, batches), every=at_least(0, every), end=at_least(1, end),
    )  # fmt: skip
    first = Phase(
        name="sensitivity", rounds=1, who=ShareOf(share), update=FindDensities(density, stage1, rate, batches),
        join=DrawMask(density), must_count=True,
    )  # fmt: skip
    rounds = averaged()
    if every:
        update = ReadjustUpdate(before=Readjust(every, end, rate, batches=batches, across=True))
        rounds = Phase(name="federate", update=update, join=HeldMean(across=True), own_mask=True)
    return FederatedMethod(
        name="flash", paper="Babakniya et al., TMLR 2023, arXiv 2208.13092",
        summary="a random mask of the tensor densities that some clients found, kept (every: elected anew)",
        phases=(first, rounds), arms=ARMS,
    )  # fmt: skip
