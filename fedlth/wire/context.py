"""The contexts of a mask's coordinates: layer, previous mask, and the reference weight's size beside the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.kernel.late_jit import COMPILED, compiled
from fedlth.models.layout import Entry

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
    """Return (layers, 2 new bit, 2 previous bit, CODES + 1) int64: how many have a code below each, the last is all.

    Without floats all are in code 0, the only one.
    """
    out = np.zeros((len(entries), 2, 2, 1 + (CODES if floats is not None else 1)), np.int64)
    for e, below in zip(entries, out, strict=True):
        new, old = mask[e.slice], previous[e.slice]
        if floats is None:
            both, ones, olds = (int(np.count_nonzero(a)) for a in (new & old, new, old))
            below[:, :, 1] = [[e.size - ones - olds + both, olds - both], [ones - both, both]]
            continue
        if COMPILED:
            counts = np.zeros(4 * CODES, np.int64)
            _count(new.view(np.uint8), old.view(np.uint8), floats[e.slice].view(np.uint32), counts)
        else:
            key = (2 * new.astype(np.int64) + old) * CODES + magnitudes(floats[e.slice], FINEST)
            counts = np.bincount(key, minlength=4 * CODES)
        np.cumsum(counts.reshape(2, 2, CODES), axis=2, out=below[:, :, 1:])
    return out


def scale_of(below: np.ndarray, shift: int) -> Scale:
    """Centre each layer's bins on the weight that would be its threshold if the largest were kept."""
    total = below.sum((1, 2))[:, :: 1 << (shift - FINEST)]
    dead = below[:, 0, :, -1].sum(1)
    reached = total[:, 1:] > dead[:, None]
    return Scale(shift, tuple(int(i) for i in np.where(reached.any(1), reached.argmax(1), 0)))


def binned(below: np.ndarray, scale: Scale) -> np.ndarray:
    """Return (layers, 2, 2, BINS): the histogram in the scale's bins."""
    centres, last = np.array(scale.centres)[:, None], below.shape[3] - 1
    edges = (centres + np.arange(1 - HALF, BINS - HALF)) * (1 << (scale.shift - FINEST))
    edges = np.concatenate((0 * centres, np.clip(edges, 0, last), 0 * centres + last), 1)
    return np.diff(np.take_along_axis(below, edges[:, None, None], 3), axis=3)


def contexts(
    size: int, entries: tuple[Entry, ...], previous: np.ndarray | None, scale: Scale | None, floats: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """Return (n,) contexts in the order layer, previous bit (where there is one), bin (where there is a scale)."""
    bits, bins = 1 if previous is None else 2, 1 if scale is None else BINS
    number = len(entries) * bits * bins
    out = np.empty(size, np.min_scalar_type(max(number - 1, 0)))
    for layer, e in enumerate(entries):
        old = previous[e.slice] if previous is not None else None
        here: Any = layer * bits * bins
        if scale is None or floats is None:
            out[e.slice] = here if old is None else here + old.astype(out.dtype)
            continue
        if COMPILED:
            held = np.zeros(e.size, np.uint8) if old is None else old.view(np.uint8)
            _label(held, floats[e.slice].view(np.uint32), scale.shift, scale.centres[layer], here, out[e.slice])
            continue
        place = magnitudes(floats[e.slice], scale.shift).astype(np.int64) - scale.centres[layer] + HALF
        here = here + np.clip(place, 0, BINS - 1)
        out[e.slice] = here if old is None else here + BINS * old
    return out, number


def _count_loop(new: Any, old: Any, bits: Any, counts: Any) -> None:
    for i in range(len(new)):
        # The sign's place takes the old bit, the one above it the new: the key is (new, old, code).
        key = (np.int64(new[i]) << 32) | (np.int64(old[i]) << 31) | (np.int64(bits[i]) & 0x7FFFFFFF)
        counts[key >> FINEST] += 1


def _label_loop(old: Any, bits: Any, shift: int, centre: int, here: int, out: Any) -> None:
    for i in range(len(old)):
        place: Any = np.int64((bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(shift)) - centre + HALF
        out[i] = here + BINS * np.int64(old[i]) + min(max(place, 0), BINS - 1)


_count = compiled(_count_loop)
_label = compiled(_label_loop)
