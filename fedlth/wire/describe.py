"""What a payload is made of, read from its header: for the ledger, after it was decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth.models.layout import Layout
from fedlth.wire import varint
from fedlth.wire.codec import MASK_NAMES, VALUE_NAMES
from fedlth.wire.payload import HEADER


@dataclass(frozen=True)
class Sections:
    """How a payload was coded, such as "magnitude + delta", and the bytes of its mask and value sections."""

    coding: str
    mask_bytes: int
    value_bytes: int


def sections(data: bytes) -> Sections:
    """Return a payload's sections. Its checks are `decode`'s: give it only what was encoded here or decoded."""
    _, _, _, mask, value, _, _ = HEADER.unpack_from(data)
    mask_bytes, at = varint.get(data, HEADER.size, len(data) - 4)
    value_bytes, _ = varint.get(data, at, len(data) - 4)
    return Sections(f"{MASK_NAMES[mask]} + {VALUE_NAMES[value]}", mask_bytes, value_bytes)


def iid_bytes(mask: np.ndarray, layout: Layout) -> float:
    """Return the i.i.d. reference of a mask: the sum over prunable tensors of n H(k / n), in bytes.

    A reference, no minimum: trained masks have structure, and a receiver may hold an earlier one.
    """
    total = 0.0
    for e in layout.prunable:
        share = int(np.count_nonzero(mask[e.slice])) / e.size
        if 0 < share < 1:
            total -= e.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    return float(total)
