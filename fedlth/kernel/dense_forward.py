"""The dense sum over taps: a convolution or linear layer forward, or its input's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedlth.kernel.arithmetic import relu, zeros_1x16, zeros_1x32, zeros_2x16, zeros_2x32, zeros_4x16, zeros_6x16
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.vectors import collect, number, outer, scatter, spread


class TapSum(NamedTuple):
    """A sum over taps for every output channel and pixel: a layer forward, or its input's gradient.

    Taps are listed by chunk of input channels, then by kernel row, kernel column and channel, so that those whose
    inputs are not padding are a few stretches of the list.
    """

    source: int  # place of the input, distance of two output rows, of two pixels, of two groups
    source_row: int
    source_step: int
    source_group: int
    inputs: int  # input channels a group, and how many of them a chunk has
    chunk: int
    window_y: int
    window_x: int
    tap_places: int  # list of the taps' places from the source
    top: int  # lists of the first and the end of the kernel rows inside the input, by output row
    left: int  # ... and of the columns, by output pixel
    weight: int  # place of the weights, distance of two output channels, of two groups, and the list by tap
    weight_channel: int
    weight_group: int
    tap_weights: int
    bias: int  # -1 for none
    groups: int
    channels: int  # outputs a group
    out: int  # place of the output, list of the channels' places from it, distance of two rows
    out_places: int
    out_row: int
    rows: int
    pixels: int
    lanes: int
    relu: bool
    accumulate: bool
    pack: int  # place of scratch for the weights in the order of use


_CHUNK = 128  # taps of a linear layer at a time, whose inputs then stay in the first-level cache


@inlined
def _height(left: int, most: int) -> int:
    """Return how many output channels the next tile takes."""
    if left >= most:
        return most
    return 4 if left >= 4 else 2 if left >= 2 else 1


@inlined
def _pack(work: Any, index: Any, w: Any, job: TapSum) -> None:
    """Lay the weights out in the order of their use: by tile, tap, channel of the tile."""
    q, taps = job.pack, job.inputs * job.window_y * job.window_x
    for group in range(job.groups):
        c = 0
        while c < job.channels:
            height = _height(job.channels - c, 6)
            first = job.weight + group * job.weight_group + c * job.weight_channel
            for k in range(taps):
                at = first + number(index, job.tap_weights + k)
                for j in range(height):
                    work[q + j] = w[at + j * job.weight_channel]
                q += height
            c += height


@inlined
def _begin(zero: Any, work: Any, index: Any, w: Any, channel: int, place: int, first: bool, job: TapSum) -> Any:
    tile = zero
    if first and job.bias >= 0:
        tile = spread(zero, w, job.bias + channel, 1)
    if not first or job.accumulate:
        tile = collect(tile, work, index, job.out_places + channel, place)
    return tile


@inlined
def _end(tile: Any, work: Any, index: Any, channel: int, place: int, last: bool, job: TapSum) -> None:
    if job.relu and last:
        tile = relu(tile)
    scatter(tile, work, index, job.out_places + channel, place)


@inlined
def _stretch(
    zero: Any,
    height: int,
    width: int,
    work: Any,
    index: Any,
    w: Any,
    q: int,
    channel: int,
    source: int,
    row: int,
    first: int,
    job: TapSum,
) -> None:
    """Add a chunk's taps for `height` channels of an output row; the tile stays in registers meanwhile."""
    count = min(job.chunk, job.inputs - first)
    taps = first * job.window_y * job.window_x
    top, bottom = number(index, job.top + 2 * row), number(index, job.top + 2 * row + 1)
    for pixel in range(job.pixels):
        left, right = number(index, job.left + 2 * pixel), number(index, job.left + 2 * pixel + 1)
        for p in range(0, job.lanes, width):
            place = job.out + row * job.out_row + pixel * job.lanes + p
            start = source + pixel * job.source_step + p
            tile = _begin(zero, work, index, w, channel, place, first == 0, job)
            for y in range(top, bottom):
                line = taps + y * job.window_x * count
                for k in range(line + left * count, line + right * count):
                    tile = outer(tile, work, q + k * height, 1, work, start + number(index, job.tap_places + k))
            _end(tile, work, index, channel, place, first + count == job.inputs, job)


@part
def sum_taps(work: Any, index: Any, w: Any, job: TapSum) -> None:
    """Run a job of many rows."""
    _pack(work, index, w, job)
    wide, taps = job.lanes % 32 == 0, job.inputs * job.window_y * job.window_x
    for row in range(job.rows):
        for group in range(job.groups):
            source = job.source + row * job.source_row + group * job.source_group
            for first in range(0, job.inputs, job.chunk):
                q, c = job.pack + group * job.channels * taps, 0
                while c < job.channels:
                    height = _height(job.channels - c, 6)
                    at = group * job.channels + c
                    if height == 6:
                        _stretch(zeros_6x16(), 6, 16, work, index, w, q, at, source, row, first, job)
                    elif height == 4:
                        _stretch(zeros_4x16(), 4, 16, work, index, w, q, at, source, row, first, job)
                    elif height == 2 and wide:
                        _stretch(zeros_2x32(), 2, 32, work, index, w, q, at, source, row, first, job)
                    elif height == 2:
                        _stretch(zeros_2x16(), 2, 16, work, index, w, q, at, source, row, first, job)
                    elif wide:
                        _stretch(zeros_1x32(), 1, 32, work, index, w, q, at, source, row, first, job)
                    else:
                        _stretch(zeros_1x16(), 1, 16, work, index, w, q, at, source, row, first, job)
                    q += height * taps
                    c += height


@inlined
def _column(
    zero: Any, work: Any, index: Any, w: Any, channel: int, p: int, first: int, last: int, step: int, job: TapSum
) -> None:
    """The same for the one pixel of a linear layer, whose weights are read where they are, `step` apart by tap."""
    tile = _begin(zero, work, index, w, channel, job.out + p, first == 0, job)
    weight, source = job.weight + channel * job.weight_channel, job.source + p
    for k in range(first, last):
        place = number(index, job.tap_places + k)
        tile = outer(tile, w, weight + k * step, job.weight_channel, work, source + place)
    _end(tile, work, index, channel, job.out + p, last == job.inputs, job)


@part
def sum_taps_of_vector(work: Any, index: Any, w: Any, job: TapSum) -> None:
    """Run a job of one row, one pixel and one group: packing would cost as much as the sum.

    Where a channel's weights lie side by side they stream past in one go; where they lie far apart, a chunk of their
    cache lines stays near until all channels in them have had their turn.
    """
    taps = job.inputs
    step = number(index, job.tap_weights + 1) - number(index, job.tap_weights) if taps > 1 else 1
    chunk = taps if step == 1 else _CHUNK
    for first in range(0, taps, chunk):
        last = min(first + chunk, taps)
        c = 0
        while c < job.channels:
            height = _height(job.channels - c, 6)
            for p in range(0, job.lanes, 16):
                if height == 6:
                    _column(zeros_6x16(), work, index, w, c, p, first, last, step, job)
                elif height == 4:
                    _column(zeros_4x16(), work, index, w, c, p, first, last, step, job)
                elif height == 2:
                    _column(zeros_2x16(), work, index, w, c, p, first, last, step, job)
                else:
                    _column(zeros_1x16(), work, index, w, c, p, first, last, step, job)
            c += height
