"""The Flower engine itself: each job to the SuperNode of its client, each answer back to its job. No flwr in here."""

from __future__ import annotations

import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from fedlth.data.split import num_sampled
from fedlth.engines.cohort import answered
from fedlth.engines.flower_keys import anybody
from fedlth.engines.flower_late import Late
from fedlth.engines.flower_link import no_link
from fedlth.engines.flower_nodes import DEVICES, Roll
from fedlth.engines.flower_record import (
    BODY,
    HEAD,
    MOST_MESSAGES,
    Order,
    Records,
    View,
    of_order,
    plain_line,
    to_answer,
)
from fedlth.engines.flower_returns import Returns
from fedlth.engines.flower_versions import REMARK, VERSIONS, asked
from fedlth.engines.inprocess import one_line
from fedlth.errors import StudyError
from fedlth.federation.jobs import Again, Answers, Enough, Failure, Job, Reply, never
from fedlth.storage import store
from fedlth.storage.records import LATE
from fedlth.study.schema import Study

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 3600.0
GRACE_S = 120.0  # Ray's workers, or a device's process, need up to half a minute before the first step begins
RUN_NAME = "flower-run"
AT_ONCE = 256  # nodes answer at their own pace: a part ends with its slowest
# Flower's codes (flwr.common.constant.ErrorCode) by what they mean here; code 0 is any exception of its backend.
UNREADABLE = -1  # ours: Flower could not unpack what came, so that its size is not known either
RAISED, CRASHED = (UNREADABLE, 1, 2, 6, 7), 8
GONE = (3, 4, 5)  # the node went away before it answered, or in the middle of its answer
TOLD_EVERY_S, LOOKED_EVERY_S = 60.0, 10.0
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
    """Clients keep their own state; `framed_down_bytes` and `framed_up_bytes` are those of whole Flower messages.

    `link_s` says how long a message of so many bytes and its answer may be on their way, `answer_s` how long whoever
    is online at the start may take to say whom it serves.
    """

    name = "flower"
    holds_state = True

    def __init__(
        self, transport: Transport, *, study: Study, out: Path, wait_s: float, stop: threading.Event,
        objection: Callable[[int, int], str] = anybody, link_s: Callable[[int], float] = no_link,
        answer_s: float | None = None, remedy: str = DEVICES,
    ) -> None:  # fmt: skip
        self._transport, self._out, self._stop, self._link_s = transport, out, stop, link_s
        self._timeout_s, self._study = study.job_timeout_s or DEFAULT_TIMEOUT_S, study.study
        self._wait_s, self._count, self._compute = wait_s, study.clients.count, study.compute
        wanted = study.federate.quorum
        self._roll = Roll(
            count=self._count, quorum=self._count if wanted is None else num_sampled(wanted, self._count),
            online=transport.online, ask=self._ask, heard=self._heard, pause=self._pause, wait_s=wait_s,
            answer_s=GRACE_S if answer_s is None else answer_s, objection=objection, remedy=remedy,
        )  # fmt: skip
        self._late = Late(self._timeout_s + GRACE_S)
        self._came_late: list[tuple[Job, Reply | Failure]] = []
        self._gathered = -math.inf
        self._returns = Returns(
            wait_s=wait_s if wanted is None else 0.0, nodes=self._nodes, pause=self._pause
        )  # fmt: skip

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        source, began = iter(jobs), time.monotonic()
        while part := list(islice(source, AT_ONCE)):
            yield from answered(part, partial(self._part, began), again)

    def _part(self, began: float, jobs: Sequence[Job]) -> list[Reply | Failure]:
        limits = [job.limit_s for job in jobs if job.limit_s is not None]
        ends = began + min(limits) if limits else None
        answers, gone = self._once(jobs, ends)
        back = self._returns({jobs[i].client for i in gone}, ends)
        if again := [i for i in gone if jobs[i].client in back]:
            # A client step depends on its job and its committed state alone: done again it is the same.
            second, _ = self._once([jobs[i] for i in again], ends)
            for i, answer in zip(again, second, strict=True):
                answers[i] = _of_both(answers[i], answer)
        return answers

    def _once(self, jobs: Sequence[Job], ends: float | None) -> tuple[list[Reply | Failure], list[int]]:
        """Send each job and return its answer; also the places of those whose SuperNode was not there or went away."""
        nodes, run = self._nodes(), self._run_name()
        busy = self._late.busy(nodes)
        sent = [self._send(job, nodes, busy, run, ends) for job in jobs]
        out = [s for s in sent if isinstance(s, Sent)]
        limit_s = self._timeout_s + GRACE_S + self._link_s(max((s.framed_bytes for s in out), default=0))
        backs = self._exchange(out, limit_s, ends)
        waited = "" if ends is not None and time.monotonic() >= ends else f"{limit_s:g} s"
        answers = [
            s if isinstance(s, Failure) else self._answer(j, s, backs.get(s.id), nodes[j.client], waited)
            for j, s in zip(jobs, sent, strict=True)
        ]
        lost = {s.id for s in out if s.id in backs and backs[s.id].code in GONE}
        gone = [
            i for i, s in enumerate(sent) if (s.id in lost if isinstance(s, Sent) else jobs[i].client not in nodes)
        ]  # fmt: skip
        return answers, gone

    def ready(self) -> None:
        """Wait until the clients that a run begins with have a SuperNode; raise StudyError where they do not come."""
        self._roll.nodes()
        self._out.mkdir(parents=True, exist_ok=True)
        self._run_name()  # from its first file on, the folder says that its run is Flower's

    def present(self, *, until: Enough | None = None) -> frozenset[int]:
        began = told = time.monotonic()
        while True:
            nodes = self._nodes()
            there = frozenset(c for c in nodes if 0 <= c < self._count) - self._late.busy(nodes).keys()
            now = time.monotonic()
            if until is None or until(there) or now - began >= self._wait_s:
                return there
            if now - told >= TOLD_EVERY_S:
                told = now
                log.info(f"waiting for clients: {len(there)} of {self._count} are there")
            self._pause()

    def late(self) -> list[tuple[Job, Reply | Failure]]:
        self._gathered = -math.inf
        self._gather()
        came, self._came_late = self._came_late, []
        return came

    def close(self) -> None:
        pass

    def _nodes(self) -> dict[int, int]:
        nodes = self._roll.nodes()
        self._gather()
        return nodes

    def _gather(self) -> None:
        """Take the answers to closed rounds that have come; each costs a request, so not at every turn."""
        if time.monotonic() - self._gathered < LOOKED_EVERY_S:
            return
        self._gathered, ids = time.monotonic(), self._late.ids()
        for back in self._transport.collect(ids) if ids else ():
            if (job := self._late.came(back.id)) is not None:
                answer, up = self._read(job, back)
                self._came_late.append((job, replace(answer, framed_up_bytes=up)))

    def _send(
        self, job: Job, nodes: Mapping[int, int], busy: Mapping[int, Job], run: str, ends: float | None
    ) -> Sent | Failure:  # fmt: skip
        if job.client not in nodes:
            return _failure(job, "lost", "no SuperNode serves this client now", sent=False)
        # A queue of rounds with limits would grow, and the device be late for ever; what has none can wait its turn.
        if (before := busy.get(job.client)) is not None and ends is not None:
            return _failure(job, LATE, f"its device is still at work on {before.phase} {before.round}", sent=False)
        if ends is not None and time.monotonic() >= ends:
            return _failure(job, LATE, "the time of the round was over before its turn", sent=False)
        if len(job.inbox) > MOST_MESSAGES:
            raise StudyError(
                f"method.topology: engine flower carries at most {MOST_MESSAGES} messages to a client, client "
                f"{job.client} would get {len(job.inbox)}"
            )
        order = of_order(Order(job, run, self._timeout_s, self._study))
        return self._transport.send(order, node=nodes[job.client], kind="train")

    def _answer(self, job: Job, sent: Sent, back: Back | None, node: int, waited: str) -> Reply | Failure:
        """Return the answer to a job; `waited` says how long for one that is missing, "" until the round's end."""
        answer: Reply | Failure
        up = None
        if back is not None:
            answer, up = self._read(job, back)
        else:
            self._late.add(sent.id, job, node)
            why = f"for {waited}" if waited else f"within federate.deadline_s = {job.limit_s:g} s"
            answer = _failure(job, "lost" if waited else LATE, f"no answer {why}")
        return replace(answer, framed_down_bytes=sent.framed_bytes, framed_up_bytes=up)

    def _read(self, job: Job, back: Back) -> tuple[Reply | Failure, int | None]:
        """Return the answer, and the bytes of the message that brought it."""
        if back.records is None:  # made up at our end: nothing came, or nothing that can be read
            return _failure(job, _kind(back.code, back.reason), f"Flower error {back.code}: {back.reason}"), None
        try:
            return to_answer(back.records, job), back.framed_bytes
        except Exception as error:  # whatever a stranger's records make it raise
            return _failure(job, "raised", f"unreadable answer: {one_line(error)}"), back.framed_bytes

    def _exchange(self, sent: Sequence[Sent], limit_s: float, ends: float | None) -> dict[str, Back]:
        """Collect until all have answered, or none has for `limit_s`, the time that one visit may take, or it `ends`.

        Every client bounds its own step, so that even a long queue on one worker shows progress within that time. Of
        two answers to one message the first counts; what answers no message of these is left alone.
        """
        waiting = {s.id for s in sent}
        got: dict[str, Back] = {}
        last = told = looked = time.monotonic()
        while waiting:
            began = time.monotonic()  # what has come by the end counts, so the last look is after it
            for back in self._transport.collect(sorted(waiting)):
                if back.id in waiting:
                    got[back.id] = back
                    waiting.discard(back.id)
                    last = told = time.monotonic()
            if began - last >= limit_s or (ends is not None and began >= ends):
                break
            if waiting and time.monotonic() - told >= TOLD_EVERY_S:
                told = time.monotonic()
                late = f"none came for {told - last:.0f} s, the limit is {limit_s:g} s"
                log.info(f"waiting for {len(waiting)} of {len(sent)} answers; {late}")
            if time.monotonic() - looked >= LOOKED_EVERY_S:  # who comes meanwhile serves from the next round on
                looked = time.monotonic()
                self._nodes()
            if waiting:
                self._pause(ends)
        return got

    def _ask(self, node: int) -> str:
        """Ask a node whom it serves; it also hears what it will need (flower_client.roll_call)."""
        return self._transport.send({HEAD: {BODY: self._compute}, VERSIONS: asked()}, node=node, kind="query").id

    def _heard(self, ids: Iterable[str]) -> dict[str, int | str]:
        asked, found = set(ids), dict[str, int | str]()
        for back in self._transport.collect(sorted(asked)):
            if back.id in asked:
                found.setdefault(back.id, _partition(back))  # of two answers the first counts
                if (remark := _remark(back)) and isinstance(found[back.id], int):
                    log.info(f"note: the device of client {found[back.id]} has {remark}: equal bits are not promised")
        return found

    def _pause(self, ends: float | None = None) -> None:
        wait_s = self._transport.poll_s
        if ends is not None:
            wait_s = max(0.0, min(wait_s, ends - time.monotonic()))
        if self._stop.wait(wait_s):
            raise KeyboardInterrupt

    def _run_name(self) -> str:
        """Return the run's name on its devices; it lies in the run folder, and so survives a resume."""
        file = self._out / RUN_NAME
        if not file.exists():
            store.write_atomic(file, secrets.token_hex(8).encode())
        return file.read_text().strip()


