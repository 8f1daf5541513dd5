"""A training in torch, a few calls a step over one flat vector: what every other backend must equal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.models.seed import seed_torch
from fedlth.training.dp_sgd import NoisyPass, opened
from fedlth.training.dropout import at_rate
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_layers import Exchange, exchanged
from fedlth.training.loss import Loss
from fedlth.training.metrics import num_counted
from fedlth.training.optimizer import Adam, AdamW, Memory, Sgd
from fedlth.training.pull import L1, Correction, Proximal
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, TrainingResult
from fedlth.training.view import Ask, Gradient, Pass

# Optimizers that are known to leave alone what must not move, and see each number alone; a subclass is another one.
EXACT = (Sgd, Adam, AdamW)
PULLS = (Proximal, Correction, L1)  # of a finite weight a finite gradient
FEW = 0.5  # of the weights move: fewer, and gathering them costs less than passing over the rest
PIECE = 1 << 18  # numbers that a step of these works on at once: what it makes on the way then stays in the cache


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks; seeds torch's generator and uses the module, so that others must wait for both."""
    with model.lock, at_rate(model.module, request.recipe.dropout):
        seed_torch(request.torch_seed)
        view = request.recipe.view
        with (
            view.opened(model, request) as gradient,
            opened(model, request) as noisy,
            _kept(model, request) as exchange,
        ):
            return _train(model, request, gradient, noisy, exchange)


def _kept(model: FlatModel, request: TrainingRequest) -> AbstractContextManager[Exchange | None]:
    """Return what lets layers go over their kept weights, where the network sees the trained weights themselves."""
    recipe = request.recipe
    dense = recipe.views or recipe.dp is not None or recipe.precision != "float32"
    if model.kept is None or request.active is None or dense:
        return nullcontext()
    return exchanged(model, model.kept, request.active, request.free(model.layout))


def _train(
    model: FlatModel,
    request: TrainingRequest,
    gradient: Gradient | None,
    noisy: NoisyPass | None,
    exchange: Exchange | None,
) -> TrainingResult:
    """Train; `gradient` is that of the recipe's view, None where the network sees the weights themselves.

    `noisy` is the pass of a training with noise, None for a plain one; `exchange` the layers on their kept weights.
    """
    recipe, layout, snapshots = request.recipe, model.layout, dict[int, np.ndarray]()
    data = model.forward.images(request.data)
    # What nothing trains lies at the ends, and costs no step anything; a view may look at it.
    part = layout.trained if gradient is None else slice(0, layout.num_params)
    weights, grad = model.flat[part], model.grad[part]
    free = request.free(layout)
    keep = None if free is None or free[part].all() else model.arranged(free)[part]
    model.load(request.start)
    if request.active is not None and not request.active.all():
        model.flat[: layout.num_prunable].mul_(model.arranged(request.active))
    anchor = _anchor(model, request)[part] if recipe.pulls else None
    if gradient is not None:  # the module's memory is then what the network sees, and these what is trained
        weights = weights.clone()
    few = None
    if keep is not None and model.kept is not None and _gathers(recipe, keep):
        few = _Few(keep, grad, weights, part.start, exchange)
        anchor, keep = None if anchor is None else anchor[few.places], None
    memory = recipe.optimizer.memory(grad if few is None else few.grad)
    step, loss_sum, seen = 0, 0.0, 0
    model.module.train()
    for epoch, parts in enumerate(request.batches, 1):
        loss_sum, seen = 0.0, 0
        for places in parts:
            batch = request.shown(step, data.batch(torch.from_numpy(places).to(model.device)))
            count = len(places) if noisy is not None else num_counted(batch.y)
            seen += count
            if noisy is not None:
                loss_sum += noisy(step, batch)
            elif gradient is None:
                loss = _pass(model, recipe, recipe.loss, batch, exchange)[1]
                loss_sum += float(loss) * count
            else:
                found, value = gradient(weights, recipe.first_step + step, _asking(model, recipe, batch))
                grad.copy_(found)
                loss_sum += value * count
            with torch.no_grad():
                rate = request.rates[step]
                slope, moving = (grad, weights) if few is None else few.gathered()
                descend(recipe, slope, moving, memory, step=step + 1, rate=rate, keep=keep, anchor=anchor)
                if few is not None:
                    few.put_back()
            step += 1
        if epoch in request.snapshots:
            if gradient is not None:
                _put(model, weights)
            snapshots[epoch] = model.in_order(model.flat)
    if gradient is not None:
        _put(model, weights)
    return TrainingResult(model.save(), loss_sum / max(1, seen), snapshots)


