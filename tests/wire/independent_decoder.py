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
    if mode == 7:
        return old, 2
    if mode == 2:
        return layer * bits + old, len(sizes) * bits
    shift, centres = head
    u = ref[: len(layer)].view(np.uint32).astype(np.int64)
    place = np.clip(((u & 0x7FFFFFFF) >> shift) - np.array(centres)[layer] + 12, 0, 24)
    return (layer * bits + old) * 25 + place, len(sizes) * bits * 25


class Bits:
    """The binary decoder of docs/wire.md, and its mixed bits."""

    STRETCH = [round(256 * math.log((i + 0.5) / (4095.5 - i))) for i in range(4096)]

    def __init__(self, data: bytes) -> None:
        self.data, self.low, self.high, self.at = data, 0, 2**32 - 1, 4
        self.value = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def bit(self, chance: int) -> int:
        span = self.high - self.low
        middle = self.low + (span >> 16) * chance + ((span & 0xFFFF) * chance >> 16)
        one = self.value <= middle
        self.low, self.high = (self.low, middle) if one else (middle + 1, self.high)
        while self.low >> 24 == self.high >> 24:
            come = self.data[self.at] if self.at < len(self.data) else 0
            self.at += 1
            self.low, self.high = self.low << 8 & 0xFFFFFFFF, (self.high << 8 & 0xFFFFFFFF) | 255
            self.value = (self.value << 8 & 0xFFFFFFFF) | come
        return int(one)

    def mixed(self, counters: list[list[int]], weights: list[int], pace: int) -> int:
        x = [self.STRETCH[c[0] >> 10] for c in counters]
        dot = max(-3071, min(3071, sum(w * v for w, v in zip(weights, x, strict=True)) >> 16))
        p = max(1, min(65535, round(65536 / (1 + math.exp(-dot / 256)))))
        bit = self.bit(p)
        for k, c in enumerate(counters):
            weights[k] += (x[k] * ((bit << 16) - p) + (1 << pace - 1)) >> pace
            c[0] += ((bit << 22) - bit - c[0]) * (131072 // (2 * c[1] + 3)) >> 16
            c[1] = min(c[1] + 1, 1023)
        return bit

    def end(self) -> None:
        for size in range(5):
            unit = 1 << 32 - 8 * size
            value = -(-self.low // unit) * unit
            if value <= self.high:
                break
        assert value == self.value and self.at - 4 + size == len(self.data)


def log16(v: int) -> int:
    if v >= 2**20:
        return log16(min(v >> 16, 4095)) + 256
    return log16(v >> 8) + 128 if v >= 4096 else max((v**16).bit_length() - 1, 0)


def clamp(v: int, most: int) -> int:
    return max(0, min(v, most))


def by_bit(mode: int, data: bytes, shapes: list[tuple[int, ...]], known: np.ndarray | None, ref: np.ndarray | None):
    centres, with_ref = [0] * len(shapes), mode == 13
    if with_ref:
        at, found = 1, []
        for _ in range(1 if data[0] else len(shapes)):
            centre, at = varint(data, at)
            found.append(centre << 10)
        centres, data = (found * len(shapes) if data[0] else found), data[at:]
    bits, mask, counters, weights, history = Bits(data), [], {}, {}, 0
    old = [0] * sum(math.prod(s) for s in shapes) if known is None or mode == 9 else known.astype(int).tolist()
    fall = [1677722]
    for _ in range(39):
        fall.append(max(fall[-1] - (fall[-1] >> 3), 4194))
    alone = 83886 if known is not None and mode != 9 else 419430
    for layer, shape in enumerate(shapes):
        rows = max(shape[0], 1) if shape else 1
        width, history = math.prod(shape) // rows, 0
        came, due = ([0] * rows, [0] * width), ([0] * rows, [0] * width)
        for i in range(math.prod(shape)):
            n, line = len(mask), (i // width, i % width)
            was, near = old[n], history
            place, first, first_near = was, alone, alone
            if with_ref:
                u = int(ref[n : n + 1].view(np.uint32)[0]) & 0x7FFFFFFF
                place = clamp((u - centres[layer] >> 18) + 20, 39)
                near = min(abs(place - 20) >> 1, 7)
                first, first_near = fall[abs(place - 20)], fall[2 * near]
            r, c = (clamp((log16(came[s][line[s]] + 256) - log16(due[s][line[s]] + 256) >> 3) + 8, 15) for s in (0, 1))
            last = ("f", history, near) if with_ref else ("f", layer, r, c)
            names = [("a", was, place), ("b", layer, was, place), ("c", r, c, near), ("d", layer, r, place),
                     ("e", layer, c, place), last]  # fmt: skip
            start = [first, first, first_near, first, first, first_near]
            seen = 3 if with_ref else 1
            chosen = [counters.setdefault(name, [s, seen]) for name, s in zip(names, start, strict=True)]
            expected = chosen[1][0] >> 14
            moved = bits.mixed(chosen, weights.setdefault((layer, was), [10923] * 6), 15 if with_ref else 18)
            mask.append(was ^ moved)
            for s in (0, 1):
                came[s][line[s]] += moved << 8
                due[s][line[s]] += expected
            history = (history << 1 & 7) | moved
    bits.end()
    return np.array(mask, bool)


def steps(data: bytes, shapes: list[tuple[int, ...]], kept: list[bool]) -> np.ndarray:
    """`shapes` are all float tensors'; `kept` says which of their coordinates have a number."""
    bits, out, counters, weights, n = Bits(data), [], {}, {}, 0

    def mixed(names: list[tuple], group: tuple) -> int:
        chosen = [counters.setdefault(name, [1 << 21, 1]) for name in names]
        return bits.mixed(chosen, weights.setdefault(group, [19661] * len(names)), 15)

    for layer, shape in enumerate(shapes):
        rows = max(shape[0], 1) if shape else 1
        width, last = math.prod(shape) // rows, 0
        lines = [[[32768, 0, 0] for _ in range(m)] for m in (rows, width)]  # size, sign, how many
        for i in range(math.prod(shape)):
            n += 1
            if not kept[n - 1]:
                continue
            row, column = lines[0][i // width], lines[1][i % width]
            r, c = log16(row[0] >> 8), log16(column[0] >> 8)
            u, v, w = (clamp((x >> 3) - 8, 15) for x in (r, c, log16(last >> 8)))
            both, size = clamp((r + c >> 3) - 16, 31), 0
            while size < 24 and mixed([("a", size, u, v), ("b", size, u, w), ("c", layer, size, v),
                                       ("d", layer, size, both), ("e", layer, size)], (layer, size)):  # fmt: skip
                size += 1
            if size == 24:
                length, value = 0, 1
                while length < 31 and bits.bit(32768):
                    length += 1
                for _ in range(length):
                    value = 2 * value + bits.bit(32768)
                size = value + 23
            way = 0
            if size:
                a, b = (7 * row[1] + 491520 >> 16), (7 * column[1] + 491520 >> 16)
                way = 2 * mixed([("s", a, b, min(size, 3)), ("t", a), ("v", b)], (layer, "sign")) - 1
            out.append(way * size)
            far = min(size, 4095) << 16
            for line in (row, column):
                pace = 131072 // (2 * line[2] + 3)
                line[0] += (far - line[0]) * pace >> 16
                line[1] += ((way << 16) - line[1]) * pace >> 16
                line[2] = min(line[2] + 1, 31)
            last += (far - last) * 26214 >> 16
    bits.end()
    return np.array(out, np.int64)


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


def run_of(
    mode: int, data: bytes, count: int, old: np.ndarray | None, shapes: list[tuple[int, ...]], kept: list[bool]
) -> np.ndarray:
    if mode == 0 or not count:
        return np.frombuffer(data, "<f4")
    if mode == 4:
        step = struct.unpack("<f", data[:4])[0]
        return (old + steps(data[4:], shapes, kept) * np.float64(step)).astype(np.float32)
    if mode == 5:
        ends = np.cumsum([0, *(math.prod(s) for s in shapes)])
        counts = [m for a, b in zip(ends, ends[1:], strict=False) if (m := sum(kept[a:b]))]
        scale = np.repeat(np.frombuffer(data, "<f4", len(counts)).astype(np.float64), counts)
        up = np.unpackbits(np.frombuffer(data[4 * len(counts) :], np.uint8))[:count]
        return (old + np.where(up, scale, -scale)).astype(np.float32)
    got = standalone.simple_decompress(data)
    if mode == 1:
        o = ordered(old) + got.view(np.uint32)
        return np.where(o >> 31, o ^ 0x80000000, ~o).astype(np.uint32).view(np.float32)
    if mode == 2:
        upper = np.where(got >> 15, got ^ 0x8000, ~got).astype(np.uint32) & 0xFFFF
        return (upper << 16).astype(np.uint32).view(np.float32)
    return got.astype(np.float32)


def decode(
    data: bytes,
    shapes: list[tuple[int, ...]],
    rest: list[tuple[int, ...]],
    ints: int,
    known: np.ndarray | None,
    ref: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return mask, floats and whole numbers; `shapes` are the prunable tensors', `rest` the other float tensors'."""
    dense = sum(math.prod(s) for s in rest)
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
        mask = (by_bit if mode >= 8 else coded)(mode, section, shapes, known, ref)
    if value_mode == 6:
        return mask, None, None
    kept = int(mask.sum())
    old = None if ref is None else np.concatenate((ref[:n][mask], ref[n:]))
    cut = 4 * (kept + dense) if value_mode == 0 else 8 * ints
    whole, stream = (tail[cut:], tail[:cut]) if value_mode == 0 else (tail[:cut], tail[cut:])
    run = run_of(value_mode, stream, kept + dense, old, shapes + rest, mask.tolist() + [True] * dense)
    floats = np.zeros(n + dense, np.float32)
    floats[:n][mask], floats[n:] = run[:kept], run[kept:]
    return mask, floats, np.frombuffer(whole, "<i8")
