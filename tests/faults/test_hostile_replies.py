"""Thousands of hostile answers at the door of a live round: each is refused, moves nothing, and takes little memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.engines.flower_engine import UNREADABLE, Back
from fedlth.engines.flower_record import of_answer
from fedlth.federation.jobs import RESYNC, Failure, Message, Reply
from fedlth.federation.replies import Replies
from fedlth.federation.rounds import Federation, Step
from fedlth.federation.update_norms import UpdateNorms
from fedlth.models.layout import Layout
from fedlth.storage.run_folder import RunFolder
from fedlth.wire import metrics, numbers, payload
from fedlth.wire.codec import LOSSLESS
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference
from tests import tiny
from tests.engines.test_flower_engine import NODES, Loopback, engine_over

MB = 2**20
BOUND = 8 * MB  # the largest of the messages has 3 MB, which the test itself makes
MADE = tiny.of_method("fedavg", federate={"rounds": 2, "clients_per_round": 3})
BOMB = numbers.compress(np.zeros(4 * MB, np.float32))
Make = Callable[[np.random.Generator, Reply, Layout], Any]


def update(draw: np.random.Generator, reply: Reply, data: bytes) -> Reply:
    return replace(reply, outbox=(replace(reply.outbox[0], payload=data), *reply.outbox[1:]))


def floats(value: float) -> Make:
    """Put a value into some places of an update of zeros."""

    def make(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
        values = np.zeros(layout.num_floats, np.float32)
        values[draw.integers(layout.num_floats, size=draw.integers(1, 9))] = value
        content = Content(np.ones(layout.num_prunable, bool), values, np.zeros(layout.num_ints, np.int64))
        return update(draw, reply, payload.encode("values", layout, content))

    return make


def record(**changes: Callable[[np.random.Generator], Any]) -> Make:
    def make(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
        told = metrics.decode(reply.outbox[1].payload) | {name: made(draw) for name, made in changes.items()}
        return replace(reply, outbox=(reply.outbox[0], replace(reply.outbox[1], payload=metrics.encode(told))))

    return make


def flipped(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    data = bytearray(reply.outbox[0].payload)
    data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    return update(draw, reply, bytes(data))


def schema(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    gone = layout.entries[int(draw.integers(1, len(layout.entries)))]
    other = layout.select(lambda e: e is not gone)
    content = Content(np.ones(other.num_prunable, bool), np.zeros(other.num_floats, np.float32), np.zeros(0, np.int64))
    return update(draw, reply, payload.encode("values", other, content))


def sparse(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    mask = draw.random(layout.num_prunable) < draw.uniform(0, 0.99)
    kept = np.zeros(layout.num_floats, np.float32)
    return update(draw, reply, payload.encode("values", layout, Content(mask, kept, np.zeros(0, np.int64))))


def foreign(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    held = draw.normal(size=layout.num_floats).astype(np.float32)
    content = Content(np.ones(layout.num_prunable, bool), held * np.float32(1.0001), np.zeros(0, np.int64))
    data = payload.encode("values", layout, content, codec=LOSSLESS, reference=Reference(held))
    return update(draw, reply, data)


def unasked(kind: str, name: str, size: int) -> Make:
    def make(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
        return replace(reply, outbox=(*reply.outbox, Message(kind, name, draw.bytes(size))))

    return make


def noise(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    return update(draw, reply, draw.bytes(int(draw.integers(4000))))


def head(text: Callable[[np.random.Generator], str]) -> Make:
    return lambda draw, reply, layout: Back("", records={"head": {"b": text(draw)}})


def other_round(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    return replace(reply, round=reply.round - 1 - int(draw.integers(9)))


def large_metrics(draw: np.random.Generator, reply: Reply, layout: Layout) -> Reply:
    told = json.dumps({"num_examples": 3, "x": "y" * 900_000}).encode()
    return replace(reply, outbox=(reply.outbox[0], replace(reply.outbox[1], payload=told)))


KINDS: dict[str, Make] = {
    "nan": floats(np.nan),
    "infinity": floats(np.inf),
    "9e29 and 10^9 examples": lambda draw, reply, layout: record(num_examples=lambda _: 10**9)(
        draw, floats(9e29)(draw, reply, layout), layout
    ),
    "9e29": floats(9e29),
    "a wrong checksum": flipped,
    "a wrong schema": schema,
    "another mask": sparse,
    "10^12 examples": record(num_examples=lambda draw: 10**12 + int(draw.integers(10**6))),
    "no examples": record(num_examples=lambda draw: -int(draw.integers(9))),
    "accuracy above 1": record(val_accuracy=lambda draw: float(draw.uniform(1.1, 9))),
    "another client's": lambda draw, reply, layout: replace(reply, client=int(draw.integers(3, 99))),
    "another round's": other_round,
    "noise": noise,
    "a bomb": lambda draw, reply, layout: update(draw, reply, reply.outbox[0].payload[:24] + b"\0\xff\7" + BOMB),
    "no head": lambda draw, reply, layout: Back("", records={"tail": {"b": "x"}}),
    "deeply nested": head(lambda draw: "[" * int(draw.integers(1000, 100_000))),
    "a head of 3 MB": head(lambda draw: " " * (3 * MB)),
    "a mask not asked for": unasked("mask", "ticket", 100),
    "a request not asked for": unasked("control", RESYNC, 8),
    "900 kB of metrics": large_metrics,
    "a foreign reference": foreign,
    "twice": lambda draw, reply, layout: replace(reply, outbox=reply.outbox * 2),
    "nothing": lambda draw, reply, layout: replace(reply, outbox=()),
    "a client that stops": lambda draw, reply, layout: Back("", code=8, reason="the process ended"),
    "unreadable": lambda draw, reply, layout: Back("", code=UNREADABLE, reason="TypeError: odd"),
}  # fmt: skip


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_hostile_replies_move_nothing_and_take_little_memory(
    tmp_path: Path, count: int, record_property: Callable[[str, object], None]
) -> None:
    transport, folder = Loopback(tmp_path, NODES), RunFolder(tmp_path)
    folder.create(MADE)
    engine = engine_over(transport, MADE)
    run = Federation(tiny.experiment(MADE), folder, engine)
    run.run(stop_after=1)  # three updates are known, so that each is judged as it comes
    phase, round = run.experiment.steps[1]
    step = Step(phase, round, run.experiment.clients(phase, round), 1, len(run.experiment.steps))
    norms = UpdateNorms(run.theta, run.experiment.layout, dict(run.progress.norms[phase.name]))
    replies = Replies(
        run.experiment, phase, round, folder, run.progress, run._downloads(step), step.clients, norms, True
    )
    jobs = list(replies.jobs())
    job = jobs[1]
    (honest,) = tiny.answers(engine, [job])
    assert isinstance(honest, Reply)
    rule = run.experiment.rule(phase)
    assert rule is not None
    accumulator, draw, before = (
        rule.init(run.state, run.experiment.layout),
        np.random.default_rng(0),
        run.theta.digest(),
    )
    known = {group: list(held) for group, held in norms.accepted.items()}
    met: dict[str, str] = {}
    with ExitStack() as stack:
        states, masks = (stack.enter_context(one.writing(replies.version)) for one in (folder.clients, folder.mirrors))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        began = time.process_time()
        for i in range(count):
            kind = list(KINDS)[i % len(KINDS)]
            made = KINDS[kind](draw, honest, run.experiment.layout)
            transport.faults[job.client] = made if isinstance(made, Back) else Back("", records=of_answer(made))
            ((sent, answer),) = engine.map([job])
            assert not list(replies.judged(sent, answer, states, masks)), kind
            (failed,) = replies.failed
            assert failed.client == job.client and failed.kind in ("refused", "raised", "died") and failed.reason, kind
            assert isinstance(answer, Failure) or failed.kind == "refused"
            assert run.theta.digest() == before and norms.accepted == known and not replies.versions, kind
            met[kind] = failed.reason
            for told in (replies.failed, replies.rows, replies.times):  # what a round says of each grows with them
                told.clear()
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        del transport.faults[job.client]
        for sent, answer in engine.map(jobs):
            for contribution in replies.judged(sent, answer, states, masks):
                rule.add(accumulator, contribution)
    told = f"{count} hostile replies of {len(met)} kinds: {seconds:.1f} CPU s, peak {peak / MB:.1f} MB"
    print(told)
    record_property("told", told)
    assert met.keys() == KINDS.keys() and peak < BOUND, told
    new = rule.result(accumulator).theta
    rest = tiny.opened(folder, engine)
    rest.run(stop_after=2)
    assert new.digest() == rest.theta.digest() != before, "the round is that of its honest clients"
