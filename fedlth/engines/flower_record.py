"""Jobs and answers as Flower records: one small JSON head, and one record a payload. Nothing here imports Flower."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlth.jobs import Failure, Job, Message, Reply

# A record of records, as a Flower message carries it. A payload has a record of its own, because Flower stores equal
# records once: a broadcast then lies on the SuperLink once, whatever the number of clients.
Records = dict[str, dict[str, str | bytes]]
View = Mapping[str, Mapping[str, Any]]
HEAD, BODY = "head", "b"
KINDS = ("raised", "died", "hung", "memory", "lost")


@dataclass(frozen=True)
class Order:
    """A job as a client receives it. `run` names the run's folder on the device; `timeout_s` bounds the step."""

    job: Job
    run: str
    timeout_s: float


def of_order(order: Order) -> Records:
    """Return the records of a job; its state is never among them."""
    job = order.job
    head = {
        "study": job.study, "phase": job.phase, "round": job.round, "client": job.client, "version": job.version,
        "run": order.run, "timeout_s": order.timeout_s,
    }  # fmt: skip
    return _pack(head, job.inbox)


def to_order(records: View) -> Order:
    """Return the job in a message; raise ValueError at anything that is not one."""
    head, inbox = _unpack(records)
    job = Job(
        study=_field(head, "study", str), phase=_field(head, "phase", str), round=_field(head, "round", int),
        client=_field(head, "client", int), version=_field(head, "version", str), inbox=inbox,
    )  # fmt: skip
    return Order(job, _field(head, "run", str), float(_field(head, "timeout_s", (int, float))))


def of_answer(answer: Reply | Failure) -> Records:
    """Return the records of an answer. A failure crosses as a value, so that its kind and reason survive."""
    head: dict[str, Any] = {"round": answer.round, "client": answer.client, "worker": answer.worker}
    if isinstance(answer, Failure):
        return _pack(head | {"kind": answer.kind, "reason": answer.reason}, ())
    return _pack(head | {"seconds": answer.seconds, "device": answer.device}, answer.outbox)


def to_answer(records: View, job: Job) -> Reply | Failure:
    """Return the answer to `job` in a message; raise ValueError at anything that is not one."""
    head, outbox = _unpack(records)
    named = _field(head, "round", int), _field(head, "client", int)
    if named != (job.round, job.client):
        raise ValueError(f"answers round {named[0]} of client {named[1]}, not round {job.round} of {job.client}")
    worker = _field(head, "worker", str)[:100]
    if "kind" in head:
        kind = _field(head, "kind", str)
        if kind not in KINDS:
            raise ValueError(f"failure kind must be one of {', '.join(KINDS)}, got {kind[:40]!r}")
        reason = " ".join(_field(head, "reason", str).split())[:300]
        return Failure(round=job.round, client=job.client, kind=kind, reason=reason, worker=worker)
    return Reply(
        round=job.round, client=job.client, outbox=outbox, worker=worker,
        seconds=float(_field(head, "seconds", (int, float))), device=_field(head, "device", str)[:100],
    )  # fmt: skip


def _pack(head: Mapping[str, Any], messages: Sequence[Message]) -> Records:
    parts = [[m.kind, m.name, m.broadcast] for m in messages]
    records: Records = {HEAD: {BODY: json.dumps({**head, "messages": parts}, sort_keys=True)}}
    return records | {f"p{i}": {BODY: m.payload} for i, m in enumerate(messages)}


def _unpack(records: View) -> tuple[dict[str, Any], tuple[Message, ...]]:
    try:
        head = json.loads(_field(records[HEAD], BODY, str))
        messages = []
        for i, (kind, name, broadcast) in enumerate(head["messages"]):
            if (type(kind), type(name), type(broadcast)) != (str, str, bool):
                raise TypeError("a message's kind and name must be text")
            messages.append(Message(kind, name, _field(records[f"p{i}"], BODY, bytes), broadcast))
        return dict(head), tuple(messages)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a fedlth message: {type(error).__name__}: {error}") from error


def _field(of: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = of.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is missing or of the wrong type")
    return value
