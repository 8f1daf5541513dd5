"""The coded modes: every bit survives, the two mask coders agree, and each mode is chosen where it is the cheapest."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlth.models.layout import Entry, Layout
from fedlth.wire import ans, ans_own, codec, context, mask_section, numbers, payload, segments
from fedlth.wire.codec import CODECS, LOSSLESS, LOSSY_BF16, LOSSY_F16, LOSSY_STEP
from fedlth.wire.errors import PayloadError
from fedlth.wire.mask_choice import cheapest
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference
from fedlth.wire.table import cumulative, weights

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


@settings(deadline=None)  # the first example compiles
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


@pytest.mark.parametrize(
    ("mode", "known"),
    [
        (codec.LAYERS, False),
        (codec.LAYERS, True),
        (codec.PREVIOUS, True),  # needs the previous mask
        (codec.MAGNITUDE, False),
        (codec.MAGNITUDE, True),
    ],
)
def test_each_coded_mode_by_both_coders_and_both_partitions(
    mode: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, old, sent = ends(3, 0.2)
    held = old if known else None
    previous = old if known else np.zeros(SIZE, bool)
    seen = context.histogram(sent.mask, LAYOUT.prunable, previous, reference.floats)
    choice = cheapest(sent.mask, LAYOUT.prunable, (mode,), held, reference)
    made = set()
    for compiled in (True, False):
        for library in (True, False):
            monkeypatch.setattr(segments, "COMPILED", compiled)
            monkeypatch.setattr(context, "COMPILED", compiled)
            monkeypatch.setattr(ans, "_own", lambda *_, library=library: not library)
            section = mask_section._coded(choice, sent.mask, LAYOUT, held, reference)
            np.testing.assert_array_equal(mask_section._read(mode, section, LAYOUT, held, reference), sent.mask)
            made.add(section)
    assert len(made) == 1
    again = context.histogram(sent.mask, LAYOUT.prunable, previous, reference.floats)
    np.testing.assert_array_equal(again, seen)


@settings(deadline=None)  # the first example compiles
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_own_coder_writes_the_library_s_words(seed: int, number: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 600, number)
    ones = 1 + (draw.random(number) ** 3 * (sizes - 1)).astype(np.int64).clip(0, sizes - 2)
    counts = (sizes + 7) // 8
    symbols = np.packbits(draw.random(8 * int(counts.sum())) < np.repeat(ones / sizes, 8 * counts))
    table = weights(ones, sizes)
    words = ans_own.encode(symbols, counts, cumulative(table))
    np.testing.assert_array_equal(words, ans.encode_library(symbols, counts, table))
    for got, clean in (
        ans_own.decode(words, counts, cumulative(table)),
        ans.decode_library(words, counts, table),
    ):
        assert clean
        np.testing.assert_array_equal(got, symbols)


def mode_of(mask: np.ndarray, known: np.ndarray | None = None, reference: Reference | None = None) -> int:
    return payload.encode("mask", LAYOUT, Content(mask, None, None), codec=LOSSLESS, known_mask=known,
                          reference=reference)[6]  # fmt: skip


def test_the_cheapest_mask_mode_is_chosen() -> None:
    draw = np.random.default_rng(0)
    reference, known, sent = ends(0, 0.2, 0.03)
    assert mode_of(np.ones(SIZE, bool)) == codec.FULL
    assert mode_of(sent.mask, sent.mask) == codec.REUSE
    assert mode_of(draw.random(SIZE) < 0.5) == codec.BITMAP
    wide = Layout((Entry("w", (400, 500), "param", 0, prunable=True),))
    thin = Content(draw.random(200_000) < 0.05, None, None)
    assert payload.encode("mask", wide, thin, codec=LOSSLESS)[6] == codec.LAYERS
    striped = Content(thin.mask & np.tile(np.repeat([True, False], 250), 400), None, None)
    assert payload.encode("mask", wide, striped, codec=LOSSLESS)[6] == codec.LAYERS_BITS
    swapped = known.copy()
    swapped[draw.choice(SIZE, 30, replace=False)] ^= True
    assert mode_of(swapped, known) == codec.PREVIOUS_BITS
    assert mode_of(sent.mask, None, reference) == codec.MAGNITUDE_BITS
    rows = np.concatenate((np.repeat(draw.random(24) < 0.5, 50), np.repeat(draw.random(30) < 0.5, 9)))
    assert mode_of(rows) == codec.CHANNELS
    got = payload.decode(
        payload.encode("mask", LAYOUT, Content(rows, None, None), codec=LOSSLESS), "mask", LAYOUT, codec=LOSSLESS
    )
    np.testing.assert_array_equal(got.mask, rows)


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
    assert DATA[6] == codec.MAGNITUDE_BITS and DATA[7] == codec.DELTA
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


def test_hostile_mask_sections_are_refused() -> None:
    mask = np.random.default_rng(0).random(SIZE) < 0.05
    bytewise = replace(LOSSLESS, masks=(codec.LAYERS, codec.BITMAP))
    mode, section = mask_section.encode(mask, LAYOUT, bytewise, None, None)
    assert mode == codec.LAYERS
    cases = {
        "cut off": section[:-1],
        "does not end": section[:2] + section[6:],
        "last word is zero": section[:-4] + bytes(4),
        "minority": b"\xff\x7f" + section[2:],
        "no shorter": section + bytes(SIZE),
    }
    for says, bad in cases.items():
        with pytest.raises(PayloadError, match=says):
            mask_section.decode(mode, bad, LAYOUT, None, None)


@settings(deadline=None)  # the first example compiles
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
