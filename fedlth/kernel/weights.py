"""Gradients of dense weights and of biases; added to the compact gradient vector."""

from __future__ import annotations

from typing import Any

from fedlth.kernel import columns as col
from fedlth.kernel.arithmetic import add, filled, zeros_1x16, zeros_2x16, zeros_4x16, zeros_5x8, zeros_10x8
from fedlth.kernel.fitting import fitting
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.reduce import add_paired_sums, add_sums, sums
from fedlth.kernel.tile_choice import TILES
from fedlth.kernel.vectors import dots, load, number, outer, paired_dots, store


@inlined
def correlate(
    zero: Any, width: int, starts: Any, places: Any, work: Any, row: Any, lanes: int, first: int, last: int
) -> Any:
    """Return the tile of sums over rows `first` to `last`: output gradient at `starts` times input at `places`."""
    tile = zero
    for y in range(first, last):
        for pixel in range(row[col.PIXELS]):
            at = y * row[col.DY_ROW] + pixel * lanes
            source = y * row[col.TAP_ROW] + pixel * row[col.TAP_STEP]
            for p in range(0, row[col.SPAN], width):
                tile = dots(tile, work, starts, at + p, work, places, source + p)
    return tile


def _pairs(channels: int) -> Any:
    """Return the sum for five taps of an even number of channels, two of which share a vector."""
    zero = filled(5 * channels // 2, 16)

    @part
    def pairs(
        work: Any, grad: Any, row: Any, lanes: int, start: int, weight: int, places: Any, first: int, last: int
    ) -> None:
        tile, plane = zero(), row[col.DY_PLANE]
        for y in range(first, last):
            for pixel in range(row[col.PIXELS]):
                at = start + y * row[col.DY_ROW] + pixel * lanes
                source = y * row[col.TAP_ROW] + pixel * row[col.TAP_STEP]
                for p in range(0, row[col.SPAN], 8):
                    tile = paired_dots(tile, work, at + p, plane, work, places, source + p)
        add_paired_sums(tile, grad, weight, row[col.TAPS], places)

    return pairs


@part
def _two(
    work: Any, grad: Any, row: Any, lanes: int, start: int, weight: int, places: Any, first: int, last: int
) -> None:
    starts = start, start + row[col.DY_PLANE]
    ten = sums(correlate(zeros_10x8(), 8, starts, places, work, row, lanes, first, last))
    for j in range(5):
        grad[weight + j] += ten[j]
        grad[weight + j + row[col.TAPS]] += ten[j + 5]


@part
def _one(
    work: Any, grad: Any, row: Any, lanes: int, start: int, weight: int, places: Any, first: int, last: int
) -> None:
    five = sums(correlate(zeros_5x8(), 8, (start,), places, work, row, lanes, first, last))
    for j in range(5):
        grad[weight + j] += five[j]


_next_channels = fitting([*((count, _pairs(count)) for count in TILES.pairs), (2, _two), (1, _one)])


@part
def _single_tap(
    work: Any, grad: Any, row: Any, lanes: int, start: int, weight: int, places: Any, first: int, last: int
) -> None:
    """Add the gradient of one tap for all channels of a group."""
    plane, taps, channels = row[col.DY_PLANE], row[col.TAPS], row[col.OUT_CHANNELS] // row[col.GROUPS]
    for o in range(0, channels - 1, 2):
        at, to = start + o * plane, weight + o * taps
        two = sums(correlate(zeros_2x16(), 16, (at, at + plane), places, work, row, lanes, first, last))
        grad[to] += two[0]
        grad[to + taps] += two[1]
    if channels % 2:
        at, to = start + (channels - 1) * plane, weight + (channels - 1) * taps
        grad[to] += sums(correlate(zeros_1x16(), 16, (at,), places, work, row, lanes, first, last))[0]


@inlined
def _rows(index: Any, row: Any, k: int, count: int) -> Any:
    """Return first and end of the output rows that any of `count` taps from k on reaches."""
    first, last = row[col.OUT_HEIGHT], 0
    for j in range(k, k + count):
        reach = row[col.REACH] + 2 * (j // row[col.WINDOW_X] % row[col.WINDOW_Y])
        first, last = min(first, number(index, reach)), max(last, number(index, reach + 1))
    return first, last


@part
def convolution_weights(work: Any, index: Any, grad: Any, row: Any, lanes: int) -> None:
    """A few output channels times five taps stay in registers while the rows that they reach stream past."""
    taps, plane = row[col.TAPS], row[col.DY_PLANE]
    channels = row[col.OUT_CHANNELS] // row[col.GROUPS]
    for group in range(row[col.GROUPS]):
        source = row[col.X] + group * row[col.TAP_GROUP]
        start = row[col.DY] + group * channels * plane
        weight = row[col.WEIGHT] + group * channels * taps
        o = 0
        while o < channels and taps >= 5:
            count = 0
            for k in range(0, taps - 4, 5):
                t = row[col.TAP_PLACES] + k
                first, last = _rows(index, row, k, 5)
                places = (
                    source + number(index, t),
                    source + number(index, t + 1),
                    source + number(index, t + 2),
                    source + number(index, t + 3),
                    source + number(index, t + 4),
                )
                at, to = start + o * plane, weight + o * taps + k
                count = _next_channels(channels - o, work, grad, row, lanes, at, to, places, first, last)
            o += count
        for k in range(taps // 5 * 5, taps):
            first, last = _rows(index, row, k, 1)
            place = (source + number(index, row[col.TAP_PLACES] + k),)
            _single_tap(work, grad, row, lanes, start, weight + k, place, first, last)


def _block(height: int, width: int) -> Any:
    """Return the gradient of `width` features, which lie transposed in the scratch, for `height` output channels."""
    zero = filled(height, width)

    @part
    def block(o: int, k: int, work: Any, grad: Any, row: Any, lanes: int) -> None:
        tile, taps = zero(), row[col.TAPS]
        start, weight = row[col.DY] + o * row[col.DY_PLANE], row[col.WEIGHT] + o * taps + k
        for lane in range(lanes):
            tile = outer(tile, work, start + lane, row[col.DY_PLANE], work, row[col.PACK] + lane * width)
        store(add(tile, load(zero(), grad, weight, taps)), grad, weight, taps)

    return block


def _blocks(width: int) -> Any:
    """Return the gradient of `width` features from k on for all output channels."""
    next_block = fitting([(height, _block(height, width)) for height, _ in TILES.line])

    @part
    def blocks(k: int, work: Any, index: Any, grad: Any, row: Any, lanes: int) -> None:
        for j in range(width):
            source = row[col.X] + number(index, row[col.TAP_PLACES] + k + j)
            for lane in range(lanes):
                work[row[col.PACK] + lane * width + j] = work[source + lane]
        o, channels = 0, row[col.OUT_CHANNELS]
        while o < channels:
            o += next_block(channels - o, o, k, work, grad, row, lanes)

    return blocks


_FEATURES = TILES.features
_many_features, _sixteen_features = _blocks(_FEATURES), _blocks(16)


@part
def linear_weights(work: Any, index: Any, grad: Any, row: Any, lanes: int) -> None:
    """A few features at a time, batch outermost, so that no sum crosses a register."""
    taps, channels = row[col.TAPS], row[col.OUT_CHANNELS]
    most, whole = taps // _FEATURES * _FEATURES, taps // 16 * 16
    for k in range(0, most, _FEATURES):
        _many_features(k, work, index, grad, row, lanes)
    if _FEATURES > 16:
        for k in range(most, whole, 16):
            _sixteen_features(k, work, index, grad, row, lanes)
    for o in range(channels):
        start, k = (row[col.DY] + o * row[col.DY_PLANE],), whole
        while k + 4 <= taps:
            t = row[col.TAP_PLACES] + k
            places = (number(index, t), number(index, t + 1), number(index, t + 2), number(index, t + 3))
            four = zeros_4x16()
            for p in range(0, lanes, 16):
                four = dots(four, work, start, p, work, places, row[col.X] + p)
            add_sums(four, grad, row[col.WEIGHT] + o * taps + k)
            k += 4
        while k < taps:
            single = zeros_1x16()
            for p in range(0, lanes, 16):
                single = dots(single, work, start, p, work, (number(index, row[col.TAP_PLACES] + k),), row[col.X] + p)
            grad[row[col.WEIGHT] + o * taps + k] += sums(single)[0]
            k += 1


@part
def biases(work: Any, grad: Any, row: Any, lanes: int) -> None:
    """Sum the output gradient over the map and the batch."""
    for o in range(row[col.OUT_CHANNELS]):
        tile = zeros_1x16()
        for y in range(row[col.OUT_HEIGHT]):
            start = row[col.DY] + o * row[col.DY_PLANE] + y * row[col.DY_ROW]
            for p in range(0, row[col.PIXELS] * row[col.SPAN], 16):
                tile = add(tile, load(tile, work, start + p, 0))
        grad[row[col.BIAS] + o] += sums(tile)[0]
