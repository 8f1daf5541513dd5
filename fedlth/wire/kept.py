"""The kept numbers of a vector, taken out and put back: one pass, without a branch a coordinate."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlth.wire.jit import COMPILED, compiled


def take(floats: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    """Return (kept + dense,) float32: the numbers under the mask's ones, then all that lie after the mask."""
    size = mask.size
    out = np.empty(kept + floats.size - size, np.float32)
    if COMPILED:
        _take(floats, mask, out)
    else:
        out[:kept] = floats[:size][mask]
    out[kept:] = floats[size:]
    return out


def put(run: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    """Undo `take`; zeros where the mask is False."""
    size = mask.size
    out = np.empty(size + run.size - kept, np.float32)
    if COMPILED and run.size:
        _put(run, mask, out)
    else:
        out[:size] = 0
        out[:size][mask] = run[:kept]
    out[size:] = run[kept:]
    return out


def _take_loop(floats: Any, mask: Any, out: Any) -> None:
    at, last = 0, len(out) - 1
    for i in range(len(mask)):
        if at <= last:
            out[at] = floats[i]
        at += int(mask[i])


def _put_loop(run: Any, mask: Any, out: Any) -> None:
    at, last = 0, len(run) - 1
    for i in range(len(mask)):
        out[i] = run[min(at, last)] if mask[i] else np.float32(0)
        at += int(mask[i])


_take = compiled(_take_loop)
_put = compiled(_put_loop)
