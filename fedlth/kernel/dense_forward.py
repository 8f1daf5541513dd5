"""The dense sum over taps: a convolution or linear layer forward, or its input's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedlth.kernel.arithmetic import filled, relu
from fedlth.kernel.fitting import fitting
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.tile_choice import TILES
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


_HEIGHTS = tuple(height for height, _ in TILES.taps)


@inlined
def _height(left: int) -> int:
    """Return how many output channels the next tile of a convolution takes."""
    for height in _HEIGHTS:
        if left >= height:
            return height
    return 1


@inlined
def _pack(work: Any, index: Any, w: Any, job: TapSum) -> None:
    """Lay the weights out in the order of their use: by tile, tap, channel of the tile."""
    q, taps = job.pack, job.inputs * job.window_y * job.window_x
    for group in range(job.groups):
        c = 0
        while c < job.channels:
            height = _height(job.channels - c)
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
def _spot(
    zero: Any,
    height: int,
    work: Any,
    index: Any,
    w: Any,
    q: int,
    channel: int,
    place: int,
    start: int,
    window: Any,
    first: int,
    job: TapSum,
) -> None:
    """Add a chunk's taps to one tile, which stays in registers meanwhile."""
    top, bottom, left, right = window
    count = min(job.chunk, job.inputs - first)
    tile = _begin(zero, work, index, w, channel, place, first == 0, job)
    for y in range(top, bottom):
        line = (first * job.window_y + y * count) * job.window_x
        for k in range(line + left * count, line + right * count):
            tile = outer(tile, work, q + k * height, 1, work, start + number(index, job.tap_places + k))
    _end(tile, work, index, channel, place, first + count == job.inputs, job)


def _stretch(height: int, width: int) -> Any:
    """Return the sum of a chunk's taps for `height` channels of an output row, `width` values at a time."""
    zero, narrow = filled(height, width), filled(height, 16)

    @part
    def stretch(
        work: Any, index: Any, w: Any, q: int, channel: int, source: int, row: int, first: int, job: TapSum
    ) -> None:
        top, bottom = number(index, job.top + 2 * row), number(index, job.top + 2 * row + 1)
        pixel = 0
        while pixel < job.pixels:
            left, right = number(index, job.left + 2 * pixel), number(index, job.left + 2 * pixel + 1)
            window = top, bottom, left, right
            place, start = job.out + row * job.out_row + pixel * job.lanes, source + pixel * job.source_step
            values = job.lanes
            pixel += 1
            # Neighbours that see the same columns of the kernel lie side by side: one stretch of values.
            while (
                job.lanes % width
                and job.source_step == job.lanes
                and pixel < job.pixels
                and number(index, job.left + 2 * pixel) == left
                and number(index, job.left + 2 * pixel + 1) == right
            ):
                values += job.lanes
                pixel += 1
            p = 0
            while p + width <= values:
                _spot(zero(), height, work, index, w, q, channel, place + p, start + p, window, first, job)
                p += width
            while width > 16 and p < values:
                _spot(narrow(), height, work, index, w, q, channel, place + p, start + p, window, first, job)
                p += 16

    return stretch


_next_stretch = fitting([(height, _stretch(height, width)) for height, width in TILES.taps])


@part
def sum_taps(work: Any, index: Any, w: Any, job: TapSum) -> None:
    """Run a job of many rows."""
    _pack(work, index, w, job)
    taps = job.inputs * job.window_y * job.window_x
    for row in range(job.rows):
        for group in range(job.groups):
            source = job.source + row * job.source_row + group * job.source_group
            for first in range(0, job.inputs, job.chunk):
                q, c = job.pack + group * job.channels * taps, 0
                while c < job.channels:
                    at = group * job.channels + c
                    height = _next_stretch(job.channels - c, work, index, w, q, at, source, row, first, job)
                    q += height * taps
                    c += height


@inlined
def _line(
    zero: Any, work: Any, index: Any, w: Any, channel: int, p: int, first: int, last: int, step: int, job: TapSum
) -> None:
    tile = _begin(zero, work, index, w, channel, job.out + p, first == 0, job)
    weight, source = job.weight + channel * job.weight_channel, job.source + p
    for k in range(first, last):
        place = number(index, job.tap_places + k)
        tile = outer(tile, w, weight + k * step, job.weight_channel, work, source + place)
    _end(tile, work, index, channel, job.out + p, last == job.inputs, job)


def _column(height: int, width: int) -> Any:
    """Return the same for the one pixel of a linear layer; weights are read where they are, `step` apart by tap."""
    zero, narrow = filled(height, width), filled(height, 16)

    @part
    def column(work: Any, index: Any, w: Any, channel: int, first: int, last: int, step: int, job: TapSum) -> None:
        p = 0
        while p + width <= job.lanes:
            _line(zero(), work, index, w, channel, p, first, last, step, job)
            p += width
        while width > 16 and p < job.lanes:
            _line(narrow(), work, index, w, channel, p, first, last, step, job)
            p += 16

    return column


_next_column = fitting([(height, _column(height, width)) for height, width in TILES.line])


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
            c += _next_column(job.channels - c, work, index, w, c, first, last, step, job)
