"""Turn the modules and functions of a torch graph into layers of the kernel's table, or say why one cannot run."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.kernel.columns import ADD, AVERAGE_POOL, CONVOLUTION, COPY, GLOBAL_MAX, GROUP_NORM, LINEAR, MAX_POOL
from fedlth.kernel.table import Op, Shape
from fedlth.models.layout import Layout


class Unsupported(Exception):
    """The reason, as the user reads it."""


@dataclass(frozen=True)
class Value:
    """A node's result: which value it is, and its shape for torch without the batch: (C, H, W) or flat (F,)."""

    at: int
    shape: tuple[int, ...]


class _Batch:
    """What x.size(0) gives; only good for reshaping."""


_BATCH = _Batch()


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


class Reader:
    """Walks the graph and collects layers."""

    def __init__(self, module: nn.Module, layout: Layout, input_shape: tuple[int, ...]) -> None:
        self.ops: list[Op] = []
        self.shapes: list[Shape] = []
        self.places = {name: e.offset for e in layout.floats if e.role == "param" for name in (e.name, *e.aliases)}
        self.module = module
        self.input = self.value(input_shape if len(input_shape) == 3 else (math.prod(input_shape), 1, 1), input_shape)

    def value(self, buffer: tuple[int, ...], shape: tuple[int, ...] | None = None) -> Value:
        self.shapes.append((buffer[0], buffer[1], buffer[2]))
        return Value(len(self.shapes) - 1, buffer if shape is None else shape)

    def image(self, x: Value, what: str) -> Shape:
        if len(x.shape) != 3:
            raise Unsupported(f"{what} on an input of shape {x.shape}")
        return x.shape[0], x.shape[1], x.shape[2]

    def place(self, name: str, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return -1
        if name not in self.places:
            raise Unsupported(f"parameter {name} is not in the layout")
        return self.places[name]

    def layer(self, name: str, part: nn.Module, x: Value) -> Value:
        """Add the layer of a leaf module. Exact types only: a subclass may compute something else."""
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise Unsupported(f"{name} has hooks")
        if type(part) is nn.Conv2d:
            return self.convolution(name, part, x)
        if type(part) is nn.Linear:
            return self.linear(name, part, x)
        if type(part) is nn.ReLU:
            return self.relu(x, part.inplace)
        if type(part) is nn.MaxPool2d:
            options = part.padding, part.dilation, part.ceil_mode, part.return_indices
            return self.max_pool(x, part.kernel_size, part.stride, *options)
        if type(part) is nn.AvgPool2d:
            more = part.padding, part.ceil_mode, part.count_include_pad, part.divisor_override
            return self.average_pool(x, part.kernel_size, part.stride, *more)
        if type(part) in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
            return self.adaptive(x, part.output_size, AVERAGE_POOL if type(part) is nn.AdaptiveAvgPool2d else MAX_POOL)
        if type(part) is nn.GroupNorm:
            return self.group_norm(name, part, x)
        if type(part) is nn.Flatten:
            return self.flatten(x, part.start_dim, part.end_dim)
        if type(part) is nn.Identity or (type(part) is nn.Dropout and part.p == 0):
            return x
        raise Unsupported(f"layer {name} is a {type(part).__name__}")

    def convolution(self, name: str, part: nn.Conv2d, x: Value) -> Value:
        shape = self.image(x, "a convolution")
        if part.padding_mode != "zeros" or part.dilation != (1, 1) or isinstance(part.padding, str):
            raise Unsupported(f"convolution {name} has dilation, or padding other than a number of zeros")
        if shape[0] != part.in_channels:
            raise Unsupported(f"convolution {name} wants {part.in_channels} channels, its input has {shape[0]}")
        window, stride, padding = _pair(part.kernel_size), _pair(part.stride), _pair(part.padding)
        out = self.value((part.out_channels, *_size(shape, window, stride, padding)))
        self.ops.append(
            Op(
                kind=CONVOLUTION,
                source=x.at,
                out=out.at,
                weight=self.place(f"{name}.weight", part.weight),
                bias=self.place(f"{name}.bias", part.bias),
                window=window,
                stride=stride,
                padding=padding,
                groups=part.groups,
            )
        )
        return out

    def linear(self, name: str, part: nn.Linear, x: Value) -> Value:
        if x.shape != (part.in_features,):
            raise Unsupported(f"linear layer {name} wants ({part.in_features},), its input is {x.shape}")
        out = self.value((part.out_features, 1, 1), (part.out_features,))
        weight, bias = self.place(f"{name}.weight", part.weight), self.place(f"{name}.bias", part.bias)
        self.ops.append(Op(kind=LINEAR, source=x.at, out=out.at, weight=weight, bias=bias))
        return out

    def relu(self, x: Value, inplace: bool = False) -> Value:
        out = self.value(self.shapes[x.at], x.shape)
        self.ops.append(Op(kind=COPY, source=x.at, out=out.at, relu=True))
        return out

    def max_pool(
        self,
        x: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
            raise Unsupported("max pooling with dilation, ceil_mode or indices")
        return self.pool(MAX_POOL, x, _pair(kernel_size), _pair(stride or kernel_size), _pair(padding))

    def average_pool(
        self,
        x: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Value:
        if _pair(padding) != (0, 0) or ceil_mode or divisor_override is not None:
            raise Unsupported("average pooling with padding, ceil_mode or a divisor")
        return self.pool(AVERAGE_POOL, x, _pair(kernel_size), _pair(stride or kernel_size), (0, 0))

    def adaptive(self, x: Value, output_size: Any, kind: int = AVERAGE_POOL) -> Value:
        shape = self.image(x, "pooling")
        if output_size not in (1, (1, 1), [1, 1]):
            raise Unsupported(f"adaptive pooling to {output_size}")
        return self.pool(kind, x, shape[1:], (1, 1), (0, 0))

    def whole(self, kind: int, x: Value, dim: Any, keepdim: bool = False) -> Value:
        """Add the mean or the largest value of each map."""
        shape = self.image(x, "a reduction")
        if not isinstance(dim, (tuple, list)) or {d % 4 for d in dim} != {2, 3}:
            raise Unsupported(f"a reduction over dimensions {dim}")
        out = self.pool(kind, x, shape[1:], (1, 1), (0, 0))
        return out if keepdim else Value(out.at, shape[:1])

    def group_norm(self, name: str, part: nn.GroupNorm, x: Value) -> Value:
        shape = x.shape if len(x.shape) == 1 else self.image(x, "group normalisation")
        if shape[0] != part.num_channels or part.eps <= 0:
            raise Unsupported(f"{name} wants {part.num_channels} channels and eps above 0, got {shape} and {part.eps}")
        if len(x.shape) == 1 and self.shapes[x.at][0] != shape[0]:
            raise Unsupported(f"group normalisation {name} of a flattened map")
        out = self.value(self.shapes[x.at], x.shape)
        weight, bias = self.place(f"{name}.weight", part.weight), self.place(f"{name}.bias", part.bias)
        self.ops.append(
            Op(
                kind=GROUP_NORM,
                source=x.at,
                out=out.at,
                weight=weight,
                bias=bias,
                groups=part.num_groups,
                scale=part.eps,
            )
        )
        return out

    def pool(
        self, kind: int, x: Value, window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> Value:
        shape = self.image(x, "pooling")
        out = self.value((shape[0], *_size(shape, window, stride, padding)))
        scale = 1.0 / (window[0] * window[1]) if kind == AVERAGE_POOL else 1.0
        self.ops.append(
            Op(kind=kind, source=x.at, out=out.at, window=window, stride=stride, padding=padding, scale=scale)
        )
        return out

    def flatten(self, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
        if start_dim != 1 or end_dim not in (-1, len(x.shape)):
            raise Unsupported("a flatten that is not flatten(1)")
        return Value(x.at, (math.prod(x.shape),))

    def reshape(self, x: Value, *sizes: Any) -> Value:
        first, *rest = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        size, flat = math.prod(x.shape), len(rest) == 1
        if flat and (rest[0] == size or (isinstance(first, _Batch) and rest[0] == -1)) and first in (-1, _BATCH):
            return Value(x.at, (size,))
        raise Unsupported("a reshape that is not (batch, -1)")

    def size(self, x: Value, dim: int | None = None) -> Any:
        sizes = (_BATCH, *x.shape)
        return sizes if dim is None else sizes[dim]

    def add(self, x: Any, y: Any, alpha: Any = 1) -> Value:
        same = isinstance(x, Value) and isinstance(y, Value) and x.shape == y.shape
        if not same or self.shapes[x.at] != self.shapes[y.at] or alpha != 1:
            raise Unsupported("an addition of other than two values of one shape")
        out = self.value(self.shapes[x.at], x.shape)
        self.ops.append(Op(kind=ADD, source=x.at, source_2=y.at, out=out.at))
        return out


def _size(shape: Shape, window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], window, stride, padding, strict=True)]
    if min(sizes) < 1:
        raise Unsupported(f"a window {window} larger than its input {shape[1:]}")
    return sizes[0], sizes[1]


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.relu: Reader.relu,
    torch.relu: Reader.relu,
    F.max_pool2d: Reader.max_pool,
    torch.max_pool2d: Reader.max_pool,
    F.avg_pool2d: Reader.average_pool,
    F.adaptive_avg_pool2d: Reader.adaptive,
    F.adaptive_max_pool2d: lambda reader, x, size: reader.adaptive(x, size, MAX_POOL),
    torch.amax: lambda reader, x, *args, **named: reader.whole(GLOBAL_MAX, x, *args, **named),
    torch.mean: lambda reader, x, *args, **named: reader.whole(AVERAGE_POOL, x, *args, **named),
    torch.flatten: Reader.flatten,
    torch.add: Reader.add,
    operator.add: Reader.add,
    operator.iadd: Reader.add,
}
METHODS: dict[str, Callable[..., Any]] = {
    "relu": Reader.relu,
    "relu_": Reader.relu,
    "flatten": Reader.flatten,
    "amax": lambda reader, x, *args, **named: reader.whole(GLOBAL_MAX, x, *args, **named),
    "mean": lambda reader, x, *args, **named: reader.whole(AVERAGE_POOL, x, *args, **named),
    "view": Reader.reshape,
    "reshape": Reader.reshape,
    "size": Reader.size,
    "add": Reader.add,
    "add_": Reader.add,
    "contiguous": lambda reader, x: x,
}
