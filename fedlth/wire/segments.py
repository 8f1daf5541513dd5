"""A mask cut into segments: coordinates of one context side by side, each segment starting at a whole byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedlth.kernel.late_jit import COMPILED, compiled
from fedlth.wire.errors import PayloadError

# Where the sizes of all parts are known, a loop works at four places of the mask in turn: a step need not wait for the
# last one of the same segment.
FRONTS = 4


@dataclass(frozen=True)
class Segments:
    """The coded segments of a mask.

    `context` (n,), of the smallest whole numbers that can, names each coordinate's segment. Segments with no ones or
    no zeros need no bits: only the `coded` ones have symbols.
    """

    context: np.ndarray
    sizes: np.ndarray
    ones: np.ndarray

    @cached_property
    def coded(self) -> np.ndarray:
        return (self.ones > 0) & (self.ones < self.sizes)

    @cached_property
    def counts(self) -> np.ndarray:
        """(S,) int64: how many bytes each segment takes."""
        return np.where(self.coded, (self.sizes + 7) // 8, 0)

    @cached_property
    def starts(self) -> np.ndarray:
        """(S,) int64: each segment's first bit among the symbols' bits; after their end where it is not coded.

        There lie a place for zeros and a place for ones.
        """
        first = 8 * (np.cumsum(self.counts) - self.counts)
        return np.where(self.coded, first, 8 * int(self.counts.sum()) + (self.ones > 0))

    @cached_property
    def padded(self) -> list[tuple[int, slice, bool]]:
        """Each segment that does not fill its last byte: which, what bits are left of it, and their value."""
        out = []
        for s in np.flatnonzero(self.coded & (self.sizes % 8 > 0)).tolist():
            start, size = int(self.starts[s]), int(self.sizes[s])
            left = slice(start + size, start + (size + 7) // 8 * 8)
            out.append((s, left, bool(2 * int(self.ones[s]) > size)))
        return out


def pack(mask: np.ndarray, segments: Segments) -> np.ndarray:
    """Return the symbols (uint8) of a mask; padding bits of a segment are its majority, which is cheap."""
    bits = np.zeros(8 * int(segments.counts.sum()) + 2, np.uint8)
    for _, left, fill in segments.padded:
        bits[left] = fill
    if COMPILED:
        _scatter(mask.view(np.uint8), segments.context, segments.starts.copy(), segments.coded.view(np.uint8), bits)
    else:
        bits[_places(segments)] = mask
    return np.packbits(bits[:-2])


def unpack(symbols: np.ndarray, segments: Segments, parts: np.ndarray) -> np.ndarray:
    """Return the mask (n,) bool; raise PayloadError at wrong padding bits or counts. `parts` is the `tally`."""
    bits = np.unpackbits(np.append(symbols, np.uint8(0b01000000)))  # a zero and a one after the end
    ones, coded = np.bitwise_count(symbols).astype(np.int64), segments.coded
    held = np.where(coded, 0, segments.ones)
    if coded.any():
        held[coded] = np.add.reduceat(ones, segments.starts[coded] >> 3)
    for s, left, fill in segments.padded:
        number = left.stop - left.start
        if int(symbols[(left.stop >> 3) - 1]) & ((1 << number) - 1) != fill * ((1 << number) - 1):
            raise PayloadError("bits after a segment's end are not its majority")
        held[s] -= fill * number
    if not np.array_equal(held, segments.ones):
        raise PayloadError("a segment does not hold as many ones as it says")
    if not COMPILED:
        return np.asarray(bits[_places(segments)].view(bool))
    mask = np.empty(segments.context.size, np.uint8)
    fronts = segments.starts + np.where(coded, np.cumsum(parts, 0) - parts, 0)
    _gather(bits, segments.context, fronts, coded.view(np.uint8), mask)
    return mask.view(bool)


def tally(context: np.ndarray, number: int) -> np.ndarray:
    """Return (FRONTS, number): how many coordinates each context has in each part of the mask."""
    out = np.zeros((FRONTS, number), np.int64)
    if COMPILED:
        _tally(context, out)
    else:
        out[0] = np.bincount(context, minlength=number)
    return out


def _places(segments: Segments) -> np.ndarray:
    """Return where each coordinate's bit lies."""
    context = segments.context
    order = np.argsort(context, kind="stable")
    first = np.cumsum(segments.sizes) - segments.sizes
    rank = np.empty(context.size, np.int64)
    rank[order] = np.arange(context.size) - first[context[order]]
    return np.asarray(segments.starts[context] + np.where(segments.coded[context], rank, 0))


def _tally_loop(context: Any, out: Any) -> None:
    part = len(context) // FRONTS
    for i in range(part):
        for f in range(FRONTS):
            out[f, context[f * part + i]] += 1
    for i in range(FRONTS * part, len(context)):
        out[FRONTS - 1, context[i]] += 1


def _scatter_loop(mask: Any, context: Any, at: Any, step: Any, bits: Any) -> None:
    for i in range(len(mask)):
        c = context[i]
        place = at[c]
        bits[place] = mask[i]
        at[c] = place + step[c]


def _gather_loop(bits: Any, context: Any, at: Any, step: Any, mask: Any) -> None:
    part = len(mask) // FRONTS
    for i in range(part):
        for f in range(FRONTS):
            c = context[f * part + i]
            place = at[f, c]
            mask[f * part + i] = bits[place]
            at[f, c] = place + step[c]
    for i in range(FRONTS * part, len(mask)):
        c = context[i]
        mask[i] = bits[at[FRONTS - 1, c]]
        at[FRONTS - 1, c] += step[c]


_tally = compiled(_tally_loop)
_scatter = compiled(_scatter_loop)
_gather = compiled(_gather_loop)
