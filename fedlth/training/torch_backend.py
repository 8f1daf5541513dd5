"""A training in torch, a few calls a step over one flat vector: what every other backend must equal."""

from __future__ import annotations

import numpy as np
import torch

from fedlth.training.flat_model import FlatModel
from fedlth.training.request import TrainingRequest, TrainingResult


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks; seeds torch's generator and uses the module, so that others must wait for both."""
    with model.lock:
        torch.manual_seed(request.torch_seed)
        return _train(model, request)


def _train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    recipe, layout, snapshots = request.recipe, model.layout, dict[int, np.ndarray]()
    data = model.forward.images(request.data)
    weights, grad = model.flat[: layout.num_params], model.grad
    free = request.free(layout)
    keep = None if free is None else model.arranged(free.astype(np.float32))
    model.load(request.start)
    if request.active is not None and not request.active.all():
        weights[: layout.num_prunable].mul_(model.arranged(request.active.astype(np.float32)))
    memory, step, loss_sum = recipe.optimizer.memory(grad), 0, 0.0
    model.module.train()
    for epoch, parts in enumerate(request.batches, 1):
        loss_sum = 0.0
        for part in parts:
            batch = data.batch(torch.from_numpy(part).to(model.device))
            grad.zero_()
            loss = recipe.loss(model.forward.train(batch.x), batch.y)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach()) * len(part)
            with torch.no_grad():
                direction = recipe.optimizer(grad, weights, memory, step + 1, keep)
                weights.add_(direction, alpha=-request.rates[step])
            step += 1
        if epoch in request.snapshots:
            snapshots[epoch] = model.in_order(model.flat)
    return TrainingResult(model.save(), loss_sum / sum(map(len, request.batches[-1])), snapshots)
