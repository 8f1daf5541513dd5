"""Injected faults at work: an engine whose answers meet them, and a client whose numbers do.

What goes wrong on the way, or with a machine, is done at the driver's end, so that it is the same on every engine. Only
what needs the client's own numbers, or its process, is done there. docs/study.md has the faults.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth import rng
from fedlth.experiment.chaos import KILL, fault_of
from fedlth.experiment.experiment import Experiment, open_experiment
from fedlth.federation.jobs import Again, Answers, Engine, Enough, Failure, Job, Message, Reply, never
from fedlth.models.layout import Layout
from fedlth.study.schema import Study
from fedlth.wire import metrics, payload
from fedlth.wire.codec import Codec
from fedlth.wire.payload import Content

# Faults after which nothing comes: what kind of failure that is, and what is said of it.
NOTHING_COMES: Mapping[str, tuple[str, str]] = {
    "drop": ("lost", "no answer came"),
    "delay": ("hung", "its answer came too late"),
    KILL: ("died", "its process was killed"),
    "disk_full": ("raised", "OSError: [Errno 28] No space left on device"),
}
NUMBERS = ("nan", "wrong_shape", "huge")  # done by the client, who alone knows its mask
HUGE = 9e29  # within what a payload may hold


def chaotic(engine: Engine, experiment: Experiment) -> Engine:
    """Return an engine whose answers meet the study's faults; the engine itself where it has none."""
    return engine if experiment.study.chaos is None else Chaotic(engine, experiment.study)


@dataclass(frozen=True)
class Chaotic:
    """An engine of which some answers are lost or damaged, by the study's `chaos`."""

    engine: Engine
    study: Study

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def holds_state(self) -> bool:
        return self.engine.holds_state

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        """Run the jobs of which an answer comes; yield those of which none does in their places."""
        drawn = deque[tuple[Job, str]]()
        # Where jobs have processes of their own, one is really killed.
        silent = NOTHING_COMES.keys() - ({KILL} if getattr(self.engine, "processes", False) else set())

        def asked() -> Iterator[Job]:
            for job in jobs:
                fault = fault_of(self.study, job.phase, job.round, job.client)
                drawn.append((job, fault))
                if fault not in silent:
                    yield job

        with closing(self.engine.map(asked(), again=again)) as answers:
            for job, answer in answers:
                while drawn[0][1] in silent:
                    yield _nothing(*drawn.popleft())
                _, fault = drawn.popleft()
                yield job, self._met(fault, job, answer)
        while drawn:
            yield _nothing(*drawn.popleft())

    def present(self, *, until: Enough | None = None) -> frozenset[int] | None:
        return self.engine.present(until=until)

    def late(self) -> Sequence[tuple[Job, Reply | Failure]]:
        return self.engine.late()

    def close(self) -> None:
        self.engine.close()

    def _met(self, fault: str, job: Job, answer: Reply | Failure) -> Reply | Failure:
        """Return what is left of an answer."""
        if isinstance(answer, Failure):
            if fault != KILL or answer.kind != "died":
                return answer
            # How a process ended is another text on each engine.
            return replace(answer, reason=NOTHING_COMES[KILL][1], injected=fault)
        answer = replace(answer, injected=fault)
        if fault == "stale":
            return replace(answer, round=answer.round - 1)
        if fault == "duplicate":
            return replace(answer, outbox=answer.outbox * 2)
        if fault == "lie_about_counts":
            return replace(answer, outbox=tuple(_record(m, _more_counted) for m in answer.outbox))
        if fault == "corrupt":
            assert self.study.chaos is not None
            draw = rng.stream(self.study.chaos.seed, f"chaos bit {job.phase}", job.round, job.client)
            return replace(answer, outbox=_flipped(answer.outbox, draw))
        return answer


def _nothing(job: Job, fault: str) -> tuple[Job, Failure]:
    kind, reason = NOTHING_COMES[fault]
    return job, Failure(round=job.round, client=job.client, kind=kind, reason=reason, injected=fault)


def _flipped(outbox: tuple[Message, ...], draw: np.random.Generator) -> tuple[Message, ...]:
    """Flip one bit: of what carries a model or a mask, if anything does, since metrics have no checksum."""
    places = [i for i, m in enumerate(outbox) if m.kind != "metrics"] or list(range(len(outbox)))
    at = places[int(draw.integers(len(places)))]
    data = bytearray(outbox[at].payload)
    byte, bit = (int(n) for n in draw.integers((len(data), 8)))
    data[byte] ^= 1 << bit
    return (*outbox[:at], replace(outbox[at], payload=bytes(data)), *outbox[at + 1 :])


def die_if_killed(job: Job) -> None:
    """End this process where the study's chaos kills it; only for a worker that its engine replaces."""
    if fault_of(open_experiment(job.study).study, job.phase, job.round, job.client) == KILL:
        os.kill(os.getpid(), signal.SIGKILL)


def spoilt(
    fault: str, outbox: tuple[Message, ...], contents: Mapping[str, Content], layout: Callable[[str, str], Layout],
    codec: Codec,
) -> tuple[Message, ...]:  # fmt: skip
    """Return what a client is about to send with the wrong numbers in its first message that has any.

    `layout` is asked for a message's, by name and kind. Where no message has numbers of a model, the metrics are wrong.
    """
    for i, message in enumerate(outbox):
        content = contents.get(message.name)
        if content is None or (fault != "wrong_shape" and (content.floats is None or not content.floats.size)):
            continue
        of, wrong = layout(message.name, message.kind), content
        if fault == "wrong_shape":
            of = of.select(lambda e, last=of.entries[-1]: e is not last)  # type: ignore[misc]
            floats = None if content.floats is None else np.zeros(of.num_floats, np.float32)
            ints = None if content.ints is None else np.zeros(of.num_ints, np.int64)
            wrong = Content(np.ones(of.num_prunable, bool), floats, ints)
        else:
            value = np.nan if fault == "nan" else HUGE
            wrong = replace(content, floats=np.full_like(content.floats, value))
        # It refers to nothing, which is allowed in every codec.
        data = payload.encode(message.kind, of, wrong, codec=codec)
        return (*outbox[:i], replace(message, payload=data), *outbox[i + 1 :])
    change: Callable[[dict[str, Any]], dict[str, Any]] = {
        "nan": lambda record: _each(record, lambda _: float("nan")),
        "huge": lambda record: _each(record, lambda _: HUGE),
        "wrong_shape": lambda record: {"record": record},
    }[fault]
    return tuple(_record(m, change) for m in outbox)


def _record(message: Message, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Message:
    """Return a message of metrics with its record changed, any other as it is."""
    if message.kind != "metrics":
        return message
    return replace(message, payload=metrics.encode(change(metrics.decode(message.payload))))


def _more_counted(record: Any) -> Any:
    """Return a record with a thousand times as many examples as there are."""
    if isinstance(record, dict):
        return {
            k: 1000 * v + 1 if k.startswith("num_") and type(v) is int else _more_counted(v) for k, v in record.items()
        }
    return [_more_counted(one) for one in record] if isinstance(record, list) else record


def _each(record: Any, change: Callable[[Any], Any]) -> Any:
    """Return a record with each of its numbers changed."""
    if isinstance(record, dict):
        return {k: _each(v, change) for k, v in record.items()}
    if isinstance(record, list):
        return [_each(one, change) for one in record]
    return change(record) if isinstance(record, (int, float)) and not isinstance(record, bool) else record
