"""One training as a value: what every backend is given, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.models.layout import Layout, Params
from fedlth.rng import stream
from fedlth.training.batches import window
from fedlth.training.dp_sgd import poisson
from fedlth.training.recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRequest:
    """Train from `start` on `data`, which a backend leaves as it is.

    batches: positions in the data of each step, by epoch. rates: the learning rate of each step. torch_seed: for
    torch's own generator (dropout). active (num_prunable,) bool: weights outside are zero from the first forward on,
    after every step, and have no momentum. trainable (num_params,) bool: all others, biases and norms too, keep
    their value. snapshots: after which epochs, the first is 1, the weights are wanted. anchor: where the recipe's pull
    draws to, None for `start`. examples_seed: for what is drawn of the examples (augmentation, hidden tokens).
    noise_seed: for the noise of the recipe's `dp`.
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
    anchor: Params | None = None
    examples_seed: int = 0
    noise_seed: int = 0

    @property
    def draws_examples(self) -> bool:
        """Say whether a step is given anything else than the examples as they are."""
        return bool(self.recipe.augment) or hasattr(self.recipe.loss, "posed")

    def shown(self, step: int, batch: Examples) -> Examples:
        """Return what step `step` (from 0) of this request trains on, given its examples; the same in every backend."""
        if not self.draws_examples:
            return batch
        # By the step of the whole run: a piece of a run sees what the run would.
        generator = stream(self.examples_seed, "examples", self.recipe.first_step + step)
        for part in self.recipe.augment:
            x = batch.tensor
            changed = part(x, generator)
            if changed.shape != x.shape or changed.dtype != x.dtype:
                wanted = f"{tuple(x.shape)} {x.dtype}"
                raise ValueError(
                    f"{type(part).__name__} must give {wanted}, got {tuple(changed.shape)} {changed.dtype}"
                )
            batch = replace(batch, x=changed)
        return self.recipe.loss.posed(batch, generator) if hasattr(self.recipe.loss, "posed") else batch

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
    anchor: Params | None = None,
    examples_seed: int = 0,
    noise_seed: int = 0,
) -> TrainingRequest:
    """Return the request of a recipe on data, its batches drawn from `order`.

    Raises StudyError where the recipe's first step lies beyond its run.
    """
    epochs = recipe.budget(len(data), recipe.batch_size, order, data.longest if recipe.group_by_length else None)
    steps = sum(map(len, epochs))
    if recipe.dp is not None:
        epochs = [[poisson(len(data), recipe.batch_size, order) for _ in parts] for parts in epochs]
    inside = window(epochs, recipe.first_step, recipe.last_step)
    if not inside:
        raise StudyError(f"finder.rewind.step: must lie inside a training's {steps} steps, got {recipe.first_step}")
    rates = [recipe.rate(step, steps) for step in range(recipe.first_step, recipe.end(steps))]
    if not all(map(math.isfinite, rates)):
        raise StudyError(f"train.schedule: must give finite numbers, got {rates}")
    return TrainingRequest(
        start=start, data=data, recipe=recipe, batches=inside,
        rates=rates, torch_seed=torch_seed, active=active, trainable=trainable, snapshots=snapshots, anchor=anchor,
        examples_seed=examples_seed, noise_seed=noise_seed,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingResult:
    """Where a training ended; the last epoch's mean loss; floats (num_floats,) after the epochs that were asked for."""

    params: Params
    loss: float
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)
