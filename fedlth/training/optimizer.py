"""Optimizers: how a gradient becomes a step of one flat vector; each equals torch.optim's of its name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Memory = tuple[Tensor, ...]


class Optimizer(Protocol):
    """Turns gradients into the direction of a step, over one flat vector of P parameters."""

    def memory(self, like: Tensor, /) -> Memory:
        """Return what is kept from step to step, as it is before the first."""
        ...

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        """Return the direction (P,): the weights go `lr` times it down. `grad` and `memory` are changed in place.

        step counts from 1. free (P,): 0.0 where a weight must not move and has no memory, else 1.0; None: all move.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent with heavy-ball or Nesterov momentum, as torch.optim.SGD."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _within("momentum", self.momentum, 0, 1)
        _within("weight_decay", self.weight_decay, 0, math.inf)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    def memory(self, like: Tensor, /) -> Memory:
        return (torch.zeros_like(like),) if self.momentum else ()

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        grad = _decayed(grad, weights, self.weight_decay, free)
        if not memory:
            return grad
        velocity = memory[0].mul_(self.momentum).add_(grad)
        return grad.add_(velocity, alpha=self.momentum) if self.nesterov else velocity


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam; weight decay is added to the gradient. Kingma & Ba, ICLR 2015, arXiv 1412.6980."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_adam(self.betas, self.eps, self.weight_decay)

    def memory(self, like: Tensor, /) -> Memory:
        return torch.zeros_like(like), torch.zeros_like(like)

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        return _adam(_decayed(grad, weights, self.weight_decay, free), memory, step, self.betas, self.eps, free)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with weight decay apart from the gradient. Loshchilov & Hutter, ICLR 2019, arXiv 1711.05101."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check_adam(self.betas, self.eps, self.weight_decay)

    def memory(self, like: Tensor, /) -> Memory:
        return torch.zeros_like(like), torch.zeros_like(like)

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        direction = _adam(_decayed(grad, weights, 0.0, free), memory, step, self.betas, self.eps, free)
        if not self.weight_decay:
            return direction
        return direction.add_(weights if free is None else weights * free, alpha=self.weight_decay)


def _adam(
    grad: Tensor, memory: Memory, step: int, betas: tuple[float, float], eps: float, free: Tensor | None
) -> Tensor:
    first, second = memory
    first.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    below = second / (1 - betas[1] ** step)
    if free is None:
        below.sqrt_()
    else:  # MKL takes the root of exactly 0 a tenth as fast as that of 1; to the bit the same
        gone = 1 - free
        below.add_(gone).sqrt_().sub_(gone)
    return (first / (1 - betas[0] ** step)).div_(below.add_(eps))


def _decayed(grad: Tensor, weights: Tensor, weight_decay: float, free: Tensor | None) -> Tensor:
    if weight_decay:
        grad.add_(weights, alpha=weight_decay)
    # After the decay: a weight that must not move has no gradient, but would decay.
    return grad if free is None else grad.mul_(free)


def _check_adam(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not (isinstance(betas, tuple) and len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas)):
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for beta in betas:
        _within("betas", beta, 0, 1)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0, got {eps}")
    _within("weight_decay", weight_decay, 0, math.inf)


def _within(name: str, value: float, low: float, end: float) -> None:
    if not low <= value < end:
        raise ValueError(
            f"{name} must be " + (f"in [{low}, {end})" if end < math.inf else "at least 0") + f", got {value}"
        )
