"""What a training makes small: one frozen value a loss, over a model's outputs and its targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

IGNORED = -100  # a label that no loss counts, as in torch


class Loss(Protocol):
    def __call__(self, outputs: Tensor, y: Tensor, /) -> Tensor:
        """Return the mean loss, a scalar."""
        ...

    def examples(self, outputs: Tensor, y: Tensor, /) -> Tensor:
        """Return (N,): each example's own loss."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy; logits (N, C) with y (N,), or (N, T, C) with y (N, T). Labels of -100 do not count."""

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    def examples(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return (N,): each example's own loss, its mean over positions."""
        each = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="none")
        return each.reshape(len(y), -1).sum(1) / (y != IGNORED).reshape(len(y), -1).sum(1).clamp(min=1)


@dataclass(frozen=True)
class MeanSquaredError:
    """Mean squared error; outputs and y (N,) or (N, k), or outputs (N, 1) with y (N,)."""

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(outputs.reshape(y.shape), y)

    def examples(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return (N,): each example's own loss, its mean over what is predicted."""
        return (outputs.reshape(y.shape) - y).square().reshape(len(y), -1).mean(1)


cross_entropy = CrossEntropy()
