"""Lay a network's values, gradients and index lists out in memory for batches of a number of lanes.

A value (C, H, W) lies as (C, top + H + bottom, left + W + right, lanes) with a rim of zeros as wide as the padding of
its readers, so that no inner loop tests a border. This file alone decides every place that the kernel touches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.bounds_check import check_bounds
from fedlth.kernel.kinds import KINDS
from fedlth.kernel.reach import EXTENTS, MemoryLayout
from fedlth.kernel.table import LayerTable, Op, Shape

_ALIGNED = 16  # floats: one cache line
_NEAR_TAPS = 128  # a convolution's taps at a time, whose inputs and packed weights then stay in the nearest cache


@dataclass(frozen=True)
class _Buffer:
    """Where value (0, 0, 0) of a map lies, and the distances of its channels and rows."""

    place: int
    plane: int
    row: int


class _Allocator:
    def __init__(self, table: LayerTable, lanes: int) -> None:
        self.table, self.lanes = table, lanes
        self.size = _ALIGNED
        self.extents: dict[int, tuple[int, int]] = {}
        self.lists: list[np.ndarray] = []
        self.listed = 0

    def buffer(self, shape: Shape, before: tuple[int, int] = (0, 0), after: tuple[int, int] = (0, 0)) -> _Buffer:
        channels, height, width = shape
        row = (before[1] + width + after[1]) * self.lanes
        plane = (before[0] + height + after[0]) * row
        place = self.size + before[0] * row + before[1] * self.lanes
        self.extents[place] = (self.size, self.size + channels * plane)
        self.size += channels * plane
        return _Buffer(place, plane, row)

    def list(self, numbers: np.ndarray) -> int:
        self.lists.append(numbers.reshape(-1))
        self.listed += numbers.size
        return self.listed - numbers.size

    def places(self, buffer: _Buffer, shape: Shape) -> np.ndarray:
        """Return (C, H, W): where each value lies from the buffer's first."""
        c, h, w = (np.arange(n) for n in shape)
        return c[:, None, None] * buffer.plane + h[:, None] * buffer.row + w * self.lanes


