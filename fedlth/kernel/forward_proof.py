"""Proof that another forward is the same function as a module: what both say and learn in both modes, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@contextmanager
def restored(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Put the module's modes and buffers and torch's generator back afterwards; yield each buffer beside its value."""
    modes = {part: part.training for part in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield buffers
    finally:
        for part, training in modes.items():
            part.training = training
        for buffer, value in buffers:  # a forward that counts its calls has counted these
            buffer.copy_(value)


def outcomes(
    module: nn.Module, train: Forward, evaluate: Forward, examples: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of each batch (N, ...) in training and in evaluation mode, and all gradients in training.

    `train` and `evaluate` are forwards over the module's own parts, whose modes are set before each.
    """
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for x in examples:
        module.train()
        logits = train(x.clone())
        if logits.requires_grad:
            gradients += torch.autograd.grad((logits * logits.detach().cos()).sum(), weights, materialize_grads=True)
        module.eval()
        with torch.no_grad():
            outputs += [logits.detach(), evaluate(x.clone())]
    return outputs, gradients
