"""A decoder of payloads FLT1, version 2, written from docs/wire.md alone."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import zlib
from typing import Any

import numpy as np
from pcodec import standalone  # type: ignore[import-untyped]

Tensor = tuple[str, tuple[int, ...], bool, bool]
Maybe = np.ndarray | None
STREAMS: dict[int, Any] = {1: np.int32, 2: np.uint16, 3: np.float16, 7: np.float32}


def need(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(what)


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


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
    """Bits by chance, and the counters of learnt bits."""

    def __init__(self, data: bytes) -> None:
        self.size, self.following, self.shifts = len(data), itertools.chain(data[4:], itertools.repeat(0)), 0
        self.low, self.high, self.value = 0, 2**32 - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self.counters: dict[Any, tuple[int, int]] = {}

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

    def learnt(self, *name: Any) -> int:
        c, n = self.counters.get(name, (1 << 21, 0))
        bit = self.plain(min(max(c >> 6, 1), 65535))
        self.counters[name] = c + ((((bit << 22) - bit - c) * (131072 // (2 * n + 3))) >> 16), min(n + 1, 2047)
        return bit

    def end(self) -> None:
        ends = [(t, -(-self.low >> 32 - 8 * t) << 32 - 8 * t) for t in range(5)]
        t, v = next(x for x in ends if x[1] <= self.high)
        need(self.value == v and self.size == t + self.shifts, "coded bits do not end exactly")


def steps(data: bytes, shapes: list[Any], keep: np.ndarray) -> np.ndarray:
    """The whole numbers of value mode 4; `keep` says which parameter coordinates have one."""
    chance, out, at = Chance(data), [], 0
    for size, rows, width in shapes:
        lines = [[[32768, 0, 0] for _ in range(count)] for count in (rows, width)]
        for i in np.flatnonzero(keep[at : at + size]).tolist():
            row, column = lines[0][i // width], lines[1][i % width]
            part, octave = math.frexp(row[0] * column[0] >> 16)
            s, more, sign, place = 0, 1, 0, min(max(4 * octave + int(8 * part) - 44, 0), 63)
            while s < 24 and more:
                more = chance.learnt("size", s, place)
                s += more
            if s == 24:
                further = next((i for i in range(31) if not chance.plain(32768)), 31)
                s = 23 + functools.reduce(lambda v, _: v << 1 | chance.plain(32768), range(further), 1)
                need(s <= 1 << 30, "a step too large")
            if s:
                sign = 2 * chance.learnt("sign", *((7 * x[1] + 491520) >> 16 for x in (row, column))) - 1
            for line in (row, column):
                q = 131072 // (2 * line[2] + 3)
                line[0] += ((65536 * min(s, 4095) - line[0]) * q) >> 16
                line[1] += ((65536 * sign - line[1]) * q) >> 16
                line[2] = min(line[2] + 1, 63)
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
    if mode < 4:
        return section.bits(n) if mode == 1 else np.full(n, True) & (mode == 2 or known)
    need(section.getbuffer().nbytes < (n + 7) // 8, "a bitmap is shorter")
    place = tensor = np.repeat(np.arange(len(shapes)), [x[0] for x in shapes])
    if mode & 2:
        centres = np.array([section.varint() for _ in shapes], np.int64)
        need((centres < 1 << 21).all(), "a centre too large")
        u = reference[:n].view("<u4").astype(np.int64)
        place = np.clip((((u & 0x7FFFFFFF) - 1024 * centres[tensor]) >> 19) + 12, 0, 24) + 25 * (u >> 31)
    was, chance = known if mode & 1 else np.zeros(n, bool), Chance(section.read())
    moved = np.array([chance.learnt(*x) for x in zip(place.tolist(), was.tolist(), strict=True)], bool)
    chance.end()
    return moved ^ was


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
    need(len(data) >= 30 and data[:6] == b"FLT1\2\0", "not a payload of this version")
    need(zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"), "wrong checksum")
    mode, value_mode = data[6], data[7]
    need(mode in (0, 1, 2, 4, 5, 6, 7) and value_mode < 8, "wrong mode")
    schema = json.dumps([kind, *([*x] for x in tensors)])
    need(data[8:16] == digest(schema.encode()), "another schema")
    if kind == "thresholds":
        need(all(len(x[1]) == 1 and not x[2] and not x[3] for x in tensors), "thresholds are numbers of rows")
        need(mode == 2 and value_mode != 6, "thresholds have no mask and are no bare mask")
    floats, integers = (sum(math.prod(x[1]) for x in tensors if x[2] is is_int) for is_int in (False, True))
    parameters = [x for x in tensors if not x[2] and x[0] not in buffers]
    shapes = [(math.prod(x[1]), x[1][0] if x[1] else 1, math.prod(x[1][1:])) for x in parameters]
    prunable = shapes[: sum(x[3] for x in parameters)]
    n, referred = sum(x[0] for x in prunable), b""
    known = None if known_mask is None or known_mask.all() else known_mask.astype(bool)
    if mode in (0, 5, 7):
        need(known is not None, "no known mask")
        referred += np.packbits(np.asarray(known)).tobytes()
    if mode in (6, 7) or value_mode in (1, 4, 5):
        need(reference is not None, "no reference")
        referred += digest(np.asarray(reference, "<f4").tobytes())
    need(data[16:24] == (digest(referred) if referred else bytes(8)), "another reference")
    body = Bytes(data[24:-4])
    head, tail = map(Bytes, map(body.take, (body.varint(), body.varint())))
    mask = read_mask(head, mode, prunable, n, known, reference)
    need(not mask.all() or mode == 2, "a full mask sent otherwise")
    out, kept = np.zeros(floats, np.float32), np.concatenate([mask, np.ones(floats - n, bool)])
    ints = tail.numbers("<i8", integers if 0 < value_mode != 6 else 0)
    if value_mode != 6:
        out[kept] = read_run(tail, value_mode, shapes, kept, reference)
    ints = tail.numbers("<i8", integers) if value_mode == 0 else ints
    need(not head.read() and not tail.read() and not body.read(), "lengths do not add up")
    need((np.abs(out) <= 1e30).all() and all(abs(i) <= 2**53 for i in ints.tolist()), "a number out of range")
    return (mask, None, None) if value_mode == 6 else (mask, out, ints.astype(np.int64))
