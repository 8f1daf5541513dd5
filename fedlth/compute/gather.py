"""The dense sum over taps: a convolution or linear layer forward, or its input's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedlth.compute.arithmetic import (
    relu,
    zeros_1x16,
    zeros_1x32,
    zeros_2x16,
    zeros_2x32,
    zeros_3x32,
    zeros_4x16,
    zeros_6x16,
)
from fedlth.compute.jit import inlined, part
from fedlth.compute.vectors import collect, number, outer, scatter, spread


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


_CHUNK = 128  # taps at a time, whose inputs then stay in the first-level cache (16 KB at 32 lanes)


@inlined
def _height(left: int, most: int) -> int:
    """Return how many output channels the next tile takes."""
    if left >= most:
        return most
    return 4 if left >= 4 else 2 if left >= 2 else 1


@inlined
def _pack(work: Any, index: Any, w: Any, job: Gather) -> None:
    """Lay the weights out in the order of their use: by tile, tap, channel of the tile."""
    q = job.pack
    for group in range(job.groups):
        c = 0
        while c < job.channels:
            height = _height(job.channels - c, 6)
            first = job.weight + group * job.weight_group + c * job.weight_channel
            for k in range(job.taps):
                at = first + number(index, job.tap_weights + k)
                for j in range(height):
                    work[q + j] = w[at + j * job.weight_channel]
                q += height
            c += height


@inlined
def _begin(zero: Any, work: Any, index: Any, w: Any, channel: int, place: int, first: int, job: Gather) -> Any:
    tile = zero
    if first == 0 and job.bias >= 0:
        tile = spread(zero, w, job.bias + channel, 1)
    if first > 0 or job.accumulate:
        tile = collect(tile, work, index, job.out_places + channel, place)
    return tile


@inlined
def _end(tile: Any, work: Any, index: Any, channel: int, place: int, last: int, job: Gather) -> None:
    if job.relu and last == job.taps:
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
    out: int,
    first: int,
    last: int,
    job: Gather,
) -> None:
    """Add taps first to last of `height` channels of an output row; the tile stays in registers meanwhile."""
    for pixel in range(job.pixels):
        for p in range(0, job.span, width):
            place = out + pixel * job.lanes + p
            start = source + pixel * job.source_step + p
            tile = _begin(zero, work, index, w, channel, place, first, job)
            for k in range(first, last):
                tile = outer(tile, work, q + k * height, 1, work, start + number(index, job.tap_places + k))
            _end(tile, work, index, channel, place, last, job)


@part
def gather(work: Any, index: Any, w: Any, job: Gather) -> None:
    """Run a job of many rows."""
    _pack(work, index, w, job)
    wide = job.span % 32 == 0
    for row in range(job.rows):
        out = job.out + row * job.out_row
        for group in range(job.groups):
            source = job.source + row * job.source_row + group * job.source_group
            for first in range(0, job.taps, _CHUNK):
                last = min(first + _CHUNK, job.taps)
                q, c = job.pack + group * job.channels * job.taps, 0
                while c < job.channels:
                    height = _height(job.channels - c, 6)
                    at = group * job.channels + c
                    if height == 6:
                        _stretch(zeros_6x16(), 6, 16, work, index, w, q, at, source, out, first, last, job)
                    elif height == 4:
                        _stretch(zeros_4x16(), 4, 16, work, index, w, q, at, source, out, first, last, job)
                    elif height == 2 and wide:
                        _stretch(zeros_2x32(), 2, 32, work, index, w, q, at, source, out, first, last, job)
                    elif height == 2:
                        _stretch(zeros_2x16(), 2, 16, work, index, w, q, at, source, out, first, last, job)
                    elif wide:
                        _stretch(zeros_1x32(), 1, 32, work, index, w, q, at, source, out, first, last, job)
                    else:
                        _stretch(zeros_1x16(), 1, 16, work, index, w, q, at, source, out, first, last, job)
                    q += height * job.taps
                    c += height


@inlined
def _column(
    zero: Any, width: int, work: Any, index: Any, w: Any, channel: int, first: int, last: int, job: Gather
) -> None:
    """The same for the one pixel of a linear layer, whose weights are read where they are."""
    weight = job.weight + channel * job.weight_channel
    for p in range(0, job.span, width):
        tile = _begin(zero, work, index, w, channel, job.out + p, first, job)
        for k in range(first, last):
            at, place = number(index, job.tap_weights + k), number(index, job.tap_places + k)
            tile = outer(tile, w, weight + at, job.weight_channel, work, job.source + p + place)
        _end(tile, work, index, channel, job.out + p, last, job)


@part
def gather_one(work: Any, index: Any, w: Any, job: Gather) -> None:
    """Run a job of one row, one pixel and one group: packing would cost as much as the sum."""
    wide = job.span % 32 == 0
    for first in range(0, job.taps, _CHUNK):
        last = min(first + _CHUNK, job.taps)
        c = 0
        while c < job.channels:
            if wide and c + 3 <= job.channels:
                _column(zeros_3x32(), 32, work, index, w, c, first, last, job)
                c += 3
            elif c + 4 <= job.channels:
                _column(zeros_4x16(), 16, work, index, w, c, first, last, job)
                c += 4
            else:
                _column(zeros_1x16(), 16, work, index, w, c, first, last, job)
                c += 1
