"""Masks bit by bit: each differs from what is expected with a chance learnt from its tensor, row, column and bin."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlth.kernel.late_jit import compiled
from fedlth.models.layout import Entry
from fedlth.wire import adaptive
from fedlth.wire.adaptive import INPUTS, LOGARITHM, MIXED, Model, listed

BINS, HALF, SHIFT = 40, 20, 18
CENTRE_SHIFT = 10
NEAR, RATIOS = 8, 16


def encode(
    mask: np.ndarray, entries: tuple[Entry, ...], previous: np.ndarray | None, centres: tuple[int, ...] | None,
    floats: np.ndarray | None, limit: int,
) -> bytes | None:  # fmt: skip
    """Return the coded mask, None where it would be longer than `limit`; `centres` one a tensor, with `floats`."""
    new = listed(mask.astype(np.int8))

    def code(io: Any, buffer: Any) -> None:
        _walk(io, buffer, new, entries, previous, centres, floats)

    return adaptive.encode(limit, code)


def decode(
    data: bytes, size: int, entries: tuple[Entry, ...], previous: np.ndarray | None, centres: tuple[int, ...] | None,
    floats: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """Return the mask (size,); raise PayloadError where the bytes are not exactly one mask."""
    new = listed(np.zeros(size, np.int8))

    def code(io: Any, buffer: Any) -> None:
        _walk(io, buffer, new, entries, previous, centres, floats)

    adaptive.decode(data, code)
    return np.asarray(new, np.int8).astype(bool)


def centre(floats: np.ndarray, kept: int) -> int:
    """Return the upper bits of the `kept`-th largest of |floats|: where a mask of that many would end."""
    if not 0 < kept <= floats.size:
        return 0
    size = floats.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return int(np.partition(size, floats.size - kept)[floats.size - kept]) >> CENTRE_SHIFT


def rows_of(entry: Entry) -> int:
    """Return how many rows a tensor has: its first axis; a tensor without axes has one."""
    return max(entry.shape[0], 1) if entry.shape else 1


def _walk(
    io: Any, buffer: Any, new: Any, entries: tuple[Entry, ...], previous: np.ndarray | None,
    centres: tuple[int, ...] | None, floats: np.ndarray | None,
) -> None:  # fmt: skip
    bins = 2 if centres is None else BINS
    model = _start(len(entries), bins, previous is not None)
    size = sum(e.size for e in entries)
    old = listed(np.zeros(size, np.int8) if previous is None else previous.astype(np.int8))
    bits = listed(np.zeros(1, np.uint32) if floats is None else floats[:size].copy().view(np.uint32))
    for layer, e in enumerate(entries):
        rows = rows_of(e)
        stats = [listed(np.zeros(n, np.int64)) for n in (rows, rows, e.size // rows, e.size // rows)]
        centre = 0 if centres is None else centres[layer] << CENTRE_SHIFT
        _run(io, buffer, new, old, bits, centre, bins, e.offset, e.offset + e.size, e.size // rows, layer,
             len(entries), *stats, *model.parts)  # fmt: skip


def _start(layers: int, bins: int, known: bool) -> Model:
    fall = [1677722]  # 0.4 of 2^22; a bin further from the threshold is 7/8 as likely to have moved, 1/1000 at least
    while len(fall) < BINS:
        fall.append(max(fall[-1] - (fall[-1] >> 3), 4194))
    alone = 83886 if known else 419430
    place = np.array([fall[abs(b - HALF)] if bins > 2 else alone for b in range(bins)])
    near = np.array([fall[2 * d] if bins > 2 else alone for d in range(NEAR)])
    chance = np.concatenate(
        (
            np.tile(place, 2),
            np.tile(place, 2 * layers),
            np.tile(near, RATIOS * RATIOS),
            np.tile(place, layers * RATIOS),
            np.tile(place, layers * RATIOS),
            np.tile(near, 8) if bins > 2 else np.full(layers * RATIOS * RATIOS, alone),
        )
    )
    return Model.of(chance, seen=3 if bins > 2 else 1, sets=2 * layers, weight=10923)


def _loop(io: Any, buffer: Any, new: Any, old: Any, bits: Any, centre: Any, bins: Any, start: Any, stop: Any,
          width: Any, layer: Any, layers: Any, row_came: Any, row_due: Any, column_came: Any, column_due: Any,
          chance: Any, seen: Any, weights: Any, index: Any, inputs: Any) -> None:  # fmt: skip
    second = 2 * bins
    third = second + 2 * layers * bins
    fourth = third + RATIOS * RATIOS * NEAR
    fifth = fourth + layers * RATIOS * bins
    sixth = fifth + layers * RATIOS * bins
    history: Any = 0
    row: Any = 0
    column: Any = 0
    place: Any = 0
    near: Any = 0
    pace: Any = 15 if bins > 2 else 18
    for i in range(start, stop):
        was = int(old[i])
        if bins > 2:
            place = (((int(bits[i]) & 0x7FFFFFFF) - centre) >> SHIFT) + HALF
            place = min(max(place, 0), bins - 1)
            near = min(abs(place - HALF) >> 1, NEAR - 1)
        else:
            place = was
            near = history & 7
        r = ((LOGARITHM(row_came[row] + 256) - LOGARITHM(row_due[row] + 256)) >> 3) + 8
        c = ((LOGARITHM(column_came[column] + 256) - LOGARITHM(column_due[column] + 256)) >> 3) + 8
        r, c = min(max(r, 0), RATIOS - 1), min(max(c, 0), RATIOS - 1)
        index[0] = was * bins + place
        index[1] = second + (2 * layer + was) * bins + place
        index[2] = third + (r * RATIOS + c) * NEAR + near
        index[3] = fourth + (layer * RATIOS + r) * bins + place
        index[4] = fifth + (layer * RATIOS + c) * bins + place
        if bins > 2:
            index[5] = sixth + (history & 7) * NEAR + near
        else:
            index[5] = sixth + (layer * RATIOS + r) * RATIOS + c
        due = chance[index[1]] >> 14
        moved = MIXED(io, buffer, int(new[i]) ^ was, chance, seen, weights, index, inputs,
                      (2 * layer + was) * INPUTS, INPUTS, pace)  # fmt: skip
        new[i] = moved ^ was
        row_came[row] += moved << 8
        row_due[row] += due
        column_came[column] += moved << 8
        column_due[column] += due
        history = 2 * (history & 3) + moved
        column += 1
        if column == width:
            column = 0
            row += 1


_run = compiled(_loop)
