"""A decoder written from docs/wire.md alone: numpy for the masks, pcodec for the values, nothing of fedlth."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
from pcodec import standalone


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def table(ones: int, size: int) -> list[int]:
    p = (ones + 0.5) / (size + 1)
    q, cum = 1.0 - p, [0.0]
    for byte in range(256):
        weight = 1.0
        for bit in range(7, -1, -1):
            weight *= p if byte >> bit & 1 else q
        cum.append(cum[-1] + weight)
    r = (2**24 - 256) / cum[256]
    return [math.floor(cum[b] * r) + b for b in range(256)] + [2**24]


def contexts(mode: int, shapes: list[tuple[int, ...]], known: np.ndarray | None, head: tuple, ref: np.ndarray | None):
    sizes = [math.prod(s) for s in shapes]
    layer = np.repeat(np.arange(len(sizes)), sizes)
    if mode == 1:
        return layer, len(sizes)
    old, bits = (0, 1) if known is None else (known.astype(int), 2)
    if mode == 2:
        return layer * bits + old, len(sizes) * bits
    shift, centres = head
    u = ref[: len(layer)].view(np.uint32).astype(np.int64)
    place = np.clip(((u & 0x7FFFFFFF) >> shift) - np.array(centres)[layer] + 12, 0, 24)
    return (layer * bits + old) * 25 + place, len(sizes) * bits * 25


def coded(mode: int, data: bytes, shapes: list[tuple[int, ...]], known: np.ndarray | None, ref: np.ndarray | None):
    at, head = 0, ()
    if mode == 5:
        shift, at, centres = data[0], 1, []
        for _ in shapes:
            centre, at = varint(data, at)
            centres.append(centre)
        head = (shift, centres)
    context, number = contexts(mode, shapes, known, head, ref)
    sizes, ones = np.bincount(context, minlength=number), np.zeros(number, int)
    flags = np.zeros(number, int)
    for s in range(number):
        if sizes[s]:
            code, at = varint(data, at)
            flags[s] = code & 1
            ones[s] = sizes[s] - (code >> 1) if code & 1 else code >> 1
    words = list(struct.unpack(f"<{(len(data) - at) // 4}I", data[at:]))
    state = 0
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    mask = np.zeros(len(context), bool)
    for s in range(number):
        if not sizes[s] or ones[s] == 0 or ones[s] == sizes[s]:
            mask[context == s] = ones[s] > 0
            continue
        c, out = table(int(ones[s]), int(sizes[s])), []
        for _ in range(-(-int(sizes[s]) // 8)):
            low = state % 2**24
            byte = max(b for b in range(256) if c[b] <= low)
            state = (state >> 24) * (c[byte + 1] - c[byte]) + low - c[byte]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            out.append(byte)
        bits = np.unpackbits(np.array(out, np.uint8))
        assert (bits[sizes[s] :] == flags[s]).all() and bits[: sizes[s]].sum() == ones[s]
        mask[context == s] = bits[: sizes[s]]
    assert state == 0 and not words
    return mask


def ordered(x: np.ndarray) -> np.ndarray:
    u = x.view(np.uint32)
    return np.where(u >> 31, ~u, u | 0x80000000).astype(np.uint32)


def run_of(mode: int, data: bytes, count: int, old: np.ndarray | None) -> np.ndarray:
    if mode == 0 or not count:
        return np.frombuffer(data, "<f4")
    if mode == 4:
        step = struct.unpack("<f", data[:4])[0]
        return (old + standalone.simple_decompress(data[4:]) * np.float64(step)).astype(np.float32)
    got = standalone.simple_decompress(data)
    if mode == 1:
        o = ordered(old) + got.view(np.uint32)
        return np.where(o >> 31, o ^ 0x80000000, ~o).astype(np.uint32).view(np.float32)
    if mode == 2:
        upper = np.where(got >> 15, got ^ 0x8000, ~got).astype(np.uint32) & 0xFFFF
        return (upper << 16).astype(np.uint32).view(np.float32)
    return got.astype(np.float32)


def decode(
    data: bytes, shapes: list[tuple[int, ...]], dense: int, ints: int, known: np.ndarray | None, ref: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return mask, floats and whole numbers; `shapes` are the prunable tensors', `dense` counts the other floats."""
    assert data[:6] == b"FLT1\1\0" and zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]
    mode, value_mode, n = data[6], data[7], sum(math.prod(s) for s in shapes)
    mask_bytes, at = varint(data, 24)
    value_bytes, at = varint(data, at)
    section, tail = data[at : at + mask_bytes], data[at + mask_bytes : -4]
    assert len(tail) == value_bytes
    if mode in (0, 6):
        mask = known if mode == 0 else np.ones(n, bool)
    elif mode == 3:
        mask = np.unpackbits(np.frombuffer(section, np.uint8))[:n].astype(bool)
    elif mode == 4:
        rows = np.unpackbits(np.frombuffer(section, np.uint8)).astype(bool)
        channels = [s[0] if s else 1 for s in shapes]
        each = np.concatenate([np.full(c, math.prod(s) // c) for c, s in zip(channels, shapes, strict=True)])
        mask = np.repeat(rows[: sum(channels)], each)
    else:
        mask = coded(mode, section, shapes, known, ref)
    if value_mode == 6:
        return mask, None, None
    kept = int(mask.sum())
    old = None if ref is None else np.concatenate((ref[:n][mask], ref[n:]))
    cut = 4 * (kept + dense) if value_mode == 0 else 8 * ints
    whole, stream = (tail[cut:], tail[:cut]) if value_mode == 0 else (tail[:cut], tail[cut:])
    run = run_of(value_mode, stream, kept + dense, old)
    floats = np.zeros(n + dense, np.float32)
    floats[:n][mask], floats[n:] = run[:kept], run[kept:]
    return mask, floats, np.frombuffer(whole, "<i8")
