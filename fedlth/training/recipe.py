"""How a training goes, as parts: optimizer, schedule, budget and loss, each a frozen value in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlth.training.batches import batches, steps_an_epoch
from fedlth.training.loss import CrossEntropy, Loss

Memory = tuple[Tensor, ...]


class Optimizer(Protocol):
    """Turns gradients into the direction of a step, over one flat vector of P parameters."""

    def memory(self, like: Tensor, /) -> Memory:
        """Return what is kept from step to step, as it is before the first."""
        ...

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        """Return the direction (P,): the weights go `lr` times it down. `grad` and `memory` are changed in place.

        step counts from 1. free (P,): 0.0 where a weight must not move and has no memory, else 1.0; None: all move.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent with heavy-ball momentum, as torch.optim.SGD."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def memory(self, like: Tensor, /) -> Memory:
        return (torch.zeros_like(like),) if self.momentum else ()

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        grad = _decayed(grad, weights, self.weight_decay, free)
        return memory[0].mul_(self.momentum).add_(grad) if memory else grad


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam; weight decay is added to the gradient. Kingma & Ba, ICLR 2015, arXiv 1412.6980."""

    weight_decay: float = 0.0

    def memory(self, like: Tensor, /) -> Memory:
        return torch.zeros_like(like), torch.zeros_like(like)

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        grad = _decayed(grad, weights, self.weight_decay, free)
        first, second = memory
        first.mul_(0.9).add_(grad, alpha=0.1)
        second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        return first / (1 - 0.9**step) / (second / (1 - 0.999**step)).sqrt_().add_(1e-8)


def _decayed(grad: Tensor, weights: Tensor, weight_decay: float, free: Tensor | None) -> Tensor:
    if weight_decay:
        grad.add_(weights, alpha=weight_decay)
    # After the decay: a weight that must not move has no gradient, but would decay.
    return grad if free is None else grad.mul_(free)


class Schedule(Protocol):
    def __call__(self, progress: float, /) -> float:
        """Return the share of the learning rate at `progress`, 0 at a training's first step, 1 at its last."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same rate at every step."""

    def __call__(self, progress: float, /) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine down to 1 %. Loshchilov & Hutter, ICLR 2017, arXiv 1608.03983."""

    def __call__(self, progress: float, /) -> float:
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Epochs:
    """As many passes over the data, each in an order of its own."""

    epochs: int

    def __call__(self, size: int, batch_size: int, order: np.random.Generator, /) -> list[list[np.ndarray]]:
        """Draw the batches of `size` examples, by epoch."""
        return [batches(size, batch_size, order) for _ in range(self.epochs)]

    def steps(self, size: int, batch_size: int) -> int:
        return self.epochs * steps_an_epoch(size, batch_size)


PARTS: Mapping[str, Mapping[str, Any]] = {
    "optimizer": {"sgd": Sgd, "adam": Adam},
    "schedule": {"constant": Constant, "cosine": Cosine},
    "budget": {"epochs": Epochs},
    "loss": {"cross_entropy": CrossEntropy},
}


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How long, how fast and towards what a training goes.

    With `replay_lr` False the rate stays at the schedule's last value, which is what fine-tuning means.
    `first_step` and `last_step` cut the run: the steps between them, with the batches and rates that they have in it.
    """

    budget: Epochs
    batch_size: int
    lr: float
    optimizer: Optimizer = Sgd()
    schedule: Schedule = Constant()
    loss: Loss = CrossEntropy()
    replay_lr: bool = True
    first_step: int = 0
    last_step: int | None = None

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` of `steps`."""
        return self.lr * self.schedule(step / max(1, steps - 1) if self.replay_lr else 1.0)

    def end(self, steps: int) -> int:
        """Return the step before which it ends, of the `steps` of its whole run."""
        return steps if self.last_step is None else min(self.last_step, steps)

    def steps(self, size: int) -> int:
        """Return how many steps it takes on `size` examples."""
        return max(0, self.end(self.budget.steps(size, self.batch_size)) - self.first_step)
