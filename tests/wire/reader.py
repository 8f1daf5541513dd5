"""A decoder of payloads FLT1, version 1, written from docs/wire.md alone."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import zlib
from bisect import bisect_right
from collections import defaultdict
from typing import Any

import numpy as np
from pcodec import standalone  # type: ignore[import-untyped]

Tensor = tuple[str, tuple[int, ...], bool, bool]
Maybe = np.ndarray | None
STRETCH = [round(256 * math.log((i + 0.5) / (4095.5 - i))) for i in range(4096)]
SQUASH = [min(max(round(65536 / (1 + math.exp(-d / 256))), 1), 65535) for d in range(-3071, 3072)]
LOG = [0] + [(v**16).bit_length() - 1 for v in range(1, 4096)]
STREAMS: dict[int, Any] = {1: np.int32, 2: np.uint16, 3: np.float16, 7: np.float32}


def need(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(what)


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def log16(v: int) -> int:
    return LOG[v] if v < 4096 else LOG[v >> 8] + 128 if v < 1 << 20 else LOG[min(v >> 16, 4095)] + 256


class Bytes(io.BytesIO):
    """The bytes of a section, taken from the front; read() takes the rest."""

    def take(self, size: int) -> bytes:
        part = self.read(size)
        need(len(part) == size, "too short")
        return part

    def varint(self) -> int:
        value, byte, shift = 0, 128, 0
        while byte >= 128:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            need(shift < 35 or byte < 128, "varint too long")
        need(byte or shift == 7, "varint not in its shortest form")
        return value

    def bits(self, count: int) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(self.take((count + 7) // 8), np.uint8))
        need(not bits[count:].any(), "set padding bits")
        return bits[:count].astype(bool)

    def numbers(self, kind: str, count: int) -> np.ndarray:
        return np.frombuffer(self.take(np.dtype(kind).itemsize * count), kind)


class Chance:
    """Bits by chance, with the counters and weights of mixed bits."""

    def __init__(self, data: bytes, pace: int, weight: int, seen: int) -> None:
        self.size, self.following, self.shifts = len(data), itertools.chain(data[4:], itertools.repeat(0)), 0
        self.low, self.high, self.value = 0, 2**32 - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self.pace, self.seen = pace, seen
        self.counters: dict[Any, list[int]] = {}
        self.weights: defaultdict[Any, list[int]] = defaultdict(lambda: [weight] * 6)

    def plain(self, p: int) -> int:
        span = self.high - self.low
        middle = self.low + (span >> 16) * p + (((span & 65535) * p) >> 16)
        bit = int(self.value <= middle)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while not (self.low ^ self.high) >> 24:
            self.low, self.high = self.low % 2**24 << 8, self.high % 2**24 << 8 | 255
            self.value = self.value % 2**24 << 8 | next(self.following)
            self.shifts += 1
        return bit

    def mixed(self, weights: Any, names: list[Any], chances: list[int] | int) -> int:
        firsts = [chances] * len(names) if isinstance(chances, int) else chances
        counters = [self.counters.setdefault(x, [c, self.seen]) for x, c in zip(names, firsts, strict=True)]
        xs, w = [STRETCH[counter[0] >> 10] for counter in counters], self.weights[weights]
        p = SQUASH[min(max(sum(map(int.__mul__, xs, w)) >> 16, -3071), 3071) + 3071]
        bit = self.plain(p)
        for i, (x, counter) in enumerate(zip(xs, counters, strict=True)):
            w[i] += (x * (65536 * bit - p) + (1 << (self.pace - 1))) >> self.pace
            counter[0] += (((bit << 22) - bit - counter[0]) * (131072 // (2 * counter[1] + 3))) >> 16
            counter[1] = min(counter[1] + 1, 1023)
        return bit

    def end(self) -> None:
        ends = [(t, -(-self.low >> 32 - 8 * t) << 32 - 8 * t) for t in range(5)]
        t, v = next(x for x in ends if x[1] <= self.high)
        need(self.value == v and self.size == t + self.shifts, "coded bits do not end exactly")


def table(size: int, ones: int) -> list[int]:
    p = (ones + 0.5) / (size + 1)
    weights = [math.prod([p if byte >> i & 1 else 1 - p for i in range(7, -1, -1)], start=1.0) for byte in range(256)]
    a = list(itertools.accumulate(weights, initial=0.0))
    r = (2**24 - 256) / a[256]
    return [math.floor(a[b] * r) + b for b in range(256)] + [2**24]


def segments(section: Bytes, key: np.ndarray) -> np.ndarray:
    """Counts and words of mask modes 1, 2, 5 and 7; `key` orders the segments."""
    mask, coded = np.zeros(key.size, bool), []
    order = np.argsort(key, kind="stable")
    for where in np.split(order, np.flatnonzero(np.diff(key[order], prepend=-1)))[1:]:
        smaller, flag = divmod(section.varint(), 2)
        need(2 * smaller + flag <= len(where), "a count that cannot be")
        mask[where] = flag
        if smaller:
            coded.append((where, len(where) - smaller if flag else smaller, flag))
    data, state = section.read(), 0
    need(len(data) % 4 == 0 and data[-4:] != bytes(4), "not whole words or the last is zero")
    words = np.frombuffer(data, "<u4").tolist()
    for _ in words[-2:]:
        state = state << 32 | words.pop()
    for where, ones, flag in coded:
        c, size, out = table(len(where), ones), len(where), bytearray()
        for _ in range((size + 7) // 8):
            s = state % 2**24
            byte = bisect_right(c, s) - 1
            out.append(byte)
            state = (state >> 24) * (c[byte + 1] - c[byte]) + s - c[byte]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
        bits = np.unpackbits(np.frombuffer(bytes(out), np.uint8))
        need((bits[size:] == flag).all() and bits[:size].sum() == ones, "wrong padding bits or count of ones")
        mask[where] = bits[:size]
    need(state == 0 and not words, "words do not end exactly")
    return mask


def mask_by_bits(data: bytes, mode: int, shapes: list[Any], known: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Mask modes 9, 10 and 13."""
    chance = Chance(data, 15, 10923, 3) if mode == 13 else Chance(data, 18, 10923, 1)
    first = list(itertools.accumulate(range(20), lambda f, _: max(f - (f >> 3), 4194), initial=1677722))
    out: list[bool] = []
    for t, (size, rows, width) in enumerate(shapes):
        history, lines = 0, [[[0, 0] for _ in range(count)] for count in (rows, width)]
        for i in range(size):
            was, spot = int(known[len(out)]), int(place[len(out)])
            pair = lines[0][i // width], lines[1][i % width]
            r, k = (min(max(((log16(x[0] + 256) - log16(x[1] + 256)) >> 3) + 8, 0), 15) for x in pair)
            near, sixth, chances = history, ("F", t, r, k), [419430 if mode == 9 else 83886] * 6
            if mode == 13:
                near = min(abs(spot - 20) >> 1, 7)
                far, close, sixth = first[abs(spot - 20)], first[2 * near], ("F", history, near, 0)
                chances = [far, far, close, far, far, close]
            second = ("B", t, was, spot)
            expected = chance.counters.get(second, chances[1:])[0] >> 14
            names = [("A", was, spot), second, ("C", r, k, near), ("D", t, r, spot), ("E", t, k, spot), sixth]
            bit = chance.mixed((t, was), names, chances)
            for line in pair:
                line[:] = line[0] + 256 * bit, line[1] + expected
            history = (history << 1 | bit) & 7
            out.append(bit != was)
    chance.end()
    return np.array(out, bool)


def steps(data: bytes, shapes: list[Any], keep: np.ndarray) -> np.ndarray:
    """The whole numbers of value mode 4; `keep` says which parameter coordinates have one."""
    chance, out, at = Chance(data, 15, 19661, 1), [], 0
    for t, (size, rows, width) in enumerate(shapes):
        last, lines = 0, [[[32768, 0, 0] for _ in range(count)] for count in (rows, width)]
        for i in np.flatnonzero(keep[at : at + size]).tolist():
            row, column = lines[0][i // width], lines[1][i % width]
            a, b = log16(row[0] >> 8), log16(column[0] >> 8)
            u, v, w = (min(max((x >> 3) - 8, 0), 15) for x in (a, b, log16(last >> 8)))
            s, more, sign, both = 0, 1, 0, min(max(((a + b) >> 3) - 16, 0), 31)
            while s < 24 and more:
                names = [("A", s, u, v), ("B", s, u, w), ("C", t, s, v), ("D", t, s, both), ("E", t, s)]
                more = chance.mixed((t, s), names, 1 << 21)
                s += more
            if s == 24:
                further = next((i for i in range(31) if not chance.plain(32768)), 31)
                s = 23 + functools.reduce(lambda v, _: v << 1 | chance.plain(32768), range(further), 1)
                need(s <= 1 << 30, "a step too large")
            if s:
                g, h = ((7 * x[1] + 491520) >> 16 for x in (row, column))
                sign = 2 * chance.mixed(t, [("G", g, h, min(s, 3)), ("H", g), ("I", h)], 1 << 21) - 1
            for line in (row, column):
                q = 131072 // (2 * line[2] + 3)
                line[0] += ((65536 * min(s, 4095) - line[0]) * q) >> 16
                line[1] += ((65536 * sign - line[1]) * q) >> 16
                line[2] = min(line[2] + 1, 31)
            last += ((65536 * min(s, 4095) - last) * 26214) >> 16
            out.append(sign * s)
        at += size
    chance.end()
    return np.array(out, np.float64)


def stream(data: bytes, kind: Any, count: int) -> np.ndarray:
    """One standalone pcodec stream of exactly `count` numbers, nothing after it: it is none without its last byte."""
    done, out = [False, False], np.zeros((2, count), kind)
    for i in (0, 1):
        with contextlib.suppress(RuntimeError, TypeError):
            progress = standalone.simple_decompress_into(data[: len(data) - i], out[i])
            done[i] = progress.finished and progress.n_processed == count
    need(done == [True, False], "not one stream of that many numbers")
    return np.asarray(out[0])


def read_mask(section: Bytes, mode: int, shapes: list[Any], n: int, known: Any, reference: Any) -> np.ndarray:
    need(mode in (0, 3, 6) or section.getbuffer().nbytes < (n + 7) // 8, "a bitmap is shorter")
    need(known is not None or mode not in (0, 2, 7, 10), "no known mask")
    if mode in (0, 3, 6):
        return section.bits(n) if mode == 3 else np.full(n, True) & (mode == 6 or known)
    if mode == 4:
        return np.repeat(section.bits(sum(x[1] for x in shapes)), [x[2] for x in shapes for _ in range(x[1])])
    tensor = np.repeat(np.arange(len(shapes)), [x[0] for x in shapes])
    was, place = np.zeros(n, bool) if known is None or mode in (1, 9) else known, np.zeros(n, np.int64)
    if mode in (5, 13):
        head = section.take(1)[0]
        need(19 <= head <= 22 if mode == 5 else head < 2, "wrong head")
        centres = np.array([section.varint() for _ in (shapes[:1] if head == 1 else shapes)], np.int64)
        need((centres < (1 << (31 - head) if mode == 5 else 1 << 21)).all(), "a centre too large")
        u, centre = reference[:n].view("<u4").astype(np.int64) & 0x7FFFFFFF, centres[tensor * (head != 1)]
        place = np.clip((u >> head) - centre + 12, 0, 24) if mode == 5 else (u - 1024 * centre) >> 18
    if mode >= 9:
        return mask_by_bits(section.read(), mode, shapes, was, np.clip(place + 20, 0, 39) if mode == 13 else was)
    return segments(section, ((0 if mode == 7 else tensor) * 2 + was) * 25 + place)


def read_run(section: Bytes, mode: int, shapes: list[Any], kept: np.ndarray, reference: Any) -> np.ndarray:
    """The run; `kept` is over all floats, `shapes` are those of the parameters, float buffers are the rest."""
    m, parameters = int(kept.sum()), kept[: sum(x[0] for x in shapes)]
    if m == 0 or mode == 0:
        return section.numbers("<f4", m)
    if mode in (4, 5):
        doubles = reference[: parameters.size][parameters].astype(np.float64)
        buffers = section.numbers("<f4", m - doubles.size)
        if doubles.size and mode == 4:
            step = float(section.numbers("<f4", 1)[0])
            need(0 < step < math.inf, "wrong step")
            doubles += steps(section.read(), shapes, parameters) * step
        elif doubles.size:
            tensor = np.repeat(np.arange(len(shapes)), [x[0] for x in shapes])[parameters]
            used, which = np.unique(tensor, return_inverse=True)
            scales = section.numbers("<f4", used.size).astype(np.float64)
            need(((scales >= 0) & (scales < math.inf)).all(), "wrong scale")
            doubles += scales[which] * np.where(section.bits(doubles.size), 1, -1)
        return np.concatenate([doubles.clip(-1e38, 1e38).astype("<f4"), buffers])
    values = stream(section.read(), STREAMS[mode], m)
    if mode == 1:
        u = reference[kept].view("<u4")
        o = np.where(u >> 31, ~u, u | 0x80000000) + values.view(np.uint32)
        values = np.where(o >> 31, o ^ 0x80000000, ~o).view("<f4")
    elif mode == 2:
        values = (np.where(values >> 15, values ^ 0x8000, ~values).astype("<u4") << 16).view("<f4")
    return values.astype("<f4")


def decode(
    data: bytes, *, kind: str, tensors: list[Tensor], buffers: set[str], known_mask: Maybe, reference: Maybe
) -> tuple[np.ndarray, Maybe, Maybe]:
    """The mask, the floats and the integers of a payload; ValueError if it is not one."""
    need(len(data) >= 30 and data[:6] == b"FLT1\1\0", "not a payload of this version")
    need(zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"), "wrong checksum")
    mode, value_mode = data[6], data[7]
    need(mode in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 13) and value_mode < 8, "wrong mode")
    schema = json.dumps([kind, *([*x] for x in tensors)])
    need(data[8:16] == digest(schema.encode()), "another schema")
    floats, integers = (sum(math.prod(x[1]) for x in tensors if x[2] is is_int) for is_int in (False, True))
    parameters = [x for x in tensors if not x[2] and x[0] not in buffers]
    shapes = [(math.prod(x[1]), x[1][0] if x[1] else 1, math.prod(x[1][1:])) for x in parameters]
    prunable = shapes[: sum(x[3] for x in parameters)]
    n, referred = sum(x[0] for x in prunable), b""
    known = None if known_mask is None or known_mask.all() else known_mask.astype(bool)
    if known is not None and mode in (0, 2, 5, 7, 10, 13):
        referred += np.packbits(known).tobytes()
    if mode in (5, 13) or value_mode in (1, 4, 5):
        need(reference is not None, "no reference")
        referred += digest(np.asarray(reference, "<f4").tobytes())
    need(data[16:24] == (digest(referred) if referred else bytes(8)), "another reference")
    body = Bytes(data[24:-4])
    head, tail = map(Bytes, map(body.take, (body.varint(), body.varint())))
    mask = read_mask(head, mode, prunable, n, known, reference)
    need(not mask.all() or mode == 6, "a full mask sent otherwise")
    out, kept = np.zeros(floats, np.float32), np.concatenate([mask, np.ones(floats - n, bool)])
    ints = tail.numbers("<i8", integers if 0 < value_mode != 6 else 0)
    if value_mode != 6:
        out[kept] = read_run(tail, value_mode, shapes, kept, reference)
    ints = tail.numbers("<i8", integers) if value_mode == 0 else ints
    need(not head.read() and not tail.read() and not body.read(), "lengths do not add up")
    need((np.abs(out) <= 1e30).all() and all(abs(i) <= 2**53 for i in ints.tolist()), "a number out of range")
    return (mask, None, None) if value_mode == 6 else (mask, out, ints.astype(np.int64))
