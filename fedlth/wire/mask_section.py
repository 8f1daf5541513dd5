"""The mask section: nothing where the receiver knows the mask, else coded bit by bit, or a bitmap where that saves."""

from __future__ import annotations

import numpy as np

from fedlth.models.layout import Layout
from fedlth.wire import mask as bitmap
from fedlth.wire import mask_bits
from fedlth.wire.codec import BITMAP, CODED, FULL, ON_MASK, ON_VALUES, REUSE, Codec
from fedlth.wire.errors import PayloadError
from fedlth.wire.reference import Reference


def uses_mask(mode: int) -> bool:
    """Say whether a section in this mode refers to the known mask."""
    return mode == REUSE or (mode >= CODED and bool(mode & ON_MASK))


def uses_floats(mode: int) -> bool:
    """Say whether a section in this mode refers to the reference's floats."""
    return mode >= CODED and bool(mode & ON_VALUES)


def encode(
    mask: np.ndarray, layout: Layout, codec: Codec, known: np.ndarray | None, reference: Reference | None
) -> tuple[int, bytes]:
    """Return mode and section. `known` and `reference` are what the receiver holds."""
    if bool(mask.all()):
        return FULL, b""
    if known is not None and np.array_equal(mask, known):
        return REUSE, b""
    if CODED in codec.masks:
        mode = CODED + ON_MASK * (known is not None) + ON_VALUES * (reference is not None)
        shorter = (mask.size + 7) // 8 - 1
        section = mask_bits.encode(mask, layout.prunable, known, _prunable(mode, layout, reference), shorter)
        if section is not None:
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
        raise PayloadError("a coded mask is no shorter than its bitmap")
    else:
        old = known if uses_mask(mode) else None
        mask = mask_bits.decode(section, size, layout.prunable, old, _prunable(mode, layout, reference))
    if mask.all():
        raise PayloadError("a full mask must be sent as full")
    return mask


def _prunable(mode: int, layout: Layout, reference: Reference | None) -> np.ndarray | None:
    return reference.floats[: layout.num_prunable] if reference is not None and uses_floats(mode) else None
