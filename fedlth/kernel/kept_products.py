"""Products with the kept weights of a layer: forward, its input's gradient, and the gradient of these weights.

Examples (of a linear layer: positions) lie innermost, in panels: a panel holds every place of their maps, one after the
other. A weight is then one broadcast, multiplied with a tile of places that lie side by side, as in sparse.py. A linear
layer is a convolution of maps of one pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from fedlth.kernel.arithmetic import filled, zeros_4x16
from fedlth.kernel.fitting import fitting
from fedlth.kernel.jit import entry, inlined, intrinsic, part, source_stamp
from fedlth.kernel.kept_form import WIDEST
from fedlth.kernel.reduce import add_sums, sums
from fedlth.kernel.tile_choice import CHOSEN, TILES
from fedlth.kernel.vectors import INT, Code, along, dots, load, made, nothing, number, same, spread, store

_SIDE = 16 if CHOSEN == "wide" else 8  # of the square tiles that are turned: moves alone, which round nothing
_square = filled(_SIDE, _SIDE)


@intrinsic
def _turned(typing, tile):  # type: ignore[no-untyped-def]
    """Return a square tile transposed."""

    def body(c: Code) -> Any:
        rows, near = c.rows(0), 1
        side = len(rows)
        while near < side:
            places = [k % near + k // near % 2 * side + k // near // 2 * 2 * near for k in range(side)]
            low, high = (ir.Constant(ir.VectorType(INT, side), [at + k for k in places]) for at in (0, near))
            for i in range(side):
                if not i & near:
                    a, b = rows[i], rows[i + near]
                    rows[i] = c.builder.shuffle_vector(a, b, low)
                    rows[i + near] = c.builder.shuffle_vector(a, b, high)
            near *= 2
        return c.tile(rows)

    return made(body, same)(tile)


@intrinsic
def _put(typing, tile, out, base, row, places, first):  # type: ignore[no-untyped-def]
    """Store row j at out[base + places[first + j] * row : ...]."""

    def body(c: Code) -> Any:
        for j, value in enumerate(c.rows(0)):
            place = c.builder.sext(c.scalar(4, c.plus(c.args[5], j)), ir.IntType(64))
            c.store(1, c.builder.add(c.args[2], c.builder.mul(place, c.args[3])), value)

    return made(body, nothing)(tile, out, base, row, places, first)


@inlined
def _row(examples: int, p: int, panel: int) -> int:
    """Return how many values a place has in the panel that begins at example p: a multiple of 16."""
    return (min(panel, examples - p) + 15) // 16 * 16


@part
def _to_panel(source: Any, start: int, out: Any, base: int, places: Any, rims: Any, count: int, row: int) -> None:
    """Turn `count` examples, from source[start] on, into a panel; its rims and what fills up its rows is zero."""
    size = len(places)
    for j in range(len(rims)):
        at = base + number(rims, j) * row
        out[at : at + row] = 0
    for r in range(0, row, 16):
        for f in range(0, size, 16):
            at = start + r * size + f
            if f + 16 <= size and r + 16 <= count:
                for i in range(0, 16, _SIDE):
                    for j in range(0, 16, _SIDE):
                        tile = load(_square(), source, at + i * size + j, size)
                        _put(_turned(tile), out, base + r + i, row, places, f + j)
            else:
                for j in range(min(16, size - f)):
                    to = base + number(places, f + j) * row + r
                    for i in range(16):
                        out[to + i] = source[at + i * size + j] if r + i < count else 0


class _Sweep(NamedTuple):
    """The pixels that sums are wanted of: rows of walks, each of so many pixels that lie side by side in both maps.

    Distances are in places: of the source's rows and walks, and of the output's rows and planes.
    """

    rows: int
    walks: int
    pixels: int
    source_row: int
    source_step: int
    out_row: int
    out_plane: int
    first: int  # place of the first pixel of an output's gradient in its panel, and its distances there
    slope_row: int
    slope_step: int
    slope_plane: int
    lines: int  # rows of the output that are made in a panel together, before they are turned
    channels: int  # of the output, and its pixels; channels_last: how the tensor has them
    area: int
    channels_last: int


@inlined
def _sweep(numbers: Any) -> Any:
    n = numbers
    return _Sweep(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14])


@part
def _from_panel(panel: Any, out: Any, start: int, sweep: Any, line: int, lines: int, count: int, row: int) -> None:
    """Turn a panel of a few rows from row `line` on, for `count` examples, which lie from out[start] on."""
    pixels, size = lines * sweep.out_row, sweep.channels * sweep.area
    if sweep.channels_last:
        runs, run, apart, between = pixels, sweep.channels, sweep.out_plane * row, row
        feature, features = line * sweep.out_row * sweep.channels, sweep.channels
    else:
        runs, run, apart, between = sweep.channels, pixels, row, sweep.out_plane * row
        feature, features = line * sweep.out_row, sweep.area
    for i in range(runs):
        for r in range(0, row, 16):
            for f in range(0, run, 16):
                at, to = i * between + f * apart + r, start + r * size + feature + i * features + f
                if f + 16 <= run and r + 16 <= count:
                    for j in range(0, 16, _SIDE):
                        for k in range(0, 16, _SIDE):
                            tile = load(_square(), panel, at + k * apart + j, apart)
                            store(_turned(tile), out, to + j * size + k, size)
                else:
                    for k in range(min(16, run - f)):
                        for j in range(min(16, count - r)):
                            out[to + j * size + k] = panel[at + k * apart + j]


def _span(values: int) -> Any:
    """Return the sum over one chunk of the inputs, for all outputs and `values` values that lie side by side."""
    width = 32 if values % 32 == 0 else 16
    zero = filled(values // width, width)

    @part
    def span(
        x: Any, start: int, y: Any, to: int, row: int, plane: int, starts: Any, places: Any, w: Any, bias: Any,
        outputs: int, chunk: int,
    ) -> None:  # fmt: skip
        for o in range(outputs):
            tile, at, out = zero(), chunk * outputs + o, to + o * plane
            if chunk > 0:
                tile = load(tile, y, out, width)
            elif len(bias) > 0:
                tile = spread(tile, bias, o, 0)
            for k in range(number(starts, at), number(starts, at + 1)):
                tile = along(tile, w, k, x, start + number(places, k) * row)
            store(tile, y, out, width)

    return span


_next_span = fitting([(values, _span(values)) for values in TILES.spans])


@part
def _product(
    x: Any, base: int, panel: Any, y: Any, begin: int, starts: Any, places: Any, w: Any, bias: Any, row: int,
    count: int, sweep: Any, chunks: int,
) -> None:  # fmt: skip
    """Write `count` examples of the output, from y[begin] on, each a sum over its kept weights and its bias.

    bias may be empty. A few rows of all channels are made at a time, which then are still near when they are turned.
    """
    for first in range(0, sweep.rows, sweep.lines):
        lines = min(sweep.lines, sweep.rows - first)
        for line in range(lines):
            for walk in range(sweep.walks):
                source = base + ((first + line) * sweep.source_row + walk * sweep.source_step) * row
                to, at = (line * sweep.out_row + walk) * row, 0
                while at < sweep.pixels * row:
                    width = 0
                    for chunk in range(chunks):
                        width = _next_span(
                            sweep.pixels * row - at, x, source + at, panel, to + at, row, sweep.out_plane * row,
                            starts, places, w, bias, sweep.channels, chunk,
                        )  # fmt: skip
                    at += width
        _from_panel(panel, y, begin, sweep, first, lines, count, row)


_BLOCK = 1024  # values that a sum runs over at least where it can: fewer, and adding up its lanes costs as much


@inlined
def _over_pixels(x: Any, at: Any, dy: Any, slope: int, row: int, sweep: Any, first: int, last: int) -> Any:
    """Return the tile of the sums over rows of an output's gradient times four inputs."""
    four = zeros_4x16()
    for line in range(first, last):
        for walk in range(sweep.walks):
            a = (line * sweep.slope_row + walk * sweep.slope_step) * row
            b = (line * sweep.source_row + walk * sweep.source_step) * row
            for p in range(0, sweep.pixels * row, 16):
                four = dots(four, dy, (slope,), a + p, x, at, b + p)
    return four


