"""A mask bit by bit, each with a chance learnt from what both ends know of its coordinate."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlth.kernel.late_jit import compiled
from fedlth.models.layout import Entry
from fedlth.wire import coder, varint
from fedlth.wire.coder import LEARNT, State, listed
from fedlth.wire.errors import PayloadError

BINS, MIDDLE, SHIFT = 25, 12, 19  # a bin is a sixteenth of an octave wide
CENTRE_SHIFT = 10


def encode(
    mask: np.ndarray, entries: tuple[Entry, ...], known: np.ndarray | None, floats: np.ndarray | None, limit: int
) -> bytes | None:
    """Return the coded mask (n,), None where that is longer than `limit` bytes.

    `known` (n,) bool is a mask and `floats` (n,) float32 are numbers that the receiver holds too.
    """
    centres = [] if floats is None else [_centre(floats[e.slice], mask[e.slice]) for e in entries]
    # Coded is where the mask differs from the known one: rare bits, which a processor's branches foresee.
    head, bits = b"".join(varint.put(c) for c in centres), mask if known is None else mask ^ known
    contexts = _contexts(mask.size, entries, known, floats, centres)
    coded = coder.encode(limit - len(head), lambda *io: _walk(io, listed(bits.astype(np.uint8)), contexts))
    return None if coded is None else head + coded


def decode(
    data: bytes, size: int, entries: tuple[Entry, ...], known: np.ndarray | None, floats: np.ndarray | None
) -> np.ndarray:
    """Return the mask (size,); raise PayloadError where the bytes are not exactly one mask."""
    centres, at = [], 0
    for _ in entries if floats is not None else ():
        centre, at = varint.get(data, at, len(data))
        if centre >= 1 << (31 - CENTRE_SHIFT):
            raise PayloadError(f"bins are centred at {centre}")
        centres.append(centre)
    bits, contexts = listed(np.zeros(size, np.uint8)), _contexts(size, entries, known, floats, centres)
    coder.decode(data[at:], lambda *io: _walk(io, bits, contexts))
    mask = np.asarray(bits, np.uint8).view(bool)
    return mask if known is None else mask ^ known


def _centre(floats: np.ndarray, mask: np.ndarray) -> int:
    """Return the upper bits of the |number| at which a mask of that many would end if the largest were kept."""
    kept = int(np.count_nonzero(mask))
    if not kept:
        return 0
    sizes = floats.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return int(np.partition(sizes, sizes.size - kept)[sizes.size - kept]) >> CENTRE_SHIFT


def _contexts(
    size: int, entries: tuple[Entry, ...], known: np.ndarray | None, floats: np.ndarray | None, centres: list[int]
) -> np.ndarray:
    """Return (size,) which counter each coordinate has: by its number's bin, else by its tensor; by its known bit."""
    out = np.empty(size, np.min_scalar_type(2 * max(len(entries), 2 * BINS) - 1))
    for t, e in enumerate(entries):
        if floats is None:
            out[e.slice] = 2 * t
            continue
        held = floats[e.slice].view(np.uint32)
        place = (held & np.uint32(0x7FFFFFFF)).view(np.int32)
        place -= np.int32(centres[t] << CENTRE_SHIFT)
        place >>= SHIFT
        place += MIDDLE
        np.clip(place, 0, BINS - 1, out=place)
        place += BINS * (held >> 31).view(np.int32)
        out[e.slice] = 2 * place
    if known is not None:
        out += known
    return out


def _walk(io: tuple[State, Any, bool], bits: Any, contexts: np.ndarray) -> Any:
    return _run(*io, bits, listed(contexts), *coder.counters(int(contexts.max(initial=0)) + 1))


def _loop(state: Any, buffer: Any, decoding: Any, bits: Any, contexts: Any, chance: Any, seen: Any) -> Any:
    for i in range(len(bits)):
        bits[i], state = LEARNT(state, buffer, decoding, int(bits[i]), chance, seen, int(contexts[i]))
    return state


_run = compiled(_loop)
