"""Golden payloads: read by fedlth, and by a decoder that was written from docs/wire.md alone, to the same bits."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from fedlth.wire import payload
from fedlth.wire.codec import CODECS
from fedlth.wire.errors import PayloadError
from tests.wire import reader
from tests.wire.golden_payloads import BUFFERS, HERE, LAYOUT, cases, thresholds

TENSORS = [(e.name, e.shape, e.is_int, e.prunable) for e in LAYOUT.entries]


@pytest.mark.parametrize("name", cases())
def test_both_decoders_read_it(name: str) -> None:
    codec, content, holds = cases()[name]
    data = (HERE / f"{name}.bin").read_bytes()
    got = payload.decode(data, "values", LAYOUT, codec=CODECS[codec], **holds)
    held = holds["reference"].floats if "reference" in holds else None
    mask, floats, ints = reader.decode(
        data, kind="values", tensors=TENSORS, buffers=BUFFERS, known_mask=holds.get("known_mask"), reference=held
    )
    np.testing.assert_array_equal(got.mask, content.mask)
    np.testing.assert_array_equal(mask, content.mask)
    if content.floats is None:
        assert got.floats is None and floats is None
        return
    assert got.floats.tobytes() == floats.tobytes() and got.ints.tolist() == ints.tolist() == [11]
    if codec in ("raw", "lossless"):
        assert got.floats.tobytes() == content.floats.tobytes()


def test_both_decoders_read_thresholds_and_refuse_them_as_another_kind() -> None:
    rows, content, held = thresholds()
    data = (HERE / "thresholds.bin").read_bytes()
    tensors = [(e.name, e.shape, e.is_int, e.prunable) for e in rows.entries]
    assert tensors == [("a", (24,), False, False), ("b", (30,), False, False)]
    got = payload.decode(data, "thresholds", rows, codec=CODECS["lossless"], reference=held)
    alone: dict[str, Any] = {"buffers": set(), "known_mask": None, "reference": held.floats}
    told = reader.decode(data, kind="thresholds", tensors=tensors, **alone)
    assert content.floats is not None and got.floats is not None and told[1] is not None
    assert got.floats.tobytes() == told[1].tobytes() == content.floats.tobytes()
    assert got.mask.size == told[0].size == got.ints.size == 0
    with pytest.raises(PayloadError, match="schema"):
        payload.decode(data, "values", rows, codec=CODECS["lossless"], reference=held)
    with pytest.raises(ValueError, match="numbers of rows"):
        reader.decode(
            data[:8] + LAYOUT.digest("thresholds") + data[16:-4] + _checked(data[:8], data[16:-4]), kind="thresholds",
            tensors=TENSORS, buffers=BUFFERS, known_mask=None, reference=held.floats,
        )  # fmt: skip


def _checked(head: bytes, rest: bytes) -> bytes:
    return zlib.crc32(head + LAYOUT.digest("thresholds") + rest).to_bytes(4, "little")


def test_the_golden_payloads_hold_every_mode() -> None:
    seen = [(HERE / f"{name}.bin").read_bytes()[6:8] for name in cases()]
    assert {s[0] for s in seen} == {0, 1, 2, 4, 5, 6, 7}
    assert {s[1] for s in seen} == {0, 1, 2, 3, 4, 5, 6, 7}
    assert {p.stem for p in HERE.glob("*.bin")} == {*cases(), "thresholds"}
