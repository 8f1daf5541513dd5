"""Pulls: a term of the objective over the weights and a vector, the training's start or what a method gives."""

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


NO_PULL = Proximal(mu=0.0)
