"""Which mask mode is the cheapest: told from counts alone, without trial encoding."""

from __future__ import annotations

import numpy as np

from fedlth.params import Entry
from fedlth.wire import channels, context, counts, mask_bits
from fedlth.wire.codec import (
    BITMAP,
    CHANNELS,
    LAYERS,
    LAYERS_BITS,
    MAGNITUDE,
    MAGNITUDE_BITS,
    PREVIOUS,
    PREVIOUS_BITS,
    TOGETHER,
)  # fmt: skip
from fedlth.wire.context import COARSEST, FINEST, Scale
from fedlth.wire.reference import Reference

# Coding bit by bit is some thirty times slower than coding bytes: a large mask must save this share of its bitmap.
SMALL, WORTH = 1 << 17, 1 / 128


def cheapest(
    mask: np.ndarray, entries: tuple[Entry, ...], modes: tuple[int, ...], known: np.ndarray | None,
    reference: Reference | None,
) -> tuple[int, Scale | None, bool]:  # fmt: skip
    """Return the one of `modes`, the scale of MAGNITUDE, and whether MAGNITUDE_BITS has one centre for all tensors."""
    previous = np.zeros(mask.size, bool) if known is None else known
    seen = context.histogram(mask, entries, previous, reference.floats if reference else None)
    by_bit, slow = seen.sum(3), WORTH * mask.size / 8 if mask.size > SMALL else 0.0
    found: list[tuple[float, int, Scale | None, bool]] = [((mask.size + 7) // 8, BITMAP, None, False)]
    found.append((counts.cost(by_bit[:, 1].sum(1), by_bit.sum((1, 2))), LAYERS, None, False))
    if known is not None:
        found.append((counts.cost(by_bit[:, 1].ravel(), by_bit.sum(1).ravel()), PREVIOUS, None, False))
        pooled = by_bit.sum(0)
        found.append((counts.cost(pooled[1], pooled.sum(0)), TOGETHER, None, False))
        found.append((slow + _learnt(by_bit), PREVIOUS_BITS, None, False))
    if reference is not None:
        for shift in range(FINEST, COARSEST + 1):
            scale = context.scale_of(seen, shift)
            bins = context.binned(seen, scale)
            price = counts.cost(bins[:, 1].ravel(), bins.sum(1).ravel()) + 1 + 2 * len(entries)
            found.append((price, MAGNITUDE, scale, False))
        for one in (True, False):
            whole = seen.sum(0, keepdims=True) if one else seen
            bins = context.binned(whole, context.scale_of(whole, FINEST))
            found.append((slow + _learnt(bins.sum(0, keepdims=True)) + 1 + 3 * len(whole), MAGNITUDE_BITS, None, one))
    if known is None and reference is None:
        found.append((slow + _by_line(mask, entries), LAYERS_BITS, None, False))
    if channels.fit(mask, entries):
        found.append((channels.num_bytes(entries), CHANNELS, None, False))
    _, mode, chosen, one = min((f for f in found if f[1] in modes), key=lambda f: f[0])
    return mode, chosen, one


def _learnt(seen: np.ndarray) -> float:
    """Estimate (layers, 2 new, 2 previous, ...) counts learnt for all tensors together or each apart."""
    both = (seen.sum(0, keepdims=True), seen)
    return 4 + 1.01 * min(counts.learnt(s[:, 1].ravel(), s.sum(1).ravel()) for s in both)


def _by_line(mask: np.ndarray, entries: tuple[Entry, ...]) -> float:
    """Estimate a mask whose density varies by row or by column, whichever tells more in each tensor."""
    total = 2.0
    for e in entries:
        if not e.size:
            continue
        lines = mask[e.slice].reshape(mask_bits.rows_of(e), -1)
        total += min(
            counts.learnt(np.array([np.count_nonzero(lines)]), np.array([e.size])),
            *(
                counts.learnt(np.count_nonzero(lines, axis=a), np.full(lines.shape[1 - a], lines.shape[a]))
                for a in (0, 1)
            ),
        )
    return 1.002 * total