@inlined
def _over_tile(x: Any, at: Any, dy: Any, slope: int, row: int, sweep: Any, first: int, last: int) -> Any:
    """The same where that is the widest tile, as of a linear layer: a loop of known length takes two thirds as long."""
    four = zeros_4x16()
    for p in range(0, WIDEST, 16):
        four = dots(four, dy, (slope,), p, x, at, p)
    return four


def _gradient(correlated: Any) -> Any:
    """Return what adds the gradient of a chunk's kept weights over a few rows, four of an output at a time."""

    @part
    def gradient(
        x: Any, base: int, dy: Any, starts: Any, places: Any, grad: Any, row: int, sweep: Any, chunk: int, first: int,
        end: int,
    ) -> None:  # fmt: skip
        for o in range(sweep.channels):
            k = number(starts, chunk * sweep.channels + o)
            last = number(starts, chunk * sweep.channels + o + 1)
            slope = (sweep.first + o * sweep.slope_plane) * row
            while k < last:
                most = last - 1
                at = (
                    base + number(places, k) * row,
                    base + number(places, min(k + 1, most)) * row,
                    base + number(places, min(k + 2, most)) * row,
                    base + number(places, min(k + 3, most)) * row,
                )
                four = correlated(x, at, dy, slope, row, sweep, first, end)
                if k + 4 <= last:
                    add_sums(four, grad, k)
                else:
                    rest = sums(four)
                    for j in range(last - k):
                        grad[k + j] += rest[j]
                k += 4

    return gradient


