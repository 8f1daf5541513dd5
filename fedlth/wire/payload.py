"""The FLT1 envelope: header, mask section, value section, checksum. docs/wire.md has it byte by byte."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedlth.models.layout import Layout
from fedlth.wire import mask_section, values, varint
from fedlth.wire.codec import BITMAP, F32, FULL, NO_VALUES, RAW, REUSE, Codec
from fedlth.wire.errors import PayloadError, ReferenceLost
from fedlth.wire.mask_section import uses_floats, uses_mask
from fedlth.wire.reference import NO_REFERENCE, Reference
from fedlth.wire.reference import name as name_of
from fedlth.wire.values import USES_FLOATS, Places

__all__ = ["BITMAP", "F32", "FULL", "HEADER", "NO_VALUES", "REUSE", "Content", "decode", "encode"]

MAGIC = b"FLT1"
VERSION = 2
HEADER = struct.Struct("<4sBBBB8s8s")  # magic, version, flags, mask mode, value mode, schema id, reference id
LARGEST_INT = 2**53
OF_ITSELF = frozenset({"scores", "statistics"})  # kinds that refer to no download: they are no new state of it


@dataclass(frozen=True)
class Content:
    """What a payload says, in the receiver's layout.

    `mask` (num_prunable,) bool; `floats` (num_floats,) float32, zero where the mask is False, or None for a bare
    mask; `ints` (num_ints,) int64, or None.
    """

    mask: np.ndarray
    floats: np.ndarray | None
    ints: np.ndarray | None

    @cached_property
    def reference(self) -> Reference | None:
        """These floats as what a later payload may refer to."""
        return None if self.floats is None else Reference(self.floats)


def encode(
    kind: str, layout: Layout, content: Content, *, codec: Codec = RAW, known_mask: np.ndarray | None = None,
    reference: Reference | None = None,
) -> bytes:  # fmt: skip
    """Serialise `content` under `layout`.

    `known_mask` and `reference` are what the receiver already holds, bit for bit; a codec uses them where that is
    shorter. A mask that the receiver holds is never sent.
    """
    known, held = _partial(known_mask), _fitting(reference, layout)
    mode, section = mask_section.encode(content.mask, layout, codec, known, held)
    value_mode = NO_VALUES
    tail: tuple[bytes | memoryview, ...] = ()
    if content.floats is not None and content.ints is not None:
        old, places = held.floats if held else None, Places(content.mask, layout)
        value_mode, coded = values.encode(np.ascontiguousarray(content.floats, np.float32), old, codec, places)
        whole = content.ints.astype("<i8").tobytes()
        tail = (coded, whole) if value_mode == F32 else (whole, coded)
    named = _name(mode, value_mode, known, held)
    head = HEADER.pack(MAGIC, VERSION, 0, mode, value_mode, layout.digest(kind), named)
    lengths = varint.put(len(section)) + varint.put(sum(map(len, tail)))
    parts = (head, lengths, section, *tail)
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return b"".join((*parts, struct.pack("<I", check)))


def longest(layout: Layout, codec: Codec = RAW) -> int:
    """Return the most bytes that a payload of this layout can have, whatever it holds."""
    found = HEADER.size + 24 + (layout.num_prunable + 7) // 8 + 4 * layout.num_floats + 8 * layout.num_ints
    return found + 64 if F32_ONLY.isdisjoint(codec.values) else found


def decode(
    data: bytes, kind: str, layout: Layout, *, codec: Codec = RAW, known_mask: np.ndarray | None = None,
    reference: Reference | None = None,
) -> Content:  # fmt: skip
    """Read a payload that may come from anyone; shapes come from the receiver's `layout`, never from the payload.

    Raises PayloadError, and only that, at anything that is not exactly a payload of this kind, layout and codec.
    """
    if len(data) > longest(layout, codec):
        raise PayloadError(f"{len(data)} bytes, at most {longest(layout, codec)} are possible")
    if len(data) < HEADER.size + 6:
        raise PayloadError(f"{len(data)} bytes are too few")
    magic, version, flags, mode, value_mode, schema, named = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or flags != 0:
        raise PayloadError(f"magic {magic!r} version {version} flags {flags}, wanted {MAGIC!r} {VERSION} 0")
    if mode not in codec.masks or value_mode not in codec.values:
        raise PayloadError(f"unknown mask mode {mode} or value mode {value_mode} for {codec.name}")
    if struct.unpack("<I", data[-4:])[0] != zlib.crc32(memoryview(data)[:-4]):
        raise PayloadError("checksum does not match")
    if schema != layout.digest(kind):
        raise PayloadError(f"schema {schema.hex()} is not the receiver's {layout.digest(kind).hex()} for {kind}")
    known, held = _partial(known_mask), _fitting(reference, layout)
    _check_reference(named, mode, value_mode, known, held)
    mask_bytes, at = varint.get(data, HEADER.size, len(data) - 4)
    value_bytes, at = varint.get(data, at, len(data) - 4)
    if at + mask_bytes + value_bytes + 4 != len(data):
        raise PayloadError("section lengths do not add up")
    mask = mask_section.decode(mode, data[at : at + mask_bytes], layout, known, held)
    tail = memoryview(data)[at + mask_bytes : -4]
    if value_mode == NO_VALUES:
        if tail:
            raise PayloadError("a bare mask carries values")
        return Content(mask, None, None)
    return _values(tail, value_mode, mask, layout, held)


F32_ONLY = frozenset((F32,))


def _values(tail: memoryview, mode: int, mask: np.ndarray, layout: Layout, held: Reference | None) -> Content:
    places, whole = Places(mask, layout), 8 * layout.num_ints
    if len(tail) < whole or (mode == F32 and len(tail) != 4 * places.size + whole):
        raise PayloadError(f"{len(tail)} bytes of values, wanted those of {places.size}")
    first = len(tail) - whole if mode == F32 else 0
    ints = np.frombuffer(tail, "<i8", count=layout.num_ints, offset=first).astype(np.int64)
    if ints.size and (ints.min() < -LARGEST_INT or ints.max() > LARGEST_INT):
        raise PayloadError("an integer is beyond 2^53")
    old = held.floats if held is not None else None
    return Content(mask, values.decode(mode, tail[:first] if mode == F32 else tail[whole:], old, places), ints)


def _partial(known: np.ndarray | None) -> np.ndarray | None:
    """A full mask says nothing: the same as none, so that both ends agree on what they hold."""
    return None if known is None or bool(known.all()) else known


def _fitting(reference: Reference | None, layout: Layout) -> Reference | None:
    return reference if reference is not None and reference.floats.size == layout.num_floats else None


def _name(mode: int, value_mode: int, known: np.ndarray | None, held: Reference | None) -> bytes:
    floats = uses_floats(mode) or value_mode in USES_FLOATS
    return name_of(known if uses_mask(mode) else None, held if floats else None)


def _check_reference(
    named: bytes, mode: int, value_mode: int, known: np.ndarray | None, held: Reference | None
) -> None:
    floats = uses_floats(mode) or value_mode in USES_FLOATS
    if not (floats or uses_mask(mode)) and named != NO_REFERENCE:
        raise PayloadError("a self-contained payload names a reference")
    lacks = (uses_mask(mode) and known is None) or (floats and held is None)
    if lacks or named != _name(mode, value_mode, known, held):
        raise ReferenceLost("refers to a mask or values that the receiver does not hold")
