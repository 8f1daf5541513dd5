"""Max pooling: the largest value of each window."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reach import Reach, windows
from fedlth.kernel.reader import Reader, Unsupported, Value, adaptive_size, pair


def max_pool(
    reader: Reader,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if pair(dilation) != (1, 1) or ceil_mode or return_indices:
        raise Unsupported("max pooling with dilation, ceil_mode or indices")
    return reader.windows(MAX_POOL, x, pair(kernel_size), pair(stride or kernel_size), pair(padding))


def adaptive(reader: Reader, x: Value, output_size: Any, return_indices: bool = False) -> Value:
    shape = reader.image(x, "pooling")
    size = adaptive_size(shape, output_size)
    if shape[1] % size[0] or shape[2] % size[1] or return_indices:
        raise Unsupported(f"adaptive max pooling of {shape[1:]} to {size}, or with indices")
    window = shape[1] // size[0], shape[2] // size[1]
    return reader.windows(MAX_POOL, x, window, window)


def check(layer: Reach) -> None:
    windows(layer, padded=True)


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import add, keep_equal, keep_positive, maximum, relu, subtract
    from fedlth.kernel.jit import inlined, part
    from fedlth.kernel.pointwise import clear, get
    from fedlth.kernel.vectors import store

    @inlined
    def is_two_by_two(row: Any) -> Any:
        window = row[col.WINDOW_Y] == 2 and row[col.WINDOW_X] == 2
        stride = row[col.STRIDE_Y] == 2 and row[col.STRIDE_X] == 2
        return window and stride and row[col.PADDING_Y] == 0 and row[col.PADDING_X] == 0

    @inlined
    def seen(at: int, stride: int, padding: int, window: int, size: int) -> tuple[int, int]:
        """Return the first and the end of the input positions that output position `at` sees."""
        start = at * stride - padding
        return max(start, 0), min(start + window, size)

    @inlined
    def most_of(work: Any, row: Any, at: int, lanes: int, y: int, x: int) -> Any:
        top, bottom = seen(y, row[col.STRIDE_Y], row[col.PADDING_Y], row[col.WINDOW_Y], row[col.HEIGHT])
        left, right = seen(x, row[col.STRIDE_X], row[col.PADDING_X], row[col.WINDOW_X], row[col.WIDTH])
        value = get(work, at + top * row[col.X_ROW] + left * lanes)
        for i in range(top, bottom):
            for j in range(left, right):
                value = maximum(value, get(work, at + i * row[col.X_ROW] + j * lanes))
        return value

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        """Take the largest value of each window."""
        simple, line = is_two_by_two(row), row[col.X_ROW]
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.OUT_HEIGHT]):
                for x in range(row[col.OUT_WIDTH]):
                    for p in range(0, lanes, 16):
                        at = row[col.X] + c * row[col.X_PLANE] + p
                        if simple:
                            at += 2 * y * line + 2 * x * lanes
                            upper = maximum(get(work, at), get(work, at + lanes))
                            value = maximum(upper, maximum(get(work, at + line), get(work, at + line + lanes)))
                        else:
                            value = most_of(work, row, at, lanes, y, x)
                        if row[col.RELU]:
                            value = relu(value)
                        out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes + p
                        store(value, work, out, 0)

    @inlined
    def give(work: Any, most: Any, left: Any, at: int, to: int, keep: int) -> Any:
        """Give what is `left` of a window's gradient to the position that holds its maximum; return what remains."""
        taken = keep_equal(get(work, at), most, left)
        value = taken
        if keep:
            value = add(taken, get(work, to))
        store(value, work, to, 0)
        return subtract(left, taken)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        """Send each gradient to the first largest value of its window, as torch does.

        With relu, the pooled values are clipped ones: a window whose maximum was clipped gets no gradient.
        """
        simple, line, back = is_two_by_two(row) and not row[col.ACCUMULATE], row[col.X_ROW], row[col.DX_ROW]
        whole = 2 * row[col.OUT_HEIGHT] == row[col.HEIGHT] and 2 * row[col.OUT_WIDTH] == row[col.WIDTH]
        if not (simple and whole) and not row[col.ACCUMULATE]:
            clear(work, row, lanes)
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.OUT_HEIGHT]):
                for x in range(row[col.OUT_WIDTH]):
                    for p in range(0, lanes, 16):
                        most = get(work, row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes + p)
                        left = get(work, row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + x * lanes + p)
                        if row[col.RELU]:
                            left = keep_positive(most, left)
                        at = row[col.X] + c * row[col.X_PLANE] + p
                        to = row[col.DX] + c * row[col.DX_PLANE] + p
                        if simple:
                            at += 2 * y * line + 2 * x * lanes
                            to += 2 * y * back + 2 * x * lanes
                            left = give(work, most, left, at, to, 0)
                            left = give(work, most, left, at + lanes, to + lanes, 0)
                            left = give(work, most, left, at + line, to + back, 0)
                            give(work, most, left, at + line + lanes, to + back + lanes, 0)
                            continue
                        top, bottom = seen(y, row[col.STRIDE_Y], row[col.PADDING_Y], row[col.WINDOW_Y], row[col.HEIGHT])
                        start, end = seen(x, row[col.STRIDE_X], row[col.PADDING_X], row[col.WINDOW_X], row[col.WIDTH])
                        for i in range(top, bottom):
                            for j in range(start, end):
                                left = give(work, most, left, at + i * line + j * lanes, to + i * back + j * lanes, 1)

    return forward, backward


def _module(reader: Reader, name: str, part: nn.MaxPool2d, x: Value) -> Value:
    options = part.padding, part.dilation, part.ceil_mode, part.return_indices
    return max_pool(reader, x, part.kernel_size, part.stride, *options)


MAX_POOL = Kind(
    number=col.MAX_POOL,
    name="max pool",
    modules={
        nn.MaxPool2d: _module,
        nn.AdaptiveMaxPool2d: lambda reader, name, part, x: adaptive(reader, x, part.output_size, part.return_indices),
    },
    functions={F.max_pool2d: max_pool, torch.max_pool2d: max_pool, F.adaptive_max_pool2d: adaptive},
    loops=loops,
    check=check,
    channels="kept",
    clips=True,
)
