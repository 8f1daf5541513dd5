"""Layers of which only kept weights are stored: zeros cost neither time nor memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedlth.kernel import columns as col
from fedlth.kernel.arithmetic import filled, multiply_add, relu, zeros_1x16, zeros_2x16, zeros_4x16, zeros_8x8
from fedlth.kernel.fitting import fitting
from fedlth.kernel.jit import inlined, part
from fedlth.kernel.reduce import add_eight, add_sums, sums
from fedlth.kernel.tile_choice import TILES
from fedlth.kernel.vectors import along, dots, load, number, spread, store
from fedlth.kernel.weights import correlate


@part
def list_kept(index: Any, lists: Any, kept: Any, row: Any) -> None:
    """Write the lists of one layer's kept weights by output channel and, where it is needed, by input channel.

    Both are cut into chunks of the channels that are summed over, so that a chunk's inputs fit the first-level cache.
    kept: int64, ascending; this layer's, counted from its first weight, at `row[col.KEPT]` to `row[col.KEPT_END]`.
    """
    taps, area, linear = row[col.TAPS], row[col.KERNEL_AREA], row[col.KIND] == col.LINEAR
    channels, inputs = row[col.OUT_CHANNELS] // row[col.GROUPS], row[col.CHANNELS] // row[col.GROUPS]
    first, end, chunks, chunk = row[col.KEPT], row[col.KEPT_END], row[col.CHUNKS], row[col.CHUNK] * area
    at = first
    for o in range(row[col.OUT_CHANNELS]):
        group = o // channels * row[col.TAP_GROUP]
        for c in range(chunks):
            lists[row[col.KEPT_STARTS] + o * chunks + c] = at - first
            last = o * taps + min((c + 1) * chunk, taps)
            while at < end and kept[at] < last:
                k = kept[at] - o * taps
                lists[row[col.KEPT_PLACES] + at - first] = index[row[col.TAP_PLACES] + k] + group
                if linear and row[col.NEEDS_DX]:
                    lists[row[col.BACK_KEPT_PLACES] + at - first] = index[row[col.BACK_OUT_PLACES] + k]
                at += 1
    lists[row[col.KEPT_STARTS] + row[col.OUT_CHANNELS] * chunks] = end - first
    if linear or not row[col.NEEDS_DX]:
        return
    back, chunks, ends = row[col.BACK_STARTS], row[col.BACK_CHUNKS], row[col.CHANNELS] * row[col.BACK_CHUNKS]
    for start in range(ends + 1):
        lists[back + start] = 0
    at = first
    for o in range(row[col.OUT_CHANNELS]):
        group, among = o // channels, o % channels // row[col.BACK_CHUNK]
        for c in range(inputs):
            was, last = at, o * taps + (c + 1) * area
            while at < end and kept[at] < last:
                at += 1
            lists[back + (group * inputs + c) * chunks + among + 1] += at - was
    for start in range(ends):
        lists[back + start + 1] += lists[back + start]
    at = first
    for o in range(row[col.OUT_CHANNELS]):
        group, among, places = o // channels, o % channels // row[col.BACK_CHUNK], o % channels * area
        for c in range(inputs):
            start, base = back + (group * inputs + c) * chunks + among, o * taps + c * area
            to = lists[start]
            while at < end and kept[at] < base + area:
                place = index[row[col.BACK_PLACES] + places + kept[at] - base]
                lists[row[col.BACK_KEPT_PLACES] + to] = place + group * row[col.BACK_GROUP]
                lists[row[col.BACK_KEPT_WEIGHTS] + to] = at - first
                to += 1
                at += 1
            lists[start] = to
    for start in range(ends, 0, -1):
        lists[back + start] = lists[back + start - 1]
    lists[back] = 0


class Kept(NamedTuple):
    """A sum over kept weights for every output channel and pixel: a layer forward, or its input's gradient."""

    source: int  # place of the input, distance of two output rows, of two pixels
    source_row: int
    source_step: int
    starts: int  # lists: where a channel's chunk begins, and the inputs' places from the source
    places: int
    chunks: int
    weight: int  # place of the first weight; they lie in the order of the list
    bias: int  # -1 for none
    channels: int
    out: int  # place of the output, list of the channels' places from it, distance of two rows
    out_places: int
    out_row: int
    rows: int
    pixels: int
    span: int
    lanes: int
    relu: bool
    accumulate: bool


