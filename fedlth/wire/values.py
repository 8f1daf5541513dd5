"""The value section: kept prunable floats, then all other floats, as one run; whole numbers in front of it."""

from __future__ import annotations

import struct

import numpy as np

from fedlth.wire import numbers
from fedlth.wire.codec import BF16, DELTA, F16, F32, F32_PCO, STEP, Codec
from fedlth.wire.errors import PayloadError

USES_FLOATS = (DELTA, STEP)
LARGEST = 1e30  # a trained weight beyond this is damage or attack; float32 sums of it overflow
LARGEST_F16 = 65504.0
SIGN = np.uint32(0x80000000)


def encode(run: np.ndarray, reference: np.ndarray | None, codec: Codec) -> tuple[int, bytes]:
    """Return mode and bytes of a run (m,) float32; `reference` (m,) float32 are the same places of what both hold."""
    plain = run.astype("<f4").tobytes()
    if BF16 in codec.values:
        return BF16, numbers.compress(_ordered16(_bf16(run)))
    if F16 in codec.values:
        return F16, numbers.compress(np.clip(run, -LARGEST_F16, LARGEST_F16).astype(np.float16))
    if F32_PCO not in codec.values or not run.size:
        return F32, plain
    if STEP in codec.values and reference is not None:
        return STEP, _steps(run, reference, codec.step)
    if reference is not None:
        mode, short = DELTA, numbers.compress((ordered(run) - ordered(reference)).view(np.int32))
    else:
        mode, short = F32_PCO, numbers.compress(run)
    return (mode, short) if len(short) < len(plain) else (F32, plain)


def decode(mode: int, data: bytes | memoryview, count: int, reference: np.ndarray | None) -> np.ndarray:
    """Return the run (count,) float32; raise PayloadError at another count and at values that must not be used."""
    if mode == F32:
        if len(data) != 4 * count:
            raise PayloadError(f"{len(data)} bytes of values, wanted those of {count}")
        run = np.frombuffer(data, "<f4").astype(np.float32)
    elif len(data) >= 4 * count + 64:
        raise PayloadError("coded values are longer than plain ones")
    elif mode == F32_PCO:
        run = numbers.decompress(data, count, np.float32)
    elif mode == BF16:
        run = (_plain16(numbers.decompress(data, count, np.uint16)).astype(np.uint32) << 16).view(np.float32)
    elif mode == F16:
        run = numbers.decompress(data, count, np.float16).astype(np.float32)
    elif reference is None:
        raise PayloadError("values refer to what the receiver does not hold")
    elif mode == DELTA:
        run = _moved(numbers.decompress(data, count, np.int32), reference)
    else:
        run = _stepped(data, count, reference)
    if run.size and not (float(run.min()) >= -LARGEST and float(run.max()) <= LARGEST):  # nan compares as neither
        raise PayloadError("a value is not finite or beyond 1e30")
    return run


def ordered(run: np.ndarray) -> np.ndarray:
    """Return uint32 that grow as the floats do: neighbours differ by one, -0.0 lies just below 0.0."""
    bits = run.view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def unordered(numbers_: np.ndarray) -> np.ndarray:
    """Undo `ordered`, bit for bit."""
    return np.where(numbers_ & SIGN, numbers_ ^ SIGN, ~numbers_).view(np.float32)


BLOCK = 1 << 16  # numbers at a time, so that what is in between never takes the memory of a model


def _moved(delta: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the floats that lie `delta` (m,) int32 away from `reference`, in the memory of `delta`."""
    run = delta.view(np.float32)
    for at in range(0, run.size, BLOCK):
        part = slice(at, at + BLOCK)
        run[part] = unordered(ordered(reference[part]) + delta[part].view(np.uint32))
    return run


def _bf16(run: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even; return the bits."""
    bits = run.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def _ordered16(bits: np.ndarray) -> np.ndarray:
    return np.where(bits & np.uint16(0x8000), ~bits, bits | np.uint16(0x8000))


def _plain16(numbers_: np.ndarray) -> np.ndarray:
    return np.where(numbers_ & np.uint16(0x8000), numbers_ ^ np.uint16(0x8000), ~numbers_)


def _steps(run: np.ndarray, reference: np.ndarray, share: float) -> bytes:
    delta = run.astype(np.float64) - reference
    step = np.float32(share * np.sqrt(np.mean(delta * delta)))
    if not np.isfinite(step) or step < np.float32(1e-37):
        step = np.float32(1e-37)
    count = np.clip(np.rint(delta / np.float64(step)), -(2**30), 2**30).astype(np.int32)
    return struct.pack("<f", step) + numbers.compress(count)


def _stepped(data: bytes | memoryview, count: int, reference: np.ndarray) -> np.ndarray:
    if len(data) < 4:
        raise PayloadError("values without a step")
    step = struct.unpack_from("<f", data)[0]
    if not 0 < step <= LARGEST:
        raise PayloadError(f"a step of {step}")
    away = numbers.decompress(data[4:], count, np.int32) * np.float64(step)
    with np.errstate(over="ignore"):
        return (reference + away).astype(np.float32)
