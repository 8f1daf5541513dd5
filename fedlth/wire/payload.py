"""The FLT1 envelope: header, mask section, value section, checksum. docs/wire.md has it byte by byte."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from fedlth.params import Layout
from fedlth.wire import mask as bitmap
from fedlth.wire.errors import PayloadError

MAGIC = b"FLT1"
VERSION = 1
HEADER = struct.Struct("<4sBBBB8s8s")  # magic, version, flags, mask mode, value mode, schema id, reference id
REUSE, BITMAP, FULL = 0, 3, 6
F32, NO_VALUES = 0, 6
NO_REFERENCE = bytes(8)
LARGEST_INT = 2**53
LARGEST = 1e30  # a trained weight beyond this is damage or attack; float32 sums of it overflow


@dataclass(frozen=True)
class Content:
    """What a payload says, in the receiver's layout.

    `mask` (num_prunable,) bool; `floats` (num_floats,) float32, zero where the mask is False, or None for a bare
    mask; `ints` (num_ints,) int64, or None.
    """

    mask: np.ndarray
    floats: np.ndarray | None
    ints: np.ndarray | None


def encode(kind: str, layout: Layout, content: Content, *, known_mask: np.ndarray | None = None) -> bytes:
    """Serialise `content` under `layout`.

    `known_mask` is the mask that the receiver already holds; when it is the one to send, no bits are sent.
    """
    mask, size = content.mask, layout.num_prunable
    if bool(mask.all()):
        mode, section, reference = FULL, b"", NO_REFERENCE
    elif known_mask is not None and np.array_equal(mask, known_mask):
        mode, section, reference = REUSE, b"", bytes.fromhex(bitmap.digest(mask))
    else:
        mode, section, reference = BITMAP, bitmap.pack(mask), NO_REFERENCE
    values = b""
    if content.floats is not None and content.ints is not None:
        kept = content.floats[:size][mask]
        values = b"".join(
            (
                kept.astype("<f4").tobytes(),
                content.floats[size:].astype("<f4").tobytes(),
                content.ints.astype("<i8").tobytes(),
            )
        )
    value_mode = NO_VALUES if content.floats is None else F32
    head = HEADER.pack(MAGIC, VERSION, 0, mode, value_mode, layout.digest(kind), reference)
    body = b"".join((head, _varint(len(section)), _varint(len(values)), section, values))
    return body + struct.pack("<I", zlib.crc32(body))


def decode(data: bytes, kind: str, layout: Layout, *, known_mask: np.ndarray | None = None) -> Content:
    """Read a payload that may come from anyone; shapes come from the receiver's `layout`, never from the payload.

    Raises PayloadError, and only that, at anything that is not exactly a payload of this kind and layout.
    """
    size = layout.num_prunable
    longest = HEADER.size + 24 + (size + 7) // 8 + 4 * layout.num_floats + 8 * layout.num_ints
    if len(data) > longest:
        raise PayloadError(f"{len(data)} bytes, at most {longest} can be right")
    if len(data) < HEADER.size + 6:
        raise PayloadError(f"{len(data)} bytes are too few")
    magic, version, flags, mode, value_mode, schema, reference = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or flags != 0:
        raise PayloadError(f"magic {magic!r} version {version} flags {flags}, wanted {MAGIC!r} {VERSION} 0")
    if mode not in (REUSE, BITMAP, FULL) or value_mode not in (F32, NO_VALUES):
        raise PayloadError(f"unknown mask mode {mode} or value mode {value_mode}")
    if struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise PayloadError("checksum does not match")
    if schema != layout.digest(kind):
        raise PayloadError(f"schema {schema.hex()} is not the receiver's {layout.digest(kind).hex()} for {kind}")
    mask_bytes, at = _read_varint(data, HEADER.size)
    value_bytes, at = _read_varint(data, at)
    if at + mask_bytes + value_bytes + 4 != len(data):
        raise PayloadError("section lengths do not add up")
    mask = _read_mask(mode, data[at : at + mask_bytes], size, reference, known_mask)
    values = data[at + mask_bytes : -4]
    if value_mode == NO_VALUES:
        if values:
            raise PayloadError("a bare mask carries values")
        return Content(mask, None, None)
    kept = int(np.count_nonzero(mask))
    dense = layout.num_floats - size
    if len(values) != 4 * (kept + dense) + 8 * layout.num_ints:
        raise PayloadError(f"{len(values)} bytes of values, wanted those of {kept} kept and {dense} dense")
    read = np.frombuffer(values, "<f4", count=kept + dense)
    if not np.isfinite(read).all() or (read.size and float(np.abs(read).max()) > LARGEST):
        raise PayloadError("a value is not finite or beyond 1e30")
    floats = np.zeros(layout.num_floats, np.float32)
    floats[:size][mask] = read[:kept]
    floats[size:] = read[kept:]
    ints = np.frombuffer(values, "<i8", offset=4 * (kept + dense)).astype(np.int64)
    if ints.size and (ints.min() < -LARGEST_INT or ints.max() > LARGEST_INT):
        raise PayloadError("an integer is beyond 2^53")
    return Content(mask, floats, ints)


def _read_mask(mode: int, section: bytes, size: int, reference: bytes, known: np.ndarray | None) -> np.ndarray:
    if mode != REUSE and reference != NO_REFERENCE:
        raise PayloadError("a self-contained mask names a reference")
    if mode == BITMAP:
        mask = bitmap.unpack(section, size)
        if mask.all():
            raise PayloadError("a full mask must be sent as full")
        return mask
    if section:
        raise PayloadError("a mask section where none belongs")
    if mode == FULL:
        return np.ones(size, bool)
    if known is None or reference != bytes.fromhex(bitmap.digest(known)):
        raise PayloadError("refers to a mask that the receiver does not hold")
    return known


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(5):
        if at + i >= len(data) - 4:
            raise PayloadError("a length is cut off")
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if i and byte == 0:
                raise PayloadError("a length is not in its shortest form")
            return value, at + i + 1
    raise PayloadError("a length is longer than 5 bytes")
