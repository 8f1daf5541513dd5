"""Pooling and its gradient: the largest or the mean of windows, and the largest of a whole map."""

from __future__ import annotations

from typing import Any

from fedlth.kernel import columns as col
from fedlth.kernel.arithmetic import (
    add,
    divide,
    keep_equal,
    keep_positive,
    maximum,
    multiply,
    ones_1x16,
    relu,
    subtract,
    zeros_1x16,
)
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.pointwise import clear, get
from fedlth.kernel.vectors import spread, store


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
    value = get(work, at + top * row[col.X_ROW] + left * lanes)
    for i in range(top, bottom):
        for j in range(left, right):
            value = maximum(value, get(work, at + i * row[col.X_ROW] + j * lanes))
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
                        upper = maximum(get(work, at), get(work, at + lanes))
                        value = maximum(upper, maximum(get(work, at + line), get(work, at + line + lanes)))
                    else:
                        value = _most(work, row, at, lanes, y, x)
                    if row[col.RELU]:
                        value = relu(value)
                    out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes + p
                    store(value, work, out, 0)


@inlined
def _give(work: Any, most: Any, left: Any, at: int, to: int, keep: int) -> Any:
    """Give what is `left` of a window's gradient to the position that holds its maximum; return what remains."""
    taken = keep_equal(get(work, at), most, left)
    value = taken
    if keep:
        value = add(taken, get(work, to))
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
                    most = get(work, row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + x * lanes + p)
                    left = get(work, row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + x * lanes + p)
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
                            total = add(total, get(work, place))
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
                    share = get(work, at + p)
                    share = multiply(share, spread(share, scale, 0, 0))
                    for i in range(row[col.WINDOW_Y]):
                        for j in range(row[col.WINDOW_X]):
                            place = to + i * row[col.DX_ROW] + (x * row[col.STRIDE_X] + j) * lanes + p
                            store(add(share, get(work, place)), work, place, 0)


@part
def global_max(work: Any, row: Any, lanes: int) -> None:
    """Take the largest value of each map."""
    for c in range(row[col.CHANNELS]):
        for p in range(0, lanes, 16):
            at = row[col.X] + c * row[col.X_PLANE] + p
            most = get(work, at)
            for y in range(row[col.HEIGHT]):
                for x in range(row[col.WIDTH]):
                    most = maximum(most, get(work, at + y * row[col.X_ROW] + x * lanes))
            if row[col.RELU]:
                most = relu(most)
            store(most, work, row[col.Y] + c * row[col.Y_PLANE] + p, 0)


@part
def global_max_gradient(work: Any, row: Any, lanes: int) -> None:
    """Share each gradient equally among all largest values of its map, as torch.amax does."""
    if not row[col.ACCUMULATE]:
        clear(work, row, lanes)
    for c in range(row[col.CHANNELS]):
        for p in range(0, lanes, 16):
            at, to = row[col.X] + c * row[col.X_PLANE] + p, row[col.DX] + c * row[col.DX_PLANE] + p
            most = get(work, row[col.Y] + c * row[col.Y_PLANE] + p)
            count = zeros_1x16()
            for y in range(row[col.HEIGHT]):
                for x in range(row[col.WIDTH]):
                    count = add(count, keep_equal(get(work, at + y * row[col.X_ROW] + x * lanes), most, ones_1x16()))
            share = divide(get(work, row[col.DY] + c * row[col.DY_PLANE] + p), count)
            for y in range(row[col.HEIGHT]):
                for x in range(row[col.WIDTH]):
                    place = to + y * row[col.DX_ROW] + x * lanes
                    mine = keep_equal(get(work, at + y * row[col.X_ROW] + x * lanes), most, share)
                    store(add(mine, get(work, place)), work, place, 0)
