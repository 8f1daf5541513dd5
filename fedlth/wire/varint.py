"""Lengths and counts: 7 bits a byte, lowest first, shortest form only."""

from __future__ import annotations

from fedlth.wire.errors import PayloadError


def put(value: int) -> bytes:
    """Return the shortest form of a number of at least 0."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def get(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read one number that must end before `end`; return it and the place after it."""
    value = 0
    for i in range(5):
        if at + i >= end:
            raise PayloadError("a length is cut off")
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if i and byte == 0:
                raise PayloadError("a length is not in its shortest form")
            return value, at + i + 1
    raise PayloadError("a length is longer than 5 bytes")
