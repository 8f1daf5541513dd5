"""Whole numbers bit by bit: a step's size and sign are learnt from its row and column, where updates agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedlth.kernel.late_jit import compiled
from fedlth.models.layout import Entry
from fedlth.wire import coder
from fedlth.wire.coder import LEARNT, PACE_, PLAIN, State, listed
from fedlth.wire.errors import PayloadError

UNARY = 24  # sizes up to here are coded as "larger still?", the rest by Elias' gamma code
LARGEST = 1 << 30
SIZES, SIGNS = 64, 15


def encode(steps: np.ndarray, kept: np.ndarray, entries: tuple[Entry, ...], limit: int) -> bytes | None:
    """Return the coded steps (m,), None where longer than `limit`; `kept` (n,) bool has m ones, over all entries."""
    numbers = listed(steps.astype(np.int32))
    return coder.encode(limit, lambda *io: _walk(io, numbers, kept, entries))


def decode(data: bytes, kept: np.ndarray, entries: tuple[Entry, ...]) -> np.ndarray:
    """Return the steps (m,) int32; raise PayloadError where the bytes are not exactly m steps."""
    numbers = listed(np.zeros(int(np.count_nonzero(kept)), np.int32))
    coder.decode(data, lambda *io: _walk(io, numbers, kept, entries))
    out = np.asarray(numbers, np.int32)
    if out.size and not -LARGEST <= int(out.min()) <= int(out.max()) <= LARGEST:
        raise PayloadError("a step is beyond 2^30")
    return out


def _walk(io: tuple[State, Any, bool], numbers: Any, kept: np.ndarray, entries: tuple[Entry, ...]) -> State:
    sizes, signs = coder.counters(UNARY * SIZES), coder.counters(SIGNS * SIGNS)
    here, at = listed(kept.astype(np.int8)), 0
    state, buffer, decoding = io
    for e in entries:
        rows = max(e.shape[0], 1) if e.shape else 1
        sides = [listed(np.full(n, v, np.int64)) for n in (rows, e.size // rows) for v in (1 << 15, 0, 0)]
        state, at = _run(state, buffer, decoding, numbers, at, here, e.offset, e.offset + e.size, e.size // rows,
                         *[*sides, *sizes, *signs])  # fmt: skip
    return state


def _loop(state: Any, buffer: Any, decoding: Any, numbers: Any, at: Any, kept: Any, start: Any, stop: Any, width: Any,
          row_size: Any, row_sign: Any, row_seen: Any, column_size: Any, column_sign: Any, column_seen: Any,
          chance: Any, seen: Any, chance_s: Any, seen_s: Any) -> Any:  # fmt: skip
    row: Any = 0
    column: Any = 0
    for i in range(start, stop):
        if kept[i] == 1:
            step = int(numbers[at])
            most = abs(step)
            part, octave = math.frexp((row_size[row] * column_size[column]) >> 16)
            place = min(max(4 * octave + int(8 * part) - 44, 0), SIZES - 1)
            size: Any = 0
            while size < UNARY:
                bit = 1 if most > size else 0
                bit, state = LEARNT(state, buffer, decoding, bit, chance, seen, size * SIZES + place)
                if bit == 0:
                    break
                size += 1
            if size == UNARY:
                rest = most - UNARY + 1
                bits: Any = 0
                while bits < 31:
                    bit, state = PLAIN(state, buffer, decoding, 1 if rest >> (bits + 1) > 0 else 0, 32768)
                    if bit == 0:
                        break
                    bits += 1
                value: Any = 1
                for b in range(bits - 1, -1, -1):
                    bit, state = PLAIN(state, buffer, decoding, (rest >> b) & 1, 32768)
                    value = 2 * value + bit
                size = value + UNARY - 1
            way: Any = 0
            if size > 0:
                a, c = (7 * row_sign[row] + 491520) >> 16, (7 * column_sign[column] + 491520) >> 16
                bit, state = LEARNT(state, buffer, decoding, 1 if step > 0 else 0, chance_s, seen_s, a * SIGNS + c)
                way = 2 * bit - 1
            numbers[at] = way * min(size, LARGEST + 1)
            at += 1
            far = min(size, 4095) << 16
            pace = PACE_[row_seen[row]]
            row_size[row] += ((far - row_size[row]) * pace) >> 16
            row_sign[row] += (((way << 16) - row_sign[row]) * pace) >> 16
            row_seen[row] = min(row_seen[row] + 1, 63)
            pace = PACE_[column_seen[column]]
            column_size[column] += ((far - column_size[column]) * pace) >> 16
            column_sign[column] += (((way << 16) - column_sign[column]) * pace) >> 16
            column_seen[column] = min(column_seen[column] + 1, 63)
        column += 1
        if column == width:
            column = 0
            row += 1
    return state, at


_run = compiled(_loop)
