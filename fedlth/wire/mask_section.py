"""The mask section: the cheapest of seven modes, chosen from counts alone."""

from __future__ import annotations

import numpy as np

from fedlth.params import Layout
from fedlth.wire import ans, channels, context, counts, varint
from fedlth.wire import mask as bitmap
from fedlth.wire.codec import BITMAP, CHANNELS, FULL, LAYERS, MAGNITUDE, PREVIOUS, REUSE, Codec
from fedlth.wire.context import COARSEST, FINEST, Scale
from fedlth.wire.errors import PayloadError
from fedlth.wire.reference import Reference
from fedlth.wire.segments import Segments, pack, unpack

USES_MASK = (REUSE, PREVIOUS, MAGNITUDE)


def encode(
    mask: np.ndarray, layout: Layout, codec: Codec, known: np.ndarray | None, reference: Reference | None
) -> tuple[int, bytes]:
    """Return mode and section. `known` and `reference` are what the receiver holds."""
    if bool(mask.all()):
        return FULL, b""
    if known is not None and np.array_equal(mask, known):
        return REUSE, b""
    if LAYERS not in codec.masks:
        return BITMAP, bitmap.pack(mask)
    mode, scale = _cheapest(mask, layout, known, reference)
    if mode == CHANNELS:
        return mode, channels.pack(mask, layout.prunable)
    if mode != BITMAP:
        section = _coded(mode, mask, layout, known, reference, scale)
        if len(section) < (mask.size + 7) // 8:
            return mode, section
    return BITMAP, bitmap.pack(mask)


def decode(
    mode: int, section: bytes, layout: Layout, known: np.ndarray | None, reference: Reference | None
) -> np.ndarray:
    """Return the mask; raise PayloadError at anything that `encode` does not make."""
    size = layout.num_prunable
    if mode in (FULL, REUSE):
        if section:
            raise PayloadError("a mask section where none belongs")
        return np.ones(size, bool) if mode == FULL or known is None else known
    if mode == BITMAP:
        mask = bitmap.unpack(section, size)
    elif len(section) >= (size + 7) // 8:
        raise PayloadError("a coded mask is no shorter than its bitmap")
    elif mode == CHANNELS:
        mask = channels.unpack(section, layout.prunable, size)
    else:
        mask = _read(mode, section, layout, known, reference)
    if mask.all():
        raise PayloadError("a full mask must be sent as full")
    return mask


def _cheapest(
    mask: np.ndarray, layout: Layout, known: np.ndarray | None, reference: Reference | None
) -> tuple[int, Scale | None]:
    entries = layout.prunable
    previous = np.zeros(mask.size, bool) if known is None else known
    seen = context.histogram(mask, entries, previous, reference.floats if reference else None)
    by_bit = seen.sum(3)
    found: list[tuple[float, int, Scale | None]] = [((mask.size + 7) // 8, BITMAP, None)]
    found.append((counts.cost(by_bit[:, 1].sum(1), by_bit.sum((1, 2))), LAYERS, None))
    if known is not None:
        found.append((counts.cost(by_bit[:, 1].ravel(), by_bit.sum(1).ravel()), PREVIOUS, None))
    if reference is not None:
        for shift in range(FINEST, COARSEST + 1):
            scale = context.scale_of(seen, shift)
            bins = context.binned(seen, scale)
            price = counts.cost(bins[:, 1].ravel(), bins.sum(1).ravel()) + 1 + 2 * len(entries)
            found.append((price, MAGNITUDE, scale))
    if channels.fit(mask, entries):
        found.append((channels.num_bytes(entries), CHANNELS, None))
    _, mode, chosen = min(found, key=lambda f: f[0])
    return mode, chosen


def _coded(
    mode: int, mask: np.ndarray, layout: Layout, known: np.ndarray | None, reference: Reference | None,
    scale: Scale | None,
) -> bytes:  # fmt: skip
    segments = _segments(mode, layout, known, reference, scale)
    ones = np.bincount(segments.context[mask], minlength=segments.sizes.size)
    segments = Segments(segments.context, segments.sizes, ones)
    head = b""
    if scale is not None:
        head = bytes((scale.shift,)) + b"".join(varint.put(c) for c in scale.centres)
    words = ans.encode(pack(mask, segments), segments.counts, ones, segments.sizes)
    return head + counts.put(ones, segments.sizes) + words


def _read(
    mode: int, section: bytes, layout: Layout, known: np.ndarray | None, reference: Reference | None
) -> np.ndarray:
    scale, at = None, 0
    if mode == MAGNITUDE:
        shift, at = section[0] if section else 0, 1
        if not FINEST <= shift <= COARSEST:
            raise PayloadError(f"bins of shift {shift}")
        centres = []
        for _ in layout.prunable:
            centre, at = varint.get(section, at, len(section))
            if centre >= 1 << (31 - shift):
                raise PayloadError(f"bins are centred at {centre}")
            centres.append(centre)
        scale = Scale(shift, tuple(centres))
    segments = _segments(mode, layout, known, reference, scale)
    ones, at = counts.get(section, at, segments.sizes)
    segments = Segments(segments.context, segments.sizes, ones)
    return unpack(ans.decode(section[at:], segments.counts, ones, segments.sizes), segments)


def _segments(
    mode: int, layout: Layout, known: np.ndarray | None, reference: Reference | None, scale: Scale | None
) -> Segments:
    previous = known if mode != LAYERS else None
    floats = reference.floats if reference is not None and scale is not None else None
    made, number = context.contexts(layout.num_prunable, layout.prunable, previous, scale, floats)
    sizes = np.bincount(made, minlength=number)
    return Segments(made, sizes, np.zeros(number, np.int64))
