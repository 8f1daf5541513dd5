"""Masks that keep or drop whole output channels: one bit for each index of a tensor's first axis."""

from __future__ import annotations

import numpy as np

from fedlth.models.layout import Entry
from fedlth.wire import mask as bitmap


def _rows(entry: Entry) -> int:
    return entry.shape[0] if entry.shape and entry.size else min(entry.size, 1)


def num_bytes(entries: tuple[Entry, ...]) -> int:
    return (sum(_rows(e) for e in entries) + 7) // 8


def fit(mask: np.ndarray, entries: tuple[Entry, ...]) -> bool:
    """Say whether the mask is the same along all axes but the first, in every tensor."""
    for e in entries:
        if e.size:
            rows = mask[e.slice].reshape(_rows(e), -1)
            # The first columns nearly always tell: the whole tensor is compared only where they are equal.
            if not all((part == rows[:, :1]).all() for part in (rows[:, :8], rows)):
                return False
    return True


def pack(mask: np.ndarray, entries: tuple[Entry, ...]) -> bytes:
    return bitmap.pack(np.concatenate([mask[e.slice].reshape(_rows(e), -1)[:, 0] for e in entries if e.size]))


def unpack(section: bytes, entries: tuple[Entry, ...], size: int) -> np.ndarray:
    """Return the mask (size,); raise PayloadError at a wrong length or a set padding bit."""
    bits = bitmap.unpack(section, sum(_rows(e) for e in entries))
    out, at = np.empty(size, bool), 0
    for e in entries:
        if e.size:
            out[e.slice] = np.repeat(bits[at : at + _rows(e)], e.size // _rows(e))
            at += _rows(e)
    return out
