"""Choose the network that is left, its layers on lists of kept weights, and each parameter's place in the vector."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.aligned import aligned
from fedlth.kernel.memory_layout import lay_out
from fedlth.kernel.reach import MemoryLayout
from fedlth.kernel.shrink import Shrunk, shrink
from fedlth.kernel.table import LayerTable, Op

_NEAR, _TAPS = 5120, 16  # floats of a chunk's inputs (20 of 32 KB), kept weights of a chunk


@dataclass(frozen=True)
class Prepared:
    """A memory layout whose sparse layers have their lists; keep: places of the parameters in the compact vector.

    num_params and num_params + 1 stand in `keep` for a zero and a one that do not move.
    """

    plan: MemoryLayout
    lists: np.ndarray
    work: np.ndarray
    lanes: int
    keep: np.ndarray | None


class _Last(threading.local):
    """The last network that a thread has prepared, after what it was prepared for."""

    held: tuple[LayerTable, int, np.ndarray | None, Prepared] | None = None


_last = _Last()


def prepare(table: LayerTable, lanes: int, kept: np.ndarray | None) -> Prepared:
    """Arrange the network, or the smaller one that a ticket of whole channels leaves of it.

    A thread holds its last one, since a client evaluates what it received and then trains it.
    """
    if _last.held is not None:
        of, at, mask, made = _last.held
        if of is table and at == lanes and (mask is kept is None or np.array_equal(mask, kept)):  # type: ignore[arg-type]
            return made
    small = None if kept is None else shrink(table, kept)
    made = _prepare(table, lanes, kept) if small is None else _smaller(small, lanes)
    _last.held = table, lanes, None if kept is None else kept.copy(), made
    return made


def forget() -> None:
    """Let this thread prepare its next network anew."""
    _last.held = None


def _smaller(small: Shrunk, lanes: int) -> Prepared:
    inner = _prepare(small.table, lanes, small.kept)
    rows, lists = small.folded(inner.plan.rows, inner.lists, inner.keep)
    keep = small.places if inner.keep is None else small.places[inner.keep]
    return replace(inner, plan=replace(inner.plan, rows=rows), lists=lists, keep=keep)


def _prepare(table: LayerTable, lanes: int, kept: np.ndarray | None) -> Prepared:
    """Choose sparse layers by their density, and give every weight its place in the compact vector."""
    from fedlth.kernel import loop

    plan = lay_out(table, lanes)
    rows = plan.rows.copy()
    work = aligned(plan.work_size, zero=True)
    size, alive, parts = 0, np.flatnonzero(kept) if kept is not None else np.zeros(0, np.int64), {}
    for row, op in zip(rows, table.ops, strict=True):
        if kept is None or not op.weighted:
            continue
        count = _count(row, op)
        if op.weight + count > len(kept):
            continue
        first, end = np.searchsorted(alive, [op.weight, op.weight + count])
        number = int(end - first)
        if number >= op.sparse_below * count:
            continue
        parts[op.weight] = count, alive[first:end]
        row[col.SPARSE] = 1
        _cut(row, op, number / count, lanes)
        for column, length in (
            (col.KEPT_STARTS, row[col.OUT_CHANNELS] * row[col.CHUNKS] + 1),
            (col.KEPT_PLACES, number),
            (col.BACK_STARTS, row[col.CHANNELS] * row[col.BACK_CHUNKS] + 1 if op.kind == col.CONVOLUTION else 0),
            (col.BACK_KEPT_PLACES, number),
            (col.BACK_KEPT_WEIGHTS, number if op.kind == col.CONVOLUTION else 0),
        ):
            row[column] = size
            size += int(length)
    if not parts:
        return Prepared(replace(plan, rows=rows), np.zeros(1, np.int32), work, lanes, None)
    keep = _kept_places(table.num_params, parts)
    listed = np.concatenate([part - offset for offset, (_, part) in parts.items()])
    firsts = dict(zip(parts, np.cumsum([0, *(len(part) for _, part in parts.values())]), strict=False))
    for row, op in zip(rows, table.ops, strict=True):
        for column, place, count in ((col.WEIGHT, op.weight, _count(row, op)), (col.BIAS, op.bias, _outputs(row))):
            if place >= 0:
                row[column], end = np.searchsorted(keep, [place, place + count])
                if end > len(keep) or (not row[col.SPARSE] or column == col.BIAS) and end - row[column] != count:
                    raise ValueError("kernel: a layer would reach outside the kept parameters")
        if row[col.SPARSE]:
            row[col.KEPT] = firsts[op.weight]
            row[col.KEPT_END] = firsts[op.weight] + len(parts[op.weight][1])
    lists = np.zeros(max(size, 1), np.int32)
    loop.list_layers(rows, plan.index, lists, listed)
    return Prepared(replace(plan, rows=rows), lists, work, lanes, keep)


def _kept_places(num_params: int, parts: dict[int, tuple[int, np.ndarray]]) -> np.ndarray:
    """Return the places of all parameters but the dropped weights of the sparse layers, ascending.

    parts: by the place of a layer's first weight, their number and the places of those kept.
    """
    pieces, at = [], 0
    for offset, (count, part) in sorted(parts.items()):
        pieces += [np.arange(at, offset), part]
        at = offset + count
    return np.concatenate([*pieces, np.arange(at, num_params)])


def _outputs(row: np.ndarray) -> int:
    return int(row[col.OUT_CHANNELS])


def _count(row: np.ndarray, op: Op) -> int:
    return int(row[col.OUT_CHANNELS]) * (int(row[col.TAPS]) if op.weighted else 1)


def _cut(row: np.ndarray, op: Op, density: float, lanes: int) -> None:
    """Cut the channels that a sum runs over into chunks whose inputs fit the first-level cache beside the rest.

    A chunk has at least _TAPS kept weights an output channel, since its partial sums pass through memory.
    """
    pixels = 3 if row[col.SPAN] > lanes else 1
    values = op.window[0] * (pixels + op.window[1] - 1) * lanes
    taps = int(row[col.KERNEL_AREA]) * max(density, 1e-9)
    for size, chunk, chunks in (
        (row[col.TAPS] // row[col.KERNEL_AREA], col.CHUNK, col.CHUNKS),
        (row[col.OUT_CHANNELS] // row[col.GROUPS], col.BACK_CHUNK, col.BACK_CHUNKS),
    ):
        row[chunk] = min(int(size), max(1, _NEAR // values, math.ceil(_TAPS / taps)))
        row[chunks] = -(-int(size) // int(row[chunk]))
