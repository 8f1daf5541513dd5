"""The Flower engine itself: each job to the SuperNode of its client, each answer back to its job. No flwr in here."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from fedlth.engines.cohort import answered
from fedlth.engines.flower_nodes import Roll
from fedlth.engines.flower_record import BODY, HEAD, MOST_MESSAGES, Order, Records, View, of_order, to_answer
from fedlth.engines.inprocess import one_line
from fedlth.errors import StudyError
from fedlth.federation.jobs import Again, Answers, Failure, Job, Reply, never
from fedlth.storage import store
from fedlth.study.schema import Study

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 3600.0
GRACE_S = 120.0  # Ray's workers, or a device's process, need up to half a minute before the first step begins
RUN_NAME = "flower-run"
AT_ONCE = 256  # nodes answer at their own pace: a part ends with its slowest
# Flower's codes (flwr.common.constant.ErrorCode) by what they mean here; code 0 is any exception of its backend.
UNREADABLE = -1  # ours: Flower could not unpack what came, so that its size is not known either
RAISED, CRASHED = (UNREADABLE, 1, 2, 6, 7), 8
TOLD_EVERY_S = 60.0
REASON = 300
RAY_DEATH = re.compile("ActorDied|ActorUnavailable|WorkerCrashed")


@dataclass(frozen=True)
class Sent:
    """A message on its way: its id, and its size as the transport frames it."""

    id: str
    framed_bytes: int


@dataclass(frozen=True)
class Back:
    """What came back for one message: records, or Flower's error code (or UNREADABLE) with its reason."""

    id: str
    framed_bytes: int = 0
    records: View | None = None
    code: int = 0
    reason: str = ""


class Transport(Protocol):
    """What the engine needs of Flower."""

    poll_s: float

    def online(self) -> Iterable[int]: ...

    def send(self, records: Records, *, node: int, kind: str) -> Sent: ...

    def collect(self, ids: Iterable[str]) -> list[Back]:
        """Return what has come, each once. What cannot be unpacked is UNREADABLE and costs no other message."""
        ...


class FlowerEngine:
    """Clients keep their own state; `framed_down_bytes` and `framed_up_bytes` are those of whole Flower messages."""

    name = "flower"
    holds_state = True

    def __init__(self, transport: Transport, *, study: Study, out: Path, wait_s: float, stop: threading.Event) -> None:
        self._transport, self._out, self._stop = transport, out, stop
        self._timeout_s = study.job_timeout_s or DEFAULT_TIMEOUT_S
        self._roll = Roll(
            count=study.clients.count, online=transport.online, ask=self._ask, pause=self._pause,
            wait_s=wait_s,
        )  # fmt: skip

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        source = iter(jobs)
        while part := list(islice(source, AT_ONCE)):
            yield from answered(part, self._part, again)

    def _part(self, jobs: Sequence[Job]) -> list[Reply | Failure]:
        nodes, run = self._roll.nodes(), self._run_name()
        sent = [self._send(job, nodes.get(job.client), run) for job in jobs]
        backs = self._exchange([s for s in sent if s is not None], self._timeout_s + GRACE_S)
        return [self._answer(j, s, None if s is None else backs.get(s.id)) for j, s in zip(jobs, sent, strict=True)]

    def ready(self) -> None:
        """Wait until every client has a SuperNode; raise StudyError where they do not come."""
        self._roll.nodes()

    def close(self) -> None:
        pass

    def _send(self, job: Job, node: int | None, run: str) -> Sent | None:
        if node is None:
            return None
        if len(job.inbox) > MOST_MESSAGES:
            raise StudyError(
                f"method.topology: engine flower carries at most {MOST_MESSAGES} messages to a client, client "
                f"{job.client} would get {len(job.inbox)}"
            )
        return self._transport.send(of_order(Order(job, run, self._timeout_s)), node=node, kind="train")

    def _answer(self, job: Job, sent: Sent | None, back: Back | None) -> Reply | Failure:
        if sent is None:
            return _failure(job, "lost", "no SuperNode serves this client now")
        answer, up = self._read(job, back)
        return replace(answer, framed_down_bytes=sent.framed_bytes, framed_up_bytes=up)

    def _read(self, job: Job, back: Back | None) -> tuple[Reply | Failure, int | None]:
        """Return the answer, and the bytes of the message that brought it."""
        if back is None:
            return _failure(job, "lost", f"no answer for {self._timeout_s + GRACE_S:g} s"), None
        if back.records is None:  # made up at our end: nothing came, or nothing that can be read
            return _failure(job, _kind(back.code, back.reason), f"Flower error {back.code}: {back.reason}"), None
        try:
            return to_answer(back.records, job), back.framed_bytes
        except Exception as error:  # whatever a stranger's records make it raise
            return _failure(job, "raised", f"unreadable answer: {one_line(error)}"), back.framed_bytes

    def _exchange(self, sent: Sequence[Sent], limit_s: float) -> dict[str, Back]:
        """Collect until all have answered, or none has for `limit_s`, the time that one step may take.

        Every client bounds its own step, so that even a long queue on one worker shows progress within that time.
        """
        waiting = {s.id for s in sent}
        got: dict[str, Back] = {}
        last = told = time.monotonic()
        while waiting and time.monotonic() - last < limit_s:
            for back in self._transport.collect(sorted(waiting)):
                got[back.id] = back
                waiting.discard(back.id)
                last = told = time.monotonic()
            if waiting and time.monotonic() - told >= TOLD_EVERY_S:
                told = time.monotonic()
                late = f"none came for {told - last:.0f} s, the limit is {limit_s:g} s"
                log.info(f"waiting for {len(waiting)} of {len(sent)} answers; {late}")
            if waiting:
                self._pause()
        return got

    def _ask(self, nodes: Sequence[int]) -> dict[int, int | str]:
        sent = {n: self._transport.send({HEAD: {BODY: ""}}, node=n, kind="query") for n in nodes}
        backs = self._exchange(list(sent.values()), GRACE_S)  # it asks for no work
        return {n: _partition(backs.get(s.id)) for n, s in sent.items()}

    def _pause(self) -> None:
        if self._stop.wait(self._transport.poll_s):
            raise KeyboardInterrupt

    def _run_name(self) -> str:
        """Return the run's name on its devices; it lies in the run folder, and so survives a resume."""
        file = self._out / RUN_NAME
        if not file.exists():
            store.write_atomic(file, secrets.token_hex(8).encode())
        return file.read_text().strip()


def _partition(back: Back | None) -> int | str:
    if back is None:
        return "no answer"
    if back.records is None:
        return f"Flower error {back.code}: {back.reason[-200:]}"
    said = back.records.get(HEAD, {}).get(BODY)
    return said if isinstance(said, int) else str(said)


def _failure(job: Job, kind: str, reason: str) -> Failure:
    if len(reason) > REASON:  # Ray's begin with what ran, and end with what it raised
        reason = f"{reason[:100]} ... {reason[105 - REASON :]}"
    return Failure(round=job.round, client=job.client, kind=kind, reason=reason)


def _kind(code: int, reason: str) -> str:
    if code in RAISED:
        return "raised"
    if "OutOfMemory" in reason:
        return "memory"
    return "died" if code == CRASHED or RAY_DEATH.search(reason) else "lost"
