"""Products with the kept weights of a matrix: forward, its input's gradient, and the gradient of these weights.

Positions (tokens, or examples) lie innermost, in panels: a panel holds every feature of its positions, one feature
after the other. A weight is then one broadcast, multiplied with a tile of positions, as in sparse.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fedlth.kernel.arithmetic import filled, zeros_4x16
from fedlth.kernel.fitting import fitting
from fedlth.kernel.jit import entry, inlined, intrinsic, part, source_stamp
from fedlth.kernel.reduce import add_sums, sums
from fedlth.kernel.tile_choice import CHOSEN, TILES
from fedlth.kernel.vectors import INT, Code, along, dots, load, made, number, same, spread, store

PANEL = 128  # positions: a tile of them is as wide at most, and so many values of 80 features fit the nearest cache


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


@inlined
def _turn(source: Any, at: int, step: int, out: Any, to: int, apart: int, rows: int, columns: int) -> None:
    """Write a block of at most 16 x 16 the other way: out[to + c * apart + r] = source[at + r * step + c]."""
    if rows == 16 and columns == 16:
        for r in range(0, 16, _SIDE):
            for c in range(0, 16, _SIDE):
                tile = load(_square(), source, at + r * step + c, step)
                store(_turned(tile), out, to + c * apart + r, apart)
        return
    for r in range(rows):
        for c in range(columns):
            out[to + c * apart + r] = source[at + r * step + c]


@inlined
def _row(positions: int, p: int) -> int:
    """Return how many values a feature has in the panel that begins at position p: a multiple of 16."""
    return (min(PANEL, positions - p) + 15) // 16 * 16


@part
def _to_panels(source: Any, out: Any, positions: int, features: int) -> None:
    """Turn (positions, features) into panels; what fills up the last one is zero."""
    for p in range(0, positions, PANEL):
        row, to = _row(positions, p), p * features
        for r in range(0, row, 16):
            count = min(16, positions - p - r)
            for c in range(0, features, 16):
                few = min(16, features - c)
                if count < 16:
                    for j in range(c, c + few):
                        out[to + j * row + r : to + j * row + r + 16] = 0
                _turn(source, (p + r) * features + c, features, out, to + c * row + r, row, count, few)


@part
def _from_panels(source: Any, out: Any, positions: int, features: int) -> None:
    """Turn panels into (positions, features)."""
    for p in range(0, positions, PANEL):
        row, at = _row(positions, p), p * features
        for r in range(0, row, 16):
            count = min(16, positions - p - r)
            for c in range(0, features, 16):
                few = min(16, features - c)
                _turn(source, at + c * row + r, row, out, (p + r) * features + c, features, few, count)


def _span(values: int) -> Any:
    """Return the sum over one chunk of the inputs, for all outputs and `values` positions that lie side by side."""
    width = 32 if values % 32 == 0 else 16
    zero = filled(values // width, width)

    @part
    def span(
        x: Any, start: int, y: Any, to: int, row: int, starts: Any, places: Any, w: Any, bias: Any, outputs: int,
        chunk: int, chunks: int,
    ) -> None:  # fmt: skip
        for o in range(outputs):
            tile, at = zero(), o * chunks + chunk
            if chunk > 0:
                tile = load(tile, y, to + o * row, width)
            elif len(bias) > 0:
                tile = spread(tile, bias, o, 0)
            for k in range(number(starts, at), number(starts, at + 1)):
                tile = along(tile, w, k, x, start + number(places, k) * row)
            store(tile, y, to + o * row, width)

    return span


_next_span = fitting([(values, _span(values)) for values in TILES.spans])


@part
def _product(
    x: Any, y: Any, starts: Any, places: Any, w: Any, bias: Any, positions: int, inputs: int, outputs: int, chunks: int
) -> None:
    """Write the panels of the outputs, each a sum over its kept weights and its bias; bias may be empty."""
    for p in range(0, positions, PANEL):
        row, at = _row(positions, p), 0
        while at < row:
            width = 0
            for chunk in range(chunks):
                width = _next_span(
                    row - at, x, p * inputs + at, y, p * outputs + at, row, starts, places, w, bias, outputs, chunk,
                    chunks,
                )  # fmt: skip
            at += width


@inlined
def _correlated(x: Any, at: Any, dy: Any, slope: int, row: int) -> Any:
    """Return the tile of the sums over a panel of an output's gradient times four inputs."""
    four = zeros_4x16()
    for p in range(0, row, 16):
        four = dots(four, dy, (slope,), p, x, at, p)
    return four


@part
def _weights(
    x: Any, dy: Any, starts: Any, places: Any, grad: Any, positions: int, inputs: int, outputs: int, chunks: int
) -> None:
    """Add the gradient of the kept weights, four of an output at a time."""
    for p in range(0, positions, PANEL):
        row, first = _row(positions, p), p * inputs
        for chunk in range(chunks):
            for o in range(outputs):
                k, last = number(starts, o * chunks + chunk), number(starts, o * chunks + chunk + 1)
                slope = p * outputs + o * row
                while k < last:
                    most = last - 1
                    at = (
                        first + number(places, k) * row,
                        first + number(places, min(k + 1, most)) * row,
                        first + number(places, min(k + 2, most)) * row,
                        first + number(places, min(k + 3, most)) * row,
                    )
                    four = _correlated(x, at, dy, slope, row)
                    if k + 4 <= last:
                        add_sums(four, grad, k)
                    else:
                        rest = sums(four)
                        for j in range(last - k):
                            grad[k + j] += rest[j]
                    k += 4


def _make_entries(stamp: int) -> tuple[Any, Any]:
    def forward(
        x: Any, y: Any, weight: Any, bias: Any, kept: Any, starts: Any, places: Any, w: Any, x_panels: Any,
        y_panels: Any, positions: int, inputs: int, outputs: int, chunks: int,
    ) -> int:  # fmt: skip
        """Write y (positions, outputs), the kept weights w in their order, and the panels of x for `backward`."""
        for k in range(len(kept)):
            w[k] = weight[kept[k]]
        _to_panels(x, x_panels, positions, inputs)
        _product(x_panels, y_panels, starts, places, w, bias, positions, inputs, outputs, chunks)
        _from_panels(y_panels, y, positions, outputs)
        return stamp

    def backward(
        dy: Any, dx: Any, grad: Any, kept: Any, starts: Any, places: Any, w: Any, x_panels: Any, chunks: int,
        back_starts: Any, back_places: Any, back_weights: Any, back_chunks: int, packed: Any, dy_panels: Any,
        dx_panels: Any, positions: int, inputs: int, outputs: int,
    ) -> int:  # fmt: skip
        """Write dx (positions, inputs), and add the gradient of the kept weights to grad; either may be empty."""
        _to_panels(dy, dy_panels, positions, outputs)
        if len(dx) > 0:
            for k in range(len(back_weights)):
                packed[k] = w[back_weights[k]]
            _product(
                dy_panels, dx_panels, back_starts, back_places, packed, packed[:0], positions, outputs, inputs,
                back_chunks,
            )  # fmt: skip
            _from_panels(dx_panels, dx, positions, inputs)
        if len(grad) > 0:
            packed[:] = 0
            _weights(x_panels, dy_panels, starts, places, packed, positions, inputs, outputs, chunks)
            for k in range(len(kept)):
                grad[kept[k]] += packed[k]
        return stamp

    return entry(forward), entry(backward)


forward, backward = _make_entries(source_stamp(CHOSEN))
