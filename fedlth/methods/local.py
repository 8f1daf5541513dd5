"""One client at work: its data, its streams, its training and evaluation, as a method's parts see them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fedlth import rng, train
from fedlth.network import DataNetwork
from fedlth.params import Params
from fedlth.tickets.evidence import Evidence
from fedlth.train import Plan, Trained
from fedlth.world import World


@dataclass(frozen=True)
class Local:
    """A client in one round. `stage` names its random streams: equal stages draw equal batches: twins share order."""

    world: World
    client: int
    round: int
    stage: str
    work: list[dict[str, Any]] = field(default_factory=list, compare=False)

    @cached_property
    def train_part(self) -> tuple[Tensor, Tensor]:
        return self.world.part(self.client, "train")

    @cached_property
    def val_part(self) -> tuple[Tensor, Tensor]:
        return self.world.part(self.client, "val")

    @property
    def num_train(self) -> int:
        return len(self.world.splits.clients[self.client].train)

    @cached_property
    def full(self) -> np.ndarray:
        """The dense mask, (num_prunable,) bool."""
        return np.ones(self.world.layout.num_prunable, bool)

    @property
    def plan(self) -> Plan:
        """The local training of step 1."""
        t = self.world.study.train
        return Plan(epochs=t.epochs, batch_size=t.batch_size, lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay)

    def rng(self, what: str) -> np.random.Generator:
        return rng.stream(self.world.study.seed, f"{self.stage}/{what}", self.round, self.client)

    def torch_seed(self, what: str) -> int:
        return rng.torch_seed(self.world.study.seed, f"{self.stage}/{what}", self.round, self.client)

    def train(
        self,
        start: Params,
        *,
        plan: Plan,
        mask: np.ndarray | None = None,
        update: np.ndarray | None = None,
        snapshots: tuple[int, ...] = (),
        order: str = "order",
    ) -> Trained:
        data = self.train_part
        began = time.thread_time()
        trained = train.train(
            self.world.bound,
            start,
            data=data,
            plan=plan,
            order=self.rng(order),
            torch_seed=self.torch_seed("dropout"),
            mask=mask,
            update=update,
            snapshots=snapshots,
        )
        density = 1.0 if mask is None else int(np.count_nonzero(mask)) / mask.size
        self.work.append({"density": density, "epochs": plan.epochs, "cpu_s": time.thread_time() - began})
        return trained

    def val_accuracy(self, params: Params) -> float:
        """The only accuracy that a decision may look at."""
        return self.evaluate(params, self.val_part)[0]

    def evaluate(self, params: Params, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Return (accuracy, mean loss) on a part of the client's data."""
        began = time.thread_time()
        found = train.evaluate(self.world.bound, params, part)
        self.work.append({"evaluated": len(part[1]), "cpu_s": time.thread_time() - began})
        return found

    def network(
        self, at: Params, learning: Callable[[np.ndarray, int], None] = lambda alive, epochs: None
    ) -> DataNetwork:
        """Return the network at `at` over the client's training data, as scores ask it."""
        return DataNetwork(
            bound=self.world.bound, params=at, data=self.train_part, layer_flops=lambda: self.world.flops,
            order=lambda: self.rng("mask order"), torch_seed=self.torch_seed("mask bits"),
            batch_size=self.world.study.train.batch_size, learning=learning,
        )  # fmt: skip

    def evidence(self, *, start: Params, now: Params, mask: np.ndarray, density: float) -> Evidence:
        """Return what a score may look at after a training from `start` to `now`, to cut `mask` to `density`."""
        size = mask.size
        at_start = self.network(start)
        return Evidence(
            layout=self.world.layout,
            init=self.world.theta_0.floats[:size],
            start=start.floats[:size],
            now=now.floats[:size],
            mask=mask,
            gradient=at_start.gradient,
            rng=self.rng("score"),
            density=density,
            at_start=at_start,
            at_now=self.network(now),
        )

    def fresh_init(self, what: str) -> Params:
        """Draw another initialisation, from this client's own stream; see World.fresh."""
        return self.world.fresh(self.torch_seed(what))
