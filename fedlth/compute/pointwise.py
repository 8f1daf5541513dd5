"""Layers without weights: pooling, addition, copies, and clipping a gradient where relu clipped the output."""

from __future__ import annotations

from typing import Any

from fedlth.compute import columns as col
from fedlth.compute.arithmetic import (
    add,
    keep_equal,
    keep_positive,
    maximum,
    multiply,
    relu,
    subtract,
    zeros_1x16,
)
from fedlth.compute.jit import inlined, part
from fedlth.compute.vectors import load, spread, store


@inlined
def _get(work: Any, at: int) -> Any:
    return load(zeros_1x16(), work, at, 0)


@part
def clip_gradient(work: Any, row: Any, lanes: int) -> None:
    """Zero the output gradient where the clipped output is not positive."""
    for c in range(row[col.OUT_CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            for p in range(0, row[col.OUT_WIDTH] * lanes, 16):
                store(keep_positive(_get(work, out + p), _get(work, at + p)), work, at + p, 0)


@part
def spread_gradient(work: Any, row: Any, lanes: int) -> None:
    """Copy the output gradient of a strided layer to a map whose other values are zero."""
    for c in range(row[col.OUT_CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            to = row[col.SPREAD] + c * row[col.SPREAD_PLANE] + y * row[col.STRIDE_Y] * row[col.SPREAD_ROW]
            for x in range(row[col.OUT_WIDTH]):
                for p in range(0, lanes, 16):
                    value = _get(work, at + x * lanes + p)
                    store(value, work, to + x * row[col.STRIDE_X] * lanes + p, 0)


@part
def combine(work: Any, row: Any, lanes: int) -> None:
    """Copy the input to the output, or add the two inputs."""
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.HEIGHT]):
            a = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW]
            b = row[col.X2] + c * row[col.X2_PLANE] + y * row[col.X2_ROW]
            out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
            for p in range(0, row[col.WIDTH] * lanes, 16):
                value = _get(work, a + p)
                if row[col.KIND] == col.ADD:
                    value = add(value, _get(work, b + p))
                if row[col.RELU]:
                    value = relu(value)
                store(value, work, out + p, 0)


@part
def pass_gradient(work: Any, row: Any, lanes: int, dx: int, plane: int, line: int, accumulate: int) -> None:
    """Copy or add the output gradient to an input gradient of the same shape."""
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.HEIGHT]):
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            to = dx + c * plane + y * line
            for p in range(0, row[col.WIDTH] * lanes, 16):
                value = _get(work, at + p)
                if accumulate:
                    value = add(value, _get(work, to + p))
                store(value, work, to + p, 0)


@inlined
def _is_two_by_two(row: Any) -> Any:
    window = row[col.WINDOW_Y] == 2 and row[col.WINDOW_X] == 2
    stride = row[col.STRIDE_Y] == 2 and row[col.STRIDE_X] == 2
    return window and stride and row[col.PADDING_Y] == 0 and row[col.PADDING_X] == 0


@inlined
def _window(at: int, stride: int, padding: int, window: int, size: int) -> tuple[int, int]:
    """Return the first and the end of the input positions that output position `at` sees."""
    start = at * stride - padding
    return max(start, 0), min(start + window, size)


@inlined
def _most(work: Any, row: Any, at: int, lanes: int, y: int, x: int) -> Any:
    top, bottom = _window(y, row[col.STRIDE_Y], row[col.PADDING_Y], row[col.WINDOW_Y], row[col.HEIGHT])
    left, right = _window(x, row[col.STRIDE_X], row[col.PADDING_X], row[col.WINDOW_X], row[col.WIDTH])
    value = _get(work, at + top * row[col.X_ROW] + left * lanes)
    for i in range(top, bottom):
        for j in range(left, right):
            value = maximum(value, _get(work, at + i * row[col.X_ROW] + j * lanes))
    return value


@part
def max_pool(work: Any, row: Any, lanes: int) -> None:
    """Take the largest value of each window."""
    simple, line = _is_two_by_two(row), row[col.X_ROW]
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            for x in range(row[col.OUT_WIDTH]):
                for p in range(0, lanes, 16):
                    at = row[col.X] + c * row[col.X_PLANE] + p
                    if simple:
                        at += 2 * y * line + 2 * x * lanes
                        upper = maximum(_get(work, at), _get(work, at + lanes))
                        value = maximum(upper, maximum(_get(work, at + line), _get(work, at + line + lanes)))
                    else:
                        value = _most(work, row, at, lanes, y, x)
                    if row[col.RELU]:
                        value = relu(value)
                    out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes + p
                    store(value, work, out, 0)


