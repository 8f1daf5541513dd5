"""PruneFL: one client prunes first; then the server adjusts the mask by what a weight gains a second of a round.

Jiang, Wang, Valls, Ko, Lee, Leung, Tassiulas. Model Pruning Enables Efficient Federated Learning on Edge Devices.
IEEE Transactions on Neural Networks and Learning Systems 2022, arXiv 1909.12326.

An adjustment drops the smallest `max_dec` of each tensor by |w|, and takes weights back, those that were dead before
too, in the order of squared gradient a second, while that lets the sum of squared gradients a second of a round grow.
The share falls by half every `half_life` rounds; `density` bounds what is kept.

Left open, and chosen here. The time of a round is a model, as none is measured: `constant_s`, and for each kept weight
of a tensor its training FLOPs an example x the examples of a client's round / `flops_s`, and 8 bytes (4 down, 4 up) /
`bytes_s`. Squared gradients are those of minibatches, summed over one pass after the local training of the round that
adjusts; all prunable weights' go up in that round alone, and are meant by examples. The chosen client (the place
`chosen` among those that take part) adjusts `initial` times on its own data, each after one local training, and sends
its model and mask once; 0 begins dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlth.methods.aggregate import Aggregate, Contribution, FedAvg, mean_of
from fedlth.methods.client_update import UPDATE, VALUES, Inbox, MaskedUpdate, Update, kept_private
from fedlth.methods.global_mask import ARMS, UnionMean, alive_counts, scores, scores_layout, told, top_of_each
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import at_least, check, density_of, positive
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import survivors
from fedlth.training.local_client import LocalClient
from fedlth.training.study_recipe import budget_of
from fedlth.training.task import Task
from fedlth.wire.payload import Content

GAIN = "squared_gradients"


def adjusted(
    weights: np.ndarray, mask: np.ndarray, gain: np.ndarray, seconds: np.ndarray, layout: Layout, *,
    max_dec: float, constant_s: float, most: int,
) -> np.ndarray:  # fmt: skip
    """Return the mask of an adjustment.

    All (num_prunable,): `gain` are squared gradients, `seconds` what each weight adds to a round beside `constant_s`.
    At most `most` weights are kept; ties by position.
    """
    alive = alive_counts(mask, layout)
    kept = top_of_each(np.abs(weights), mask, layout, alive - np.floor(max_dec * alive).astype(np.int64))
    if not max_dec or kept.all():
        return mask
    candidates = np.flatnonzero(~kept)
    order = candidates[np.argsort(-(gain[candidates] / seconds[candidates]), kind="stable")]
    order = order[: max(0, most - int(kept.sum()))]
    gained = float(gain[kept].sum()) + np.concatenate(([0.0], np.cumsum(gain[order])))
    spent = constant_s + float(seconds[kept].sum()) + np.concatenate(([0.0], np.cumsum(seconds[order])))
    rate = gained / spent
    falls = np.flatnonzero(rate[1:] <= rate[:-1])  # sorted by what each gains a second: from there on it only falls
    kept[order[: falls[0] if falls.size else order.size]] = True
    return kept


def squared_gradients(local: LocalClient, params: Params) -> np.ndarray:
    """Return the sum over one pass's minibatches of the squared gradient, (num_prunable,) float64."""
    total = np.zeros(local.full.size)
    for slope in local.gradients(params):
        total += slope.astype(np.float64) ** 2
    return total


@dataclass(frozen=True)
class RoundTime:
    """What a round takes: a stated model of a device, not a measurement."""

    constant_s: float
    flops_s: float
    bytes_s: float

    def of_weights(self, task: Task, layout: Layout) -> np.ndarray:
        """Return what each weight of `layout` adds to a round of the mean client, in seconds, (num_prunable,)."""
        train, sizes = task.study.train, [len(split.train) for split in task.splits.clients]
        examples = budget_of(train).examples(round(float(np.mean(sizes))), train.batch_size)
        found = np.empty(layout.num_prunable)
        for e in layout.prunable:
            found[e.slice] = examples * task.model.training_flops[e.name] / e.size / self.flops_s + 8 / self.bytes_s
        return found


