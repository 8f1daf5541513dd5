"""A user's own parts of a recipe tried before a run: what one raises, or gives in the wrong form, names its place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.data.factory import told
from fedlth.errors import StudyError
from fedlth.models.initial import torch_stream
from fedlth.models.layout import Params
from fedlth.rng import stream
from fedlth.training import torch_backend
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.optimizer import Memory, Optimizer
from fedlth.training.pull import Pull
from fedlth.training.rate_schedule import Constant, RateSchedule
from fedlth.training.recipe import PARTS, TrainingRecipe
from fedlth.training.request import drawn_request


def own(kind: str, part: object) -> bool:
    """Say whether a part is the user's own: a subclass of one of ours is."""
    return type(part) not in PARTS[kind].values()


def try_step(model: FlatModel, start: Params, few: Examples, recipe: TrainingRecipe, where: str) -> None:
    """Take one step from `start` on a few examples, dense and under a mask, where optimizer or pull are the user's.

    Raises StudyError naming the part that fails.
    """
    if not (own("optimizer", recipe.optimizer) or own("pull", recipe.pull)):
        return
    optimizer = _TriedOptimizer(recipe.optimizer, f"{where}.optimizer")
    pull = _TriedPull(recipe.pull, f"{where}.pull")
    once = replace(recipe, budget=Budget(steps=1), batch_size=len(few), schedule=Constant())
    tried = replace(once, optimizer=optimizer, pull=pull)
    mask = stream(0, "trial mask").random(model.layout.num_prunable) < 0.5
    for active in (None, mask):
        request = drawn_request(start, few, tried, order=stream(0, "trial"), torch_seed=0, active=active)
        with torch_stream(0):
            torch_backend.train(model, request)


def try_schedule(schedule: RateSchedule, steps: int, place: str) -> None:
    """Ask a user's schedule for every step of a training; raise StudyError where it fails or gives no number."""
    for step in range(steps) if own("schedule", schedule) else ():
        try:
            share = float(schedule(step, steps))
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"{place}: fails at step {step} of {steps}: {told(error)}") from error
        if not math.isfinite(share):
            raise StudyError(f"{place}: must give finite numbers, got {share} at step {step} of {steps}")


@dataclass(frozen=True)
class _TriedOptimizer:
    part: Optimizer
    place: str

    def memory(self, like: Tensor, /) -> Memory:
        try:
            found: Any = self.part.memory(like)
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"{self.place}: memory fails: {told(error)}") from error
        if not isinstance(found, tuple) or not all(isinstance(one, Tensor) for one in found):
            raise StudyError(f"{self.place}: memory must be a tuple of tensors, got {type(found).__name__}")
        return found

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        wanted = tuple(grad.shape)
        try:
            found: Any = self.part(grad, weights, memory, step, free)
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"{self.place}: fails on gradients {wanted} at step {step}: {told(error)}") from error
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise StudyError(f"{self.place}: must return a direction {wanted}, got {got}")
        return found


@dataclass(frozen=True)
class _TriedPull:
    part: Pull
    place: str

    def __call__(self, grad: Tensor, weights: Tensor, anchor: Tensor, /) -> None:
        try:
            found: Any = self.part(grad, weights, anchor)  # type: ignore[func-returns-value]
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"{self.place}: fails on weights {tuple(weights.shape)}: {told(error)}") from error
        if found is not None and found is not grad:
            raise StudyError(f"{self.place}: must change the gradient in place, got {type(found).__name__} returned")
