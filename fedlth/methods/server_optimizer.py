"""Server optimizers: the mean change of a round is a gradient, along which the server takes a step of its own.

Momentum: Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification. 2019, arXiv 1909.06335. Adam and Yogi, whose second moment begins at tau^2 and has no bias correction:
Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan. Adaptive Federated Optimization. ICLR 2021, arXiv
2003.00295. Left open by the papers: the server's rate, which both tune for each task. Changes are weighted by
examples, as in the second paper's experiments. Only what training moves is stepped: running statistics and counters are
averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedlth.methods.aggregate import Aggregate, Contribution, FedAvg, unsent
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import averaged, check, positive
from fedlth.models.layout import Layout, Params
from fedlth.storage.server_state import ServerState

Memory = Mapping[str, np.ndarray]


class ServerRule(Protocol):
    """Turns a mean change (P,) float64 into a step (P,), given what it remembers of earlier rounds by name.

    `start` is what it remembers of each parameter before the first round.
    """

    @property
    def start(self) -> Mapping[str, float]: ...

    def __call__(self, change: np.ndarray, memory: Memory, /) -> tuple[np.ndarray, Memory]: ...


@dataclass(frozen=True)
class Momentum:
    """v = beta v + change; a step of lr v."""

    lr: float = 1.0
    beta: float = 0.0

    @property
    def start(self) -> Mapping[str, float]:
        return {"velocity": 0.0} if self.beta else {}

    def __call__(self, change: np.ndarray, memory: Memory, /) -> tuple[np.ndarray, Memory]:
        if not self.beta:
            return self.lr * change, {}
        velocity = self.beta * memory["velocity"] + change
        return self.lr * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class Adam:
    """m = beta_1 m + (1 - beta_1) change, v the same of its square; a step of lr m / (sqrt(v) + tau)."""

    lr: float
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    @property
    def start(self) -> Mapping[str, float]:
        return {"first_moment": 0.0, "second_moment": self.tau**2}

    def __call__(self, change: np.ndarray, memory: Memory, /) -> tuple[np.ndarray, Memory]:
        mean = self.beta_1 * memory["first_moment"] + (1 - self.beta_1) * change
        square = self._square(memory["second_moment"], change**2)
        return self.lr * mean / (np.sqrt(square) + self.tau), {"first_moment": mean, "second_moment": square}

    def _square(self, before: np.ndarray, now: np.ndarray) -> np.ndarray:
        return self.beta_2 * before + (1 - self.beta_2) * now


@dataclass(frozen=True)
class Yogi(Adam):
    """As Adam, but the second moment moves by at most (1 - beta_2) change^2, whichever way."""

    def _square(self, before: np.ndarray, now: np.ndarray) -> np.ndarray:
        moved: np.ndarray = before - (1 - self.beta_2) * now * np.sign(before - now)
        return moved


@dataclass(frozen=True)
class ServerOptimizer:
    """Step from the old state by `rule` along the change to the `mean` of what came up.

    Under a mask of the state nothing moves that it leaves out, and what comes back begins anew. What the mean keeps,
    since nobody sent it, keeps its value and what is remembered of it.
    """

    rule: ServerRule
    mean: Aggregate = field(default_factory=FedAvg)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state, layout, self.mean.init(state, layout)

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[2], c)

    def result(self, so_far: Any, /) -> ServerState:
        state, layout, _ = so_far
        mean, size = self.mean.result(so_far[2]).theta, layout.num_params
        moves = stepped(state, layout)
        change = np.where(moves, mean.floats[:size].astype(np.float64) - state.theta.floats[:size], 0.0)
        start, held = self.rule.start, state.memory
        known = {n: np.where(moves, held.get(n, first), first).astype(np.float64) for n, first in start.items()}
        # Without memory nothing moves what has not changed.
        stays = unsent(self.mean, so_far[2], layout)[:size] if known else np.zeros(size, bool)
        step, memory = self.rule(change, known)
        floats: np.ndarray = mean.floats.copy()
        # From the mean, not from the old state: a step that is the change itself must give the mean to the bit.
        floats[:size] += np.where(moves & ~stays, step - change, 0.0)
        memory = {name: np.where(stays, known[name], vector) for name, vector in memory.items()}
        kept = {name: np.where(moves, vector, start[name]).astype(np.float32) for name, vector in memory.items()}
        return ServerState(Params(floats, mean.ints), kept)


def stepped(state: ServerState, layout: Layout) -> np.ndarray:
    """Return (num_params,) bool: what a server may step, the parameters that training moves and the mask keeps."""
    found: np.ndarray = layout.trainable
    return found if state.mask is None else found & layout.over_params(state.mask)


def _optimized(name: str, paper: str, summary: str, rule: ServerRule) -> FederatedMethod:
    return FederatedMethod(
        name=name, paper=paper, summary=summary,
        phases=(averaged(join=ServerOptimizer(rule)),), arms=("global", "local", "dense"),
    )  # fmt: skip


def fedavgm(lr: float = 1.0, beta: float = 0.9) -> FederatedMethod:
    check(lr=positive(lr), beta=(beta, 0 <= beta < 1, "in [0, 1)"))
    paper, summary = "Hsu et al., 2019, arXiv 1909.06335", "FedAvg with momentum of the server"
    return _optimized("fedavgm", paper, summary, Momentum(lr, beta))


def fedadam(lr: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> FederatedMethod:
    _check(lr, beta_1, beta_2, tau)
    paper, summary = "Reddi et al., ICLR 2021, arXiv 2003.00295", "FedAvg whose mean change is a gradient of Adam"
    return _optimized("fedadam", paper, summary, Adam(lr, beta_1, beta_2, tau))


def fedyogi(lr: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> FederatedMethod:
    _check(lr, beta_1, beta_2, tau)
    paper, summary = "Reddi et al., ICLR 2021, arXiv 2003.00295", "FedAvg whose mean change is a gradient of Yogi"
    return _optimized("fedyogi", paper, summary, Yogi(lr, beta_1, beta_2, tau))


def _check(lr: float, beta_1: float, beta_2: float, tau: float) -> None:
    betas = {name: (value, 0 <= value < 1, "in [0, 1)") for name, value in (("beta_1", beta_1), ("beta_2", beta_2))}
    check(lr=positive(lr), **betas, tau=positive(tau))
