"""What a training makes small: one frozen value a loss, over logits and labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy; logits (N, C) with y (N,), or (N, T, C) with y (N, T)."""

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    def examples(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return (N,): each example's own loss, its mean over positions."""
        each = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="none")
        return each.reshape(len(y), -1).mean(1)


cross_entropy = CrossEntropy()
