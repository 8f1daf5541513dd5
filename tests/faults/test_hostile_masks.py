"""Masks that are none: too long, a bomb, a wrong count, an empty layer; refused before memory is taken for them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest

from fedlth.federation.jobs import Reply
from fedlth.methods.aggregate import Contribution, CountMean
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.wire import mask as bitmap
from fedlth.wire import numbers, payload, varint
from fedlth.wire.codec import BITMAP, CODED, DELTA, F32, F32_PCO, LOSSLESS, NO_VALUES
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import HEADER, Content
from fedlth.wire.reference import Reference
from tests.faults.test_door import judged, reply, rows_of, with_rows  # noqa: F401

LAYOUT = Layout((Entry("a", (20, 25), "param", 0, prunable=True), Entry("b", (100,), "param", 500, prunable=True),
                 Entry("c", (7,), "param", 600)))  # fmt: skip
MB = 2**20
BOUND = MB // 2  # a hostile payload of 64 MB of numbers must not cost more than this; the layout has 2.4 kB of them


def made(mode: int, value_mode: int, section: bytes, values: bytes) -> bytes:
    """Return an envelope with a right checksum around whatever is in it."""
    head = HEADER.pack(b"FLT1", payload.VERSION, 0, mode, value_mode, LAYOUT.digest("values"), bytes(8))
    data = head + varint.put(len(section)) + varint.put(len(values)) + section + values
    return data + struct.pack("<I", zlib.crc32(data))


HELD = Reference(np.zeros(LAYOUT.num_floats, np.float32))
BOMB = numbers.compress(np.zeros(16 * MB, np.float32))
HALF = np.arange(600) % 2 == 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (made(BITMAP, F32, bitmap.pack(np.ones(8 * MB, bool)), b""), "at most"),
        (made(BITMAP, F32, bitmap.pack(np.zeros(608, bool)), bytes(28)), "bitmap of 76 bytes, wanted 75"),
        (made(CODED, F32, bytes(3), bytes(28)), "."),  # an all-zero code that goes on for ever
        (made(2, F32_PCO, b"", BOMB), "a stream of|values"),
        (made(BITMAP, F32_PCO, bitmap.pack(HALF), BOMB), "a stream of|values"),
        (made(BITMAP, DELTA, bitmap.pack(HALF), BOMB), "."),
        (made(BITMAP, F32, bitmap.pack(HALF), bytes(4 * 308)), "wanted those of 307"),
        (made(BITMAP, NO_VALUES, bitmap.pack(HALF), b"\0"), "carries values"),
        (made(BITMAP, F32, b"\xff\xff\xff\xff", varint.put(2**31)), "bitmap of"),
    ],
    ids=["far too long", "a byte too long", "coded zeros", "bomb", "sparse bomb", "bomb of differences", "popcount",
         "bare with values", "cut"],
)  # fmt: skip
def test_a_mask_or_values_of_another_size_are_refused_in_little_memory(data: bytes, says: str) -> None:
    assert len(BOMB) < 2000, "64 MB in so few bytes"
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match=says):
            payload.decode(data, "values", LAYOUT, codec=LOSSLESS, reference=HELD)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


def test_a_layer_without_a_weight_moves_nothing_of_that_layer() -> None:
    """Layer collapse at a client is its own: where nobody holds a coordinate, the global one stays."""
    rule, state = CountMean(), ServerState(Params(np.full(607, 3, np.float32), np.zeros(0, np.int64)))
    empty = np.arange(600) >= 500
    floats = np.where(np.append(empty, np.ones(7, bool)), 5, 0).astype(np.float32)
    data = payload.encode("values", LAYOUT, Content(empty, floats, state.theta.ints), codec=LOSSLESS)
    got = payload.decode(data, "values", LAYOUT, codec=LOSSLESS)
    accumulator = rule.init(state, LAYOUT)
    rule.add(accumulator, Contribution(0, 10, got))
    new = rule.result(accumulator).theta.floats
    assert (new[:500] == 3).all() and (new[500:] == 5).all() and np.isfinite(new).all()


def test_a_ticket_whose_mask_has_another_density_than_its_row_says_is_refused(reply: Reply) -> None:  # noqa: F811
    rows = rows_of(reply)
    rows[-1]["density"] = 0.31
    with pytest.raises(PayloadError, match=r"density must be that of the mask that came, 0.19[0-9]*, got 0.31"):
        judged(with_rows(reply, rows))
    assert judged(replace(reply)).rows
