"""The mask coder, written out: 64-bit rANS over bytes, 32-bit words, 24-bit tables. Byte for byte constriction's."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlth.kernel.late_jit import compiled

U = np.uint64


def encode(symbols: np.ndarray, counts: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return the uint32 words of `symbols` (N,) uint8, whose s-th run of counts[s] uses cumulative tables[s]."""
    # A symbol costs at most 24 bits, and two words hold the last state.
    out = np.zeros(len(symbols) + 4, np.uint32)
    with np.errstate(over="ignore"):
        size = _encode(symbols, counts, tables.astype(np.uint64), out)
    return out[: int(size)]


def decode(words: np.ndarray, counts: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return sum(counts) symbols, and whether state and words are used up exactly."""
    symbols = np.zeros(int(counts.sum()), np.uint8)
    clean = _decode(words, counts, tables.astype(np.uint64), symbols)
    return symbols, bool(clean)


def _run(symbols: Any, counts: Any, tables: Any, out: Any) -> Any:
    state, size, at = U(0), 0, len(symbols)
    for s in range(len(counts) - 1, -1, -1):
        for _ in range(counts[s]):
            at -= 1
            symbol = int(symbols[at])
            low = tables[s, symbol]
            share = tables[s, symbol + 1] - low
            if (state >> U(40)) >= share:
                out[size] = state & U(0xFFFFFFFF)
                size += 1
                state >>= U(32)
            state = ((state // share) << U(24)) | (low + state % share)
    while state > U(0):
        out[size] = state & U(0xFFFFFFFF)
        size += 1
        state >>= U(32)
    return size


def _unrun(words: Any, counts: Any, tables: Any, symbols: Any) -> Any:
    left, state, at = len(words), U(0), 0
    for _ in range(2):
        if left > 0:
            left -= 1
            state = (state << U(32)) | U(words[left])
    nearest = np.zeros(4097, np.int64)
    for s in range(len(counts)):
        if counts[s] == 0:
            continue
        # A longer run pays for a table of each 4096th part's first and last symbol.
        long = counts[s] > 1024
        if long:
            low = 0
            for part in range(4096):
                while tables[s, low + 1] <= U(part << 12):
                    low += 1
                nearest[part] = low
            nearest[4096] = 255
        for _ in range(counts[s]):
            slot = state & U(0xFFFFFF)
            # The table grows by at least 1 a symbol: at most eight halvings find the symbol.
            low, high = 0, 256
            if long:
                near = int(slot >> U(12))
                low, high = nearest[near], nearest[near + 1] + 1
            while high - low > 1:
                middle = (low + high) >> 1
                if tables[s, middle] <= slot:
                    low = middle
                else:
                    high = middle
            symbols[at] = low
            at += 1
            start = tables[s, low]
            state = (state >> U(24)) * (tables[s, low + 1] - start) + (slot - start)
            if state < U(0x100000000) and left > 0:
                left -= 1
                state = (state << U(32)) | U(words[left])
    return left == 0 and state == U(0)


_encode = compiled(_run)
_decode = compiled(_unrun)
