"""Masks as what is learned, over weights that never change: sampled, cut at zero, top-k, and of 1-bit weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.models.call import call_with
from fedlth.models.layout import Layout, Params
from fedlth.models.seed import seed_torch
from fedlth.tickets.evidence import Lesson
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import examined
from fedlth.training.metrics import num_counted


def learn(
    model: FlatModel,
    frozen: Params,
    scores: np.ndarray,
    *,
    data: Examples,
    lesson: Lesson,
    batch_size: int,
    order: np.random.Generator,
    torch_seed: int,
) -> tuple[np.ndarray, float]:
    """Train scores (num_prunable,) by the loss of the masked frozen net; return (scores, mean loss of the last epoch).

    The forward pass sees a mask, the backward pass the scores behind it (straight-through), the unselected too.
    "bernoulli" samples the mask from sigmoid(scores), "threshold" keeps scores above zero; "edge_popup" keeps each
    layer's `density` of highest |score|; "biprop" does, over sign(w) times the mean |w| of what is kept. The scores
    returned say "higher is kept": |score| for those two. The loss is the model's, as evaluations ask it; one that is
    not finite raises FloatingPointError.
    """
    data = examined(model.loss, data)
    layout, chances = model.layout, lesson.rule in ("bernoulli", "threshold")
    model.load(frozen)
    model.module.train()
    weights = _by_name(torch.from_numpy(frozen.floats).to(model.device), layout)
    alive = None if lesson.alive.all() else torch.from_numpy(lesson.alive.astype(np.float32)).to(model.device)
    seed_torch(torch_seed)
    learned = torch.from_numpy(scores.copy()).to(model.device).requires_grad_()
    momentum = torch.zeros_like(learned)
    epochs = Budget(epochs=lesson.epochs, steps=lesson.steps)(len(data), batch_size, order)
    steps, step, loss_sum, told = sum(map(len, epochs)), 0, 0.0, 0
    for parts in epochs:
        loss_sum, told = 0.0, 0
        for part in parts:
            batch = data.batch(torch.from_numpy(part).to(model.device))
            bits = _present(learned, dice=lesson.rule == "bernoulli") if chances else _top(learned, layout, lesson)
            if alive is not None:
                bits = bits * alive
            masks = _by_name(bits, layout, prunable=True)
            net = {n: _one_bit(weights[n], m) if lesson.rule == "biprop" else weights[n] * m for n, m in masks.items()}
            loss = model.loss(call_with(model.module, net, batch.x), batch.y)
            (slope,) = torch.autograd.grad(loss, learned)
            with torch.no_grad():
                if lesson.weight_decay:
                    slope = slope + lesson.weight_decay * learned
                if lesson.momentum:
                    slope = momentum.mul_(lesson.momentum).add_(slope)
                learned -= (lesson.lr if chances else _cosine(lesson.lr, step, steps)) * slope
            loss_sum += float(loss.detach()) * num_counted(batch.y)
            told += num_counted(batch.y)
            if not math.isfinite(loss_sum):
                raise FloatingPointError(f"training diverged: loss {loss_sum} at score learning rate {lesson.lr}")
            step += 1
    done = learned.detach() if chances else learned.detach().abs()
    return done.cpu().numpy(), loss_sum / told


def _cosine(lr: float, step: int, steps: int) -> float:
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def _present(scores: Tensor, *, dice: bool) -> Tensor:
    """Return which weights are there, with the gradient of sigmoid(scores): sampled, or those more likely than not."""
    theta = torch.sigmoid(scores)
    hard = torch.bernoulli(theta.detach()) if dice else (scores.detach() > 0).float()
    return hard + theta - theta.detach()


def _top(scores: Tensor, layout: Layout, lesson: Lesson) -> Tensor:
    """Return each layer's best by |score| as ones, at least one a layer, with the scores' own gradient."""
    size = scores.abs()
    ranked = size.detach().clone()
    ranked[torch.from_numpy(~lesson.alive).to(ranked.device)] = -1.0
    hard = torch.zeros_like(ranked)
    for e in layout.prunable:
        kept = max(1, round(lesson.density * e.size))
        hard[e.slice][torch.topk(ranked[e.slice], min(kept, e.size)).indices] = 1.0
    return hard + size - size.detach()


def _one_bit(weight: Tensor, mask: Tensor) -> Tensor:
    """Return sign(w) x mean |w| of what is kept, masked; backward as w x mask: large weights learn more."""
    kept = mask.detach()
    scale = (weight.abs() * kept).sum() / kept.sum().clamp(min=1)
    return (weight.sign() * scale * kept) + weight * (mask - kept)


def _by_name(flat: Tensor, layout: Layout, *, prunable: bool = False) -> dict[str, Tensor]:
    entries = layout.prunable if prunable else layout.floats
    return {e.name: flat[e.slice].view(e.shape) for e in entries}
