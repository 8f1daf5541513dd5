"""A training in the compute kernel, where it can run it and is the faster."""

from __future__ import annotations

import numpy as np
import torch

from fedlth.kernel import kernel
from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import CrossEntropy, restricts
from fedlth.training.optimizer import Sgd
from fedlth.training.pull import Correction, Proximal
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, TrainingResult

_PULLS = (Proximal, Correction)  # whose gradient is a factor on the weights and a vector


def obstacle(model: FlatModel, request: TrainingRequest) -> str:
    """Say why a training does not go to the kernel; "" where it does."""
    if model.table is None:
        return "the model has no layer table"
    if why := lacks(request.recipe):
        return f"the kernel has no {why}"
    if int(request.data.y.min()) < 0:
        return "the kernel has no labels that do not count"
    return "" if kernel.suits(model.table, request.active) else "a network as dense as this is faster in torch"


def lacks(recipe: TrainingRecipe) -> str:
    """Name a part of a recipe that the kernel does not have; "" where it has all of them."""
    optimizer = recipe.optimizer
    if type(optimizer) is not Sgd:
        return type(optimizer).__name__
    if optimizer.nesterov:
        return "Nesterov momentum"
    if restricts(recipe.loss):
        return "classes: own"
    if type(recipe.loss) is not CrossEntropy:
        return type(recipe.loss).__name__
    if recipe.loss.label_smoothing:
        return "label smoothing"
    checks = (
        ("clip_norm", recipe.clip_norm is not None),
        (f"pull {type(recipe.pull).__name__}", recipe.pulls and type(recipe.pull) not in _PULLS),
        (f"view {type(recipe.view).__name__}", recipe.views), ("dropout", recipe.dropout is not None),
        (recipe.precision, recipe.precision != "float32"), ("privacy.dp", recipe.dp is not None),
    )  # fmt: skip
    return next((name for name, given in checks if given), "")


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks that has no obstacle."""
    table, optimizer = model.table, request.recipe.optimizer
    assert table is not None and isinstance(optimizer, Sgd)
    ended = kernel.train_epochs(
        table, request.start.floats, request.data.tensor.numpy(), request.data.y.numpy(), request.batches,
        rates=np.array(request.rates), momentum=optimizer.momentum, weight_decay=optimizer.weight_decay,
        mask=request.active, moves=None if request.trainable is None else request.trainable.astype(np.float32),
        pull=_pull(table.num_params, request) if request.recipe.pulls else None, snapshots=request.snapshots,
        shown=_shown(request) if request.draws_examples else None,
    )  # fmt: skip
    return TrainingResult(Params(ended.floats, request.start.ints.copy()), ended.loss, ended.snapshots)


def _pull(size: int, request: TrainingRequest) -> tuple[float, np.ndarray]:
    """Return the strength and the slope (size,) that make a pull's gradient: strength w + slope."""
    anchor, pull = (request.anchor or request.start).floats[:size], request.recipe.pull
    return (pull.mu, np.float32(-pull.mu) * anchor) if isinstance(pull, Proximal) else (0.0, anchor)


def _shown(request: TrainingRequest) -> kernel.Shown:
    """Return what gives the images of an epoch, from 0, in the order of its batches: one epoch is in memory at once."""
    ends = np.cumsum([0, *map(len, request.batches)])

    def shown(epoch: int) -> np.ndarray:
        found = []
        for step, part in enumerate(request.batches[epoch], int(ends[epoch])):
            found.append(request.shown(step, request.data.batch(torch.from_numpy(part))).tensor)
        return torch.cat(found).numpy()

    return shown
