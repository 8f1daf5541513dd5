"""DP-SGD: each example's gradient clipped, their sum made noisy, over the weights that a mask keeps.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133. Examples' gradients are opacus'
(Yousefpour et al., arXiv 2109.12298). Its optimizer is not used: it adds noise to every weight, the pruned too, from
torch's own generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.errors import require
from fedlth.models.call import call
from fedlth.models.layout import Layout
from fedlth.rng import stream
from fedlth.training.flat_model import FlatModel

EXTRA = "privacy"
SAMPLE = "grad_sample"  # where opacus leaves a parameter's gradients


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """Noise of `noise_multiplier` times `max_grad_norm`, the norm that each example's gradient is clipped to."""

    noise_multiplier: float
    max_grad_norm: float
    delta: float


class Asked(Protocol):
    """What noise is told of a training: the part of a TrainingRequest that it looks at."""

    @property
    def recipe(self) -> Any: ...
    @property
    def data(self) -> Examples: ...
    @property
    def noise_seed(self) -> int: ...
    def free(self, layout: Layout) -> np.ndarray | None: ...


def poisson(size: int, batch_size: int, order: np.random.Generator) -> np.ndarray:
    """Draw a step's batch of `size` examples: each is in it with probability `rate`, whoever else is; it may be empty.

    That is the sampling which the accountant assumes.
    """
    return np.flatnonzero(order.random(size) < rate(size, batch_size))


def rate(size: int, batch_size: int) -> float:
    """Return the probability that an example is in a step's batch."""
    return min(1.0, batch_size / size)


# Given a step (from 0) and its batch: leaves the noisy gradient in the model, returns the sum of the examples' losses.
NoisyPass = Callable[[int, Examples], float]


@contextmanager
def opened(model: FlatModel, request: Asked) -> Iterator[NoisyPass | None]:
    """Give what takes the place of a step's pass where the recipe has noise; None where it has none.

    A view of the weights has a gradient of its own, which is not known to be a sum over examples: ValueError.
    """
    recipe = request.recipe
    dp: DpSgd | None = recipe.dp
    if dp is None:
        yield None
        return
    if recipe.views:
        raise ValueError(f"privacy.dp: a view of the weights ({type(recipe.view).__name__}) has no examples' gradients")
    free = request.free(model.layout)
    keep = None if free is None else model.arranged(free.astype(np.float32))
    size = len(request.data)
    expected = size * rate(size, recipe.batch_size)
    deviation = dp.noise_multiplier * dp.max_grad_norm

    def one(step: int, batch: Examples) -> float:
        total, loss = torch.zeros_like(model.grad), 0.0
        if len(batch):
            rows_BP, loss = each_gradient(model, recipe.loss, batch)
            if keep is not None:
                rows_BP *= keep
            norms = torch.linalg.vector_norm(rows_BP, dim=1)
            # An example whose gradient is no number has none: it must not be told from others by what it breaks.
            finite = torch.isfinite(norms)
            rows_BP[~finite] = 0.0
            scale = torch.where(finite, (dp.max_grad_norm / (norms + 1e-6)).clamp(max=1.0), 0.0)
            total = scale @ rows_BP
        drawn = stream(request.noise_seed, "noise", recipe.first_step + step).standard_normal(len(total), np.float32)
        noise = model.arranged(drawn)
        total.add_(noise if keep is None else noise * keep, alpha=deviation)
        model.grad.copy_(total.div_(expected))
        return loss

    with sampled(model):
        yield one


@contextmanager
def sampled(model: FlatModel) -> Iterator[None]:
    """Let backward passes through the module leave each example's gradients with the parameters."""
    require("privacy.dp", "opacus", extra=EXTRA)
    from opacus.grad_sample import GradSampleHooks

    # Its own rule for convolutions reads images as if channels lay first in memory (as_strided).
    last = model.forward.channels_last
    hooks = GradSampleHooks(model.module, loss_reduction="sum", force_functorch=last)
    try:
        with warnings.catch_warnings():
            # Of the first layer, whose inputs need no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            yield
    finally:
        hooks.cleanup()


def each_gradient(model: FlatModel, loss: Any, batch: Examples) -> tuple[Tensor, float]:
    """Return each example's gradient (B, P) in the order of the module's memory, and the sum of their losses.

    Inside `sampled` alone. The loss must have `examples`; what nothing trains has zeros.
    """
    outputs = call(model.module, batch.x)
    found: Tensor = loss.examples(outputs, batch.y).sum()
    found.backward()  # type: ignore[no-untyped-call]
    named = dict(model.module.named_parameters(remove_duplicate=False))
    rows_BP = torch.zeros(len(batch), model.layout.num_params, device=model.device)
    for e in model.layout.floats:
        sample: Tensor | None = getattr(named.get(e.name), SAMPLE, None)
        if sample is not None:
            rows_BP[:, e.slice] = model.in_memory_order(e, sample)
            setattr(named[e.name], SAMPLE, None)
    return rows_BP, float(found.detach())
