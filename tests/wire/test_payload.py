"""The FLT1 envelope: bits survive, sizes are as documented, and nothing but PayloadError comes of damage."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth.models.layout import Entry, Layout
from fedlth.wire import mask as bitmap
from fedlth.wire import payload, varint
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import BITMAP, F32, FULL, HEADER, NO_VALUES, REUSE, Content
from tests.tiny import small_layout

LAYOUT = small_layout()
SIZE, FLOATS, INTS = LAYOUT.num_prunable, LAYOUT.num_floats, LAYOUT.num_ints
ODD = np.float32([-0.0, 0.0, 1e-45, -1e-45, 1.17e-38, 9e29, -9e29, 3.4e-5])


def content(seed: int = 0, density: float = 0.4) -> Content:
    draw = np.random.default_rng(seed)
    mask = draw.random(SIZE) < density
    floats = draw.normal(size=FLOATS).astype(np.float32)
    kept = np.flatnonzero(mask)[: ODD.size]
    floats[kept] = ODD[: kept.size]
    floats[-ODD.size :] = ODD
    floats[:SIZE][~mask] = 0
    return Content(mask, floats, draw.integers(-(2**53), 2**53, INTS))


def repaired(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def header(mode: int = BITMAP, values: int = F32, *, reference: bytes = bytes(8), kind: str = "values") -> bytes:
    return HEADER.pack(b"FLT1", 2, 0, mode, values, LAYOUT.digest(kind), reference)


def assembled(head: bytes, section: bytes, values: bytes) -> bytes:
    return repaired(head + varint.put(len(section)) + varint.put(len(values)) + section + values)


def same(one: Content, other: Content) -> None:
    np.testing.assert_array_equal(one.mask, other.mask)
    assert one.floats is not None and other.floats is not None
    np.testing.assert_array_equal(one.floats.view(np.uint32), other.floats.view(np.uint32))
    np.testing.assert_array_equal(one.ints, other.ints)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_round_trip_keeps_every_bit(seed: int, density: float) -> None:
    sent = content(seed, density)
    same(payload.decode(payload.encode("values", LAYOUT, sent), "values", LAYOUT), sent)
    again = payload.decode(
        payload.encode("values", LAYOUT, sent, known_mask=sent.mask), "values", LAYOUT, known_mask=sent.mask
    )
    same(again, sent)


def test_a_kept_weight_of_zero_stays_kept() -> None:
    mask = np.zeros(SIZE, bool)
    mask[[0, 5]] = True
    sent = Content(mask, np.zeros(FLOATS, np.float32), np.zeros(INTS, np.int64))
    got = payload.decode(payload.encode("values", LAYOUT, sent), "values", LAYOUT)
    assert got.mask.sum() == 2 and not got.floats.any()


def varint_bytes(value: int) -> int:
    return 1 if value < 128 else 2 if value < 128**2 else 3


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_sizes_are_exactly_as_documented(density: float) -> None:
    sent = content(1, density)
    kept, bits = int(sent.mask.sum()), -(-SIZE // 8)
    values = 4 * kept + 4 * (FLOATS - SIZE) + 8 * INTS
    section = 0 if sent.mask.all() else bits
    assert HEADER.size == 24
    whole = 24 + varint_bytes(section) + varint_bytes(values) + section + values + 4
    assert len(payload.encode("values", LAYOUT, sent)) == whole
    reused = 24 + 1 + varint_bytes(values) + values + 4
    assert len(payload.encode("values", LAYOUT, sent, known_mask=sent.mask)) == reused
    bare = 24 + varint_bytes(section) + 1 + section + 4
    assert len(payload.encode("mask", LAYOUT, Content(sent.mask, None, None))) == bare


def test_r4_the_ratio_to_dense() -> None:
    """.531 at half, .131 at a tenth, for large n; never above min(4n, 4 kept + n / 8) and the header."""
    size = 100_000
    layout = Layout((Entry("w", (size,), "param", 0, prunable=True),))
    for kept, ratio in ((size // 2, 0.531), (size // 10, 0.131)):
        mask = np.arange(size) < kept
        data = payload.encode("values", layout, Content(mask, mask.astype(np.float32), np.zeros(0, np.int64)))
        assert len(data) / (4 * size) == pytest.approx(ratio, abs=1e-3)
        assert len(data) <= min(4 * size, 4 * kept + -(-size // 8)) + 24 + 6 + 4


def test_bare_masks() -> None:
    mask = np.random.default_rng(0).random(SIZE) < 0.3
    got = payload.decode(payload.encode("mask", LAYOUT, Content(mask, None, None)), "mask", LAYOUT)
    np.testing.assert_array_equal(got.mask, mask)
    assert got.floats is None and got.ints is None


def test_nothing_prunable_and_nothing_kept() -> None:
    none = Layout((Entry("b", (3,), "param", 0),))
    sent = Content(np.zeros(0, bool), np.float32([1, 2, 3]), np.zeros(0, np.int64))
    got = payload.decode(payload.encode("values", none, sent), "values", none)
    np.testing.assert_array_equal(got.floats, sent.floats)


GOOD = content(2)
DATA = payload.encode("values", LAYOUT, GOOD)
BITS = bitmap.pack(GOOD.mask)
VALUES = DATA[
    24 + varint_bytes(len(BITS)) + varint_bytes(4 * (int(GOOD.mask.sum()) + FLOATS - SIZE) + 8 * INTS) + len(BITS) : -4
]
DENSE = content(3, 1.0)
DENSE_VALUES = DENSE.floats.astype("<f4").tobytes() + DENSE.ints.astype("<i8").tobytes()
PADDED = bytes((*BITS[:-1], BITS[-1] | 1))


def altered(at: int, to: bytes) -> bytes:
    return repaired(DATA[:at] + to + DATA[at + len(to) : -4])


def with_value(value: float) -> bytes:
    floats = GOOD.floats.copy()
    floats[SIZE] = value
    return payload.encode("values", LAYOUT, Content(GOOD.mask, floats, GOOD.ints))


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "too few"),
    "short": (lambda: DATA[:29], "too few"),
    "cut": (lambda: DATA[:-9], "checksum"),
    "too long": (lambda: DATA + bytes(8 * FLOATS), "at most"),
    "one byte more": (lambda: repaired(DATA[:-4] + b"\0"), "do not add up"),
    "magic": (lambda: altered(0, b"FLT2"), "magic"),
    "version": (lambda: altered(4, b"\1"), "version"),
    "flags": (lambda: altered(5, b"\1"), "flags"),
    "mask mode": (lambda: altered(6, b"\4"), "unknown mask mode"),
    "value mode": (lambda: altered(7, b"\1"), "value mode"),
    "checksum": (lambda: DATA[:-1] + bytes((DATA[-1] ^ 1,)), "checksum"),
    "schema": (lambda: altered(8, bytes(8)), "schema"),
    "kind": (lambda: payload.encode("scores", LAYOUT, GOOD), "schema"),
    "varint not shortest": (
        lambda: repaired(header(FULL) + b"\x80\x00" + varint.put(len(DENSE_VALUES)) + DENSE_VALUES), "shortest"),
    "varint too long": (lambda: repaired(header() + b"\xff" * 6), "longer than 5"),
    "varint cut off": (lambda: repaired(header() + b"\xff\xff"), "cut off"),
    "bitmap too short": (lambda: assembled(header(), BITS[:-1], VALUES), "bitmap of"),
    "popcount": (lambda: assembled(header(), BITS, VALUES[4:]), "wanted those of"),
    "padding": (lambda: assembled(header(), PADDED, VALUES), "padding"),
    "full as bitmap": (lambda: assembled(header(), bitmap.pack(np.ones(SIZE, bool)), DENSE_VALUES), "sent as full"),
    "full with bits": (lambda: assembled(header(FULL), b"\0", DENSE_VALUES), "an unexpected mask section"),
    "full with a reference": (
        lambda: assembled(header(FULL, reference=b"x" * 8), b"", DENSE_VALUES), "names a reference"),
    "bitmap with a reference": (lambda: assembled(header(reference=b"x" * 8), BITS, VALUES), "names a reference"),
    "reuse of nothing": (
        lambda: payload.encode("values", LAYOUT, GOOD, known_mask=GOOD.mask), "does not hold"),
    "bare mask with values": (lambda: assembled(header(values=NO_VALUES), BITS, VALUES), "carries values"),
    "nan": (lambda: with_value(np.nan), "not finite"),
    "inf": (lambda: with_value(np.inf), "not finite"),
    "huge": (lambda: with_value(-2e30), "beyond"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(PayloadError, match=says):
        payload.decode(make(), "values", LAYOUT)


def test_the_parts_above_do_make_a_payload() -> None:
    assert assembled(header(), BITS, VALUES) == DATA
    same(payload.decode(assembled(header(FULL), b"", DENSE_VALUES), "values", LAYOUT), DENSE)


def test_reuse_needs_the_very_mask() -> None:
    data = payload.encode("values", LAYOUT, GOOD, known_mask=GOOD.mask)
    assert data[6] == REUSE
    other = GOOD.mask.copy()
    other[0] ^= True
    with pytest.raises(PayloadError, match="does not hold"):
        payload.decode(data, "values", LAYOUT, known_mask=other)
    same(payload.decode(data, "values", LAYOUT, known_mask=GOOD.mask), GOOD)


def test_heads_may_differ_but_then_the_schema_does() -> None:
    other = Layout(tuple(e for e in LAYOUT.entries if e.name != "head.bias"))
    with pytest.raises(PayloadError, match="at most|schema|wanted"):
        payload.decode(DATA, "values", other)


def usable(data: bytes, known: np.ndarray | None) -> None:
    """Either refuse with the one exception, or give finite content of the receiver's sizes."""
    try:
        got = payload.decode(data, "values", LAYOUT, known_mask=known)
    except PayloadError:
        return
    assert got.mask.shape == (SIZE,) and got.mask.dtype == bool
    if got.floats is not None:
        assert got.floats.shape == (FLOATS,) and np.isfinite(got.floats).all()
        assert not got.floats[:SIZE][~got.mask].any()
        assert got.ints.shape == (INTS,)