@inlined
def _give(work: Any, most: Any, left: Any, at: int, to: int, keep: int) -> Any:
    """Give what is `left` of a window's gradient to the position that holds its maximum; return what remains."""
    taken = keep_equal(_get(work, at), most, left)
    value = taken
    if keep:
        value = add(taken, _get(work, to))
    store(value, work, to, 0)
    return subtract(left, taken)


@part
def max_pool_gradient(work: Any, row: Any, lanes: int) -> None:
    """Send each gradient to the first largest value of its window, as torch does.

    With relu, the pooled values are clipped ones: a window whose maximum was clipped gets no gradient.
    """
    simple, line, back = _is_two_by_two(row) and not row[col.ACCUMULATE], row[col.X_ROW], row[col.DX_ROW]
    whole = 2 * row[col.OUT_HEIGHT] == row[col.HEIGHT] and 2 * row[col.OUT_WIDTH] == row[col.WIDTH]
    if not (simple and whole) and not row[col.ACCUMULATE]:
        clear(work, row, lanes)
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            for x in range(row[col.OUT_WIDTH]):
                for p in range(0, lanes, 16):
                    most = _get(work, row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes + p)
                    left = _get(work, row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + x * lanes + p)
                    if row[col.RELU]:
                        left = keep_positive(most, left)
                    at = row[col.X] + c * row[col.X_PLANE] + p
                    to = row[col.DX] + c * row[col.DX_PLANE] + p
                    if simple:
                        at += 2 * y * line + 2 * x * lanes
                        to += 2 * y * back + 2 * x * lanes
                        left = _give(work, most, left, at, to, 0)
                        left = _give(work, most, left, at + lanes, to + lanes, 0)
                        left = _give(work, most, left, at + line, to + back, 0)
                        _give(work, most, left, at + line + lanes, to + back + lanes, 0)
                        continue
                    top, bottom = _window(y, row[col.STRIDE_Y], row[col.PADDING_Y], row[col.WINDOW_Y], row[col.HEIGHT])
                    start, end = _window(x, row[col.STRIDE_X], row[col.PADDING_X], row[col.WINDOW_X], row[col.WIDTH])
                    for i in range(top, bottom):
                        for j in range(start, end):
                            left = _give(work, most, left, at + i * line + j * lanes, to + i * back + j * lanes, 1)


@part
def clear(work: Any, row: Any, lanes: int) -> None:
    """Zero the input gradient."""
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.HEIGHT]):
            at = row[col.DX] + c * row[col.DX_PLANE] + y * row[col.DX_ROW]
            work[at : at + row[col.WIDTH] * lanes] = 0


@part
def average_pool(work: Any, scale: Any, row: Any, lanes: int) -> None:
    """Take the mean of each window; scale: (1,) float32, one over its area."""
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
                            total = add(total, _get(work, place))
                    value = multiply(total, spread(total, scale, 0, 0))
                    if row[col.RELU]:
                        value = relu(value)
                    store(value, work, out + p, 0)


@part
def average_pool_gradient(work: Any, scale: Any, row: Any, lanes: int) -> None:
    """Share each gradient among its window; scale: (1,) float32, one over its area."""
    if not row[col.ACCUMULATE]:
        clear(work, row, lanes)
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            for x in range(row[col.OUT_WIDTH]):
                at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + x * lanes
                to = row[col.DX] + c * row[col.DX_PLANE] + y * row[col.STRIDE_Y] * row[col.DX_ROW]
                for p in range(0, lanes, 16):
                    share = _get(work, at + p)
                    share = multiply(share, spread(share, scale, 0, 0))
                    for i in range(row[col.WINDOW_Y]):
                        for j in range(row[col.WINDOW_X]):
                            place = to + i * row[col.DX_ROW] + (x * row[col.STRIDE_X] + j) * lanes + p
                            store(add(share, _get(work, place)), work, place, 0)
