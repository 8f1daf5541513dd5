"""Bit-packed masks: 8 coordinates a byte, first coordinate in the highest bit."""

from __future__ import annotations

import hashlib

import numpy as np

from fedlth.wire.errors import PayloadError


def pack(mask: np.ndarray) -> bytes:
    """Pack a bool mask (n,) into ceil(n / 8) bytes; padding bits are zero."""
    return np.packbits(mask).tobytes()


def unpack(data: bytes, size: int) -> np.ndarray:
    """Return the bool mask (size,); raise PayloadError at a wrong length or a set padding bit."""
    if len(data) != (size + 7) // 8:
        raise PayloadError(f"bitmap of {len(data)} bytes, wanted {(size + 7) // 8}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[size:].any():
        raise PayloadError("bitmap has padding bits set")
    return bits[:size].astype(bool)


def digest(mask: np.ndarray) -> str:
    """Return the 16 hex digits that name a mask: blake2b-64 of its packed bits."""
    return hashlib.blake2b(pack(mask), digest_size=8).hexdigest()
