"""What the network sees of the weights that are trained: w = view(v, step), and its gradient brought back to v."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import Loss


class Given(Protocol):
    """What a view is told of a training: the part of a TrainingRequest that it may look at, its recipe among it."""

    @property
    def start(self) -> Params: ...
    @property
    def recipe(self) -> Any: ...
    @property
    def batches(self) -> list[list[np.ndarray]]: ...
    @property
    def active(self) -> np.ndarray | None: ...
    @property
    def num_examples(self) -> int: ...


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: gradient (P,) of the loss to what the network saw, outputs (B, ...), the loss.

    Nothing in it has a graph; the gradient is the reader's own.
    """

    gradient: Tensor
    outputs: Tensor
    loss: float


class Ask(Protocol):
    """Runs the step's batch through the network once."""

    def __call__(self, seen: Tensor, loss: Loss | None = None, /) -> Pass:
        """Return what comes of weights `seen` (P,), under the recipe's loss where no other is given."""
        ...


# From trained weights (P,), left as they are, and a step of the whole run (from 0): the gradient (P,) of the step
# to them, and its loss. Vectors are in the order of the module's memory (FlatModel.arranged).
Gradient = Callable[[Tensor, int, Ask], tuple[Tensor, float]]


class View(Protocol):
    """A frozen value. Where a recipe has another than `Identity`, a training goes to torch, client by client."""

    def opened(self, model: FlatModel, request: Given, /) -> AbstractContextManager[Gradient | None]:
        """Return what gives each step's gradient, for as long as the training runs; None: the weights' own."""
        ...

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        """Yield what passes through the network cost: which of `alive` (num_prunable,) bool they see, and examples."""
        ...


@dataclass(frozen=True)
class Identity:
    """The weights themselves, as every backend trains them."""

    def opened(self, model: FlatModel, request: Given, /) -> AbstractContextManager[Gradient | None]:
        return nullcontext()

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        yield alive, request.num_examples


IDENTITY = Identity()


def elementwise(see: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Gradient:
    """Return the gradient of a view that looks at each weight alone: its values, and its derivative, both (P,)."""

    def gradient(weights: Tensor, step: int, ask: Ask, /) -> tuple[Tensor, float]:
        found = ask(see(weights))
        return found.gradient.mul_(slope(weights)), found.loss

    return gradient
