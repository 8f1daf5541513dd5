"""Pulls: a term of the objective over the weights and a vector, often the training's start or a method's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Pull(Protocol):
    def __call__(self, grad: Tensor, weights: Tensor, anchor: Tensor, /) -> None:
        """Add the term's gradient to `grad`, in place. All are flat vectors of P parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class Proximal:
    """mu / 2 |w - anchor|^2: FedProx (arXiv 1812.06127), Ditto (2012.04221), pFedMe (2006.08848). mu 0: no pull."""

    mu: float

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"mu must be at least 0, got {self.mu}")

    def __call__(self, grad: Tensor, weights: Tensor, anchor: Tensor, /) -> None:
        grad.add_(weights - anchor, alpha=self.mu)


@dataclass(frozen=True)
class Correction:
    """<anchor, w>: the anchor itself is added to every gradient, as SCAFFOLD's c - c_k (arXiv 1910.06378).

    A method's alone: its anchor is no place but a slope.
    """

    def __call__(self, grad: Tensor, weights: Tensor, anchor: Tensor, /) -> None:
        grad.add_(anchor)


@dataclass(frozen=True, kw_only=True)
class L1:
    """strength |w|_1: draws weights to zero, whatever their size. Tibshirani, Lasso, 1996.

    `spans` are (first, end) positions in the flat vector, where a method draws some tensors alone: network slimming
    (Liu et al., ICCV 2017, arXiv 1708.06519) the scales of norms. None: all parameters.
    """

    strength: float
    spans: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def __call__(self, grad: Tensor, weights: Tensor, anchor: Tensor, /) -> None:
        for first, end in ((0, weights.shape[-1]),) if self.spans is None else self.spans:
            grad[..., first:end].add_(weights[..., first:end].sign(), alpha=self.strength)


NO_PULL = Proximal(mu=0.0)
