"""The value section: kept prunable floats, then all other floats, as one run; whole numbers in front of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedlth.models.layout import Entry, Layout
from fedlth.wire import kept, numbers, step_bits
from fedlth.wire import mask as bitmap
from fedlth.wire.codec import BF16, DELTA, F16, F32, F32_PCO, SIGN, STEP, Codec
from fedlth.wire.errors import PayloadError

USES_FLOATS = (DELTA, STEP, SIGN)
LARGEST = 1e30  # a trained weight beyond this is damage or attack; float32 sums of it overflow
BEYOND = "a value is not finite or beyond 1e30"
LARGEST_F16 = 65504.0
ERROR = 0.03  # what STEP may lose of the norm of a difference


@dataclass(frozen=True)
class Places:
    """Where a run's numbers lie. Its last `exact` ones are buffers: a rounded variance can fall below zero."""

    mask: np.ndarray
    layout: Layout

    @cached_property
    def number(self) -> int:
        """How many of the mask's coordinates are kept."""
        return int(np.count_nonzero(self.mask))

    @property
    def size(self) -> int:
        """How many numbers the run has."""
        return self.number + self.layout.num_floats - self.mask.size

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


def encode(
    floats: np.ndarray, reference: np.ndarray | None, codec: Codec, places: Places
) -> tuple[int, bytes | memoryview]:
    """Return mode and bytes of the kept ones of (num_floats,) float32; `reference` (num_floats,) is what both hold."""
    whole = 4 * places.size
    kind = SIGN if SIGN in codec.values else STEP
    if reference is not None and DELTA in codec.values and whole:
        # The usual case at once: the run itself is not needed.
        away = kept.difference(floats, reference, places.mask, places.number)
        short = numbers.compress_differences(away)
        if len(short) < whole:
            return DELTA, short
    run = kept.take(floats, places.mask, places.number)
    if BF16 in codec.values:
        return BF16, numbers.compress(_ordered16(_bf16(run)))
    if F16 in codec.values:
        return F16, numbers.compress(np.clip(run, -LARGEST_F16, LARGEST_F16).astype(np.float16))
    plain = run.astype("<f4", copy=False)
    if F32_PCO not in codec.values or not run.size:
        return F32, plain.data.cast("B")
    cut = run.size - places.exact
    if reference is not None and kind in codec.values and cut:
        new, old = run[:cut], kept.take(reference, places.mask, places.number)[:cut]
        lossy = _signs(new, old, places) if kind == SIGN else _steps(new, old, places)
        if lossy is not None and len(lossy) < 4 * cut:
            return kind, plain[cut:].tobytes() + lossy
    if reference is None or DELTA not in codec.values:
        short = numbers.compress(run)
        if len(short) < whole:
            return F32_PCO, short
    return F32, plain.data.cast("B")


def decode(mode: int, data: bytes | memoryview, reference: np.ndarray | None, places: Places) -> np.ndarray:
    """Return (num_floats,) float32, zero where the mask is; raise PayloadError at another count and at wrong values."""
    count = places.size
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
        delta = numbers.decompress(data, count, np.int32)
        run, most = kept.moved(delta, reference, places.mask, places.number)
        if not most <= LARGEST:
            raise PayloadError(BEYOND)
        return run
    else:
        # All of it is the reference itself: no copy, since a receiver's memory is bounded.
        full = places.number == places.mask.size
        run = _lossy(mode, data, reference if full else kept.take(reference, places.mask, places.number), places)
    return kept.put(_checked(run), places.mask, places.number)


def _checked(run: np.ndarray) -> np.ndarray:
    if run.size and not (float(run.min()) >= -LARGEST and float(run.max()) <= LARGEST):  # nan compares as neither
        raise PayloadError(BEYOND)
    return run


def _lossy(mode: int, data: bytes | memoryview, reference: np.ndarray, places: Places) -> np.ndarray:
    whole, old = 4 * places.exact, reference[: reference.size - places.exact]
    if len(data) < whole:
        raise PayloadError("values without their buffers")
    read = _stepped if mode == STEP else _signed
    params = read(data[whole:], old, places)
    return np.concatenate((params, np.frombuffer(data, "<f4", count=places.exact))) if whole else params


BLOCK = 1 << 16  # numbers at a time, so that what is in between never takes the memory of a model


def _bf16(run: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even; return the bits."""
    bits = run.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def _ordered16(bits: np.ndarray) -> np.ndarray:
    return np.where(bits & np.uint16(0x8000), ~bits, bits | np.uint16(0x8000))


def _plain16(numbers_: np.ndarray) -> np.ndarray:
    return np.where(numbers_ & np.uint16(0x8000), numbers_ ^ np.uint16(0x8000), ~numbers_)


def _steps(run: np.ndarray, reference: np.ndarray, places: Places) -> bytes | None:
    delta = run.astype(np.float64) - reference
    norm = float(np.sqrt(np.dot(delta, delta)))
    if not norm <= LARGEST:
        return None
    # A step leaves about step / sqrt(12) a number, less where many numbers are below half a step.
    share, step, count = 2 * ERROR * np.sqrt(12.0), np.float32(0), np.zeros(0)
    for _ in range(64):
        step = np.float32(max(share * norm / np.sqrt(delta.size), 1e-37))
        count = np.clip(np.rint(delta / np.float64(step)), -step_bits.LARGEST, step_bits.LARGEST)
        left = delta - count * np.float64(step)
        if np.dot(left, left) <= (ERROR * norm) ** 2:
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