@given(st.binary(max_size=400))
def test_noise(data: bytes) -> None:
    usable(data, None)
    usable(repaired(data), GOOD.mask)


SOURCES = (DATA, payload.encode("values", LAYOUT, GOOD, known_mask=GOOD.mask), payload.encode("values", LAYOUT, DENSE))


@given(
    st.sampled_from(SOURCES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    st.tuples(st.integers(0, 2000), st.integers(0, 8), st.binary(max_size=8)),
    st.booleans(),
)
def test_mutations_with_and_without_a_repaired_checksum(
    source: bytes, edits: list[tuple[int, int]], splice: tuple[int, int, bytes], repair: bool
) -> None:
    data = bytearray(source[:-4] if repair else source)
    for at, value in edits:
        data[at % min(len(data), 40 + at % 7)] = value  # mostly header and lengths, where structure is
    at, cut, new = splice
    at %= len(data)
    data[at : at + cut] = new
    usable(repaired(bytes(data)) if repair else bytes(data), GOOD.mask)


@given(st.binary(max_size=20), st.integers(0, 170))
def test_unpack_refuses_or_packs_back(data: bytes, size: int) -> None:
    try:
        mask = bitmap.unpack(data, size)
    except PayloadError:
        return
    assert mask.shape == (size,) and bitmap.pack(mask) == data
