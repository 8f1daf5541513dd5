"""The coded modes: every bit survives, and each mode is chosen where it can be."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth.models.layout import Entry, Layout
from fedlth.wire import codec, mask_section, numbers, payload, varint
from fedlth.wire.codec import CODECS, LOSSLESS, LOSSY_BF16, LOSSY_F16, LOSSY_STEP
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

LAYOUT = Layout(
    (
        Entry("a", (24, 50), "param", 0, prunable=True),
        Entry("b", (30, 3, 3), "param", 1200, prunable=True),
        Entry("c", (40,), "param", 1470),
        Entry("n", (), "buffer", 0, is_int=True),
    )
)
SIZE, FLOATS = LAYOUT.num_prunable, LAYOUT.num_floats


def ends(seed: int, density: float, moved: float = 0.1) -> tuple[Reference, np.ndarray, Content]:
    """Return what both ends hold (weights and a mask), and a trained update near it."""
    draw = np.random.default_rng(seed)
    held = draw.normal(size=FLOATS).astype(np.float32)
    floats = (held + moved * draw.normal(size=FLOATS)).astype(np.float32)

    def largest(w: np.ndarray) -> np.ndarray:
        mask = np.zeros(SIZE, bool)
        mask[np.argsort(-np.abs(w[:SIZE]))[: round(density * SIZE)]] = True
        return mask

    known, mask = largest(held), largest(floats)
    floats[:SIZE][~mask] = 0
    return Reference(held), known, Content(mask, floats, np.array([7]))


def bits(content: Content) -> tuple[bytes, bytes, bytes]:
    floats = b"" if content.floats is None else content.floats.tobytes()
    return content.mask.tobytes(), floats, b"" if content.ints is None else content.ints.tobytes()


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 0.5), st.booleans(), st.booleans(), st.booleans())
def test_lossless_keeps_every_bit(
    seed: int, density: float, moved: float, knows: bool, holds: bool, bare: bool
) -> None:
    reference, known, sent = ends(seed, density, moved)
    if bare:
        sent = Content(sent.mask, None, None)
    both = {"known_mask": known if knows else None, "reference": reference if holds else None}
    data = payload.encode("values", LAYOUT, sent, codec=LOSSLESS, **both)
    assert len(data) <= len(payload.encode("values", LAYOUT, sent, known_mask=both["known_mask"]))
    assert bits(payload.decode(data, "values", LAYOUT, codec=LOSSLESS, **both)) == bits(sent)


def mode_of(mask: np.ndarray, known: np.ndarray | None = None, reference: Reference | None = None) -> int:
    return payload.encode("mask", LAYOUT, Content(mask, None, None), codec=LOSSLESS, known_mask=known,
                          reference=reference)[6]  # fmt: skip


def test_a_mask_is_coded_on_all_that_the_receiver_holds() -> None:
    draw = np.random.default_rng(0)
    reference, known, sent = ends(0, 0.2, 0.03)
    assert mode_of(np.ones(SIZE, bool)) == codec.FULL
    assert mode_of(sent.mask, sent.mask) == codec.REUSE
    assert mode_of(draw.random(SIZE) < 0.5) == codec.BITMAP
    assert mode_of(sent.mask) == codec.CODED
    assert mode_of(sent.mask, known) == codec.CODED + codec.ON_MASK
    assert mode_of(sent.mask, None, reference) == codec.CODED + codec.ON_VALUES
    assert mode_of(sent.mask, known, reference) == codec.CODED + codec.ON_MASK + codec.ON_VALUES


def test_a_mask_drawn_from_scores_costs_less_than_its_bitmap() -> None:
    """Half of the mask is ones; only the sign of a score says which half."""
    draw = np.random.default_rng(0)
    scores = draw.normal(scale=3, size=FLOATS).astype(np.float32)
    mask = draw.random(SIZE) < 1 / (1 + np.exp(-scores[:SIZE]))
    data = payload.encode("mask", LAYOUT, Content(mask, None, None), codec=LOSSLESS, reference=Reference(scores))
    assert data[6] == codec.CODED + codec.ON_VALUES and len(data) < 0.9 * SIZE / 8


@pytest.mark.parametrize(("lossy", "limit"), [(LOSSY_BF16, 4e-3), (LOSSY_F16, 5e-4), (LOSSY_STEP, 2e-2)])
def test_lossy_modes_stay_near(lossy: codec.Codec, limit: float) -> None:
    reference, known, sent = ends(5, 0.3)
    data = payload.encode("values", LAYOUT, sent, codec=lossy, known_mask=known, reference=reference)
    got = payload.decode(data, "values", LAYOUT, codec=lossy, known_mask=known, reference=reference)
    np.testing.assert_array_equal(got.mask, sent.mask)
    assert 0 < np.linalg.norm(got.floats - sent.floats) < limit * np.linalg.norm(sent.floats)


def test_odd_floats_survive_as_deltas() -> None:
    odd = np.float32([-0.0, 0.0, 1e-45, -1e-45, 9e29, -9e29, 3.4e-5, -3.4e-5])
    layout = Layout((Entry("b", (8000,), "param", 0),))
    sent = Content(np.zeros(0, bool), np.tile(odd, 1000), np.zeros(0, np.int64))
    reference = Reference(np.tile(odd[::-1], 1000).copy())
    data = payload.encode("values", layout, sent, codec=LOSSLESS, reference=reference)
    assert data[7] == codec.DELTA
    assert bits(payload.decode(data, "values", layout, codec=LOSSLESS, reference=reference)) == bits(sent)


REFERENCE, KNOWN, SENT = ends(1, 0.3, 0.05)
DATA = payload.encode("values", LAYOUT, SENT, codec=LOSSLESS, known_mask=KNOWN, reference=REFERENCE)


def read(data: bytes, known: np.ndarray | None = KNOWN, reference: Reference | None = REFERENCE) -> Content:
    return payload.decode(data, "values", LAYOUT, codec=LOSSLESS, known_mask=known, reference=reference)


def test_another_reference_is_refused() -> None:
    assert DATA[6] == codec.CODED + codec.ON_MASK + codec.ON_VALUES and DATA[7] == codec.DELTA
    other = REFERENCE.floats.copy()
    other[0] += 1
    with pytest.raises(PayloadError, match="does not hold"):
        read(DATA, KNOWN, Reference(other))
    with pytest.raises(PayloadError, match="does not hold"):
        read(DATA, KNOWN, None)
    with pytest.raises(PayloadError, match="does not hold"):
        read(DATA, ~KNOWN)
    with pytest.raises(PayloadError, match="unknown mask mode"):
        payload.decode(DATA, "values", LAYOUT, known_mask=KNOWN, reference=REFERENCE)


def test_bytes_after_the_values_are_refused() -> None:
    run = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    data = numbers.compress(run)
    np.testing.assert_array_equal(numbers.decompress(data, 3000, np.float32), run)
    for bad in (data + b"\0", data + data, data[:-1], b"", data[:-9]):
        with pytest.raises(PayloadError):
            numbers.decompress(bad, 3000, np.float32)
    for count, dtype in ((2999, np.float32), (3001, np.float32), (3000, np.int32), (0, np.float32)):
        with pytest.raises(PayloadError):
            numbers.decompress(data, count, dtype)


def under_the_mask_of(other: bytes, data: bytes) -> bytes:
    """Return the values of one payload under the mask of another, with lengths and a checksum that fit."""
    parts = []
    for one in (other, data):
        size, at = varint.get(one, payload.HEADER.size, len(one) - 4)
        _, at = varint.get(one, at, len(one) - 4)
        parts.append((one[at : at + size], one[at + size : -4]))
    section, values = parts[0][0], parts[1][1]
    body = data[: payload.HEADER.size] + varint.put(len(section)) + varint.put(len(values)) + section + values
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_values_of_more_or_fewer_weights_than_the_mask_keeps_are_refused(name: str, holds: bool) -> None:
    """In every value mode: of plain floats the length alone says it; signs are counted by the byte."""
    reference, known, sent = ends(3, 0.4)
    both = {"codec": CODECS[name], "known_mask": known, "reference": reference if holds else None}
    data = payload.encode("values", LAYOUT, sent, **both)
    assert under_the_mask_of(data, data) == data
    for kept in (True, False):
        mask = sent.mask.copy()
        mask[np.flatnonzero(mask == kept)[: 8 if name == "sign" and holds else 1]] = not kept
        other = payload.encode("values", LAYOUT, Content(mask, sent.floats, sent.ints), **both)
        assert other[6] == data[6], "their masks are coded alike"
        with pytest.raises(PayloadError):
            payload.decode(under_the_mask_of(other, data), "values", LAYOUT, **both)


def test_hostile_mask_sections_are_refused() -> None:
    reference, _, sent = ends(4, 0.05, 0.03)
    mode, section = mask_section.encode(sent.mask, LAYOUT, LOSSLESS, None, reference)
    assert mode == codec.CODED + codec.ON_VALUES
    cases = {
        "cut off": section[:4],
        "do not end": section + b"\0",
        "centred": b"\xff\xff\xff\x7f" + section[3:],
        "no shorter": section + bytes(SIZE),
    }
    for says, bad in cases.items():
        with pytest.raises(PayloadError, match=says):
            mask_section.decode(mode, bad, LAYOUT, None, reference)


@given(
    st.lists(st.tuples(st.integers(0, len(DATA) - 5), st.integers(0, 255)), max_size=4), st.sampled_from(sorted(CODECS))
)
def test_mutants_with_a_repaired_checksum(edits: list[tuple[int, int]], name: str) -> None:
    chosen = CODECS[name]
    body = bytearray(payload.encode("values", LAYOUT, SENT, codec=chosen, known_mask=KNOWN, reference=REFERENCE)[:-4])
    for at, value in edits:
        body[at % len(body)] = value
    data = bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))
    try:
        got = payload.decode(data, "values", LAYOUT, codec=chosen, known_mask=KNOWN, reference=REFERENCE)
    except PayloadError:
        return
    assert got.mask.shape == (SIZE,)
    if got.floats is not None:
        assert got.floats.shape == (FLOATS,) and np.isfinite(got.floats).all()
        assert not got.floats[:SIZE][~got.mask].any()
