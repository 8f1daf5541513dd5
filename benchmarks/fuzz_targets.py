"""What a fuzzer may send to a receiver, and what must hold afterwards: the targets of wire_fuzz.py."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.engines.flower_record import Order, of_answer, of_order, to_answer, to_order
from fedlth.federation.jobs import Failure, Job, Message, Reply
from fedlth.models.layout import Entry, Layout, layout_of
from fedlth.wire import metrics, payload
from fedlth.wire.codec import CODECS, Codec
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference


@dataclass(frozen=True)
class Target:
    """A receiver. `run` returns whether it accepted what `prepare` made of an input, and raises at a surprise.

    `seeds` are what honest senders would send; `model_bytes` is the receiver's model, 0 where none is at hand;
    `is_text` says that inputs are JSON, of which tokens may be swapped.
    """

    run: Callable[[Any], bool]
    seeds: list[bytes]
    prepare: Callable[[bytes], Any] = lambda data: data
    model_bytes: int = 0
    is_text: bool = False

    def __call__(self, data: bytes) -> bool:
        return self.run(self.prepare(data))


def handmade(*shapes: tuple[int, ...]) -> Layout:
    """Return a layout with these prunable tensors, a bias and a counter."""
    entries, at = [], 0
    for i, shape in enumerate(shapes):
        entries.append(Entry(f"w{i}", shape, "param", at, prunable=True))
        at += int(np.prod(shape))
    return Layout((*entries, Entry("x", (40,), "param", at), Entry("z", (), "buffer", 0, is_int=True)))


def layout(name: str) -> Layout:
    """Return tiny, small, or the layout of a model by name."""
    if name == "tiny":
        return handmade((8, 12), (5, 3, 3))
    if name == "small":
        return handmade((40, 50), (30, 3, 3))
    from fedlth.models.registry import build

    model = build(name, input_shape=(1, 28, 28), num_classes=10, options={})
    return layout_of(model, tuple(n for n, p in model.named_parameters() if p.ndim > 1))


@dataclass(frozen=True)
class Payloads:
    """Payloads of one layout under every codec. An input is a case's number and a payload without its checksum."""

    layout: Layout
    cases: tuple[tuple[Codec, dict[str, Any]], ...]

    @staticmethod
    def of(layout: Layout) -> Payloads:
        held, known = _held(layout)
        refs: tuple[dict[str, Any], ...] = ({}, {"known_mask": known})
        refs += ({"known_mask": known, "reference": Reference(held)},)
        return Payloads(layout, tuple((codec, ref) for codec in CODECS.values() for ref in refs))

    @property
    def model_bytes(self) -> int:
        return 4 * self.layout.num_floats + 8 * self.layout.num_ints

    def seeds(self) -> Iterator[bytes]:
        """Yield an input for each case, mask and content: what honest senders would send."""
        held, known = _held(self.layout)
        size, draw = self.layout.num_prunable, np.random.default_rng(1)
        floats = held + (0.05 * draw.normal(size=held.size)).astype(np.float32)
        near, far = np.abs(floats[:size]) > 1.2, draw.random(size) < 0.05
        for mask in (near, far, known, np.ones(size, bool), draw.random(size) < 0.5):
            sent = floats.copy()
            sent[:size][~mask] = 0
            whole = Content(mask, sent, np.full(self.layout.num_ints, 3))
            for number, (codec, refs) in enumerate(self.cases):
                for content in (whole, Content(mask, None, None)):
                    data = payload.encode("values", self.layout, content, codec=codec, **refs)
                    yield bytes((number,)) + data[:-4]

    def prepare(self, data: bytes) -> tuple[int, bytes]:
        """Return the case, and the payload with its checksum repaired."""
        body = data[1:]
        return (data[0] if data else 0), body + struct.pack("<I", zlib.crc32(body))

    def __call__(self, given: tuple[int, bytes]) -> bool:
        codec, refs = self.cases[given[0] % len(self.cases)]
        try:
            got = payload.decode(given[1], "values", self.layout, codec=codec, **refs)
        except PayloadError:
            return False
        size = self.layout.num_prunable
        assert got.mask.shape == (size,) and got.mask.dtype == bool
        if got.floats is None:
            assert got.ints is None
            return True
        assert got.floats.shape == (self.layout.num_floats,) and got.floats.dtype == np.float32
        assert bool(np.isfinite(got.floats).all()) and not got.floats[:size][~got.mask].any()
        assert got.ints is not None and got.ints.shape == (self.layout.num_ints,) and got.ints.dtype == np.int64
        return True


