"""The mask section: read in every mode; written in the mode that mask_choice finds the cheapest."""

from __future__ import annotations

import numpy as np

from fedlth.models.layout import Entry, Layout
from fedlth.wire import ans, channels, counts, mask_bits, varint
from fedlth.wire import mask as bitmap
from fedlth.wire.codec import (
    BITMAP,
    BY_BIT,
    CHANNELS,
    FULL,
    LAYERS,
    MAGNITUDE,
    MAGNITUDE_BITS,
    PREVIOUS,
    PREVIOUS_BITS,
    REUSE,
    TOGETHER,
    Codec,
)
from fedlth.wire.context import COARSEST, FINEST, Scale, contexts
from fedlth.wire.errors import PayloadError
from fedlth.wire.mask_choice import Choice, cheapest
from fedlth.wire.reference import Reference
from fedlth.wire.segments import Segments, pack, tally, unpack

NEEDS_MASK = (REUSE, PREVIOUS, TOGETHER, PREVIOUS_BITS)
USES_MAGNITUDES = (MAGNITUDE, MAGNITUDE_BITS)
USES_MASK = (*NEEDS_MASK, *USES_MAGNITUDES)


def encode(
    mask: np.ndarray, layout: Layout, codec: Codec, known: np.ndarray | None, reference: Reference | None
) -> tuple[int, bytes]:
    """Return mode and section. `known` and `reference` are what the receiver holds."""
    if bool(mask.all()):
        return FULL, b""
    if known is not None and np.array_equal(mask, known):
        return REUSE, b""
    if set(codec.masks) <= {REUSE, BITMAP, FULL}:
        return BITMAP, bitmap.pack(mask)
    choice = cheapest(mask, layout.prunable, codec.masks, known, reference)
    mode = choice.mode
    if mode == CHANNELS:
        return mode, channels.pack(mask, layout.prunable)
    if mode >= BY_BIT:
        section = _by_bit(mode, mask, layout, known, reference, choice.one)
    elif mode != BITMAP:
        section = _coded(choice, mask, layout, known, reference)
    if mode != BITMAP and section is not None and len(section) < (mask.size + 7) // 8:
        return mode, section
    return BITMAP, bitmap.pack(mask)


def decode(
    mode: int, section: bytes, layout: Layout, known: np.ndarray | None, reference: Reference | None
) -> np.ndarray:
    """Return the mask; raise PayloadError at anything that `encode` does not make."""
    size = layout.num_prunable
    if mode in (FULL, REUSE):
        if section:
            raise PayloadError("an unexpected mask section")
        return np.ones(size, bool) if mode == FULL or known is None else known
    if mode == BITMAP:
        mask = bitmap.unpack(section, size)
    elif len(section) >= (size + 7) // 8:
        raise PayloadError("a coded mask is not shorter than its bitmap")
    elif mode == CHANNELS:
        mask = channels.unpack(section, layout.prunable, size)
    elif mode >= BY_BIT:
        mask = _read_bits(mode, section, layout, known, reference)
    else:
        mask = _read(mode, section, layout, known, reference)
    if mask.all():
        raise PayloadError("a full mask must be sent as full")
    return mask


def _coded(
    choice: Choice, mask: np.ndarray, layout: Layout, known: np.ndarray | None, reference: Reference | None
) -> bytes:
    scale, counted = choice.scale, np.zeros((2, 0), np.int64) if choice.counts is None else choice.counts
    context, _ = _contexts(choice.mode, layout, known, reference, scale)
    segments = Segments(context, counted.sum(0), counted[1])
    ones = segments.ones
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
        centres, at = _centres(section, at, len(layout.prunable), shift)
        scale = Scale(shift, tuple(centres))
    context, number = _contexts(mode, layout, known, reference, scale)
    parts = tally(context, number)
    sizes = parts.sum(0)
    ones, at = counts.get(section, at, sizes)
    segments = Segments(context, sizes, ones)
    return unpack(ans.decode(section[at:], segments.counts, ones, segments.sizes), segments, parts)


def _contexts(
    mode: int, layout: Layout, known: np.ndarray | None, reference: Reference | None, scale: Scale | None
) -> tuple[np.ndarray, int]:
    previous = known if mode != LAYERS else None
    floats = reference.floats if reference is not None and scale is not None else None
    size = layout.num_prunable
    tensors = (Entry("all", (size,), "param", 0),) if mode == TOGETHER else layout.prunable
    return contexts(size, tensors, previous, scale, floats)


def _centres(section: bytes, at: int, number: int, shift: int) -> tuple[list[int], int]:
    centres = []
    for _ in range(number):
        centre, at = varint.get(section, at, len(section))
        if centre >= 1 << (31 - shift):
            raise PayloadError(f"bins are centred at {centre}")
        centres.append(centre)
    return centres, at


def _by_bit(
    mode: int, mask: np.ndarray, layout: Layout, known: np.ndarray | None, reference: Reference | None, one: bool
) -> bytes | None:
    head, centres, floats = b"", None, None
    if mode == MAGNITUDE_BITS and reference is not None:
        floats = reference.floats[: mask.size]
        spans = [slice(0, mask.size)] if one else [e.slice for e in layout.prunable]
        found = [mask_bits.centre(floats[s], int(np.count_nonzero(mask[s]))) for s in spans]
        head = bytes((int(one),)) + b"".join(varint.put(c) for c in found)
        centres = tuple(found * len(layout.prunable)) if one else tuple(found)
    previous = known if mode in USES_MASK else None
    coded = mask_bits.encode(mask, layout.prunable, previous, centres, floats, (mask.size + 7) // 8)
    return None if coded is None else head + coded


def _read_bits(
    mode: int, section: bytes, layout: Layout, known: np.ndarray | None, reference: Reference | None
) -> np.ndarray:
    at, centres, floats, number = 0, None, None, len(layout.prunable)
    if mode == MAGNITUDE_BITS and reference is not None:
        one, at = section[0] if section else 2, 1
        if one > 1:
            raise PayloadError(f"{one} means neither one centre nor one for each tensor")
        found, at = _centres(section, at, 1 if one else number, mask_bits.CENTRE_SHIFT)
        centres = tuple(found * number) if one else tuple(found)
        floats = reference.floats[: layout.num_prunable]
    previous: np.ndarray | None = known if mode in USES_MASK else None
    return mask_bits.decode(section[at:], layout.num_prunable, layout.prunable, previous, centres, floats)
