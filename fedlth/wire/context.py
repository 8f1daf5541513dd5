"""The contexts of a mask's coordinates: layer, previous mask, and the reference weight's size beside the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.params import Entry
from fedlth.wire.jit import COMPILED, compiled

BINS, HALF = 25, 12
FINEST, COARSEST = 19, 22
CODES = 1 << (31 - FINEST)


@dataclass(frozen=True)
class Scale:
    """How |w_ref| becomes a bin: the float's bits without the sign, shifted, beside each layer's centre."""

    shift: int
    centres: tuple[int, ...]


def magnitudes(floats: np.ndarray, shift: int) -> np.ndarray:
    """Return the top bits of |w|: monotone in |w|, integer on every machine."""
    return (floats.view(np.uint32) & np.uint32(0x7FFFFFFF)) >> np.uint32(shift)


def histogram(
    mask: np.ndarray, entries: tuple[Entry, ...], previous: np.ndarray, floats: np.ndarray | None
) -> np.ndarray:
    """Return (layers, 2 new bit, 2 previous bit, CODES) int64 counts; without floats all are in code 0."""
    out = np.zeros((len(entries), 2, 2, CODES if floats is not None else 1), np.int64)
    for e, counts in zip(entries, out, strict=True):
        new, old = mask[e.slice], previous[e.slice]
        if floats is None:
            both, ones, olds = (int(np.count_nonzero(a)) for a in (new & old, new, old))
            counts[:, :, 0] = [[e.size - ones - olds + both, olds - both], [ones - both, both]]
        elif COMPILED:
            _count(new, old, floats[e.slice].view(np.uint32), counts)
        else:
            key = (2 * new.astype(np.int64) + old) * CODES + magnitudes(floats[e.slice], FINEST)
            counts += np.bincount(key, minlength=4 * CODES).reshape(2, 2, CODES)
    return out


def scale_of(counts: np.ndarray, shift: int) -> Scale:
    """Centre each layer's bins on the weight that would be its threshold if the largest were kept."""
    total = counts.sum((1, 2)).reshape(len(counts), -1, 1 << (shift - FINEST)).sum(2)
    dead = counts[:, 0].sum((1, 2))
    reached = np.cumsum(total, 1) > dead[:, None]
    return Scale(shift, tuple(int(i) for i in np.where(reached.any(1), reached.argmax(1), 0)))


def binned(counts: np.ndarray, scale: Scale) -> np.ndarray:
    """Return (layers, 2, 2, BINS): the histogram in the scale's bins."""
    out = np.zeros((*counts.shape[:3], BINS), np.int64)
    code = np.arange(counts.shape[3]) >> (scale.shift - FINEST)
    for layer, centre in enumerate(scale.centres):
        place = np.clip(code - centre + HALF, 0, BINS - 1)
        first = np.searchsorted(place, np.arange(BINS + 1))
        sums = np.concatenate((np.zeros((2, 2, 1), np.int64), np.cumsum(counts[layer], 2)), 2)
        out[layer] = np.diff(sums[:, :, first], axis=2)
    return out


def contexts(
    size: int, entries: tuple[Entry, ...], previous: np.ndarray | None, scale: Scale | None, floats: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """Return (n,) contexts in the order layer, previous bit (where there is one), bin (where there is a scale)."""
    bits, bins = 1 if previous is None else 2, 1 if scale is None else BINS
    number = len(entries) * bits * bins
    out = np.empty(size, np.uint16 if number <= 1 << 16 else np.uint32)
    for layer, e in enumerate(entries):
        old = previous[e.slice] if previous is not None else None
        here: Any = layer * bits * bins
        if scale is None or floats is None:
            out[e.slice] = here if old is None else here + old.astype(out.dtype)
            continue
        if COMPILED:
            held = np.zeros(e.size, bool) if old is None else old
            _label(held, floats[e.slice].view(np.uint32), scale.shift, scale.centres[layer], here, out[e.slice])
            continue
        place = magnitudes(floats[e.slice], scale.shift).astype(np.int64) - scale.centres[layer] + HALF
        here = here + np.clip(place, 0, BINS - 1)
        out[e.slice] = here if old is None else here + BINS * old
    return out, number


def _count_loop(new: Any, old: Any, bits: Any, counts: Any) -> None:
    for i in range(len(new)):
        counts[int(new[i]), int(old[i]), (bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(FINEST)] += 1


def _label_loop(old: Any, bits: Any, shift: int, centre: int, here: int, out: Any) -> None:
    for i in range(len(old)):
        place: Any = np.int64((bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(shift)) - centre + HALF
        out[i] = here + BINS * int(old[i]) + min(max(place, 0), BINS - 1)


_count = compiled(_count_loop)
_label = compiled(_label_loop)
