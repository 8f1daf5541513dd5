"""Where the pixels of a layer's maps lie in the panels that kept_products.py goes over, for inputs of one size.

A place is one pixel of one channel, of every example of a panel. Planes have an odd number of places, or the same pixel
of all channels would fall into the same few lines of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

Pair = tuple[int, int]
WIDEST, _SIDE_BY_SIDE = 128, 8  # values of the widest tile; pixels of a walk that fill it with 16 examples each
_RUN = 512  # pixels of a channel that are written together: fewer, and too many pages are written to in turn


@dataclass(frozen=True)
class Convolution:
    """What a convolution does beside its weights; a linear layer is one of maps of one pixel."""

    window: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def out(self, size: Pair) -> Pair:
        """Return height and width of the output for an input of `size`; below 1 where there is none."""
        y, x = (
            (n + 2 * p - (k - 1) * d - 1) // s + 1
            for n, k, s, p, d in zip(size, self.window, self.stride, self.padding, self.dilation, strict=True)
        )
        return y, x


LINEAR = Convolution()


@dataclass(frozen=True, eq=False)
class Map:
    """A tensor's map in a panel: `places` of its values in the tensor's own order, `rims` that are zero; int32."""

    places: np.ndarray
    rims: np.ndarray
    size: int
    row: int
    plane: int


@dataclass(frozen=True, eq=False)
class Form:
    """The maps of a layer for inputs of one size, and what the sums go over.

    y_size, dx_size: places of what is made of the output, and of the input's gradient, before it is turned.
    taps, back_taps: (window area,) int32, the places of a channel's taps from an output's first one, and of an output
    channel's gradients from an input's. numbers, back_numbers: int64, the fields of kept_products' sweeps. panel: the
    examples of one.
    """

    x: Map
    dy: Map
    y_size: int
    dx_size: int
    taps: np.ndarray
    back_taps: np.ndarray
    numbers: np.ndarray
    back_numbers: np.ndarray
    panel: int

    def padded(self, examples: int) -> int:
        """Return how many examples the panels of so many hold."""
        return -(-examples // 16) * 16

    def row(self, examples: int) -> int:
        """Return how many of these the first panel holds, which is the largest."""
        return min(self.panel, self.padded(examples))


@lru_cache(maxsize=64)
def form(layer: Convolution, inputs: int, outputs: int, size: Pair, channels_last: bool) -> Form:
    """Return the form of a layer for inputs (N, inputs, *size) and outputs of the same memory format."""
    (high, wide), (above, left), (by_y, by_x) = layer.window, layer.padding, layer.dilation
    (height, width), (step_y, step_x), out = size, layer.stride, layer.out(size)
    x = _map(inputs, size, (above, left), (above, left), (1, 1), channels_last)
    # The gradient of an output lies where its window begins; what an input pixel was read for lies before it.
    before = max(0, (high - 1) * by_y - above), max(0, (wide - 1) * by_x - left)
    after = max(0, height + above - 1 - (out[0] - 1) * step_y), max(0, width + left - 1 - (out[1] - 1) * step_x)
    dy = _map(outputs, out, before, after, layer.stride, channels_last)
    row, column = (one.reshape(-1).astype(np.int32) for one in np.indices(layer.window))
    taps = row * by_y * x.row + column * by_x
    back_taps = (before[0] + above - row * by_y) * dy.row + before[1] + left - column * by_x
    pixels = 1 if step_x > 1 else out[1]
    # Without a rim the rows too lie side by side.
    merged = _merged(out) if layer.stride == (1, 1) and x.row == dy.row == out[1] else 1
    made, y_size = _made(outputs, out, merged, channels_last)
    numbers = [
        out[0] // merged, out[1] // pixels, pixels * merged, merged * step_y * x.row, step_x, *made[:2],
        before[0] * dy.row + before[1], merged * step_y * dy.row, step_x, dy.plane, *made[2:],
    ]  # fmt: skip
    back_merged = _merged(size) if dy.row == width else 1
    made, dx_size = _made(inputs, size, back_merged, channels_last)
    back_numbers = [
        height // back_merged, 1, width * back_merged, back_merged * dy.row, 1, *made[:2], 0, 0, 0, 0, *made[2:],
    ]  # fmt: skip
    return Form(
        x, dy, y_size, dx_size, taps.astype(np.int32), back_taps.astype(np.int32), np.array(numbers, np.int64),
        np.array(back_numbers, np.int64), _panel(min(numbers[2], back_numbers[2]), prod(size)),
    )  # fmt: skip


def _merged(size: Pair) -> int:
    """Return how many rows are one walk where they lie side by side: enough pixels for a tile."""
    height, width = size
    return next(m for m in range(1, height + 1) if height % m == 0 and (m * width >= 16 or m == height))


def _made(channels: int, size: Pair, merged: int, channels_last: bool) -> tuple[list[int], int]:
    """Return what a sweep says of its output, and how many places are made before they are turned.

    These are a few rows, so that they stay near, but so many that a tensor is written in long runs of a channel.
    """
    rows, row = size[0] // merged, merged * size[1]
    least = 1 if channels_last else _RUN
    lines = next(m for m in range(1, rows + 1) if (m * row % 16 == 0 and m * row >= least) or m == rows)
    plane = lines * row | 1
    return [row, plane, lines, channels, prod(size), channels_last or prod(size) == 1], channels * plane


def _panel(pixels: int, area: int) -> int:
    """Return how many examples a panel holds: of large maps few, so that it stays near, but enough for a tile."""
    if area == 1:
        return WIDEST
    return 16 if pixels >= _SIDE_BY_SIDE else 32


def _map(channels: int, size: Pair, before: Pair, after: Pair, step: Pair, channels_last: bool) -> Map:
    """Return a map whose pixels lie `step` apart inside a rim."""
    height, row = (b + (n - 1) * s + 1 + a for n, b, a, s in zip(size, before, after, step, strict=True))
    plane = height * row | 1
    c, y, x = np.indices((channels, *size), np.int32)
    places = c * plane + (before[0] + y * step[0]) * row + before[1] + x * step[1]
    if channels_last:
        places = places.transpose(1, 2, 0)
    places = places.reshape(-1).astype(np.int32)
    used = np.zeros(channels * plane, bool)
    used[places] = True
    return Map(places, np.flatnonzero(~used).astype(np.int32), channels * plane, row, plane)
