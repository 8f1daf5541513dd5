"""What a linear layer or convolution computes from its kept weights alone, as an autograd function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedlth.kernel.kept_form import LINEAR, Convolution
from fedlth.kernel.kept_matrix import KeptMatrix, Scratch

Layer = nn.Linear | nn.Conv2d


def form_of(layer: nn.Module | None) -> Convolution | None:
    """Return what a layer does beside its weights; None for what cannot go over its kept weights.

    That is another kind of layer, and a convolution whose rim is not as wide before the map as behind it, or no zeros.
    """
    if type(layer) is nn.Linear:
        return LINEAR
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros":
        return None
    window, stride, dilation = (_pair(one) for one in (layer.kernel_size, layer.stride, layer.dilation))
    rims = [d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    if layer.padding == "same":
        if any(one % 2 for one in rims):
            return None
        padding = rims[0] // 2, rims[1] // 2
    else:
        padding = (0, 0) if layer.padding == "valid" else _pair(layer.padding)
    return Convolution(window, stride, padding, dilation, layer.groups)


def _pair(given: Any) -> tuple[int, int]:
    y, x = given
    return int(y), int(x)


@dataclass(eq=False)
class KeptForward:
    """What a layer's forward is for the time of a training; adds the kept weights' gradient to `slopes` (kept,)."""

    layer: Layer
    matrix: KeptMatrix
    slopes: np.ndarray
    trained: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not self._plain(x) or torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
            return type(layer).forward(layer, x)  # type: ignore[arg-type]
        return _Product.apply(x, layer.weight, layer.bias, self)  # type: ignore[no-any-return, no-untyped-call]

    def _plain(self, x: Tensor) -> bool:
        if x.dtype != torch.float32 or not x.numel():
            return False
        if isinstance(self.layer, nn.Linear):
            return bool(x.shape[-1] == self.matrix.inputs)
        return x.dim() == 4 and x.shape[1] == self.matrix.inputs and all(n > 0 for n in self.matrix.layer.out(_size(x)))


def kept_forward(layer: Layer, mask: np.ndarray, scratch: Scratch) -> KeptForward:
    """Return the forward of a layer over the weights inside a mask; mask: bool, as the layer's weights."""
    form = form_of(layer)
    assert form is not None
    matrix = KeptMatrix(mask, scratch, form, moved=_moved(layer))
    return KeptForward(layer, matrix, np.zeros(len(matrix.kept), np.float32))


def in_memory(tensor: Tensor) -> Tensor:
    """Return a dense tensor's own memory, flat."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _moved(layer: Layer) -> bool:
    return not layer.weight.is_contiguous()


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Return the format that torch's own convolution would give its result, which a view of it depends on."""
    return not weight.is_contiguous() or (not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]


def _rows(x: Tensor, linear: bool, channels_last: bool) -> np.ndarray:
    """Return a tensor's values as (N, features), maps in their own memory format."""
    x = x.detach()
    if channels_last:
        x = x.permute(0, 2, 3, 1)
    x = x.contiguous()
    found: np.ndarray = x.view((-1, x.shape[-1]) if linear else (len(x), -1)).numpy()
    return found


def _tensor(rows: np.ndarray, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Return (N, features) as a tensor of a shape."""
    found = torch.from_numpy(rows)
    if channels_last:
        count, channels, *size = shape
        return found.view(count, *size, channels).permute(0, 3, 1, 2)
    return found.view(shape)


class _Product(torch.autograd.Function):
    """The kept product; the gradient of the weights goes where the layer says, at kept places alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptForward) -> Tensor:
        linear, matrix = isinstance(kept.layer, nn.Linear), kept.matrix
        last = not linear and _channels_last(x, weight)
        size = (1, 1) if linear else _size(x)
        y, panels = matrix.forward(
            _rows(x, linear, last), in_memory(weight).numpy(), None if bias is None else in_memory(bias).numpy(), size,
            channels_last=last,
        )  # fmt: skip
        ctx.shape, ctx.panels, ctx.kept, ctx.last = tuple(x.shape), panels, kept, last
        shape = (*x.shape[:-1], matrix.outputs) if linear else (len(x), matrix.outputs, *matrix.layer.out(size))
        return _tensor(y, shape, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        kept, linear, dx = ctx.kept, isinstance(ctx.kept.layer, nn.Linear), None
        rows = _rows(dy, linear, ctx.last)
        wants_weight = wants_weight and kept.trained
        if wants_x or wants_weight:
            found = kept.matrix.backward(rows, ctx.panels, kept.slopes if wants_weight else None, wants_dx=wants_x)
            dx = _tensor(found, ctx.shape, ctx.last) if wants_x else None
        sums = None
        if wants_bias:
            sums = torch.from_numpy(rows).sum(0) if linear else dy.sum((0, 2, 3))
        return dx, None, sums, None
