"""Turn the modules and functions of a torch graph into layers of the kernel's table, or say why one cannot run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedlth.kernel.columns import CONVOLUTION, LINEAR
from fedlth.kernel.kind import Kind
from fedlth.kernel.table import Op, Shape
from fedlth.models.layout import Layout

Pair = tuple[int, int]


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


def pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def adaptive_size(shape: Shape, output_size: Any) -> Pair:
    """Return the rows and columns that adaptive pooling makes of a map; None is as many as it has."""
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * 2
    rows, columns = (n if size is None else int(size) for n, size in zip(shape[1:], sizes, strict=True))
    if min(rows, columns) < 1:
        raise Unsupported(f"adaptive pooling to {output_size}")
    return rows, columns


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

    def layer(self, kind: Kind, x: Value, shape: Shape | None = None, **options: Any) -> Value:
        """Add a layer whose output has a map's `shape`, without one that of its input; options: fields of its Op."""
        out = self.value(self.shapes[x.at], x.shape) if shape is None else self.value(shape)
        self.ops.append(Op(kind=kind.number, name=kind.name, source=x.at, out=out.at, **options))
        return out

    def windows(
        self, kind: Kind, x: Value, window: Pair, stride: Pair, padding: Pair = (0, 0), **options: Any
    ) -> Value:
        """Add a layer whose outputs each see a window of the same channel."""
        shape = self.image(x, "pooling")
        out = (shape[0], *window_size(shape, window, stride, padding))
        return self.layer(kind, x, out, window=window, stride=stride, padding=padding, **options)

    def map_dimensions(self, x: Value, dim: Any) -> Shape:
        """Want `dim` to be the rows and columns of a map; return its shape."""
        shape = self.image(x, "a reduction")
        if not isinstance(dim, (tuple, list)) or {d % 4 for d in dim} != {2, 3}:
            raise Unsupported(f"a reduction over dimensions {dim}")
        return shape

    def convolution(self, name: str, part: nn.Conv2d, x: Value) -> Value:
        shape = self.image(x, "a convolution")
        if part.padding_mode != "zeros" or part.dilation != (1, 1) or isinstance(part.padding, str):
            raise Unsupported(f"convolution {name} has dilation, or padding other than a number of zeros")
        if shape[0] != part.in_channels:
            raise Unsupported(f"convolution {name} wants {part.in_channels} channels, its input has {shape[0]}")
        window, stride, padding = pair(part.kernel_size), pair(part.stride), pair(part.padding)
        out = self.value((part.out_channels, *window_size(shape, window, stride, padding)))
        self.ops.append(
            Op(
                kind=CONVOLUTION,
                name="convolution",
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
        self.ops.append(Op(kind=LINEAR, name="linear", source=x.at, out=out.at, weight=weight, bias=bias))
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


def window_size(shape: Shape, window: Pair, stride: Pair, padding: Pair) -> Pair:
    sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], window, stride, padding, strict=True)]
    if min(sizes) < 1:
        raise Unsupported(f"a window {window} larger than its input {shape[1:]}")
    return sizes[0], sizes[1]


def _identity(reader: Reader, name: str, part: nn.Module, x: Value) -> Value:
    if isinstance(part, nn.Dropout) and part.p:
        raise Unsupported(f"layer {name} is a Dropout")
    return x


# What is no Kind: layers with a matrix of weights, and what only says how a value is seen.
MODULES: dict[type, Callable[..., Any]] = {
    nn.Conv2d: Reader.convolution,
    nn.Linear: Reader.linear,
    nn.Flatten: lambda reader, name, part, x: reader.flatten(x, part.start_dim, part.end_dim),
    nn.Identity: _identity,
    nn.Dropout: _identity,
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {torch.flatten: Reader.flatten}
METHODS: dict[str, Callable[..., Any]] = {
    "flatten": Reader.flatten,
    "view": Reader.reshape,
    "reshape": Reader.reshape,
    "size": Reader.size,
    "contiguous": lambda reader, x: x,
}
