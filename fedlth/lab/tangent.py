"""The network in its tangent space: linear in its weights, around where it starts.

Does linearised training predict training? Wentworth, Updating the Lottery Ticket Hypothesis, LessWrong 2021; Jacot,
Gabriel, Hongler, Neural Tangent Kernel, NeurIPS 2018, arXiv 1806.07572. Forward-mode: torch.func.jvp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from fedlth.data.examples import Examples
from fedlth.models.call import call_with
from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel
from fedlth.training.recipe import TrainingRecipe


@dataclass(frozen=True, eq=False)
class Tangent:
    """f_lin(d; x) = f(theta; x) + J(theta; x) d, over all parameters, buffers fixed, in evaluation mode."""

    model: FlatModel
    theta: Params
    double: bool = False

    def logits(self, delta: Tensor, x: Tensor) -> Tensor:
        """Return the linearised logits at theta + delta; delta (num_params,)."""
        base, fixed = self._split()
        value, slope = jvp(lambda w: self._call(w, fixed, x), (base,), (delta,))  # type: ignore[misc]
        logits: Tensor = value + slope
        return logits

    def exact(self, delta: Tensor, x: Tensor) -> Tensor:
        """Return the network's own logits at theta + delta."""
        base, fixed = self._split()
        with torch.no_grad():
            return self._call(base + delta, fixed, x)

    def remainder(self, delta: Tensor, x: Tensor) -> float:
        """Return the norm of what the linearised network misses at theta + delta."""
        with torch.no_grad():
            return float(torch.linalg.vector_norm(self.exact(delta, x) - self.logits(delta, x)))

    def zero(self) -> Tensor:
        """Return a delta of zeros."""
        return torch.zeros_like(self._split()[0])

    def _split(self) -> tuple[Tensor, dict[str, Tensor]]:
        layout, size = self.model.layout, self.model.layout.num_params
        flat = torch.from_numpy(self.theta.floats.copy()).to(self.model.device)
        flat = flat.double() if self.double else flat
        fixed = {e.name: flat[e.slice].view(e.shape) for e in layout.floats if e.role == "buffer"}
        return flat[:size], fixed

    def _call(self, weights: Tensor, fixed: dict[str, Tensor], x: Tensor) -> Tensor:
        layout = self.model.layout
        self.model.module.eval()
        named = {e.name: weights[e.slice].view(e.shape) for e in layout.floats if e.role == "param"}
        return call_with(self.model.module, {**named, **fixed}, x)


def remainders(tangent: Tangent, delta: Tensor, x: Tensor, halvings: int) -> tuple[float, ...]:
    """Return the remainder at delta, delta / 2, delta / 4, ...: a smooth network's falls by 4 each time."""
    return tuple(tangent.remainder(delta / 2**i, x) for i in range(halvings + 1))


def fine_tune(
    tangent: Tangent,
    data: Examples,
    *,
    recipe: TrainingRecipe,
    order: np.random.Generator,
    mask: np.ndarray | None = None,
) -> Tensor:
    """Train delta by SGD on the loss of the linearised network; return it.

    `mask` (num_prunable,) bool: weights outside keep their value. A loss that is not finite raises FloatingPointError.
    """
    x, y = data.tensor, data.y
    delta = tangent.zero()
    layout = tangent.model.layout
    free = layout.trainable if mask is None else layout.trainable & layout.over_params(mask)
    moves, memory = torch.from_numpy(free).to(delta), recipe.optimizer.memory(delta)
    epochs = recipe.budget(len(y), recipe.batch_size, order)
    steps, step = sum(map(len, epochs)), 0
    for parts in epochs:
        for part in parts:
            index = torch.from_numpy(part)
            delta.requires_grad_()
            loss = recipe.loss(tangent.logits(delta, x[index]), y[index])
            if not torch.isfinite(loss):
                raise FloatingPointError(f"linearised training diverged: loss {float(loss)} at rate {recipe.lr}")
            (slope,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                direction = recipe.optimizer(slope, delta, memory, step + 1, moves)
                delta = delta - recipe.rate(step, steps) * direction
            step += 1
    return delta


def accuracy(tangent: Tangent, delta: Tensor, data: Examples, *, linear: bool) -> float:
    """Return the accuracy at theta + delta of the linearised network, or of the network itself."""
    x, y = data.tensor, data.y
    right = 0
    for at in range(0, len(y), 256):
        part = x[at : at + 256]
        with torch.no_grad():
            logits = tangent.logits(delta, part) if linear else tangent.exact(delta, part)
        right += int((logits.argmax(-1) == y[at : at + 256]).sum())
    return right / len(y)
