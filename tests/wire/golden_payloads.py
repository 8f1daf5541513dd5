"""What the golden payloads hold; `python -m tests.wire.golden_payloads` writes them anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedlth.models.layout import Entry, Layout
from fedlth.wire import payload
from fedlth.wire.codec import CODECS
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

HERE = Path(__file__).parent / "payloads"
BUFFERS = {"d"}
LAYOUT = Layout(
    (
        Entry("a", (24, 50), "param", 0, prunable=True),
        Entry("b", (30, 3, 3), "param", 1200, prunable=True),
        Entry("c", (40,), "param", 1470),
        Entry("d", (6,), "buffer", 1510),
        Entry("n", (), "buffer", 0, is_int=True),
    )
)
SIZE = LAYOUT.num_prunable


def pseudo(seed: int, count: int) -> np.ndarray:
    """Return float32 in [-1, 1) by whole-number arithmetic: the same on every machine and numpy."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(1000003 * seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((x >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def cases() -> dict[str, tuple[str, Content, dict[str, Any]]]:
    """Return name -> codec, content, what the receiver holds."""
    held = pseudo(1, LAYOUT.num_floats)
    floats = held + np.float32(0.03) * pseudo(2, held.size)
    known, near = np.abs(held[:SIZE]) > 0.75, np.abs(floats[:SIZE]) > 0.75
    few = np.abs(pseudo(3, SIZE)) > 0.95
    swapped = known ^ (pseudo(5, SIZE) > 0.97)
    half, both = pseudo(7, SIZE) > 0, {"known_mask": known, "reference": Reference(held)}

    def values(mask: np.ndarray) -> Content:
        sent = floats.copy()
        sent[:SIZE][~mask] = 0
        return Content(mask, sent, np.array([11]))

    # One number in a hundred moves a hundred times as far: steps beyond 24, coded by their own rule.
    leap = held + np.float32(0.001) * pseudo(8, held.size) * np.where(pseudo(9, held.size) > 0.98, 100, 1)
    leap[:SIZE][~known] = 0
    far = Content(known, leap.astype(np.float32), np.array([11]))
    apart = np.concatenate((np.abs(held[:1200]) > 0.9, np.abs(held[1200:SIZE]) > 0.3))

    return {
        "raw": ("raw", values(near), {}),
        "alone": ("lossless", values(few), {}),
        "on_mask": ("lossless", Content(swapped, None, None), {"known_mask": known}),
        "on_values": ("lossless", values(near), {"reference": Reference(held)}),
        "on_values_apart": ("lossless", Content(apart, None, None), {"reference": Reference(held)}),
        "on_both": ("lossless", values(near), both),
        "bitmap": ("lossless", Content(half, None, None), {}),
        "reuse": ("lossless", values(known), both),
        "full": ("lossless", values(np.ones(SIZE, bool)), {}),
        "bf16": ("bf16", values(near), both),
        "f16": ("f16", values(near), both),
        "step": ("step", values(near), both),
        "sign": ("sign", values(near), both),
        "step_alone": ("step", values(near), {}),
        "step_bare": ("step", values(np.ones(SIZE, bool)), {"reference": Reference(held)}),
        "sign_bare": ("sign", values(np.ones(SIZE, bool)), {"reference": Reference(held)}),
        "step_far": ("step", far, both),
    }


def thresholds() -> tuple[Layout, Content, Reference]:
    """Return a layout of rows, a number for each, and what the receiver holds."""
    rows = LAYOUT.rows
    held = pseudo(10, rows.num_floats)
    moved = held + np.float32(0.01) * pseudo(11, held.size)
    return rows, Content(np.ones(0, bool), moved.astype(np.float32), np.zeros(0, np.int64)), Reference(held)


def encoded_thresholds() -> bytes:
    rows, content, held = thresholds()
    return payload.encode("thresholds", rows, content, codec=CODECS["lossless"], reference=held)


def encoded(name: str) -> bytes:
    codec, content, holds = cases()[name]
    return payload.encode("values", LAYOUT, content, codec=CODECS[codec], **holds)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for one in cases():
        (HERE / f"{one}.bin").write_bytes(encoded(one))
    (HERE / "thresholds.bin").write_bytes(encoded_thresholds())