def _partition(back: Back) -> int | str:
    if back.records is None:
        return f"Flower error {back.code}: {back.reason[-200:]}"
    head = back.records.get(HEAD)
    said = head.get(BODY) if isinstance(head, Mapping) else None
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    return plain_line(said, REASON) if isinstance(said, str) else "an odd answer to the roll call"


def _remark(back: Back) -> str:
    record = (back.records or {}).get(REMARK)
    said = record.get(BODY) if isinstance(record, Mapping) else None
    return plain_line(said, REASON) if isinstance(said, str) else ""


def _failure(job: Job, kind: str, reason: str, *, sent: bool = True) -> Failure:
    if len(reason) > REASON:  # Ray's begin with what ran, and end with what it raised
        reason = f"{reason[:100]} ... {reason[105 - REASON :]}"
    return Failure(round=job.round, client=job.client, kind=kind, reason=reason, sent=sent)


def _of_both(first: Reply | Failure, second: Reply | Failure) -> Reply | Failure:
    """Return the second answer, with what has crossed in both tries."""
    if isinstance(second, Failure) and not second.sent:
        return first
    down = [one.framed_down_bytes for one in (first, second) if one.framed_down_bytes is not None]
    return replace(second, framed_down_bytes=sum(down) if down else None)


def _kind(code: int, reason: str) -> str:
    if code in RAISED:
        return "raised"
    if "OutOfMemory" in reason:
        return "memory"
    return "died" if code == CRASHED or RAY_DEATH.search(reason) else "lost"