def _largest(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    found = [(0, 0), *pairs]
    return max(y for y, _ in found), max(x for _, x in found)


def _trained(table: LayerTable) -> set[int]:
    """Return the values that depend on a weight: those whose gradient is wanted."""
    found: set[int] = set()
    for op in table.ops:
        if op.weight >= 0 or found & set(op.reads):
            found.add(op.out)
    return found


def _rest(op: Op, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rims before and behind a spread output gradient that the input's gradient reads."""
    before = [max(0, k - 1 - p) for k, p in zip(op.window, op.padding, strict=True)]
    left = [(n + 2 * p - k) % s for n, k, s, p in zip(shape[1:], op.window, op.stride, op.padding, strict=True)]
    after = [max(0, k - 1 - p + r) for k, p, r in zip(op.window, op.padding, left, strict=True)]
    return (before[0], before[1]), (after[0], after[1])


@lru_cache(maxsize=16)
def lay_out(table: LayerTable, lanes: int) -> MemoryLayout:
    """Return the memory layout of all dense layers; lanes must be a multiple of 16."""
    if lanes < 16 or lanes % 16:
        raise ValueError(f"kernel: lanes must be a multiple of 16, got {lanes}")
    plan, trained = _Allocator(table, lanes), _trained(table)
    makers = {op.out: op for op in table.ops}
    values, gradients = [], []
    for at, shape in enumerate(table.shapes):
        rim = _largest(op.padding for op in table.ops if op.source == at and op.kind == col.CONVOLUTION)
        used = at == 0 or at in makers
        values.append(plan.buffer(shape, rim, rim) if used else None)
        rims = (0, 0), (0, 0)
        maker = makers.get(at)
        if maker is not None and maker.kind == col.CONVOLUTION and maker.stride == (1, 1):
            rims = _rest(maker, table.shapes[maker.source])
        gradients.append(plan.buffer(shape, *rims) if at in trained else None)
    rows = np.zeros((len(table.ops), col.NUM_COLUMNS), np.int64)
    scales = np.array([op.scale for op in table.ops], np.float32)
    for row, op in zip(rows, table.ops, strict=True):
        _common(row, op, table, values, gradients, lanes)
        if op.kind in (col.CONVOLUTION, col.LINEAR):
            _weighted(row, op, plan, values[op.source], gradients[op.source])
        elif op.kind == col.CHOOSE:
            row[col.CHOICE] = plan.list(np.array(op.picks))
        elif count := KINDS[op.kind].stats(op):
            row[col.STATS], row[col.STATS_COUNT] = plan.buffer((count, 1, 1)).place, count
    packed = (int(r[col.OUT_CHANNELS] * r[col.TAPS]) for r in rows if r[col.KIND] == col.CONVOLUTION)
    scratch = max((32 * lanes, *packed))
    plan.size = -(-plan.size // _ALIGNED) * _ALIGNED
    rows[:, col.PACK] = plan.size
    plan.size += scratch + _ALIGNED
    extents = np.zeros((len(rows), len(EXTENTS), 2), np.int64)
    for row, extent in zip(rows, extents, strict=True):
        for k, column in enumerate(EXTENTS):
            extent[k] = plan.extents.get(int(row[column]), (0, 0))
    written: set[int] = set()
    for row, op in zip(rows[::-1], table.ops[::-1], strict=True):
        for source, need, accumulate in zip(
            op.reads, (col.NEEDS_DX, col.NEEDS_DX_2), (col.ACCUMULATE, col.ACCUMULATE_2), strict=False
        ):
            row[need] = source in trained
            row[accumulate] = source in written
            written.add(source)
    inlet = np.zeros(col.NUM_COLUMNS, np.int64)
    _place(inlet, col.X, values[0])
    inlet[[col.CHANNELS, col.HEIGHT, col.WIDTH]] = table.shapes[0]
    index = np.concatenate(plan.lists).astype(np.int32) if plan.lists else np.zeros(1, np.int32)
    if plan.size >= 2**31:
        raise ValueError(f"kernel: a batch of the network must fit 2**31 floats, got {plan.size}")
    found = MemoryLayout(
        rows=rows, inlet=inlet, index=index, scales=scales, extents=extents, scratch=scratch, work_size=plan.size
    )
    check_bounds(found, lanes, table.num_params)
    return found


def _place(row: np.ndarray, column: int, buffer: _Buffer | None) -> None:
    if buffer is not None:
        row[column : column + 3] = buffer.place, buffer.plane, buffer.row


def _common(
    row: np.ndarray,
    op: Op,
    table: LayerTable,
    values: list[_Buffer | None],
    gradients: list[_Buffer | None],
    lanes: int,
) -> None:
    row[[col.KIND, col.RELU, col.GROUPS, col.WEIGHT, col.BIAS]] = op.kind, op.relu, op.groups, op.weight, op.bias
    row[[col.CHANNELS, col.HEIGHT, col.WIDTH]] = table.shapes[op.source]
    row[[col.OUT_CHANNELS, col.OUT_HEIGHT, col.OUT_WIDTH]] = table.shapes[op.out]
    _place(row, col.X, values[op.source])
    _place(row, col.Y, values[op.out])
    _place(row, col.DX, gradients[op.source])
    _place(row, col.DY, gradients[op.out])
    if op.source_2 >= 0:
        _place(row, col.X2, values[op.source_2])
        _place(row, col.DX2, gradients[op.source_2])
    row[[col.WINDOW_Y, col.WINDOW_X]] = op.window
    row[[col.STRIDE_Y, col.STRIDE_X]] = op.stride
    row[[col.PADDING_Y, col.PADDING_X]] = op.padding


def _weighted(row: np.ndarray, op: Op, plan: _Allocator, x: _Buffer | None, dx: _Buffer | None) -> None:
    shape, lanes = plan.table.shapes[op.source], plan.lanes
    channels, out, groups = shape[0], plan.table.shapes[op.out], op.groups
    assert x is not None
    dy = _Buffer(*(int(n) for n in row[col.DY : col.DY + 3]))
    spread = dy
    if op.kind == col.LINEAR:
        picks = np.array(op.picks) if op.picks else slice(None)
        taps = plan.places(x, shape).reshape(-1)[picks]
        area, back, sizes = 1, np.arange(out[0]) * dy.plane, (1, 1)
        back_out = None if dx is None else plan.places(dx, shape).reshape(-1)[picks]
        row[[col.CHANNELS, col.HEIGHT, col.WIDTH]] = taps.size, 1, 1
        row[[col.TAP_ROW, col.TAP_STEP, col.TAP_GROUP]] = 0
        chunks = taps.size, out[0]
        row[[col.PIXELS, col.SPAN, col.BACK_ROWS, col.BACK_SPAN]] = 1, lanes, 1, lanes
    else:
        (ky, kx), (sy, sx), (py, px) = op.window, op.stride, op.padding
        if op.stride != (1, 1) and dx is not None:
            wide = (out[0], (out[1] - 1) * sy + 1, (out[2] - 1) * sx + 1)
            spread = plan.buffer(wide, *_rest(op, shape))
        area = ky * kx
        window = _Buffer(0, x.plane, x.row)
        taps = plan.places(window, (channels // groups, ky, kx)) - py * x.row - px * lanes
        y, xs = np.arange(ky)[:, None], np.arange(kx)
        back = np.arange(out[0] // groups)[:, None, None] * spread.plane
        back = back + (py - y) * spread.row + (px - xs) * lanes
        back_out = None if dx is None else np.arange(channels) * dx.plane
        row[[col.TAP_ROW, col.TAP_STEP, col.TAP_GROUP]] = sy * x.row, sx * lanes, channels // groups * x.plane
        row[[col.PIXELS, col.SPAN]] = (1, out[2] * lanes) if sx == 1 else (out[2], lanes)
        row[[col.BACK_ROWS, col.BACK_SPAN]] = shape[1], shape[2] * lanes
        sizes = (out[1] - 1) * sy + 1, (out[2] - 1) * sx + 1
        chunks = (max(1, _NEAR_TAPS // area),) * 2
    weights = np.arange(out[0] // groups)[:, None] * taps.size + np.arange(area)
    _place(row, col.SPREAD, spread)
    row[[col.TAPS, col.KERNEL_AREA]] = taps.size, area
    row[col.TAP_PLACES] = plan.list(taps)
    order, back_order = (
        _order(n, area, chunk) for n, chunk in zip((taps.size // area, out[0] // groups), chunks, strict=True)
    )
    row[col.FORWARD_PLACES], row[col.FORWARD_WEIGHTS] = plan.list(taps.reshape(-1)[order]), plan.list(order)
    row[[col.FORWARD_CHUNK, col.BACKWARD_CHUNK]] = chunks
    row[col.OUT_PLACES] = plan.list(np.arange(out[0]) * int(row[col.Y_PLANE]))
    row[[col.BACK_TAPS, col.BACK_GROUP]] = weights.size, out[0] // groups * spread.plane
    row[col.BACK_PLACES] = plan.list(back)
    row[col.BACKWARD_PLACES] = plan.list(back.reshape(-1)[back_order])
    row[col.BACKWARD_WEIGHTS] = plan.list(weights.reshape(-1)[back_order])
    if back_out is not None:
        row[col.BACK_OUT_PLACES] = plan.list(back_out)
    for axis, (top, back_top) in enumerate(((col.TOP, col.BACK_TOP), (col.LEFT, col.BACK_LEFT))):
        size, taps_along, step, rim = int(row[col.HEIGHT + axis]), op.window[axis], op.stride[axis], op.padding[axis]
        at, behind = np.arange(int(row[col.OUT_HEIGHT + axis])) * step - rim, np.arange(size) + rim
        row[top] = plan.list(_inside(-at, size - at, taps_along))
        row[back_top] = plan.list(_inside(behind - sizes[axis] + 1, behind + 1, taps_along))
    down = np.arange(int(row[col.OUT_HEIGHT])) * op.stride[0] - op.padding[0]
    inside = [np.flatnonzero((down + k >= 0) & (down + k < int(row[col.HEIGHT]))) for k in range(op.window[0])]
    row[col.REACH] = plan.list(np.array([(rows[0], rows[-1] + 1) if rows.size else (0, 0) for rows in inside]))


def _order(inputs: int, area: int, chunk: int) -> np.ndarray:
    """Return taps (inputs, area) by chunk of inputs, then by place in the kernel, then by input."""
    parts = [np.arange(start, min(start + chunk, inputs)) for start in range(0, inputs, chunk)]
    return np.concatenate([(part * area + np.arange(area)[:, None]).reshape(-1) for part in parts])


def _inside(first: np.ndarray, end: np.ndarray, window: int) -> np.ndarray:
    """Return (N, 2): from which to which place a kernel is inside the map, for N places of its output."""
    first = first.clip(0, window)
    return np.stack([first, end.clip(first, window)], 1)
