"""Whole numbers bit by bit: a step's size and sign are learnt from its tensor, row and column, where updates agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlth.kernel.late_jit import compiled
from fedlth.models.layout import Entry
from fedlth.wire import adaptive
from fedlth.wire.adaptive import CODE, INPUTS, LOGARITHM, MIXED, PACE_, Model, listed
from fedlth.wire.errors import PayloadError
from fedlth.wire.mask_bits import rows_of

UNARY = 24  # sizes up to here are coded as "larger still?", the rest by Elias' gamma code
LARGEST = 1 << 30
SIZES, PAIRS, SIGNS = 16, 32, 15
INPUTS_SIZE, INPUTS_SIGN = 5, 3


def encode(steps: np.ndarray, kept: np.ndarray, entries: tuple[Entry, ...], limit: int) -> bytes | None:
    """Return the coded steps (m,), None where longer than `limit`; `kept` (n,) bool has m ones, over all entries."""
    numbers = listed(steps.astype(np.int32))
    return adaptive.encode(limit, lambda io, buffer: _walk(io, buffer, numbers, kept, entries))


def decode(data: bytes, kept: np.ndarray, entries: tuple[Entry, ...]) -> np.ndarray:
    """Return the steps (m,) int32; raise PayloadError where the bytes are not exactly m steps."""
    numbers = listed(np.zeros(int(np.count_nonzero(kept)), np.int32))
    adaptive.decode(data, lambda io, buffer: _walk(io, buffer, numbers, kept, entries))
    out = np.asarray(numbers, np.int32)
    if out.size and not -LARGEST <= int(out.min()) <= int(out.max()) <= LARGEST:
        raise PayloadError("a step is beyond 2^30")
    return out


def _walk(io: Any, buffer: Any, numbers: Any, kept: np.ndarray, entries: tuple[Entry, ...]) -> None:
    count = len(entries)
    chance = np.full(UNARY * SIZES * (2 * SIZES + count * SIZES) + UNARY * count * (PAIRS + 1), 1 << 21)
    size = Model.of(chance, seen=1, sets=count * UNARY, weight=19661)
    sign = Model.of(np.full(SIGNS * SIGNS * 4 + 2 * SIGNS, 1 << 21), seen=1, sets=count, weight=19661)
    here, at = listed(kept.astype(np.int8)), 0
    for layer, e in enumerate(entries):
        rows = rows_of(e)
        sides = [listed(np.full(n, v, np.int64)) for n in (rows, e.size // rows) for v in (1 << 15, 0, 0)]
        at = _run(io, buffer, numbers, at, here, e.offset, e.offset + e.size, e.size // rows, layer, count,
                  *sides, *size.parts, *sign.parts)  # fmt: skip


def _loop(io: Any, buffer: Any, numbers: Any, at: Any, kept: Any, start: Any, stop: Any, width: Any, layer: Any,
          layers: Any, row_size: Any, row_sign: Any, row_seen: Any, column_size: Any, column_sign: Any,
          column_seen: Any, chance: Any, seen: Any, weights: Any, index: Any, inputs: Any, chance_s: Any, seen_s: Any,
          weights_s: Any, index_s: Any, inputs_s: Any) -> Any:  # fmt: skip
    second = UNARY * SIZES * SIZES
    third = second + UNARY * SIZES * SIZES
    fourth = third + layers * UNARY * SIZES
    fifth = fourth + layers * UNARY * PAIRS
    last: Any = 0
    row: Any = 0
    column: Any = 0
    for i in range(start, stop):
        if kept[i] == 1:
            step = int(numbers[at])
            most = abs(step)
            r, c = LOGARITHM(row_size[row] >> 8), LOGARITHM(column_size[column] >> 8)
            both = min(max(((r + c) >> 3) - 16, 0), PAIRS - 1)
            u, v = min(max((r >> 3) - 8, 0), SIZES - 1), min(max((c >> 3) - 8, 0), SIZES - 1)
            w = min(max((LOGARITHM(last >> 8) >> 3) - 8, 0), SIZES - 1)
            size: Any = 0
            while size < UNARY:
                index[0] = (size * SIZES + u) * SIZES + v
                index[1] = second + (size * SIZES + u) * SIZES + w
                index[2] = third + (layer * UNARY + size) * SIZES + v
                index[3] = fourth + (layer * UNARY + size) * PAIRS + both
                index[4] = fifth + layer * UNARY + size
                more = MIXED(io, buffer, 1 if most > size else 0, chance, seen, weights, index, inputs,
                             (layer * UNARY + size) * INPUTS, INPUTS_SIZE, 15)  # fmt: skip
                if more == 0:
                    break
                size += 1
            if size == UNARY:
                rest = most - UNARY + 1
                bits: Any = 0
                while bits < 31:
                    if CODE(io, buffer, 32768, 1 if rest >> (bits + 1) > 0 else 0) == 0:
                        break
                    bits += 1
                value: Any = 1
                for b in range(bits - 1, -1, -1):
                    value = 2 * value + CODE(io, buffer, 32768, (rest >> b) & 1)
                size = value + UNARY - 1
            way: Any = 0
            if size > 0:
                a, b_ = (7 * row_sign[row] + 491520) >> 16, (7 * column_sign[column] + 491520) >> 16
                index_s[0] = (a * SIGNS + b_) * 4 + min(size, 3)
                index_s[1] = SIGNS * SIGNS * 4 + a
                index_s[2] = SIGNS * SIGNS * 4 + SIGNS + b_
                up = MIXED(io, buffer, 1 if step > 0 else 0, chance_s, seen_s, weights_s, index_s, inputs_s,
                           layer * INPUTS, INPUTS_SIGN, 15)  # fmt: skip
                way = 2 * up - 1
            numbers[at] = way * min(size, LARGEST + 1)
            at += 1
            far = min(size, 4095) << 16
            pace = PACE_[row_seen[row]]
            row_size[row] += ((far - row_size[row]) * pace) >> 16
            row_sign[row] += (((way << 16) - row_sign[row]) * pace) >> 16
            row_seen[row] = min(row_seen[row] + 1, 31)
            pace = PACE_[column_seen[column]]
            column_size[column] += ((far - column_size[column]) * pace) >> 16
            column_sign[column] += (((way << 16) - column_sign[column]) * pace) >> 16
            column_seen[column] = min(column_seen[column] + 1, 31)
            last += ((far - last) * 26214) >> 16
        column += 1
        if column == width:
            column = 0
            row += 1
    return at


_run = compiled(_loop)
