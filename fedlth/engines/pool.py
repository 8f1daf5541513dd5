"""The workers: one job in flight each, a deadline on everything, and a fresh one for each that is lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedlth.engines.worker import Born, Parcel
from fedlth.errors import StudyError
from fedlth.jobs import Failure, Job, Reply

STARTS = 2  # a place whose worker cannot start twice in a row is given up


@dataclass(frozen=True)
class Lost:
    """A call that gave no value: kind is died, memory or raised."""

    kind: str
    reason: str


class Seam(Protocol):
    """What the pool needs of whatever holds the workers: Ray, or forked processes."""

    def put(self, value: object) -> Any: ...
    def call(self, actor: Any, method: str, *args: object, **kwargs: object) -> Any: ...
    def wait(self, calls: Sequence[Any], *, timeout_s: float | None) -> list[Any]: ...
    def get(self, call: Any) -> Any: ...
    def kill(self, actor: Any) -> None: ...


@dataclass
class Place:
    """Room for one worker. `call` is its start, or the job at `position`; None while it waits."""

    number: int
    actor: Any = None
    call: Any = None
    position: int = -1
    deadline: float | None = None
    failed_starts: int = 0
    worker: str = ""

    @property
    def starting(self) -> bool:
        return self.call is not None and self.position < 0

    @property
    def idle(self) -> bool:
        return self.actor is not None and self.call is None


@dataclass(frozen=True)
class Limits:
    """Seconds: for a worker to start, and for a job from the moment an idle worker gets it (None: no limit)."""

    start_s: float
    job_s: float | None


class Pool:
    """A fixed number of places. Which of them does a job changes nothing but times."""

    def __init__(
        self, seam: Seam, size: int, *, name: str, spawn: Callable[[], Any], given: Mapping[str, object],
        limits: Limits,
    ) -> None:  # fmt: skip
        self.seam, self.name, self.spawn, self.given, self.limits = seam, name, spawn, given, limits
        self.places = [Place(number) for number in range(size)]

    def map(self, jobs: Sequence[Job]) -> list[Reply | Failure]:
        """Run every job; answers stand in job order. Raises StudyError when no worker can be started."""
        batch = _Batch(self, jobs)
        try:
            return batch.run()
        finally:
            # Only after an error is one still at work: its answer would be taken for another job's.
            for place in self.places:
                if place.position >= 0:
                    self.drop(place)

    def start(self, place: Place, study: Any) -> None:
        place.actor = self.spawn()
        place.call = self.seam.call(place.actor, "start", study, **self.given)
        place.deadline = time.monotonic() + self.limits.start_s

    def drop(self, place: Place) -> None:
        """End a place's worker; a new one is started when there is work for it."""
        if place.actor is not None:
            self.seam.kill(place.actor)
        place.actor, place.call, place.position, place.deadline = None, None, -1, None

    def close(self) -> None:
        for place in self.places:
            self.drop(place)


class _Batch:
    """One map: what is still to do, and what has come back."""

    def __init__(self, pool: Pool, jobs: Sequence[Job]) -> None:
        self.pool, self.jobs = pool, jobs
        self.todo = deque(range(len(jobs)))
        self.answers: dict[int, Reply | Failure] = {}
        self.stored: dict[bytes | str, Any] = {}
        self.trouble = ""

    def run(self) -> list[Reply | Failure]:
        while len(self.answers) < len(self.jobs):
            self._hand_out()
            self._collect()
        return [self.answers[i] for i in range(len(self.jobs))]

    def _store(self, value: bytes | str) -> Any:
        """Put a value into the object store, once."""
        if value not in self.stored:
            self.stored[value] = self.pool.seam.put(value)
        return self.stored[value]

    def _hand_out(self) -> None:
        """Give idle workers a job each, then start as many workers as there are jobs left for."""
        for place in self.pool.places:
            if self.todo and place.idle:
                self._begin(place, self.todo.popleft())
        coming = sum(place.starting for place in self.pool.places)
        for place in self.pool.places:
            if coming < len(self.todo) and place.actor is None and place.failed_starts < STARTS:
                self.pool.start(place, self._store(self.jobs[self.todo[0]].study))
                coming += 1
        if not any(place.call is not None for place in self.pool.places):
            raise StudyError(f"{self.pool.name}: no worker could be started: {self.trouble}")

    def _begin(self, place: Place, position: int) -> None:
        job = self.jobs[position]
        shared = tuple(i for i, m in enumerate(job.inbox) if m.broadcast)
        light = tuple(replace(m, payload=b"") if m.broadcast else m for m in job.inbox)
        payloads = [self._store(job.inbox[i].payload) for i in shared]
        parcel = Parcel(replace(job, study="", inbox=light), shared)
        place.position = position
        place.call = self.pool.seam.call(place.actor, "step", parcel, self._store(job.study), *payloads)
        place.deadline = None if self.pool.limits.job_s is None else time.monotonic() + self.pool.limits.job_s

    def _collect(self) -> None:
        """Wait for the first answer or the first deadline."""
        busy = [place for place in self.pool.places if place.call is not None]
        deadlines = [place.deadline for place in busy if place.deadline is not None]
        patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ended = self.pool.seam.wait([place.call for place in busy], timeout_s=patience)
        now = time.monotonic()
        for place in busy:
            if place.call in ended:
                self._ended(place, self.pool.seam.get(place.call))
            elif place.deadline is not None and now >= place.deadline:
                self._overdue(place)

    def _ended(self, place: Place, value: Any) -> None:
        if isinstance(value, Born):
            where = f"@gpu{value.gpu}" if value.gpu else ""
            place.worker = f"{self.pool.name}:{place.number}{where} {value.host}:{value.pid}"
            place.call, place.deadline, place.failed_starts = None, None, 0
        elif place.starting:
            self._not_started(place, value.reason)
        elif isinstance(value, Reply | Failure):
            self.answers[place.position] = replace(value, worker=place.worker)
            place.call, place.position, place.deadline = None, -1, None
            if isinstance(value, Failure) and value.kind == "memory":
                self.pool.drop(place)  # what was refused may have left the process half done
        else:
            self._fail(place, value.kind, value.reason)

    def _overdue(self, place: Place) -> None:
        if place.starting:
            self._not_started(place, f"it took more than {self.pool.limits.start_s:g} s")
        else:
            self._fail(place, "hung", f"no answer within job_timeout_s = {self.pool.limits.job_s:g} s")

    def _not_started(self, place: Place, reason: str) -> None:
        self.trouble = reason
        place.failed_starts += 1
        self.pool.drop(place)

    def _fail(self, place: Place, kind: str, reason: str) -> None:
        job = self.jobs[place.position]
        self.answers[place.position] = Failure(
            round=job.round, client=job.client, kind=kind, reason=reason, worker=place.worker
        )
        self.pool.drop(place)
