"""The kept numbers of a vector, taken out and put back, or as differences: one pass, without a branch a coordinate."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlth.kernel.late_jit import COMPILED, compiled

TOP = np.uint32(0x80000000)


def take(floats: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    """Return (kept + dense,) float32: the numbers under the mask's ones, then all that lie after the mask."""
    size = mask.size
    if kept == size:
        return floats.astype(np.float32)
    out = np.empty(kept + floats.size - size, np.float32)
    if COMPILED:
        _take(floats.view(np.uint32), mask.view(np.uint8), out.view(np.uint32))
    else:
        out[:kept] = floats[:size][mask]
    out[kept:] = floats[size:]
    return out


def put(run: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    """Undo `take`; zeros where the mask is False. A full mask needs no copy."""
    size = mask.size
    if kept == size:
        return run
    out = np.empty(size + run.size - kept, np.float32)
    if COMPILED and run.size:
        _put(run.view(np.uint32), mask.view(np.uint8), out.view(np.uint32))
    else:
        out[:size] = 0
        out[:size][mask] = run[:kept]
    out[size:] = run[kept:]
    return out


def difference(floats: np.ndarray, reference: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    """Return (kept + dense,) int32: `take` of how many floats lie between `reference` and `floats`, modulo 2^32."""
    if not COMPILED:
        away = ordered(take(floats, mask, kept)) - ordered(take(reference, mask, kept))
        return np.asarray(away.view(np.int32))
    size = mask.size
    out = np.empty(kept + floats.size - size, np.uint32)
    _subtract(floats.view(np.uint32), reference.view(np.uint32), mask.view(np.uint8), out)
    out[kept:] = ordered(floats[size:]) - ordered(reference[size:])
    return out.view(np.int32)


def moved(delta: np.ndarray, reference: np.ndarray, mask: np.ndarray, kept: int) -> tuple[np.ndarray, float]:
    """Undo `difference`, with zeros where the mask is False; beside it the largest |number|, nan where one is nan."""
    size, step = mask.size, delta.view(np.uint32)
    if not COMPILED or not delta.size:
        out = put(unordered(ordered(take(reference, mask, kept)) + step), mask, kept)
        return out, float(np.abs(out).max(initial=0))
    out = np.empty(reference.size, np.float32)
    most = _add(step, reference.view(np.uint32), mask.view(np.uint8), out.view(np.uint32))
    out[size:] = unordered(ordered(reference[size:]) + step[kept:])
    rest = np.abs(out[size:]).max(initial=0)
    return out, float(np.maximum(rest, np.uint32(most).view(np.float32)))


def ordered(run: np.ndarray) -> np.ndarray:
    """Return uint32 that grow as the floats do: neighbours differ by one, -0.0 lies just below 0.0."""
    bits = run.view(np.uint32)
    return np.asarray(np.where(bits & TOP, ~bits, bits | TOP))


def unordered(numbers: np.ndarray) -> np.ndarray:
    """Undo `ordered`, bit for bit."""
    return np.asarray(np.where(numbers & TOP, numbers ^ TOP, ~numbers).view(np.float32))


def _take_loop(bits: Any, mask: Any, out: Any) -> None:
    at, last = 0, len(out) - 1
    for i in range(len(mask)):
        if at <= last:
            out[at] = bits[i]
        at += mask[i]


def _put_loop(run: Any, mask: Any, out: Any) -> None:
    at, last = 0, len(run) - 1
    for i in range(len(mask)):
        out[i] = run[min(at, last)] & -np.int64(mask[i])
        at += mask[i]


def _subtract_loop(new: Any, old: Any, mask: Any, out: Any) -> None:
    at, last = 0, len(out) - 1
    for i in range(len(mask)):
        if at <= last:
            # x ^ flip is `ordered`: all bits of a negative number turn, of another only the highest.
            x, y = np.int64(new[i]), np.int64(old[i])
            out[at] = (x ^ (-(x >> 31) | 0x80000000)) - (y ^ (-(y >> 31) | 0x80000000))
        at += mask[i]


def _add_loop(step: Any, old: Any, mask: Any, out: Any) -> Any:
    at, last, most = 0, len(step) - 1, np.int64(0)
    for i in range(len(mask)):
        y = np.int64(old[i])
        z = ((y ^ (-(y >> 31) | 0x80000000)) + np.int64(step[min(at, last)])) & 0xFFFFFFFF
        z = (z ^ (((z >> 31) - 1) | 0x80000000)) & -np.int64(mask[i]) & 0xFFFFFFFF
        most = max(most, z & 0x7FFFFFFF)
        out[i] = z
        at += mask[i]
    return most


_take = compiled(_take_loop)
_put = compiled(_put_loop)
_subtract = compiled(_subtract_loop)
_add = compiled(_add_loop)
