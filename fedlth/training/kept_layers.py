"""Linear layers that go over their kept weights alone while a torch module trains inside a ticket.

What the kernel cannot train whole (a transformer, a dropout, a loop) has layers all the same whose zeros can be left
out: each gets a forward in the kernel's loops for the time of one training, as far as its ticket is thin enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedlth.errors import StudyError
from fedlth.kernel import kernel
from fedlth.kernel.kept_matrix import KeptMatrix, Scratch
from fedlth.models.layout import Layout
from fedlth.study.compute_section import Crossovers

BELOW = 0.25  # of a layer's weights kept: fewer, and their list beats the dense product where nothing was measured


def lists_below(module: nn.Module, layout: Layout, measured: Crossovers | None, why: str) -> dict[str, float]:
    """Return the density below which each layer goes over its kept weights, by the name of its weights.

    Loads what is compiled for it. Raises StudyError where no layer can; why: what keeps the kernel from the network.
    """
    place = next(module.parameters()).device.type
    lacks = kernel.available() or ("" if place == "cpu" else f"the device is {place}")
    names = exchangeable(module, layout)
    if lacks or not names:
        none = f"; {lacks or 'and it has no plain linear layer whose kept weights alone could be trained'}"
        more = "" if lacks == why else none
        raise StudyError(f"compute: must be tuned or reference for this study, the kernel cannot run it: {why}{more}")
    KeptMatrix(np.ones((1, 1), bool), Scratch()).warm()
    below = {} if measured is None else measured.sparse_below
    return {name: below.get(name, BELOW) for name in names}


def said(below: Mapping[str, float] | None) -> list[str]:
    """Say which layers go over their kept weights inside a ticket, and below which density."""
    layers = dict[float, list[str]]()
    for name, density in (below or {}).items():
        layers.setdefault(density, []).append(name)
    lines = [
        f"    below density {density:g}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for density, names in sorted(layers.items(), reverse=True)
    ]
    return ["  in torch, inside a ticket, these layers go over their kept weights alone:", *lines] if lines else []


def exchangeable(module: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    """Return the linear layers that may go over their kept weights, by the name of their weights.

    A layer with a hook, of a subclass, or whose weights another one has too computes what a list would not.
    """
    layers = {f"{name}.weight" if name else "weight": layer for name, layer in module.named_modules()}
    return {
        e.name: layer
        for e in layout.prunable
        if not e.aliases and type(layer := layers.get(e.name)) is nn.Linear and _plain(layer)
    }


def _plain(layer: nn.Linear) -> bool:
    hooks = (
        layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks,
        layer.weight._backward_hooks, getattr(layer.weight, "_post_accumulate_grad_hooks", None),
    )  # fmt: skip
    return not any(hooks) and "forward" not in vars(layer) and layer.weight.dtype == torch.float32


@contextmanager
def exchanged(module: nn.Module, layout: Layout, below: Mapping[str, float], active: np.ndarray) -> Iterator[None]:
    """Let the layers that a mask leaves thin enough go over their kept weights.

    below: the density of each layer that may, by the name of its weights. active (num_prunable,) bool: those outside
    are zero, and get no gradient; those inside have theirs where torch would leave it.
    """
    scratch, changed = Scratch(), list[nn.Linear]()
    layers = exchangeable(module, layout)
    try:
        for e in layout.prunable:
            layer, mask = layers.get(e.name), active[e.slice]
            if layer is not None and np.count_nonzero(mask) < below.get(e.name, 0.0) * e.size:
                vars(layer)["forward"] = KeptLinear(layer, KeptMatrix(mask.reshape(e.shape), scratch))
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del vars(layer)["forward"]


@dataclass(frozen=True, eq=False)
class KeptLinear:
    """The forward of a linear layer whose weights are zero but for the kept ones."""

    layer: nn.Linear
    matrix: KeptMatrix

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        plain = x.dtype == torch.float32 and x.numel() > 0 and x.shape[-1] == layer.in_features
        if not plain or torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
            return F.linear(x, layer.weight, layer.bias)
        return _Product.apply(x, layer.weight, layer.bias, self.matrix)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """The kept product; adds the gradient of the weights to that which torch would add it to, at kept places alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: KeptMatrix) -> Tensor:
        flat = x.detach().reshape(-1, matrix.inputs).contiguous()
        y, panels = matrix.forward(flat.numpy(), _floats(weight), None if bias is None else _floats(bias))
        ctx.shape, ctx.panels, ctx.matrix, ctx.weight = x.shape, panels, matrix, weight
        return torch.from_numpy(y).view(*x.shape[:-1], matrix.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        slope, dx = dy.reshape(-1, ctx.matrix.outputs).contiguous(), None
        if wants_x or wants_weight:
            grad = _floats(ctx.weight.grad) if wants_weight else None
            found = ctx.matrix.backward(slope.numpy(), ctx.panels, grad, wants_dx=wants_x)
            dx = torch.from_numpy(found).view(ctx.shape) if wants_x else None
        return dx, None, slope.sum(0) if wants_bias else None, None


def _floats(tensor: Tensor) -> np.ndarray:
    """Return a contiguous tensor's own memory, flat."""
    found: np.ndarray = tensor.detach().view(-1).numpy()
    return found