@dataclass(frozen=True)
class Adjust:
    """FedAvg, and a new mask in the rounds in which squared gradients came; both are joined by `mean`."""

    max_dec: float
    half_life: float
    density: float
    time: RoundTime
    task: Task | None = None
    mean: Aggregate = field(default_factory=FedAvg)
    masks: ClassVar[bool] = True

    def of_task(self, task: Task, /) -> Adjust:
        return replace(self, task=task)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        nobodys = told(np.full(layout.num_prunable, -1.0))  # what no square is
        gains = self.mean.init(nobodys, scores_layout(layout))
        return [state, layout, self.mean.init(state, layout), gains, False]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c)
        if GAIN in c.others:
            self.mean.add(so_far[3], c.as_numbers(c.others[GAIN]))
            so_far[4] = True

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, mean, gains, came = so_far
        new, rounds = self.mean.result(mean), int(state.memory.get("rounds", 0)) + 1
        memory = {"rounds": np.array(rounds)}
        gain = mean_of(self.mean, gains) if came else np.full(layout.num_prunable, -1.0)
        if gain.max() < 0:  # none came, or none is believed
            return replace(new, memory=memory)
        old = np.ones(gain.size, bool) if state.mask is None else state.mask
        assert self.task is not None
        mask = adjusted(
            new.theta.floats[: gain.size], old, gain, self.time.of_weights(self.task, layout), layout,
            max_dec=self.max_dec * 0.5 ** (rounds / self.half_life), constant_s=self.time.constant_s,
            most=survivors(layout, self.density),
        )  # fmt: skip
        return ServerState(new.theta.masked(mask), memory, mask)


@dataclass(frozen=True)
class GainUpdate(MaskedUpdate):
    """Train under everyone's mask; every `every` rounds send the squared gradients of all weights, too."""

    every: int = 1
    sends: tuple[tuple[str, str], ...] = (*VALUES, (GAIN, "scores"))

    def skips(self, round: int) -> Sequence[str]:
        return () if round % self.every == 0 else (GAIN,)

    def range(self, name: str, task: Task, /) -> tuple[float, float] | None:
        return (0.0, np.inf) if name == GAIN else None

    def also(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> Mapping[str, Content]:
        if self.skips(local.round):
            return {}
        return {GAIN: scores(local.task.shared_mask(squared_gradients(local, params)))}


@dataclass(frozen=True)
class PruneFirst(MaskedUpdate):
    """Train and adjust `times` times, each on batches of the client's own data drawn anew; send the model under the
    mask that came of it."""

    times: int = 1
    max_dec: float = 0.3
    density: float = 1.0
    time: RoundTime = RoundTime(0.0, 1.0, 1.0)

    def passes(self, task: Task, visits: int, /) -> int:
        return self.times

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held, task = self.own(local, inbox, state), local.task
        params, mask, loss = held.params, held.mask, 0.0
        seconds = self.time.of_weights(task, task.layout)
        for i in range(self.times):
            again = replace(local, stage=f"{local.stage} {i + 1}")  # else all would train in one order
            trained = again.train(params, recipe=self.recipe(local, local.recipe), active=mask)
            mask = adjusted(
                trained.params.floats[: mask.size], mask, squared_gradients(again, trained.params), seconds,
                task.layout, max_dec=self.max_dec, constant_s=self.time.constant_s,
                most=survivors(task.layout, self.density),
            )  # fmt: skip
            params, loss = trained.params.masked(mask), trained.loss
        sent = task.shared_part(params)
        new = kept_private(local, replace(state, visits=state.visits + 1), params)
        content = Content(task.shared_mask(mask), sent.floats, sent.ints)
        return Update(new, {UPDATE: content}, {"loss": loss, "density": float(mask.mean())})


@dataclass(frozen=True)
class Chosen:
    """The one client at a place among those of the federation."""

    place: int

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        return [seen[self.place % len(seen)]]


def prunefl(
    every: int = 50, max_dec: float = 0.3, half_life: float = 10000.0, initial: int = 5, chosen: int = 0,
    density: float = 1.0, constant_s: float = 1.0, flops_s: float = 1e9, bytes_s: float = 1e6,
) -> FederatedMethod:  # fmt: skip
    check(
        every=at_least(1, every), max_dec=(max_dec, 0 <= max_dec < 1, "in [0, 1)"), half_life=positive(half_life),
        initial=at_least(0, initial), chosen=at_least(0, chosen), density=density_of(density),
        constant_s=positive(constant_s), flops_s=positive(flops_s), bytes_s=positive(bytes_s),
    )  # fmt: skip
    time = RoundTime(constant_s, flops_s, bytes_s)
    first = Phase(
        name="prune", rounds=1, who=Chosen(chosen), update=PruneFirst(times=initial, max_dec=max_dec, density=density,
        time=time), join=UnionMean(), own_mask=True,
    )  # fmt: skip
    rounds = Phase(name="federate", update=GainUpdate(every=every), join=Adjust(max_dec, half_life, density, time))
    return FederatedMethod(
        name="prunefl", paper="Jiang et al., TNNLS 2022, arXiv 1909.12326",
        summary="one mask that the server adjusts by squared gradients a second of a round (control: max_dec 0)",
        phases=(first, rounds) if initial else (rounds,), arms=ARMS,
    )  # fmt: skip