_gradient_of_pixels, _gradient_of_tile = _gradient(_over_pixels), _gradient(_over_tile)


@part
def _weights(
    x: Any, base: int, dy: Any, starts: Any, places: Any, grad: Any, row: int, sweep: Any, chunks: int
) -> None:
    """Add the gradient of the kept weights, a few rows of a chunk's channels at a time."""
    if sweep.rows * sweep.walks == 1 and sweep.pixels * row == WIDEST:
        for chunk in range(chunks):
            _gradient_of_tile(x, base, dy, starts, places, grad, row, sweep, chunk, 0, 1)
        return
    lines = 1 + _BLOCK // (sweep.walks * sweep.pixels * row)
    for chunk in range(chunks):
        for line in range(0, sweep.rows, lines):
            end = min(line + lines, sweep.rows)
            _gradient_of_pixels(x, base, dy, starts, places, grad, row, sweep, chunk, line, end)


def _make_entries(stamp: int) -> tuple[Any, Any]:
    def forward(
        x: Any, y: Any, weight: Any, bias: Any, kept: Any, starts: Any, places: Any, w: Any, chunks: int,
        x_places: Any, x_rims: Any, x_panels: Any, x_size: int, y_panel: Any, numbers: Any, examples: int, panel: int,
    ) -> int:  # fmt: skip
        """Write y, the kept weights w in their order, and the panels of x for `backward`."""
        sweep = _sweep(numbers)
        for k in range(len(kept)):
            w[k] = weight[kept[k]]
        for p in range(0, examples, panel):
            row, count, base = _row(examples, p, panel), min(panel, examples - p), p * x_size
            _to_panel(x, p * len(x_places), x_panels, base, x_places, x_rims, count, row)
            begin = p * sweep.channels * sweep.area
            _product(x_panels, base, y_panel, y, begin, starts, places, w, bias, row, count, sweep, chunks)
        return stamp

    def backward(
        dy: Any, dx: Any, grad: Any, starts: Any, places: Any, w: Any, chunks: int, x_panels: Any, x_size: int,
        back_starts: Any, back_places: Any, back_weights: Any, back_chunks: int, packed: Any, dy_places: Any,
        dy_rims: Any, dy_panel: Any, dx_panel: Any, numbers: Any, back_numbers: Any, examples: int, panel: int,
    ) -> int:  # fmt: skip
        """Write dx, and add the gradient of the kept weights to grad, in their order; either may be empty."""
        sweep, back = _sweep(numbers), _sweep(back_numbers)
        if len(dx) > 0:
            for k in range(len(back_weights)):
                packed[k] = w[back_weights[k]]
        for p in range(0, examples, panel):
            row, count = _row(examples, p, panel), min(panel, examples - p)
            _to_panel(dy, p * len(dy_places), dy_panel, 0, dy_places, dy_rims, count, row)
            if len(dx) > 0:
                begin = p * back.channels * back.area
                _product(
                    dy_panel, 0, dx_panel, dx, begin, back_starts, back_places, packed, packed[:0], row, count, back,
                    back_chunks,
                )  # fmt: skip
            if len(grad) > 0:
                _weights(x_panels, p * x_size, dy_panel, starts, places, grad, row, sweep, chunks)
        return stamp

    return entry(forward), entry(backward)


forward, backward = _make_entries(source_stamp(CHOSEN))
