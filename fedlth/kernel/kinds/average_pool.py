"""Average pooling: the mean of each window."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reach import windows
from fedlth.kernel.reader import Pair, Reader, Unsupported, Value, pair


def mean_of_windows(reader: Reader, x: Value, window: Pair, stride: Pair) -> Value:
    return reader.windows(AVERAGE_POOL, x, window, stride, scale=1.0 / (window[0] * window[1]))


def average_pool(
    reader: Reader,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if pair(padding) != (0, 0) or ceil_mode or divisor_override is not None:
        raise Unsupported("average pooling with padding, ceil_mode or a divisor")
    return mean_of_windows(reader, x, pair(kernel_size), pair(stride or kernel_size))


def mean(reader: Reader, x: Value, dim: Any, keepdim: bool = False) -> Value:
    shape = reader.map_dimensions(x, dim)
    out = mean_of_windows(reader, x, shape[1:], (1, 1))
    return out if keepdim else Value(out.at, shape[:1])


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import add, multiply, relu, zeros_1x16
    from fedlth.kernel.jit import part
    from fedlth.kernel.pointwise import clear, get
    from fedlth.kernel.vectors import spread, store

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        """Take the mean of each window; scale: one over its area."""
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.OUT_HEIGHT]):
                for x in range(row[col.OUT_WIDTH]):
                    at = row[col.X] + c * row[col.X_PLANE] + y * row[col.STRIDE_Y] * row[col.X_ROW]
                    out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes
                    for p in range(0, lanes, 16):
                        total = zeros_1x16()
                        for i in range(row[col.WINDOW_Y]):
                            for j in range(row[col.WINDOW_X]):
                                place = at + i * row[col.X_ROW] + (x * row[col.STRIDE_X] + j) * lanes + p
                                total = add(total, get(work, place))
                        value = multiply(total, spread(total, scale, 0, 0))
                        if row[col.RELU]:
                            value = relu(value)
                        store(value, work, out + p, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        """Share each gradient among its window; scale: one over its area."""
        if not row[col.ACCUMULATE]:
            clear(work, row, lanes)
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.OUT_HEIGHT]):
                for x in range(row[col.OUT_WIDTH]):
                    at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + x * lanes
                    to = row[col.DX] + c * row[col.DX_PLANE] + y * row[col.STRIDE_Y] * row[col.DX_ROW]
                    for p in range(0, lanes, 16):
                        share = get(work, at + p)
                        share = multiply(share, spread(share, scale, 0, 0))
                        for i in range(row[col.WINDOW_Y]):
                            for j in range(row[col.WINDOW_X]):
                                place = to + i * row[col.DX_ROW] + (x * row[col.STRIDE_X] + j) * lanes + p
                                store(add(share, get(work, place)), work, place, 0)

    return forward, backward


def _module(reader: Reader, name: str, part: nn.AvgPool2d, x: Value) -> Value:
    more = part.padding, part.ceil_mode, part.count_include_pad, part.divisor_override
    return average_pool(reader, x, part.kernel_size, part.stride, *more)


AVERAGE_POOL = Kind(
    number=col.AVERAGE_POOL,
    name="average pool",
    modules={nn.AvgPool2d: _module},
    functions={F.avg_pool2d: average_pool, torch.mean: mean},
    methods={"mean": mean},
    loops=loops,
    check=windows,
    channels="kept",
    clips=True,
)
