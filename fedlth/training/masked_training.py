"""Weights trained together with what makes their mask: thresholds of rows, a gate that looks at each batch.

Plain torch over one flat vector, client by client, as the reference backend does it: with a mask that keeps everything
and no gradient of its own it is that training, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.models.call import call_with
from fedlth.models.layout import Layout, Params
from fedlth.models.seed import seed_torch
from fedlth.training.dropout import at_rate
from fedlth.training.flat_model import FlatModel
from fedlth.training.metrics import num_counted
from fedlth.training.request import TrainingRequest
from fedlth.training.torch_backend import cast, descend


class Masking(Protocol):
    """How numbers beside the weights make a mask; a frozen value. All are flat vectors on the model's device."""

    def mask(self, weights: Tensor, extra: Tensor, batch: Examples, layout: Layout, /) -> Tensor:
        """Return (num_prunable,) ones and zeros, with the gradient that `weights` and `extra` are to have through it.

        Called once a step, before the forward pass, without gradient too: may change `extra` in place under no_grad.
        """
        ...

    def penalty(self, extra: Tensor, /) -> Tensor:
        """Return what is added to the loss."""
        ...


@dataclass(frozen=True, eq=False)
class Masked:
    """Where a training ended; the last epoch's mean loss; the share of steps in which each weight was alive.

    `params` are whole, what no mask keeps included; `extra` as the last step left it; `often` (num_prunable,) float64.
    """

    params: Params
    extra: np.ndarray
    often: np.ndarray
    loss: float


def train(
    model: FlatModel, request: TrainingRequest, masking: Masking, extra: np.ndarray, *, pace: float = 1.0
) -> Masked:
    """Train weights by the request's recipe and `extra` (E,) by SGD at `pace` times its rate, both by one loss.

    The loss told is without the penalty. Raises FloatingPointError where it is not finite.
    """
    with model.lock, at_rate(model.module, request.recipe.dropout):
        seed_torch(request.torch_seed)
        return _train(model, request, masking, extra, pace)


def _train(model: FlatModel, request: TrainingRequest, masking: Masking, extra: np.ndarray, pace: float) -> Masked:
    recipe, layout, data = request.recipe, model.layout, request.data
    size, count = layout.num_prunable, layout.num_params
    model.load(request.start)
    model.module.train()
    entries = [e for e in layout.floats if e.role == "param"]
    weights = torch.from_numpy(request.start.floats[:count].copy()).to(model.device).requires_grad_()
    held = torch.from_numpy(extra.astype(np.float32)).to(model.device).requires_grad_()
    free = request.free(layout)
    keep = None if free is None else torch.from_numpy(free).to(model.device)
    anchor = weights.detach().clone() if recipe.pulls else None
    memory, often = recipe.optimizer.memory(torch.zeros_like(weights)), torch.zeros(size, device=model.device)
    step, loss_sum, told = 0, 0.0, 0
    for parts in request.batches:
        loss_sum, told = 0.0, 0
        for part in parts:
            batch = request.shown(step, data.batch(torch.from_numpy(part).to(model.device)))
            mask = masking.mask(weights, held, batch, layout)
            seen = torch.cat((weights[:size] * mask, weights[size:]))
            net = {e.name: seen[e.slice].view(e.shape) for e in entries}
            with cast(model, recipe.precision):
                outputs = call_with(model.module, net, batch.x)
            loss = recipe.loss(outputs if recipe.precision == "float32" else outputs.float(), batch.y)
            grad, slope = torch.autograd.grad(loss + masking.penalty(held), (weights, held), allow_unused=True)
            assert grad is not None
            loss_sum += float(loss.detach()) * num_counted(batch.y)
            told += num_counted(batch.y)
            with torch.no_grad():
                often += mask
                rate = request.rates[step]
                descend(recipe, grad, weights, memory, step=step + 1, rate=rate, keep=keep, anchor=anchor)
                if slope is not None:
                    held.add_(slope, alpha=-pace * rate)
            step += 1
    if not (np.isfinite(loss_sum) and bool(torch.isfinite(weights).all()) and bool(torch.isfinite(held).all())):
        raise FloatingPointError(f"training diverged: loss {loss_sum}")
    saved = model.save()  # buffers that the forward passes moved
    floats = np.concatenate((weights.detach().cpu().numpy(), saved.floats[count:]))
    return Masked(
        Params(floats, saved.ints), held.detach().cpu().numpy(), (often.double() / step).cpu().numpy(), loss_sum / told
    )
