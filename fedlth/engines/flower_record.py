"""Jobs and answers as Flower records: one small JSON head, and the payloads. Nothing here imports Flower."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from fedlth.federation.jobs import Failure, Job, Message, Reply
from fedlth.version import __version__
from fedlth.wire.payload import VERSION

# A record of records, as a Flower message carries it. Where a payload lies (benchmarks/flower_framing.py measures it):
# - one client's own in the head's record, which costs 12 to 18 B;
# - a broadcast in a record of its own ("p0.0"), 240 B: Flower stores equal objects once, so that it lies once on the
#   SuperLink for all clients, and from two clients and 500 B on that is less;
# - what is longer than a piece in records of a piece each ("p0.0", "p0.1", ...), 250 B for each. Flower 1.41 sends
#   each record in a request of its own, two at a time, waits 30 s for the answer, and then sends it again; and the
#   SuperLink gives up what has not come 180 s after the record before. At 64 kbit/s two pieces take 9 s; where packets
#   are lost one connection starves the other, and the slower of them took up to 15 s (twice that with 64 KiB).
Records = dict[str, dict[str, str | bytes]]
View = Mapping[str, Mapping[str, Any]]
HEAD, BODY, APART = "head", "b", "p"
PIECE_BYTES = 1 << 15
LONGEST_HEAD, MOST_MESSAGES, LONGEST_NAME = 1 << 19, 1000, 100  # a client has at most so many neighbours
KINDS = ("raised", "died", "hung", "memory", "lost")
SPEAKS = f"{__version__}/{VERSION}"  # what both ends must have: of other code nobody promises equal results


class OtherVersion(ValueError):
    """A message of another version; `head` is what it says of itself, none of which has been checked."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        said = plain_line(str(head.get("v", "an earlier one")), 40)
        super().__init__(f"this end has fedlth {SPEAKS} (its version, the wire format's), the other end {said}")
        self.head = head


@dataclass(frozen=True)
class Order:
    """A job as a client receives it.

    `run` names the run's folder on the device; `timeout_s` bounds the step. `name` is the study's, which a device's
    ticket says: the job's text of the study is without it.
    """

    job: Job
    run: str
    timeout_s: float
    name: str = "study"


def of_order(order: Order) -> Records:
    """Return the records of a job; its state is never among them."""
    job = order.job
    head = {
        "study": job.study, "phase": job.phase, "round": job.round, "client": job.client, "version": job.version,
        "data": job.data, "run": order.run, "timeout_s": order.timeout_s, "name": order.name,
    }  # fmt: skip
    return _pack(head, job.inbox)


def to_order(records: View) -> Order:
    """Return the job in a message; raise ValueError at anything that is not one."""
    head, inbox = _unpack(records)
    job = Job(
        study=_field(head, "study", str), phase=_field(head, "phase", str), round=_field(head, "round", int),
        client=_field(head, "client", int), version=_field(head, "version", str), inbox=inbox,
        data=_field(head, "data", str),
    )  # fmt: skip
    name = _field(head, "name", str)
    name.encode()  # half of a surrogate pair, which JSON may hold and no file's metadata, is a ValueError
    return Order(job, _field(head, "run", str), _seconds(head, "timeout_s"), name)


def of_answer(answer: Reply | Failure) -> Records:
    """Return the records of an answer. A failure crosses as a value, so that its kind and reason survive."""
    head: dict[str, Any] = {"round": answer.round, "client": answer.client, "worker": answer.worker}
    if isinstance(answer, Failure):
        return _pack(head | {"kind": answer.kind, "reason": answer.reason}, ())
    told: dict[str, Any] = {"seconds": answer.seconds, "device": answer.device}
    if answer.flops:
        told["flops"] = [answer.flops, answer.alive_flops]
    return _pack(head | told, answer.outbox)


