"""A training of two models at once, where the second is seen only mixed with the first: APFL's steps (2003.13461)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedlth.models.layout import Params
from fedlth.models.seed import seed_torch
from fedlth.training.dropout import at_rate
from fedlth.training.flat_model import FlatModel
from fedlth.training.metrics import num_counted
from fedlth.training.optimizer import Memory
from fedlth.training.request import TrainingRequest, TrainingResult
from fedlth.training.torch_backend import cast, descend


def mixed(shared: Params, personal: Params, share: float, weights: int) -> Params:
    """Return the model that is seen: of parameters `share` personal + (1 - share) shared; statistics are personal."""
    floats = personal.floats.copy()
    floats[:weights] = np.float32(share) * floats[:weights] + np.float32(1 - share) * shared.floats[:weights]
    return replace(personal, floats=floats)


@dataclass
class _Weights:
    """One of the two models: all its floats (F,) and counters, in the order of the module's memory."""

    floats: Tensor
    ints: list[Tensor]
    memory: Memory = field(default_factory=tuple)


def train_mixed(
    model: FlatModel, request: TrainingRequest, personal: Params, share: float, *, adapts: bool
) -> tuple[TrainingResult, Params, float]:
    """Train the shared model as `torch_backend.train` does, and in each of its steps the personal one by the mixture.

    Return the shared training's result, the personal model, and the share, which `adapts` moves at the first step
    along its own gradient <grad f(mixed), personal - shared>, within [0, 1].
    """
    recipe, layout = request.recipe, model.layout
    size, prunable = layout.num_params, layout.num_prunable
    with model.lock, at_rate(model.module, recipe.dropout):
        seed_torch(request.torch_seed)
        model.module.train()
        free = request.free(layout)
        keep = None if free is None else model.arranged(free)
        data, pair = model.forward.images(request.data), []
        for start in (request.start, personal):
            model.load(start)
            if request.active is not None and not request.active.all():
                model.flat[:prunable].mul_(model.arranged(request.active.astype(np.float32)))
            ints = [tensor.clone() for _, tensor in model.ints]
            pair.append(_Weights(model.flat.clone(), ints, recipe.optimizer.memory(model.grad)))
        ours, theirs = pair[1], pair[0]
        step, loss_sum, told = 0, 0.0, 0
        for parts in request.batches:
            loss_sum, told = 0.0, 0
            for part in parts:
                batch = request.shown(step, data.batch(torch.from_numpy(part).to(model.device)))
                seen = _Weights(ours.floats.clone(), ours.ints)
                seen.floats[:size].mul_(share).add_(theirs.floats[:size], alpha=1 - share)
                _gradient(model, request, seen, batch)
                ours.floats[size:] = seen.floats[size:]
                if step == 0 and adapts:
                    slope = float(torch.dot(model.grad, ours.floats[:size] - theirs.floats[:size]))
                    share = min(1.0, max(0.0, share - request.rates[0] * slope))
                model.grad.mul_(share)
                _take(model, request, ours, step, keep)
                loss_sum += _gradient(model, request, theirs, batch) * num_counted(batch.y)
                told += num_counted(batch.y)
                _take(model, request, theirs, step, keep)
                step += 1
        ended = []
        for one in pair:
            model.flat.copy_(one.floats)
            _counters(model, one)
            ended.append(model.save())
    return TrainingResult(ended[0], loss_sum / told), ended[1], share


def _counters(model: FlatModel, at: _Weights) -> None:
    for (_, tensor), value in zip(model.ints, at.ints, strict=True):
        tensor.copy_(value)


def _gradient(model: FlatModel, request: TrainingRequest, at: _Weights, batch: object) -> float:
    """Leave the gradient at `at` in model.grad, and its statistics in `at`; return the loss."""
    recipe = request.recipe
    model.flat.copy_(at.floats)
    _counters(model, at)
    model.grad.zero_()
    with cast(model, recipe.precision):
        outputs = model.forward.train(model.forward.images(batch).x)  # type: ignore[arg-type]
    loss = recipe.loss(outputs if recipe.precision == "float32" else outputs.float(), batch.y)  # type: ignore[attr-defined]
    loss.backward()  # type: ignore[no-untyped-call]
    at.floats.copy_(model.flat)
    for kept, (_, tensor) in zip(at.ints, model.ints, strict=True):
        kept.copy_(tensor)
    return float(loss.detach())


def _take(model: FlatModel, request: TrainingRequest, at: _Weights, step: int, keep: Tensor | None) -> None:
    """Move `at` one step down the gradient in model.grad."""
    weights, rate = at.floats[: model.layout.num_params], request.rates[step]
    with torch.no_grad():
        descend(request.recipe, model.grad, weights, at.memory, step=step + 1, rate=rate, keep=keep)
