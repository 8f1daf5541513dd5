"""Mutated payloads, checksums repaired: python benchmarks/wire_fuzz.py [COUNT]. Ends with an error at any surprise."""

from __future__ import annotations

import resource
import struct
import sys
import time
import zlib

import numpy as np

from fedlth.params import Entry, Layout
from fedlth.wire import payload
from fedlth.wire.codec import CODECS
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

LAYOUT = Layout(
    (
        Entry("a", (40, 50), "param", 0, prunable=True),
        Entry("b", (30, 3, 3), "param", 2000, prunable=True),
        Entry("c", (40,), "param", 2270),
        Entry("n", (), "buffer", 0, is_int=True),
    )
)


def main(count: int) -> None:
    draw = np.random.default_rng(0)
    size = LAYOUT.num_prunable
    held = draw.normal(size=LAYOUT.num_floats).astype(np.float32)
    known = np.abs(held[:size]) > 1.2
    floats = held + (0.05 * draw.normal(size=held.size)).astype(np.float32)
    near, far = np.abs(floats[:size]) > 1.2, draw.random(size) < 0.05
    rows = np.concatenate((np.repeat(draw.random(40) < 0.5, 50), np.repeat(draw.random(30) < 0.5, 9)))
    seeds = []
    for name, codec in CODECS.items():
        for mask in (near, far, rows, known, np.ones(size, bool), draw.random(size) < 0.5):
            sent = floats.copy()
            sent[:size][~mask] = 0
            for refs in ({}, {"known_mask": known}, {"known_mask": known, "reference": Reference(held)}):
                for content in (Content(mask, sent, np.array([3])), Content(mask, None, None)):
                    data = payload.encode("values", LAYOUT, content, codec=codec, **refs)
                    seeds.append((name, data[:-4], refs))
    accepted, slowest, began = 0, 0.0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        name, body, refs = seeds[i % len(seeds)]
        bad = bytearray(body)
        for _ in range(int(draw.integers(1, 5))):
            # Mostly the structure: header, lengths, counts, a stream's head.
            at = int(draw.integers(0, len(bad) if draw.random() < 0.5 else min(len(bad), 60)))
            kind = draw.random()
            if kind < 0.7:
                bad[at] = int(draw.integers(0, 256))
            elif kind < 0.85:
                del bad[at : at + int(draw.integers(1, 9))]
            else:
                bad[at:at] = draw.bytes(int(draw.integers(1, 9)))
            bad = bad or bytearray(1)
        data = bytes(bad) + struct.pack("<I", zlib.crc32(bytes(bad)))
        start = time.perf_counter()
        try:
            got = payload.decode(data, "values", LAYOUT, codec=CODECS[name], **refs)
        except PayloadError:
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - start)
        accepted += 1
        assert got.mask.shape == (size,) and got.mask.dtype == bool
        assert got.floats is None or (got.floats.size == held.size and bool(np.isfinite(got.floats).all()))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{count} inputs from {len(seeds)} payloads in {time.perf_counter() - began:.0f} s: {accepted} accepted, all")
    print(f"finite and right-sized; slowest {1000 * slowest:.1f} ms; memory grew by {grown / 1024:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
