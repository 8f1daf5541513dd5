"""A training in the compute kernel, where it can run it and is the faster."""

from __future__ import annotations

import numpy as np

from fedlth.kernel import kernel
from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import CrossEntropy
from fedlth.training.recipe import Sgd
from fedlth.training.request import TrainingRequest, TrainingResult


def obstacle(model: FlatModel, request: TrainingRequest) -> str:
    """Say why a training does not go to the kernel; "" where it does."""
    if model.table is None:
        return "the model has no layer table"
    for part, known in ((request.recipe.optimizer, Sgd), (request.recipe.loss, CrossEntropy)):
        if type(part) is not known:
            return f"the kernel has no {type(part).__name__}"
    return "" if kernel.suits(model.table, request.active) else "a large network as dense as this is faster in torch"


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks that has no obstacle."""
    table, optimizer = model.table, request.recipe.optimizer
    assert table is not None and isinstance(optimizer, Sgd)
    ended = kernel.train_epochs(
        table, request.start.floats, request.data.tensor.numpy(), request.data.y.numpy(), request.batches,
        rates=np.array(request.rates), momentum=optimizer.momentum, weight_decay=optimizer.weight_decay,
        mask=request.active, moves=None if request.trainable is None else request.trainable.astype(np.float32),
        snapshots=request.snapshots,
    )  # fmt: skip
    return TrainingResult(Params(ended.floats, request.start.ints.copy()), ended.loss, ended.snapshots)