def _held(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    held = np.random.default_rng(0).normal(size=layout.num_floats).astype(np.float32)
    return held, np.abs(held[: layout.num_prunable]) > 1.2


def read_metrics(data: bytes) -> bool:
    """Metrics: what is read can be written into a run's files."""
    try:
        record = metrics.decode(data)
    except PayloadError:
        return False
    json.dumps(record, allow_nan=False).encode()
    return True


JOB = Job(study="{}", phase="federate", round=3, client=2, inbox=())
ANSWERS = (
    Reply(round=3, client=2, outbox=(Message("values", "u", b"1"), Message("metrics", "m", b"{}")), seconds=1.5),
    Reply(round=3, client=2, outbox=(Message("values", "u", b"1", True),), worker="pid 1", device="cpu"),
    Failure(round=3, client=2, kind="raised", reason="no luck", worker="pid 1"),
)
ORDER = Order(Job(study="{}", phase="federate", round=3, client=2, inbox=(Message("mask", "m", b"1"),)), "ab", 60.0)


def _flat(records: Any) -> bytes:
    """Return records as JSON text: what Flower hands over are values of its own types, never bytes to parse."""
    text = json.dumps({n: {k: ["b", v.hex()] if isinstance(v, bytes) else v for k, v in r.items()} for n, r in records})
    return text.encode()


def _records(data: bytes) -> dict[str, dict[str, Any]] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(r, dict) for r in found.values()):
        return None
    return {n: {k: b"1" if isinstance(v, list) else v for k, v in r.items()} for n, r in found.items()}


def flower_seeds() -> Iterator[bytes]:
    """Yield inputs of read_flower: a head's text, after a byte that says which side reads it and what lies beside."""
    for answer, places in zip(ANSWERS, (0, 4, 8), strict=True):
        yield bytes((places,)) + str(of_answer(answer)["head"]["b"]).encode()
        yield b"\x02" + _flat(of_answer(answer).items())
    yield b"\x05" + str(of_order(ORDER)["head"]["b"]).encode()
    yield b"\x03" + _flat(of_order(ORDER).items())


def read_flower(data: bytes) -> bool:
    """Flower records: a head's text with payloads in each place, or a whole tree of records; either side reads them."""
    side, text = data[:1], data[1:].decode(errors="replace")
    places = ({"0": b"1", "1": b"1"}, {"0": b"1"}, {})[(side[0] >> 2) % 3] if side else {}
    records = _records(data[1:]) if side and side[0] & 2 else {"head": {"b": text, **places}}
    if records is None:
        return False
    try:
        got = to_order(records) if side and side[0] & 1 else to_answer(records, JOB)
    except ValueError:
        return False
    if isinstance(got, Order):
        assert got.timeout_s == got.timeout_s and isinstance(got.job.round, int)
        return True
    assert (got.round, got.client) == (3, 2) and got.worker.isprintable() and len(got.worker) <= 100
    if isinstance(got, Reply):
        json.dumps([got.seconds, got.device, got.worker], allow_nan=False)
        assert all(len(m.kind + m.name) <= 200 and isinstance(m.payload, bytes) for m in got.outbox)
    return True


def target(name: str) -> Target:
    """Return a target: metrics, flower, or the payloads of a layout by name."""
    if name == "metrics":
        record = {"num_examples": 60, "val_accuracy": 0.5, "rows": [{"client": 2, "arm": "ticket", "x": [1.5, None]}]}
        return Target(
            read_metrics, [metrics.encode(record), metrics.encode({}), b'{"a": {"f": "+1e999"}}'], is_text=True
        )
    if name == "flower":
        return Target(read_flower, list(flower_seeds()), is_text=True)
    made = Payloads.of(layout(name))
    return Target(made, list(made.seeds()), made.prepare, made.model_bytes)
