"""Which mask mode is the cheapest: told from counts alone, without trial encoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth.models.layout import Entry
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
)
from fedlth.wire.context import COARSEST, FINEST, Scale
from fedlth.wire.reference import Reference

# Coding bit by bit is some thirty times slower than coding bytes: a large mask must save this share of its bitmap, and
# beside a reference, where an upload's speed counts, MAGNITUDE takes the place of MAGNITUDE_BITS.
SMALL, WORTH = 1 << 17, 1 / 128


@dataclass(frozen=True)
class Choice:
    """A mode and what it needs: MAGNITUDE a scale, MAGNITUDE_BITS whether one centre serves all tensors.

    `counts` (2, segments), of the modes with segments: how many zeros and ones each has.
    """

    mode: int
    scale: Scale | None = None
    one: bool = False
    counts: np.ndarray | None = None


def cheapest(
    mask: np.ndarray, entries: tuple[Entry, ...], modes: tuple[int, ...], known: np.ndarray | None,
    reference: Reference | None,
) -> Choice:  # fmt: skip
    """Return the cheapest of `modes`."""
    previous = np.zeros(mask.size, bool) if known is None else known
    seen = context.histogram(mask, entries, previous, reference.floats if reference else None)
    by_bit, slow = seen[:, :, :, -1:], WORTH * mask.size / 8 if mask.size > SMALL else 0.0
    found: list[tuple[float, Choice]] = [((mask.size + 7) // 8, Choice(BITMAP))]

    def add(mode: int, tally: np.ndarray, more: float = 0.0, scale: Scale | None = None) -> None:
        both = tally.swapaxes(0, 1).reshape(2, -1)
        found.append((counts.cost(both[1], both.sum(0)) + more, Choice(mode, scale, counts=both)))

    add(LAYERS, by_bit.sum(2))
    if known is not None:
        add(PREVIOUS, by_bit)
        add(TOGETHER, by_bit.sum(0, keepdims=True))
        found.append((slow + _learnt(by_bit), Choice(PREVIOUS_BITS)))
    if reference is not None:
        for shift in range(FINEST, COARSEST + 1):
            scale = context.scale_of(seen, shift)
            bins = context.binned(seen, scale)
            add(MAGNITUDE, bins if known is not None else bins[:, :, 0], 1 + 2 * len(entries), scale)
        for one in (True, False) if mask.size <= SMALL else ():
            whole = seen.sum(0, keepdims=True) if one else seen
            bins = context.binned(whole, context.scale_of(whole, FINEST))
            price = _learnt(bins.sum(0, keepdims=True)) + 1 + 3 * len(whole)
            found.append((price, Choice(MAGNITUDE_BITS, one=one)))
    if known is None and reference is None:
        found.append((slow + _by_line(mask, entries), Choice(LAYERS_BITS)))
    if channels.fit(mask, entries):
        found.append((channels.num_bytes(entries), Choice(CHANNELS)))
    return min((f for f in found if f[1].mode in modes), key=lambda f: f[0])[1]


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