class _Few:
    """The weights that move and their gradients, gathered: a step then passes over no others.

    First come those of layers that go over their kept weights, which leave both here themselves.
    """

    def __init__(self, keep: Tensor, grad: Tensor, weights: Tensor, first: int, exchange: Exchange | None) -> None:
        self.flat_grad, self.flat, count = grad, weights, 0
        if exchange is not None and exchange.whole:
            ours, count = exchange.places - first, len(exchange.places)
            keep = keep.clone()
            keep[ours] = False
            self.rest = torch.nonzero(keep).view(-1)
            self.places = torch.cat((ours, self.rest))
        else:
            self.places = self.rest = torch.nonzero(keep).view(-1)
        self.grad, self.weights = torch.zeros(len(self.places)), weights.index_select(0, self.places)
        self.ends = self.grad[count:], self.weights[count:]
        if exchange is not None and count:
            exchange.leave_in(self.grad[:count], self.weights[:count])

    def gathered(self) -> tuple[Tensor, Tensor]:
        for source, end in zip((self.flat_grad, self.flat), self.ends, strict=True):
            torch.index_select(source, 0, self.rest, out=end)
        return self.grad, self.weights

    def put_back(self) -> None:
        self.flat.index_copy_(0, self.places, self.weights)


def _gathers(recipe: TrainingRecipe, keep: Tensor) -> bool:
    """Say whether a step gathers the weights that move; else it goes over all.

    Only where layers go over their kept weights: the norm that clips then sums in another order.
    """
    known = type(recipe.optimizer) in EXACT and (not recipe.pulls or type(recipe.pull) in PULLS)
    return known and int(keep.count_nonzero()) < FEW * len(keep)


def _pass(
    model: FlatModel, recipe: TrainingRecipe, loss: Loss, batch: Examples, exchange: Exchange | None = None
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of a batch's loss in the model; return its outputs and its loss."""
    if exchange is None:
        model.grad[model.layout.trained].zero_()
    else:
        exchange.begin()
    with cast(model, recipe.precision):
        outputs = model.forward.train(model.forward.images(batch).x)
    outputs = outputs if recipe.precision == "float32" else outputs.float()
    found = loss(outputs, batch.y)
    found.backward()  # type: ignore[no-untyped-call]
    if exchange is not None:
        exchange.end()
    return outputs.detach(), found.detach()


def _asking(model: FlatModel, recipe: TrainingRecipe, batch: Examples) -> Ask:
    """Return what a view runs the step's batch through the network with."""

    def ask(seen: Tensor, loss: Loss | None = None, /) -> Pass:
        _put(model, seen)
        outputs, found = _pass(model, recipe, loss or recipe.loss, batch)
        return Pass(model.grad.clone(), outputs, float(found))

    return ask


def _put(model: FlatModel, weights: Tensor) -> None:
    """Put weights (P,) into the module's memory."""
    model.flat[: len(weights)].copy_(weights)


def descend(
    recipe: TrainingRecipe,
    grad: Tensor,
    weights: Tensor,
    memory: Memory,
    *,
    step: int,
    rate: float,
    keep: Tensor | None,
    anchor: Tensor | None = None,
) -> None:
    """Take one step down `grad` (P,), with the recipe's pull where there is an anchor; all tensors change in place.

    step counts from 1. keep (P,) bool: what may move, None for all; every other weight stays as it is, whatever a
    user's optimizer or pull makes of it, no number at all included.
    """
    exact = type(recipe.optimizer) in EXACT
    if anchor is not None:
        recipe.pull(grad, weights, anchor)
    if keep is not None and not (exact and (anchor is None or type(recipe.pull) in PULLS)):
        grad.masked_fill_(~keep, 0.0)  # a product would leave 0 / 0 what it is
    elif keep is not None and (anchor is not None or recipe.clip_norm is not None):
        for piece in _pieces(len(grad), PIECE):
            grad[piece].mul_(_as_numbers(keep[piece], grad))
    if recipe.clip_norm is not None:
        clip(grad, recipe.clip_norm)
    pieces = _pieces(len(weights), PIECE if exact else len(weights))
    for piece in pieces:
        free = None if keep is None else _as_numbers(keep[piece], weights)
        known = tuple(one[piece] for one in memory) if len(pieces) > 1 else memory
        direction = recipe.optimizer(grad[piece], weights[piece], known, step, free)
        if keep is not None and not exact:
            direction = torch.where(keep, direction, 0.0)
        weights[piece].add_(direction, alpha=-rate)


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, count, max(1, size))]


def _as_numbers(keep: Tensor, like: Tensor) -> Tensor:
    """Return (P,) bool as zeros and ones of like's type; by way of bytes, which torch casts several times as fast."""
    return keep.view(torch.uint8).to(like.dtype)


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
    """Return what a forward pass runs in, at this precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(model.device).type, dtype=torch.bfloat16)
