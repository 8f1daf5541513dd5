"""Dense convolution and linear layers with the batch innermost: forward, gradient of the input, of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedlth.compute.arithmetic import (
    relu,
    zeros_1x16,
    zeros_1x32,
    zeros_2x16,
    zeros_2x32,
    zeros_4x16,
    zeros_6x16,
)
from fedlth.compute.columns import (
    DY_ROW,
    OUT_HEIGHT,
    PIXELS,
    SPAN,
    TAP_ROW,
    TAP_STEP,
)
from fedlth.compute.jit import inlined, part
from fedlth.compute.vectors import collect, dots, number, outer, scatter, spread


class Gather(NamedTuple):
    """A sum over taps for every output channel and pixel: a layer forward, or its input's gradient."""

    source: int  # place of the input, distance of two output rows, of two pixels, of two groups
    source_row: int
    source_step: int
    source_group: int
    taps: int  # how many, and the list of their places from the source
    tap_places: int
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
    span: int
    lanes: int
    relu: bool
    accumulate: bool
    pack: int  # place of scratch for the weights in the order of use


@inlined
def _height(left: int) -> int:
    """Return how many output channels the next tile takes."""
    return 6 if left >= 6 else 4 if left >= 4 else 2 if left >= 2 else 1


@inlined
def _pack(work: Any, index: Any, w: Any, q: int, height: int, first: int, job: Gather) -> None:
    for k in range(job.taps):
        at = first + number(index, job.tap_weights + k)
        for j in range(height):
            work[q + k * height + j] = w[at + j * job.weight_channel]


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
    out: int,
    job: Gather,
) -> None:
    """Compute `height` channels of one output row; the tile's type is the shape of what stays in registers."""
    for pixel in range(job.pixels):
        for p in range(0, job.span, width):
            tile = zero
            if job.bias >= 0:
                tile = spread(zero, w, job.bias + channel, 1)
            start = source + pixel * job.source_step + p
            for k in range(job.taps):
                tile = outer(tile, work, q + k * height, 1, work, start + number(index, job.tap_places + k))
            place = out + pixel * job.lanes + p
            if job.accumulate:
                tile = collect(tile, work, index, job.out_places + channel, place)
            if job.relu:
                tile = relu(tile)
            scatter(tile, work, index, job.out_places + channel, place)


@part
def gather(work: Any, index: Any, w: Any, job: Gather) -> None:
    """Run the job. Weights are packed once for many rows, or tile by tile for the one row of a linear layer."""
    many = job.rows > 1
    if many:
        q = job.pack
        for group in range(job.groups):
            c = 0
            while c < job.channels:
                height = _height(job.channels - c)
                first = job.weight + group * job.weight_group + c * job.weight_channel
                _pack(work, index, w, q, height, first, job)
                q += height * job.taps
                c += height
    wide = job.span % 32 == 0
    for row in range(job.rows):
        q = job.pack
        for group in range(job.groups):
            source = job.source + row * job.source_row + group * job.source_group
            out = job.out + row * job.out_row
            c = 0
            while c < job.channels:
                height = _height(job.channels - c)
                if not many:
                    q = job.pack
                    first = job.weight + group * job.weight_group + c * job.weight_channel
                    _pack(work, index, w, q, height, first, job)
                channel = group * job.channels + c
                if height == 6:
                    _stretch(zeros_6x16(), 6, 16, work, index, w, q, channel, source, out, job)
                elif height == 4:
                    _stretch(zeros_4x16(), 4, 16, work, index, w, q, channel, source, out, job)
                elif height == 2:
                    if wide:
                        _stretch(zeros_2x32(), 2, 32, work, index, w, q, channel, source, out, job)
                    else:
                        _stretch(zeros_2x16(), 2, 16, work, index, w, q, channel, source, out, job)
                elif wide:
                    _stretch(zeros_1x32(), 1, 32, work, index, w, q, channel, source, out, job)
                else:
                    _stretch(zeros_1x16(), 1, 16, work, index, w, q, channel, source, out, job)
                q += height * job.taps
                c += height


@inlined
def _correlate(zero: Any, width: int, starts: Any, places: Any, work: Any, row: Any, lanes: int) -> Any:
    """Return the tile of sums over the whole map of output gradient times input."""
    tile = zero
    for y in range(row[OUT_HEIGHT]):
        for pixel in range(row[PIXELS]):
            at = y * row[DY_ROW] + pixel * lanes
            source = y * row[TAP_ROW] + pixel * row[TAP_STEP]
            for p in range(0, row[SPAN], width):
                tile = dots(tile, work, _shift(starts, at + p), work, _shift(places, source + p))
    return tile


@inlined
def _shift(places: Any, by: int) -> Any:
    # A tuple's length is part of its type, so each branch but one is gone when this is compiled.
    if len(places) == 5:
        return _shift_5(places, by)
    return _shift_2(places, by) if len(places) == 2 else (places[0] + by,)
