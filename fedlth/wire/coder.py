"""A binary range coder: each bit's probability is a counter that both ends keep. Whole numbers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedlth.kernel.late_jit import COMPILED, compiled
from fedlth.wire.errors import PayloadError

State = tuple[Any, Any, Any, Any]  # low, high, value, and how many bytes were shifted out
HALF = 1 << 21  # of 2^22: a counter's first chance of a 1
# How far a counter moves towards the n-th bit that it sees, in 65536ths.
PACE = np.array([131072 // (2 * n + 3) for n in range(2048)])


def listed(array: np.ndarray) -> Any:
    """Plain Python reads lists several times faster than arrays, and its whole numbers never overflow."""
    return array if COMPILED else array.tolist()


def counters(count: int) -> tuple[Any, Any]:
    """Return new counters: their chances of a 1, of 2^22, and how many bits each has seen."""
    return listed(np.full(count, HALF, np.int32)), listed(np.zeros(count, np.int16))


def encode(limit: int, code: Callable[[State, Any, bool], State]) -> bytes | None:
    """Return what `code(state, buffer, False)` writes; None where that is longer than `limit` bytes."""
    buffer = listed(np.zeros(max(limit, 0) + 8, np.uint8))
    low, high, _, at = map(int, code((0, 0xFFFFFFFF, 0, 0), buffer, False))
    size, value = _tail(low, high)
    if at + size > limit:
        return None
    return np.asarray(buffer[:at], np.uint8).tobytes() + value.to_bytes(4, "big")[:size]


def decode(data: bytes, code: Callable[[State, Any, bool], State]) -> None:
    """Let `code(state, buffer, True)` read; raise PayloadError where the bytes are not exactly what `encode` writes."""
    first, buffer = int.from_bytes(data[:4].ljust(4, b"\0"), "big"), listed(np.frombuffer(data, np.uint8).copy())
    low, high, value, at = map(int, code((0, 0xFFFFFFFF, first, 0), buffer, True))
    if (at + _tail(low, high)[0], value) != (len(data), _tail(low, high)[1]):
        raise PayloadError("coded bits do not end where they should")


def _tail(low: int, high: int) -> tuple[int, int]:
    """Return the fewest bytes that place a number in [low, high] when zeros follow, and that number."""
    for size in range(4):
        unit = 1 << (32 - 8 * size)
        value = -(-low // unit) * unit
        if value <= high:
            return size, value
    return 4, low


def _plain(state: Any, buffer: Any, decoding: Any, bit: Any, chance: Any) -> Any:
    low, high, value, at = state
    span = high - low
    middle = low + (span >> 16) * chance + (((span & 0xFFFF) * chance) >> 16)
    if decoding:
        bit = 1 if value <= middle else 0
    if bit == 1:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        if decoding:
            come = int(buffer[at + 4]) if at + 4 < len(buffer) else 0
            value = ((value << 8) & 0xFFFFFFFF) | come
        elif at < len(buffer):
            buffer[at] = high >> 24
        at += 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 0xFF
    return bit, (low, high, value, at)


def _learnt(state: Any, buffer: Any, decoding: Any, bit: Any, chance: Any, seen: Any, i: Any) -> Any:
    was, times = int(chance[i]), int(seen[i])
    bit, state = PLAIN(state, buffer, decoding, bit, min(max(was >> 6, 1), 65535))
    chance[i] = was + ((((bit << 22) - bit - was) * PACE_[times]) >> 16)
    seen[i] = min(times + 1, 2047)
    return bit, state


PACE_ = listed(PACE)
# Code a bit; return it and the state after it: PLAIN by a chance of 65536ths, LEARNT by counter i, which learns from
# it. Both become part of their callers, whose compiled code on disk does not notice a change here.
PLAIN = compiled(_plain, inline=True)
LEARNT = compiled(_learnt, inline=True)
