"""An adaptive binary coder: each bit's probability is mixed from counters that both ends keep. Whole numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.kernel.late_jit import COMPILED, compiled
from fedlth.wire.errors import PayloadError

INPUTS = 6
CERTAIN = 3071  # log odds of 12, in 256ths
LOW, HIGH, VALUE, AT, DECODING = range(5)
# ln(p / (1 - p)) in 256ths for p = (i + 1/2) / 4096; its inverse as 65536ths; none lies near a tie of rounding.
STRETCH = np.array([round(256 * math.log((i + 0.5) / (4095.5 - i))) for i in range(4096)])
SQUASH = np.array([min(max(round(65536 / (1 + math.exp(-d / 256))), 1), 65535) for d in range(-CERTAIN, CERTAIN + 1)])
# floor(16 log2(v)), exactly; 0 for v = 0.
LOG = np.array([max((v**16).bit_length() - 1, 0) for v in range(4096)])
# How far a counter moves towards the n-th bit that it sees, in 65536ths.
PACE = np.array([131072 // (2 * n + 3) for n in range(1024)])


@dataclass(frozen=True)
class Model:
    """Counters (22-bit probabilities of a 1, and how many bits each has seen) and mixing weights (65536ths)."""

    chance: Any
    seen: Any
    weights: Any
    index: Any
    inputs: Any

    @classmethod
    def of(cls, chance: np.ndarray, *, seen: int, sets: int, weight: int) -> Model:
        """Start `sets` sets of weights, all `weight`, and counters that count as having seen `seen` bits."""
        parts = (
            chance.astype(np.int32),
            np.full(chance.size, seen, np.int16),
            np.full(sets * INPUTS, weight, np.int64),
            np.zeros(INPUTS, np.int64),
            np.zeros(INPUTS, np.int64),
        )
        return cls(*(listed(p) for p in parts))

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.chance, self.seen, self.weights, self.index, self.inputs


def listed(array: np.ndarray) -> Any:
    """Plain Python reads lists several times faster than arrays, and its whole numbers never overflow."""
    return array if COMPILED else array.tolist()


def encode(limit: int, code: Callable[[Any, Any], object]) -> bytes | None:
    """Return what `code(io, buffer)` writes; None where that is longer than `limit` bytes."""
    io, buffer = listed(np.array([0, 0xFFFFFFFF, 0, 0, 0], np.int64)), listed(np.zeros(limit + 8, np.uint8))
    code(io, buffer)
    low, high, at = int(io[LOW]), int(io[HIGH]), int(io[AT])
    if at + 4 > limit:
        return None
    size, value = _tail(low, high)
    return np.asarray(buffer[:at], np.uint8).tobytes() + value.to_bytes(4, "big")[:size]


def decode(data: bytes, code: Callable[[Any, Any], object]) -> None:
    """Let `code(io, buffer)` read; raise PayloadError where the bytes are not exactly what `encode` writes."""
    io = listed(np.array([0, 0xFFFFFFFF, int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 0, 1], np.int64))
    code(io, listed(np.frombuffer(data, np.uint8).copy()))
    size, value = _tail(int(io[LOW]), int(io[HIGH]))
    if int(io[AT]) + size != len(data) or int(io[VALUE]) != value:
        raise PayloadError("coded bits do not end where they should")


def _tail(low: int, high: int) -> tuple[int, int]:
    """Return the fewest bytes that place a number in [low, high] when zeros follow, and that number."""
    for size in range(4):
        unit = 1 << (32 - 8 * size)
        value = -(-low // unit) * unit
        if value <= high:
            return size, value
    return 4, low


def _code(io: Any, buffer: Any, chance: Any, bit: Any) -> Any:
    low, high = io[LOW], io[HIGH]
    span = high - low
    middle = low + (span >> 16) * chance + (((span & 0xFFFF) * chance) >> 16)
    if io[DECODING] == 1:
        bit = 1 if io[VALUE] <= middle else 0
    if bit == 1:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        at = io[AT]
        if io[DECODING] == 1:
            come = buffer[at + 4] if at + 4 < len(buffer) else 0
            io[VALUE] = ((io[VALUE] << 8) & 0xFFFFFFFF) | come
        elif at < len(buffer):
            buffer[at] = high >> 24
        io[AT] = at + 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 0xFF
    io[LOW], io[HIGH] = low, high
    return bit


def _mixed(io: Any, buffer: Any, bit: Any, chance: Any, seen: Any, weights: Any, index: Any, inputs: Any, first: Any,
           number: Any, pace: Any) -> Any:  # fmt: skip
    dot: Any = 0
    for k in range(number):
        inputs[k] = STRETCH_[chance[index[k]] >> 10]
        dot += weights[first + k] * inputs[k]
    dot >>= 16
    mixed = SQUASH_[min(max(dot, -CERTAIN), CERTAIN) + CERTAIN]
    bit = CODE(io, buffer, mixed, bit)
    missed = (bit << 16) - mixed
    half = 1 << (pace - 1)
    for k in range(number):
        weights[first + k] += (inputs[k] * missed + half) >> pace
        i = index[k]
        chance[i] += (((bit << 22) - bit - chance[i]) * PACE_[seen[i]]) >> 16
        if seen[i] < 1023:
            seen[i] += 1
    return bit


def _log(value: Any) -> Any:
    if value < 4096:
        return LOG_[value]
    if value < 1 << 20:
        return LOG_[value >> 8] + 128
    return LOG_[min(value >> 16, 4095)] + 256


STRETCH_, SQUASH_, LOG_, PACE_ = (listed(t) for t in (STRETCH, SQUASH, LOG, PACE))
CODE = compiled(_code)
MIXED = compiled(_mixed)
LOGARITHM = compiled(_log)
