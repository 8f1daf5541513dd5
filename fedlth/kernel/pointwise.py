"""Passes over maps that several kinds of layers share, choices of channels, and what relu clips of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedlth.kernel import columns as col
from fedlth.kernel.arithmetic import add, keep_positive, relu, zeros_1x16
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.kind import Loop
from fedlth.kernel.reduce import sums
from fedlth.kernel.vectors import load, number, spread, store


@inlined
def get(work: Any, at: int) -> Any:
    return load(zeros_1x16(), work, at, 0)


@part
def clip_gradient(work: Any, row: Any, lanes: int) -> None:
    """Zero the output gradient where the clipped output is not positive."""
    for c in range(row[col.OUT_CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            for p in range(0, row[col.OUT_WIDTH] * lanes, 16):
                store(keep_positive(get(work, out + p), get(work, at + p)), work, at + p, 0)


@part
def spread_gradient(work: Any, row: Any, lanes: int) -> None:
    """Copy the output gradient of a strided layer to a map whose other values are zero."""
    for c in range(row[col.OUT_CHANNELS]):
        for y in range(row[col.OUT_HEIGHT]):
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            to = row[col.SPREAD] + c * row[col.SPREAD_PLANE] + y * row[col.STRIDE_Y] * row[col.SPREAD_ROW]
            for x in range(row[col.OUT_WIDTH]):
                for p in range(0, lanes, 16):
                    value = get(work, at + x * lanes + p)
                    store(value, work, to + x * row[col.STRIDE_X] * lanes + p, 0)


def value_by_value(value: Callable[..., Any], slope: Callable[..., Any]) -> tuple[Loop, Loop]:
    """Return forward and backward of a kind whose every output depends on one input: an activation.

    value(x, option) -> y and slope(x, dy, option) -> dx are inlined functions of vectors; option: Op.scale everywhere.
    """

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        option = spread(zeros_1x16(), scale, 0, 0)
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.HEIGHT]):
                at = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW]
                out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
                for p in range(0, row[col.WIDTH] * lanes, 16):
                    store(value(get(work, at + p), option), work, out + p, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        option = spread(zeros_1x16(), scale, 0, 0)
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.HEIGHT]):
                at = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW]
                above = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
                to = row[col.DX] + c * row[col.DX_PLANE] + y * row[col.DX_ROW]
                for p in range(0, row[col.WIDTH] * lanes, 16):
                    passed = slope(get(work, at + p), get(work, above + p), option)
                    if row[col.ACCUMULATE]:
                        passed = add(passed, get(work, to + p))
                    store(passed, work, to + p, 0)

    return forward, backward


@part
def pass_gradient(work: Any, row: Any, lanes: int, dx: int, plane: int, line: int, accumulate: int) -> None:
    """Copy or add the output gradient to an input gradient of the same shape."""
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.HEIGHT]):
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            to = dx + c * plane + y * line
            for p in range(0, row[col.WIDTH] * lanes, 16):
                value = get(work, at + p)
                if accumulate:
                    value = add(value, get(work, to + p))
                store(value, work, to + p, 0)


@part
def clear(work: Any, row: Any, lanes: int) -> None:
    """Zero the input gradient."""
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.HEIGHT]):
            at = row[col.DX] + c * row[col.DX_PLANE] + y * row[col.DX_ROW]
            work[at : at + row[col.WIDTH] * lanes] = 0


@part
def choose(work: Any, index: Any, w: Any, row: Any, lanes: int) -> None:
    """Copy to each output channel the input channel of its choice, or fill it with its bias."""
    for c in range(row[col.OUT_CHANNELS]):
        source, fill = number(index, row[col.CHOICE] + c), zeros_1x16()
        if source < 0 and row[col.BIAS] >= 0:
            fill = spread(fill, w, row[col.BIAS] + c, 0)
        for y in range(row[col.HEIGHT]):
            at = row[col.X] + source * row[col.X_PLANE] + y * row[col.X_ROW]
            out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
            for p in range(0, row[col.WIDTH] * lanes, 16):
                value = fill
                if source >= 0:
                    value = get(work, at + p)
                if row[col.RELU]:
                    value = relu(value)
                store(value, work, out + p, 0)


@part
def choose_gradient(work: Any, index: Any, grad: Any, row: Any, lanes: int) -> None:
    """Add each output channel's gradient to that of its input channel, or its sum to that of its bias."""
    if not row[col.ACCUMULATE]:
        clear(work, row, lanes)
    for c in range(row[col.OUT_CHANNELS]):
        source, total = number(index, row[col.CHOICE] + c), zeros_1x16()
        for y in range(row[col.HEIGHT]):
            at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW]
            to = row[col.DX] + source * row[col.DX_PLANE] + y * row[col.DX_ROW]
            for p in range(0, row[col.WIDTH] * lanes, 16):
                if source >= 0:
                    store(add(get(work, to + p), get(work, at + p)), work, to + p, 0)
                else:
                    total = add(total, get(work, at + p))
        if source < 0 and row[col.BIAS] >= 0:
            grad[row[col.BIAS] + c] += sums(total)[0]
