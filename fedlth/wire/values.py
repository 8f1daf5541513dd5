"""The value section: kept prunable floats, then all other floats, as one run; whole numbers in front of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedlth.params import Entry, Layout
from fedlth.wire import mask as bitmap
from fedlth.wire import numbers, step_bits
from fedlth.wire.codec import BF16, DELTA, F16, F32, F32_PCO, SIGN, STEP, Codec
from fedlth.wire.errors import PayloadError

USES_FLOATS = (DELTA, STEP, SIGN)
LARGEST = 1e30  # a trained weight beyond this is damage or attack; float32 sums of it overflow
LARGEST_F16 = 65504.0
TOP = np.uint32(0x80000000)


@dataclass(frozen=True)
class Places:
    """Where a run's numbers lie. Its last `exact` ones are buffers: a rounded variance can fall below zero."""

    mask: np.ndarray
    layout: Layout

    @property
    def exact(self) -> int:
        return self.layout.num_floats - self.layout.num_params

    @cached_property
    def kept(self) -> np.ndarray:
        """Which parameters have a number, (num_params,) bool."""
        return np.concatenate((self.mask, np.ones(self.layout.num_params - self.mask.size, bool)))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The parameters, in layout order."""
        return tuple(e for e in self.layout.floats if e.role == "param")

    @property
    def counts(self) -> list[int]:
        """How many numbers of the run each parameter has."""
        return [int(np.count_nonzero(self.kept[e.slice])) for e in self.entries]


def encode(run: np.ndarray, reference: np.ndarray | None, codec: Codec, places: Places) -> tuple[int, bytes]:
    """Return mode and bytes of a run (m,) float32; `reference` (m,) float32 are the same places of what both hold."""
    plain = run.astype("<f4").tobytes()
    if BF16 in codec.values:
        return BF16, numbers.compress(_ordered16(_bf16(run)))
    if F16 in codec.values:
        return F16, numbers.compress(np.clip(run, -LARGEST_F16, LARGEST_F16).astype(np.float16))
    if F32_PCO not in codec.values or not run.size:
        return F32, plain
    lossy, kind = None, SIGN if SIGN in codec.values else STEP
    cut = run.size - places.exact
    if reference is not None and kind in codec.values and cut:
        new, old = run[:cut], reference[:cut]
        lossy = _signs(new, old, places) if kind == SIGN else _steps(new, old, codec.error, places)
        lossy = None if lossy is None else plain[4 * cut :] + lossy
    if lossy is not None and len(lossy) < len(plain):
        return kind, lossy
    if reference is not None and DELTA in codec.values:
        mode, short = DELTA, numbers.compress((ordered(run) - ordered(reference)).view(np.int32))
    else:
        mode, short = F32_PCO, numbers.compress(run)
    return (mode, short) if len(short) < len(plain) else (F32, plain)


def decode(mode: int, data: bytes | memoryview, count: int, reference: np.ndarray | None, places: Places) -> np.ndarray:
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
        run = _lossy(mode, data, reference, places)
    if run.size and not (float(run.min()) >= -LARGEST and float(run.max()) <= LARGEST):  # nan compares as neither
        raise PayloadError("a value is not finite or beyond 1e30")
    return run


def _lossy(mode: int, data: bytes | memoryview, reference: np.ndarray, places: Places) -> np.ndarray:
    whole, old = 4 * places.exact, reference[: reference.size - places.exact]
    if len(data) < whole:
        raise PayloadError("values without their buffers")
    read = _stepped if mode == STEP else _signed
    params = read(data[whole:], old, places)
    return np.concatenate((params, np.frombuffer(data, "<f4", count=places.exact))) if whole else params


def ordered(run: np.ndarray) -> np.ndarray:
    """Return uint32 that grow as the floats do: neighbours differ by one, -0.0 lies just below 0.0."""
    bits = run.view(np.uint32)
    return np.where(bits & TOP, ~bits, bits | TOP)


def unordered(numbers_: np.ndarray) -> np.ndarray:
    """Undo `ordered`, bit for bit."""
    return np.where(numbers_ & TOP, numbers_ ^ TOP, ~numbers_).view(np.float32)


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


def _steps(run: np.ndarray, reference: np.ndarray, error: float, places: Places) -> bytes | None:
    delta = run.astype(np.float64) - reference
    norm = float(np.sqrt(np.dot(delta, delta)))
    if not norm <= LARGEST:
        return None
    # A step leaves about step / sqrt(12) a number, less where many numbers are below half a step.
    share, step, count = 2 * error * np.sqrt(12.0), np.float32(0), np.zeros(0)
    for _ in range(64):
        step = np.float32(max(share * norm / np.sqrt(delta.size), 1e-37))
        count = np.clip(np.rint(delta / np.float64(step)), -step_bits.LARGEST, step_bits.LARGEST)
        left = delta - count * np.float64(step)
        if np.dot(left, left) <= (error * norm) ** 2:
            break
        share *= 0.97
    coded = step_bits.encode(count.astype(np.int64), places.kept, places.entries, 4 * delta.size)
    return None if coded is None else struct.pack("<f", step) + coded


def _stepped(data: bytes | memoryview, reference: np.ndarray, places: Places) -> np.ndarray:
    if len(data) < 4:
        raise PayloadError("values without a step")
    step = struct.unpack_from("<f", data)[0]
    if not 0 < step <= LARGEST:
        raise PayloadError(f"a step of {step}")
    away = step_bits.decode(bytes(data[4:]), places.kept, places.entries)
    run = away.view(np.float32)
    with np.errstate(over="ignore"):
        for at in range(0, run.size, BLOCK):
            part = slice(at, at + BLOCK)
            run[part] = reference[part] + away[part] * np.float64(step)
    return run


def _signs(run: np.ndarray, reference: np.ndarray, places: Places) -> bytes:
    delta, counts = run.astype(np.float64) - reference, [c for c in places.counts if c]
    first = np.cumsum([0, *counts[:-1]])
    with np.errstate(over="ignore"):
        scales = (np.add.reduceat(np.abs(delta), first) / counts).astype("<f4")
    return scales.tobytes() + np.packbits(delta >= 0).tobytes()


def _signed(data: bytes | memoryview, reference: np.ndarray, places: Places) -> np.ndarray:
    counts = [c for c in places.counts if c]
    if len(data) != 4 * len(counts) + (reference.size + 7) // 8:
        raise PayloadError(f"{len(data)} bytes of signs and scales, wanted those of {reference.size} values")
    scales = np.frombuffer(data, "<f4", count=len(counts)).astype(np.float64)
    if not ((scales >= 0) & (scales <= LARGEST)).all():
        raise PayloadError("a scale is negative, not finite or beyond 1e30")
    up = bitmap.unpack(bytes(data[4 * len(counts) :]), reference.size)
    run, at = np.empty(reference.size, np.float32), 0
    with np.errstate(over="ignore"):
        for scale, count in zip(scales, counts, strict=True):
            part = slice(at, at + count)
            run[part] = reference[part] + np.where(up[part], scale, -scale)
            at += count
    return run
