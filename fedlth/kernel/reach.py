"""What one layer can reach: its row and lists against the extents of the maps that it means to read or write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth.kernel import columns as col

# The maps of a layer: the column of each one's place, followed by the distances of its channels and rows.
EXTENTS = (col.X, col.Y, col.DX, col.DY, col.X2, col.DX2, col.SPREAD)


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """rows (ops, NUM_COLUMNS) int64, inlet (NUM_COLUMNS,) the input's place, index int32, scales (ops,) float32.

    extents (ops, 7, 2) int64: first and end of each layer's EXTENTS in the work array, rims included; (0, 0) for none.
    """

    rows: np.ndarray
    inlet: np.ndarray
    index: np.ndarray
    scales: np.ndarray
    extents: np.ndarray
    scratch: int
    work_size: int


class Reach:
    """One layer's row, and what it can reach."""

    def __init__(self, plan: MemoryLayout, at: int, lanes: int) -> None:
        self.plan, self.at, self.lanes = plan, at, lanes
        self.row = [int(n) for n in plan.rows[at]]

    def want(self, good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"kernel: layer {self.at} would reach outside its {what}")

    def list(self, column: int, size: int) -> np.ndarray:
        start = self.row[column]
        self.want(start >= 0 and size >= 0 and start + size <= len(self.plan.index), f"lists ({column})")
        return self.plan.index[start : start + size].astype(np.int64)

    def numbers(self, column: int, size: int, end: int, what: str) -> None:
        found = self.list(column, size)
        self.want(not found.size or (found.min() >= 0 and found.max() < end), what)

    def reach(self, column: int, *distances: np.ndarray | int) -> None:
        """Want place + one of each of the distances, and a whole vector of lanes there, inside the map's extent."""
        first, end = (int(n) for n in self.plan.extents[self.at, EXTENTS.index(column)])
        parts = [np.minimum(np.min(d), 0) if np.ndim(d) == 0 else np.min(d) for d in distances]
        least = self.row[column] + sum(int(n) for n in parts)
        parts = [np.maximum(np.max(d), 0) if np.ndim(d) == 0 else np.max(d) for d in distances]
        most = self.row[column] + sum(int(n) for n in parts) + self.lanes
        self.want(16 <= first <= least and most <= end <= self.plan.work_size, f"map ({column})")

    def map(self, column: int, shape: int) -> None:
        """Want a whole map inside; `shape` is the first of the columns of its three sizes."""
        channels, height, width = self.row[shape : shape + 3]
        self.want(min(channels, height, width) > 0, "sizes")
        plane, line = self.row[column + 1 : column + 3]
        self.reach(column, (channels - 1) * plane, (height - 1) * line, (width - 1) * self.lanes)


def same_shape(layer: Reach) -> None:
    """Want an output of the input's shape."""
    row = layer.row
    layer.want(row[col.CHANNELS : col.WIDTH + 1] == row[col.OUT_CHANNELS : col.OUT_WIDTH + 1], "map")


def windows(layer: Reach, *, padded: bool = False) -> None:
    """Want an output channel by channel of windows that lie in the input; `padded` ones must only see some of it."""
    for axis in (0, 1):
        size, out = layer.row[col.HEIGHT + axis], layer.row[col.OUT_HEIGHT + axis]
        window, step, rim = (layer.row[c + axis] for c in (col.WINDOW_Y, col.STRIDE_Y, col.PADDING_Y))
        fits = (out - 1) * step - rim < size if padded else (out - 1) * step + window <= size
        layer.want(window > rim >= 0 and step > 0 and fits, "windows")
    layer.want(layer.row[col.OUT_CHANNELS] == layer.row[col.CHANNELS], "channels")
