"""A training in torch, a few calls a step over one flat vector: what every other backend must equal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fedlth.training.dropout import at_rate
from fedlth.training.flat_model import FlatModel
from fedlth.training.optimizer import Adam, AdamW, Sgd
from fedlth.training.request import TrainingRequest, TrainingResult

EXACT = (Sgd, Adam, AdamW)  # optimizers that are known to leave alone what must not move


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks; seeds torch's generator and uses the module, so that others must wait for both."""
    with model.lock, at_rate(model.module, request.recipe.dropout):
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
    anchor = _anchor(model, request) if recipe.pulls else None
    foreign = keep is not None and not isinstance(recipe.optimizer, EXACT)
    memory, step, loss_sum = recipe.optimizer.memory(grad), 0, 0.0
    model.module.train()
    for epoch, parts in enumerate(request.batches, 1):
        loss_sum = 0.0
        for part in parts:
            batch = request.shown(step, data.batch(torch.from_numpy(part).to(model.device)))
            grad.zero_()
            with cast(model, recipe.precision):
                outputs = model.forward.train(model.forward.images(batch).x)
            loss = recipe.loss(outputs if recipe.precision == "float32" else outputs.float(), batch.y)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach()) * len(part)
            with torch.no_grad():
                if anchor is not None:
                    recipe.pull(grad, weights, anchor)
                if keep is not None and (foreign or anchor is not None or recipe.clip_norm is not None):
                    grad.mul_(keep)
                if recipe.clip_norm is not None:
                    clip(grad, recipe.clip_norm)
                direction = recipe.optimizer(grad, weights, memory, step + 1, keep)
                if foreign and keep is not None:
                    direction = direction * keep
                weights.add_(direction, alpha=-request.rates[step])
            step += 1
        if epoch in request.snapshots:
            snapshots[epoch] = model.in_order(model.flat)
    return TrainingResult(model.save(), loss_sum / sum(map(len, request.batches[-1])), snapshots)


def clip(grad: Tensor, most: float) -> None:
    """Scale gradients (..., P) in place to a norm of `most` where theirs is larger; torch's clip_grad_norm_."""
    norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))


def _anchor(model: FlatModel, request: TrainingRequest) -> Tensor:
    """Return where the pull draws to; weights that are pruned have none."""
    size = model.layout.num_params
    if request.anchor is None:
        return model.flat[:size].clone()
    return model.arranged(request.anchor.floats[:size])


def cast(model: FlatModel, precision: str) -> AbstractContextManager[object]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(model.device).type, dtype=torch.bfloat16)