def _span(values: int) -> Any:
    """Return the sum of one chunk's taps for all channels of `values` values that lie side by side."""
    width = 32 if values % 32 == 0 else 16
    zero = filled(values // width, width)

    @part
    def span(
        work: Any, index: Any, lists: Any, weights: Any, w: Any, chunk: int, start: int, to: int, job: Kept
    ) -> None:
        for c in range(job.channels):
            at, out = job.starts + c * job.chunks + chunk, to + number(index, job.out_places + c)
            tile = zero()
            if chunk > 0 or job.accumulate:
                tile = load(tile, work, out, width)
            elif job.bias >= 0:
                tile = spread(tile, w, job.bias + c, 0)
            for k in range(number(lists, at), number(lists, at + 1)):
                tile = along(tile, weights, job.weight + k, work, start + number(lists, job.places + k))
            if job.relu and chunk == job.chunks - 1:
                tile = relu(tile)
            store(tile, work, out, width)

    return span


_next_span = fitting([(values, _span(values)) for values in TILES.spans])


@part
def run(work: Any, index: Any, lists: Any, weights: Any, w: Any, job: Kept) -> None:
    """Run a job, as many values of a row at a time as a tile holds; `weights` are the kept ones, `w` has the biases."""
    for y in range(job.rows):
        for pixel in range(job.pixels):
            p = 0
            while p < job.span:
                start = job.source + y * job.source_row + pixel * job.source_step + p
                to = job.out + y * job.out_row + pixel * job.lanes + p
                width = 0
                for chunk in range(job.chunks):
                    width = _next_span(job.span - p, work, index, lists, weights, w, chunk, start, to, job)
                p += width


@part
def forward(work: Any, index: Any, lists: Any, w: Any, row: Any, lanes: int) -> None:
    """Compute the layer's output from its kept weights."""
    job = Kept(
        row[col.X],
        row[col.TAP_ROW],
        row[col.TAP_STEP],
        row[col.KEPT_STARTS],
        row[col.KEPT_PLACES],
        row[col.CHUNKS],
        row[col.WEIGHT],
        row[col.BIAS],
        row[col.OUT_CHANNELS],
        row[col.Y],
        row[col.OUT_PLACES],
        row[col.Y_ROW],
        row[col.OUT_HEIGHT],
        row[col.PIXELS],
        row[col.SPAN],
        lanes,
        row[col.RELU] != 0,
        False,
    )
    run(work, index, lists, w, w, job)


@part
def input_gradient(work: Any, index: Any, lists: Any, w: Any, row: Any, lanes: int) -> None:
    """Compute the gradient of the layer's input from its kept weights, first laid out in the order of their use."""
    count = number(lists, row[col.BACK_STARTS] + row[col.CHANNELS] * row[col.BACK_CHUNKS])
    for k in range(count):
        work[row[col.PACK] + k] = w[row[col.WEIGHT] + number(lists, row[col.BACK_KEPT_WEIGHTS] + k)]
    job = Kept(
        row[col.SPREAD],
        row[col.SPREAD_ROW],
        lanes,
        row[col.BACK_STARTS],
        row[col.BACK_KEPT_PLACES],
        row[col.BACK_CHUNKS],
        row[col.PACK],
        -1,
        row[col.CHANNELS],
        row[col.DX],
        row[col.BACK_OUT_PLACES],
        row[col.DX_ROW],
        row[col.BACK_ROWS],
        1,
        row[col.BACK_SPAN],
        lanes,
        False,
        row[col.ACCUMULATE] != 0,
    )
    run(work, index, lists, work, w, job)


_BLOCK = 64  # vectors of 16 values that a sum runs over at least: fewer, and adding up its lanes costs as much


@part
def weights(work: Any, lists: Any, grad: Any, row: Any, lanes: int) -> None:
    """Add the gradient of the kept weights, four at a time, over a few rows of a chunk's channels at a time."""
    height, chunks = row[col.OUT_HEIGHT], row[col.CHUNKS]
    rows = min(height, 1 + _BLOCK * 16 // (row[col.PIXELS] * row[col.SPAN]))
    for chunk in range(chunks):
        for y in range(0, height, rows):
            end = min(y + rows, height)
            for o in range(row[col.OUT_CHANNELS]):
                at = row[col.KEPT_STARTS] + o * chunks + chunk
                k, last = number(lists, at), number(lists, at + 1)
                start = (row[col.DY] + o * row[col.DY_PLANE],)
                while k < last:
                    t, most = row[col.KEPT_PLACES], last - 1
                    places = (
                        row[col.X] + number(lists, t + k),
                        row[col.X] + number(lists, t + min(k + 1, most)),
                        row[col.X] + number(lists, t + min(k + 2, most)),
                        row[col.X] + number(lists, t + min(k + 3, most)),
                    )
                    four = correlate(zeros_4x16(), 16, start, places, work, row, lanes, y, end)
                    if k + 4 <= last:
                        add_sums(four, grad, row[col.WEIGHT] + k)
                    else:
                        rest = sums(four)
                        for j in range(last - k):
                            grad[row[col.WEIGHT] + k + j] += rest[j]
                    k += 4


@inlined
def _share(zero: Any, chunk: int, p: int, work: Any, lists: Any, w: Any, row: Any) -> None:
    """Add what a chunk's kept weights pass back to the lanes from `p` on."""
    # Read once: to the compiler, every store to `work` may have changed the row.
    starts, chunks, slopes, plane = row[col.KEPT_STARTS] + chunk, row[col.CHUNKS], row[col.DY] + p, row[col.DY_PLANE]
    places, weights, to = row[col.BACK_KEPT_PLACES], row[col.WEIGHT], row[col.DX] + p
    for o in range(row[col.OUT_CHANNELS]):
        slope = load(zero, work, slopes + o * plane, 16)
        for k in range(number(lists, starts + o * chunks), number(lists, starts + o * chunks + 1)):
            place = to + number(lists, places + k)
            weight = spread(slope, w, weights + k, 0)
            store(multiply_add(weight, slope, load(slope, work, place, 16)), work, place, 16)


@part
def linear_input_gradient(work: Any, index: Any, lists: Any, w: Any, row: Any, lanes: int) -> None:
    """Compute a linear layer's input gradient in the order of its weights, each of which adds its share to an input."""
    if not row[col.ACCUMULATE]:
        for c in range(row[col.CHANNELS]):
            at = row[col.DX] + number(index, row[col.BACK_OUT_PLACES] + c)
            work[at : at + lanes] = 0
    for chunk in range(row[col.CHUNKS]):
        if lanes % 32 == 0:
            for p in range(0, lanes, 32):
                _share(zeros_2x16(), chunk, p, work, lists, w, row)
        else:
            for p in range(0, lanes, 16):
                _share(zeros_1x16(), chunk, p, work, lists, w, row)


@inlined
def _eight(lists: Any, listed: int, most: int, x: int, start: Any, work: Any, lanes: int) -> Any:
    """Return the tile of the sums for eight kept weights, whose places are listed from `listed` to `most`."""
    places = (
        number(lists, listed),
        number(lists, min(listed + 1, most)),
        number(lists, min(listed + 2, most)),
        number(lists, min(listed + 3, most)),
        number(lists, min(listed + 4, most)),
        number(lists, min(listed + 5, most)),
        number(lists, min(listed + 6, most)),
        number(lists, min(listed + 7, most)),
    )
    eight = zeros_8x8()
    for p in range(0, lanes, 8):
        eight = dots(eight, work, start, p, work, places, x + p)
    return eight


@part
def linear_weights(work: Any, lists: Any, grad: Any, row: Any, lanes: int) -> None:
    """Add the gradient of a linear layer's kept weights, eight at a time."""
    listed, x, weight, chunks = row[col.KEPT_PLACES], row[col.X], row[col.WEIGHT], row[col.CHUNKS]
    for chunk in range(chunks):
        for o in range(row[col.OUT_CHANNELS]):
            at = row[col.KEPT_STARTS] + o * chunks + chunk
            k, last = number(lists, at), number(lists, at + 1)
            start = (row[col.DY] + o * row[col.DY_PLANE],)
            while k + 8 <= last:
                add_eight(_eight(lists, listed + k, listed + k + 7, x, start, work, lanes), grad, weight + k)
                k += 8
            if k < last:
                rest = sums(_eight(lists, listed + k, listed + last - 1, x, start, work, lanes))
                for j in range(last - k):
                    grad[weight + k + j] += rest[j]
