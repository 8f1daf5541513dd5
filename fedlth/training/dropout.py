"""The rate of a model's dropout modules, set for a training and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every module that drops, with the name of its rate."""
    found: list[tuple[nn.Module, str]] = []
    for part in module.modules():
        if isinstance(part, _DropoutNd):
            found.append((part, "p"))
        # One recurrent layer drops nothing: its rate is for what lies between layers.
        elif isinstance(part, nn.MultiheadAttention) or (isinstance(part, nn.RNNBase) and part.num_layers > 1):
            found.append((part, "dropout"))
    return found


@contextmanager
def at_rate(module: nn.Module, rate: float | None) -> Iterator[None]:
    """Let every dropout module drop `rate`; None: as the model has it."""
    old = [] if rate is None else [(part, name, getattr(part, name)) for part, name in places(module)]
    try:
        for part, name, _ in old:
            setattr(part, name, rate)
        yield
    finally:
        for part, name, value in old:
            setattr(part, name, value)
