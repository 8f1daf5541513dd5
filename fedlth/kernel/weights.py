"""Gradients of dense weights and of biases; added to the compact gradient vector."""

from __future__ import annotations

from typing import Any

from fedlth.kernel import columns as col
from fedlth.kernel.arithmetic import add, zeros_1x16, zeros_2x16, zeros_4x16, zeros_5x8, zeros_6x16, zeros_10x8
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.reduce import add_sums, sums
from fedlth.kernel.vectors import dots, load, number, outer, store


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


@part
def convolution_weights(work: Any, index: Any, grad: Any, row: Any, lanes: int) -> None:
    """Two output channels times five taps stay in registers while the rows that they reach stream past."""
    taps, plane = row[col.TAPS], row[col.DY_PLANE]
    channels = row[col.OUT_CHANNELS] // row[col.GROUPS]
    for group in range(row[col.GROUPS]):
        source = row[col.X] + group * row[col.TAP_GROUP]
        for o in range(0, channels, 2):
            channel = group * channels + o
            both = o + 1 < channels
            start = row[col.DY] + channel * plane
            weight = row[col.WEIGHT] + channel * taps
            k = 0
            while k < taps:
                t, count = row[col.TAP_PLACES] + k, min(5, taps - k)
                first, last = row[col.OUT_HEIGHT], 0
                for j in range(k, k + count):
                    reach = row[col.REACH] + 2 * (j // row[col.WINDOW_X] % row[col.WINDOW_Y])
                    first, last = min(first, number(index, reach)), max(last, number(index, reach + 1))
                if count == 5:
                    places = (
                        source + number(index, t),
                        source + number(index, t + 1),
                        source + number(index, t + 2),
                        source + number(index, t + 3),
                        source + number(index, t + 4),
                    )
                    if both:
                        ten = sums(
                            correlate(zeros_10x8(), 8, (start, start + plane), places, work, row, lanes, first, last)
                        )
                        for j in range(5):
                            grad[weight + k + j] += ten[j]
                            grad[weight + k + j + taps] += ten[j + 5]
                    else:
                        five = sums(correlate(zeros_5x8(), 8, (start,), places, work, row, lanes, first, last))
                        for j in range(5):
                            grad[weight + k + j] += five[j]
                    k += 5
                else:
                    place = (source + number(index, t),)
                    if both:
                        two = sums(
                            correlate(zeros_2x16(), 16, (start, start + plane), place, work, row, lanes, first, last)
                        )
                        grad[weight + k] += two[0]
                        grad[weight + k + taps] += two[1]
                    else:
                        one = sums(correlate(zeros_1x16(), 16, (start,), place, work, row, lanes, first, last))
                        grad[weight + k] += one[0]
                    k += 1


@inlined
def _block(zero: Any, o: int, weight: int, work: Any, grad: Any, row: Any, lanes: int) -> None:
    """Add the gradient of 16 features for the tile's output channels; the features lie transposed in the scratch."""
    tile = zero
    start = row[col.DY] + o * row[col.DY_PLANE]
    for lane in range(lanes):
        tile = outer(tile, work, start + lane, row[col.DY_PLANE], work, row[col.PACK] + lane * 16)
    store(add(tile, load(zero, grad, weight, row[col.TAPS])), grad, weight, row[col.TAPS])


@part
def linear_weights(work: Any, index: Any, grad: Any, row: Any, lanes: int) -> None:
    """Sixteen features at a time, batch outermost, so that no sum crosses a register."""
    taps, channels = row[col.TAPS], row[col.OUT_CHANNELS]
    whole = taps // 16 * 16
    for k in range(0, whole, 16):
        for j in range(16):
            source = row[col.X] + number(index, row[col.TAP_PLACES] + k + j)
            for lane in range(lanes):
                work[row[col.PACK] + lane * 16 + j] = work[source + lane]
        o = 0
        while o < channels:
            weight = row[col.WEIGHT] + o * taps + k
            if o + 6 <= channels:
                _block(zeros_6x16(), o, weight, work, grad, row, lanes)
                o += 6
            elif o + 4 <= channels:
                _block(zeros_4x16(), o, weight, work, grad, row, lanes)
                o += 4
            elif o + 2 <= channels:
                _block(zeros_2x16(), o, weight, work, grad, row, lanes)
                o += 2
            else:
                _block(zeros_1x16(), o, weight, work, grad, row, lanes)
                o += 1
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
