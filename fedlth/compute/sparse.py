"""Layers of which only kept weights are stored: zeros cost neither time nor memory."""

from __future__ import annotations

from typing import Any

from fedlth.compute import columns as col
from fedlth.compute.arithmetic import add, relu, zeros_1x16, zeros_1x32, zeros_3x32, zeros_4x16
from fedlth.compute.jit import inlined, part
from fedlth.compute.vectors import add_sums, along, load, number, spread, store, sums
from fedlth.compute.weights import correlate


@part
def list_kept(index: Any, lists: Any, kept: Any, row: Any) -> None:
    """Write the lists of one layer's kept weights by output channel and, where it is needed, by input channel.

    kept: bool over all parameters, or whatever `row[col.MASK]` counts in.
    """
    taps, area = row[col.TAPS], row[col.KERNEL_AREA]
    channels, inputs = row[col.OUT_CHANNELS] // row[col.GROUPS], row[col.CHANNELS] // row[col.GROUPS]
    count = 0
    back = row[col.BACK_STARTS]
    if row[col.NEEDS_DX]:
        for c in range(row[col.CHANNELS] + 1):
            lists[back + c] = 0
    for o in range(row[col.OUT_CHANNELS]):
        lists[row[col.KEPT_STARTS] + o] = count
        group = o // channels
        for k in range(taps):
            if kept[row[col.MASK] + o * taps + k]:
                lists[row[col.KEPT_PLACES] + count] = index[row[col.TAP_PLACES] + k] + group * row[col.TAP_GROUP]
                if row[col.NEEDS_DX]:
                    lists[back + group * inputs + k // area + 1] += 1
                count += 1
    lists[row[col.KEPT_STARTS] + row[col.OUT_CHANNELS]] = count
    if not row[col.NEEDS_DX]:
        return
    for c in range(row[col.CHANNELS]):
        lists[back + c + 1] += lists[back + c]
    count = 0
    for o in range(row[col.OUT_CHANNELS]):
        group = o // channels
        for k in range(taps):
            if kept[row[col.MASK] + o * taps + k]:
                channel = group * inputs + k // area
                at = lists[back + channel]
                lists[back + channel] = at + 1
                place = index[row[col.BACK_PLACES] + (o - group * channels) * area + k % area]
                lists[row[col.BACK_KEPT_PLACES] + at] = place + group * row[col.BACK_GROUP]
                lists[row[col.BACK_KEPT_WEIGHTS] + at] = count
                count += 1
    for c in range(row[col.CHANNELS], 0, -1):
        lists[back + c] = lists[back + c - 1]
    lists[back] = 0


@inlined
def _forward(
    zero: Any, channel: int, work: Any, w: Any, lists: Any, first: int, last: int, start: int, row: Any
) -> Any:
    tile = zero
    if row[col.BIAS] >= 0:
        tile = spread(zero, w, row[col.BIAS] + channel, 0)
    for k in range(first, last):
        tile = along(tile, w, row[col.WEIGHT] + k, work, start + number(lists, row[col.KEPT_PLACES] + k))
    if row[col.RELU]:
        tile = relu(tile)
    return tile


@part
def forward(work: Any, index: Any, lists: Any, w: Any, row: Any, lanes: int) -> None:
    """Compute the layer's output from its kept weights, three vectors of 32 values at a time."""
    for y in range(row[col.OUT_HEIGHT]):
        for o in range(row[col.OUT_CHANNELS]):
            first, last = number(lists, row[col.KEPT_STARTS] + o), number(lists, row[col.KEPT_STARTS] + o + 1)
            for pixel in range(row[col.PIXELS]):
                start = row[col.X] + y * row[col.TAP_ROW] + pixel * row[col.TAP_STEP]
                out = row[col.Y] + number(index, row[col.OUT_PLACES] + o) + y * row[col.Y_ROW] + pixel * lanes
                p = 0
                while p + 96 <= row[col.SPAN]:
                    store(_forward(zeros_3x32(), o, work, w, lists, first, last, start + p, row), work, out + p, 32)
                    p += 96
                while p + 32 <= row[col.SPAN]:
                    store(_forward(zeros_1x32(), o, work, w, lists, first, last, start + p, row), work, out + p, 0)
                    p += 32
                while p < row[col.SPAN]:
                    store(_forward(zeros_1x16(), o, work, w, lists, first, last, start + p, row), work, out + p, 0)
                    p += 16


@inlined
def _backward(zero: Any, work: Any, w: Any, lists: Any, first: int, last: int, start: int, row: Any) -> Any:
    tile = zero
    for k in range(first, last):
        weight = row[col.WEIGHT] + number(lists, row[col.BACK_KEPT_WEIGHTS] + k)
        tile = along(tile, w, weight, work, start + number(lists, row[col.BACK_KEPT_PLACES] + k))
    return tile


@part
def input_gradient(work: Any, index: Any, lists: Any, w: Any, row: Any) -> None:
    """Compute the gradient of the layer's input from its kept weights."""
    for y in range(row[col.BACK_ROWS]):
        for c in range(row[col.CHANNELS]):
            first, last = number(lists, row[col.BACK_STARTS] + c), number(lists, row[col.BACK_STARTS] + c + 1)
            start = row[col.SPREAD] + y * row[col.SPREAD_ROW]
            out = row[col.DX] + number(index, row[col.BACK_OUT_PLACES] + c) + y * row[col.DX_ROW]
            p = 0
            while p < row[col.BACK_SPAN]:
                if p + 96 <= row[col.BACK_SPAN]:
                    three = _backward(zeros_3x32(), work, w, lists, first, last, start + p, row)
                    if row[col.ACCUMULATE]:
                        three = add(three, load(three, work, out + p, 32))
                    store(three, work, out + p, 32)
                    p += 96
                elif p + 32 <= row[col.BACK_SPAN]:
                    wide = _backward(zeros_1x32(), work, w, lists, first, last, start + p, row)
                    if row[col.ACCUMULATE]:
                        wide = add(wide, load(wide, work, out + p, 0))
                    store(wide, work, out + p, 0)
                    p += 32
                else:
                    narrow = _backward(zeros_1x16(), work, w, lists, first, last, start + p, row)
                    if row[col.ACCUMULATE]:
                        narrow = add(narrow, load(narrow, work, out + p, 0))
                    store(narrow, work, out + p, 0)
                    p += 16


@part
def weights(work: Any, lists: Any, grad: Any, row: Any, lanes: int) -> None:
    """Add the gradient of the kept weights, four at a time."""
    for o in range(row[col.OUT_CHANNELS]):
        k, last = number(lists, row[col.KEPT_STARTS] + o), number(lists, row[col.KEPT_STARTS] + o + 1)
        start = (row[col.DY] + o * row[col.DY_PLANE],)
        while k + 4 <= last:
            t = row[col.KEPT_PLACES] + k
            places = (
                row[col.X] + number(lists, t),
                row[col.X] + number(lists, t + 1),
                row[col.X] + number(lists, t + 2),
                row[col.X] + number(lists, t + 3),
            )
            add_sums(correlate(zeros_4x16(), 16, start, places, work, row, lanes), grad, row[col.WEIGHT] + k)
            k += 4
        while k < last:
            place = (row[col.X] + number(lists, row[col.KEPT_PLACES] + k),)
            grad[row[col.WEIGHT] + k] += sums(correlate(zeros_1x16(), 16, start, place, work, row, lanes))[0]
            k += 1
