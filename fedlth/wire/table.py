"""The frequency table of 8 mask bits as one symbol: computed from a segment's counts, never sent."""

from __future__ import annotations

import numpy as np

PRECISION = 24
FREE = float((1 << PRECISION) - 256)


def weights(ones: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (S, 256) float64: the product over the bits, highest first, of p = (ones + 1/2) / (size + 1) or 1 - p.

    Multiplications one after the other: every IEEE 754 machine gets the same doubles. No pow, no BLAS.
    """
    p = (ones + 0.5) / (sizes + 1.0)
    share = np.stack((1.0 - p, p), 1)[:, None]
    out = np.ones((len(ones), 1))
    for _ in range(8):  # bytes with the same highest bits share the product of those
        out = (out[:, :, None] * share).reshape(len(ones), 2 * out.shape[1])
    return out


def cumulative(table: np.ndarray) -> np.ndarray:
    """Return (S, 257) uint32: the 24-bit cumulative frequencies of weights (S, 256); every symbol has at least 1."""
    cum = np.zeros((len(table), 257))
    np.cumsum(table, axis=1, out=cum[:, 1:])
    cum *= FREE / cum[:, 256:]
    out = cum.astype(np.uint32) + np.arange(257, dtype=np.uint32)
    out[:, 256] = 1 << PRECISION
    return out
