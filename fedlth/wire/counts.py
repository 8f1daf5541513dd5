"""How many ones a segment has: as a varint on the wire, and as an estimate of what its bits will cost."""

from __future__ import annotations

import numpy as np

from fedlth.wire import varint
from fedlth.wire.errors import PayloadError


def put(ones: np.ndarray, sizes: np.ndarray) -> bytes:
    """Return one varint a non-empty segment: twice its minority's count, plus one where ones are the majority."""
    code = 2 * np.minimum(ones, sizes - ones) + (2 * ones > sizes)
    return b"".join(varint.put(c) for c in code[sizes > 0].tolist())


def get(data: bytes, at: int, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Read the ones of every segment; raise PayloadError where one cannot be."""
    ones = np.zeros(sizes.size, np.int64)
    for s in np.flatnonzero(sizes).tolist():
        code, at = varint.get(data, at, len(data))
        size, fewer, most = int(sizes[s]), code >> 1, code & 1
        if 2 * fewer > size or (most and 2 * fewer == size):
            raise PayloadError(f"a segment of {size} says that its minority is {fewer}")
        ones[s] = size - fewer if most else fewer
    return ones, at


def cost(ones: np.ndarray, sizes: np.ndarray) -> float:
    """Estimate the bytes of a mask with these segments: entropy, counts, half a byte of padding, the state."""
    code = 2 * np.minimum(ones, sizes - ones)[sizes > 0]
    return entropy(ones, sizes) + int((1 + (code > 127) + (code > 16383)).sum()) + 4


def learnt(ones: np.ndarray, sizes: np.ndarray) -> float:
    """Estimate the bytes of bits whose chances are learnt on the way: entropy, and log2(size) / 2 bits a chance."""
    return entropy(ones, sizes) + float(np.log2(sizes[sizes > 0] + 1.0).sum()) / 16


def entropy(ones: np.ndarray, sizes: np.ndarray) -> float:
    """Return the sum of n H(k / n), in bytes."""
    k, n = ones.astype(np.float64), sizes.astype(np.float64)
    most = np.maximum(n, 1)
    bits = k * np.log2(most / np.maximum(k, 1)) + (n - k) * np.log2(most / np.maximum(n - k, 1))
    return float(bits.sum()) / 8