def to_answer(records: View, job: Job) -> Reply | Failure:
    """Return the answer to `job` in a message; raise ValueError at anything that is not one."""
    head, outbox = _unpack(records)
    named = _field(head, "round", int), _field(head, "client", int)
    if named != (job.round, job.client):
        raise ValueError(f"answers another job than round {job.round} of client {job.client}")
    worker = plain_line(_field(head, "worker", str), 100)
    if "kind" in head:
        kind = _field(head, "kind", str)
        if kind not in KINDS:
            raise ValueError(f"failure kind must be one of {', '.join(KINDS)}, got {plain_line(kind, 40)!r}")
        reason = plain_line(_field(head, "reason", str), 300)
        return Failure(round=job.round, client=job.client, kind=kind, reason=reason, worker=worker)
    flops, alive_flops = _flops(head)
    return Reply(
        round=job.round, client=job.client, outbox=outbox, worker=worker, seconds=_seconds(head, "seconds"),
        device=plain_line(_field(head, "device", str), 100), flops=flops, alive_flops=alive_flops,
    )  # fmt: skip


def _pack(head: Mapping[str, Any], messages: Sequence[Message]) -> Records:
    parts = [[m.kind, m.name, m.broadcast] for m in messages]
    own: dict[str, str | bytes] = {BODY: json.dumps({**head, "v": SPEAKS, "messages": parts}, sort_keys=True)}
    records: Records = {HEAD: own}
    room = PIECE_BYTES  # of the head's record, for all the payloads in it
    for i, message in enumerate(messages):
        payload = message.payload
        if not message.broadcast and len(payload) <= room:
            own[str(i)] = payload
            room -= len(payload)
            continue
        for number, start in enumerate(range(0, max(len(payload), 1), PIECE_BYTES)):
            records[_piece(i, number)] = {BODY: payload[start : start + PIECE_BYTES]}
    return records


def _piece(i: int, number: int) -> str:
    return f"{APART}{i}.{number}"


def _unpack(records: View) -> tuple[dict[str, Any], tuple[Message, ...]]:
    """Return the head and the messages; each payload must lie in one way, and nothing else may come along."""
    try:
        text = _field(records[HEAD], BODY, str)
        if len(text) > LONGEST_HEAD:
            raise ValueError(f"a head of {len(text)} characters, at most {LONGEST_HEAD} are read")
        head = dict(json.loads(text))
        if head.get("v") != SPEAKS:
            raise OtherVersion(head)
        parts = _field(head, "messages", list)
        if len(parts) > MOST_MESSAGES:
            raise ValueError(f"{len(parts)} payloads, at most {MOST_MESSAGES} are read")
        left = {(record, key) for record, held in records.items() for key in held} - {(HEAD, BODY)}
        messages = []
        for i, (kind, name, broadcast) in enumerate(parts):
            if (type(kind), type(name), type(broadcast)) != (str, str, bool):
                raise TypeError("a message's kind and name must be text")
            if max(len(kind), len(name)) > LONGEST_NAME or not (kind + name).isprintable():
                raise ValueError("a message's kind or name is no name")
            apart = takewhile(left.__contains__, ((_piece(i, number), BODY) for number in count()))
            places = [(HEAD, str(i))] if (HEAD, str(i)) in left else list(apart)
            if not places:
                raise ValueError("a payload is missing")
            left.difference_update(places)
            payload = b"".join(_field(records[record], key, bytes) for record, key in places)
            messages.append(Message(kind, name, payload, broadcast))
        if left or not all(records.values()):
            raise ValueError("contains what the head does not name")
        return head, tuple(messages)
    except OtherVersion:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a fedlth message: {type(error).__name__}: {error}") from error


def _field(of: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = of.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is missing or of the wrong type")
    return value


def _seconds(head: Mapping[str, Any], name: str) -> float:
    """Return a finite number: JSON text may say NaN, or a whole number that no float holds."""
    value = _field(head, name, (int, float))
    if not (isinstance(value, float) or abs(value) < 2**53) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number")
    return float(value)


def _flops(head: Mapping[str, Any]) -> tuple[float, float]:
    """Return what a client says that it trained, (dense, by what is alive): finite and not negative; nothing is 0."""
    if "flops" not in head:
        return 0.0, 0.0
    told = _field(head, "flops", list)
    if len(told) != 2:
        raise ValueError("flops must be two numbers")
    both = {"dense": told[0], "alive": told[1]}
    dense, alive = _seconds(both, "dense"), _seconds(both, "alive")
    if min(dense, alive) < 0:
        raise ValueError("flops must not be negative")
    return dense, alive


def plain_line(text: str, longest: int) -> str:
    """Return one line that a terminal or a file takes: no control characters, no half of a surrogate pair."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text[: 4 * longest].split()))[:longest]
