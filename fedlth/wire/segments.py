"""A mask cut into segments: coordinates of one context side by side, each segment starting at a whole byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.wire.errors import PayloadError
from fedlth.wire.jit import COMPILED, compiled


@dataclass(frozen=True)
class Segments:
    """The coded segments of a mask.

    `context` (n,) uint16 names each coordinate's segment. Segments with no ones or no zeros need no bits: only the
    `coded` ones have symbols.
    """

    context: np.ndarray
    sizes: np.ndarray
    ones: np.ndarray

    @property
    def coded(self) -> np.ndarray:
        return (self.ones > 0) & (self.ones < self.sizes)

    @property
    def counts(self) -> np.ndarray:
        """(S,) int64: how many bytes each segment takes."""
        return np.where(self.coded, (self.sizes + 7) // 8, 0)

    @property
    def starts(self) -> np.ndarray:
        """(S,) int64: each segment's first bit among the symbols' bits; -1 - fill where a segment is not coded."""
        counts = self.counts
        first = 8 * (np.cumsum(counts) - counts)
        return np.where(self.coded, first, np.where(self.ones > 0, -2, -1))


def pack(mask: np.ndarray, segments: Segments) -> np.ndarray:
    """Return the symbols (uint8) of a mask; padding bits of a segment are its majority, which is cheap."""
    bits = np.zeros(8 * int(segments.counts.sum()), bool)
    for at, fill in _padding(segments):
        bits[at] = fill
    if COMPILED:
        _scatter(mask, segments.context, segments.starts.copy(), bits)
    else:
        place, coded = _places(segments)
        bits[place[coded]] = mask[coded]
    return np.packbits(bits)


def unpack(symbols: np.ndarray, segments: Segments) -> np.ndarray:
    """Return the mask (n,) bool; raise PayloadError at wrong padding bits or counts."""
    bits = np.unpackbits(symbols).astype(bool)
    for at, fill in _padding(segments):
        if (bits[at] != fill).any():
            raise PayloadError("bits after a segment's end are not its majority")
    mask = np.empty(segments.context.size, bool)
    if COMPILED:
        ends = segments.starts.copy()
        _gather(bits, segments.context, ends, mask)
    else:
        place, coded = _places(segments)
        mask = np.where(coded, bits[np.where(coded, place, 0)] if bits.size else False, place == -2)
    if not np.array_equal(count(mask, segments.context, segments.ones.size), segments.ones):
        raise PayloadError("a segment does not hold as many ones as it says")
    return mask


def count(mask: np.ndarray, context: np.ndarray, number: int) -> np.ndarray:
    """Return how many ones each of `number` contexts has."""
    if not COMPILED:
        return np.bincount(context[mask], minlength=number)
    out = np.zeros(number, np.int64)
    _count(mask, context, out)
    return out


def _padding(segments: Segments) -> list[tuple[slice, bool]]:
    starts, out = segments.starts, []
    for s in np.flatnonzero(segments.coded & (segments.sizes % 8 > 0)).tolist():
        start, size = int(starts[s]), int(segments.sizes[s])
        out.append((slice(start + size, start + (size + 7) // 8 * 8), bool(2 * int(segments.ones[s]) > size)))
    return out


def _places(segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Return where each coordinate's bit lies (negative: nowhere), and which have one."""
    context, starts = segments.context, segments.starts
    order = np.argsort(context, kind="stable")
    first = np.cumsum(segments.sizes) - segments.sizes
    rank = np.empty(context.size, np.int64)
    rank[order] = np.arange(context.size) - first[context[order]]
    start = starts[context]
    return np.where(start >= 0, start + rank, start), start >= 0


def _count_loop(mask: Any, context: Any, out: Any) -> None:
    for i in range(len(mask)):
        out[context[i]] += int(mask[i])


def _scatter_loop(mask: Any, context: Any, at: Any, bits: Any) -> None:
    for i in range(len(mask)):
        c = context[i]
        if at[c] >= 0:
            bits[at[c]] = mask[i]
            at[c] += 1


def _gather_loop(bits: Any, context: Any, at: Any, mask: Any) -> None:
    for i in range(len(mask)):
        c = context[i]
        if at[c] >= 0:
            mask[i] = bits[at[c]]
            at[c] += 1
        else:
            mask[i] = at[c] == -2


_count = compiled(_count_loop)
_scatter = compiled(_scatter_loop)
_gather = compiled(_gather_loop)
