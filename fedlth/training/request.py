"""One training as a value: what every backend is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.models.layout import Layout, Params
from fedlth.training.batches import window
from fedlth.training.recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRequest:
    """Train from `start` on `data`, which a backend leaves as it is.

    batches: positions in the data of each step, by epoch. rates: the learning rate of each step. torch_seed: for
    torch's own generator (dropout). active (num_prunable,) bool: weights outside are zero from the first forward on,
    after every step, and have no momentum. trainable (num_params,) bool: all others, biases and norms too, keep
    their value. snapshots: after which epochs, the first is 1, the weights are wanted.
    """

    start: Params
    data: Examples
    recipe: TrainingRecipe
    batches: list[list[np.ndarray]]
    rates: list[float]
    torch_seed: int
    active: np.ndarray | None = None
    trainable: np.ndarray | None = None
    snapshots: tuple[int, ...] = ()

    def free(self, layout: Layout) -> np.ndarray | None:
        """Return (num_params,) bool: the parameters that a step may change; None where that is all of them."""
        found = layout.trainable
        if self.trainable is not None:
            found = found & self.trainable
        if self.active is not None:
            found = found & layout.over_params(self.active)
        return None if found.all() else found

    @property
    def num_examples(self) -> int:
        """The examples of all its steps, each as often as it is seen."""
        return sum(len(part) for parts in self.batches for part in parts)


def drawn_request(
    start: Params,
    data: Examples,
    recipe: TrainingRecipe,
    *,
    order: np.random.Generator,
    torch_seed: int,
    active: np.ndarray | None = None,
    trainable: np.ndarray | None = None,
    snapshots: tuple[int, ...] = (),
) -> TrainingRequest:
    """Return the request of a recipe on data, its batches drawn from `order`.

    Raises StudyError where the recipe's first step lies beyond its run.
    """
    epochs = recipe.budget(len(data), recipe.batch_size, order)
    steps = sum(map(len, epochs))
    inside = window(epochs, recipe.first_step, recipe.last_step)
    if not inside:
        raise StudyError(f"finder.rewind.step: must lie inside a training's {steps} steps, got {recipe.first_step}")
    return TrainingRequest(
        start=start, data=data, recipe=recipe, batches=inside,
        rates=[recipe.rate(step, steps) for step in range(recipe.first_step, recipe.end(steps))],
        torch_seed=torch_seed, active=active, trainable=trainable, snapshots=snapshots,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingResult:
    """Where a training ended; the last epoch's mean loss; floats (num_floats,) after the epochs that were asked for."""

    params: Params
    loss: float
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)
