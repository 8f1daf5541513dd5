"""The workers: one cohort of jobs in flight each, a deadline on everything, and a fresh one for each that is lost.

Client steps are pure, so work that is lost with its worker is done again and gives what it would have given.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from fedlth.engines.worker import Born, Parcel
from fedlth.errors import StudyError
from fedlth.federation.jobs import Again, Answers, Failure, Job, Reply, never

log = logging.getLogger(__name__)

AHEAD = 8  # cohorts a worker that may be drawn before the answer that is to be given next
STARTS = 2  # a place whose worker cannot start twice in a row is given up
TRIES = 3  # so often is a cohort's work begun whose worker is lost each time; then one of its clients does it
MACHINES = ("died", "memory")  # how a worker is lost with its process or its machine, and not by what a job raises
TOLD_EVERY_S = 30.0


@dataclass(frozen=True)
class Lost:
    """A call that gave no value: kind is died, memory or raised."""

    kind: str
    reason: str


class Seam(Protocol):
    """What the pool needs of whatever holds the workers: Ray, or forked processes."""

    def put(self, value: object) -> Any: ...
    def call(self, actor: Any, method: str, *args: object, **kwargs: object) -> Any:
        """Return what stands for the call, or None where the worker is known to have gone before it."""
        ...

    def wait(self, calls: Sequence[Any], *, timeout_s: float | None) -> list[Any]: ...
    def get(self, call: Any) -> Any: ...
    def kill(self, actor: Any) -> None: ...


@dataclass
class Place:
    """Room for one worker. `call` is its start, or the jobs at `positions`; None while it waits."""

    number: int
    actor: Any = None
    call: Any = None
    positions: tuple[int, ...] = ()
    deadline: float | None = None
    failed_starts: int = 0
    worker: str = ""

    @property
    def starting(self) -> bool:
        return self.call is not None and not self.positions

    @property
    def idle(self) -> bool:
        return self.actor is not None and self.call is None


@dataclass(frozen=True)
class Limits:
    """Seconds: for a worker to start, and for each job from the moment an idle worker gets it (None: no limit)."""

    start_s: float
    job_s: float | None


class Pool:
    """Places for workers, which may become more between two maps. Which does a job changes nothing but times."""

    def __init__(
        self, seam: Seam, size: int, *, name: str, spawn: Callable[[], Any], given: Mapping[str, object],
        limits: Limits, room: Callable[[], str] = str,
    ) -> None:  # fmt: skip
        self.seam, self.name, self.spawn, self.given, self.limits = seam, name, spawn, given, limits
        self.room = room  # room() says what workers may wait for, "" where nothing is known
        self.places = [Place(number) for number in range(size)]
        self.trouble, self.told = "", 0.0
        self.machines: dict[str, int] = {}

    def map(self, jobs: Iterable[Job], *, cohort: int = 1, again: Again = never) -> Answers:
        """Run every job, `cohort` consecutive ones a call; yield them with their answers, in job order.

        The cohorts are the same for any number of workers. Raises StudyError when no worker can be started.
        """
        try:
            yield from _Batch(self, iter(jobs), cohort, again).run()
        finally:
            # Only after an error, or a reader's, is one still at work: its answer would be taken for another job's.
            for place in self.places:
                if place.positions:
                    self.drop(place)

    def grow(self, size: int) -> None:
        """Have `size` places at least, and try those again that were given up: there are more machines now."""
        self.places += map(Place, range(len(self.places), size))
        for place in self.places:
            if place.actor is None:
                place.failed_starts = 0

    def start(self, place: Place, study: Any) -> None:
        place.failed_starts += 1  # until it says that it lives
        try:
            place.actor = self.spawn()
        except OSError as error:
            self.trouble = str(error)
            return
        place.call = self.seam.call(place.actor, "start", study, **self.given)
        place.deadline = time.monotonic() + self.limits.start_s
        if place.call is None:
            self.trouble = "its process ended at once"
            self.drop(place)

    def say_that_it_waits(self) -> None:
        """Say every so often, while no worker has started, for how long and what for."""
        now, deadline = time.monotonic(), min(p.deadline for p in self.places if p.deadline is not None)
        waited = now - (deadline - self.limits.start_s)
        if min(waited, now - self.told) >= TOLD_EVERY_S:
            self.told = now
            said = f"{self.name}: no worker yet after {waited:.0f} s, the limit is {self.limits.start_s:g} s"
            log.info("; ".join(filter(None, [said, self.room()])))

    def machine(self, host: str) -> str:
        """Return a number in place of a machine's name: times.jsonl leaves with a run, and must name nobody's."""
        return f"machine {self.machines.setdefault(host, len(self.machines))}"

    def drop(self, place: Place) -> None:
        """End a place's worker; a new one is started when there is work for it."""
        if place.actor is not None:
            self.seam.kill(place.actor)
        place.actor, place.call, place.positions, place.deadline = None, None, (), None

    def close(self) -> None:
        for place in self.places:
            self.drop(place)


class _Batch:
    """One map: what is still to do, and what has come back. Positions count the jobs; those given out are let go."""

    def __init__(self, pool: Pool, source: Iterator[Job], cohort: int, again: Again) -> None:
        self.pool, self.source, self.cohort, self.again = pool, source, cohort, again
        self.todo = deque[tuple[int, ...]]()
        self.jobs: dict[int, Job] = {}
        self.answers: dict[int, Reply | Failure] = {}
        self.drawn = self.given = 0
        self.losses = Counter[int]()
        self.stored: dict[bytes | str, Any] = {}

    def run(self) -> Answers:
        self._hand_out()
        while self.given < self.drawn:
            if self.given in self.answers:
                answer = self.jobs.pop(self.given), self.answers.pop(self.given)
                del self.losses[self.given]
                self.given += 1
                yield answer
                self._collect(wait=False)
            else:
                self._collect()
            self._hand_out()

    def _draw(self) -> None:
        """Draw one more cohort, unless the answer that is to be given next lies too far behind."""
        if self.drawn - self.given < AHEAD * len(self.pool.places) * self.cohort:
            drawn = dict(enumerate(islice(self.source, self.cohort), self.drawn))
            self.jobs |= drawn
            self.drawn += len(drawn)
            self.todo.extend([tuple(drawn)] if drawn else [])

    def _store(self, value: bytes | str) -> Any:
        """Put a value into the object store, once."""
        if value not in self.stored:
            self.stored[value] = self.pool.seam.put(value)
        return self.stored[value]

    def _hand_out(self) -> None:
        """Give idle workers a cohort each, draw the next ones, and start as many workers as there are cohorts for."""
        for place in self.pool.places:
            if place.idle and not self.todo:
                self._draw()
            if place.idle and self.todo:
                self._begin(place, self.todo.popleft())
        for _ in range(len(self.pool.places) - len(self.todo)):
            self._draw()
        coming = sum(place.starting for place in self.pool.places)
        for place in self.pool.places:
            if coming < len(self.todo) and place.actor is None and place.failed_starts < STARTS:
                self.pool.start(place, self._store(self.jobs[self.todo[0][0]].study))
                coming += 1
        if self.todo and not any(place.call is not None for place in self.pool.places):
            raise StudyError(f"{self.pool.name}: no worker could be started: {self.pool.trouble}")

    def _begin(self, place: Place, positions: tuple[int, ...]) -> None:
        numbers: dict[bytes, int] = {}
        parcels = []
        for job in (self.jobs[i] for i in positions):
            sent = [(at, m.payload) for at, m in enumerate(job.inbox) if m.broadcast]
            shared = tuple((at, numbers.setdefault(payload, len(numbers))) for at, payload in sent)
            light = tuple(replace(m, payload=b"") if m.broadcast else m for m in job.inbox)
            parcels.append(Parcel(replace(job, study="", inbox=light), shared))
        stored = [self._store(self.jobs[positions[0]].study), *map(self._store, numbers)]
        place.positions = positions
        place.call = self.pool.seam.call(place.actor, "step", parcels, *stored)
        if place.call is None:  # it died idle, which is no client's doing
            self.todo.appendleft(positions)
            self.pool.drop(place)
            return
        limit = self.pool.limits.job_s
        place.deadline = None if limit is None else time.monotonic() + limit * len(positions)

    def _collect(self, *, wait: bool = True) -> None:
        """Take what has ended; wait for the first answer or the first deadline."""
        busy = [place for place in self.pool.places if place.call is not None]
        deadlines = [place.deadline for place in busy if place.deadline is not None]
        patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        nobody_works = bool(busy) and all(place.starting for place in busy)
        if nobody_works and patience is not None:
            patience = min(patience, TOLD_EVERY_S)
        ended = self.pool.seam.wait([place.call for place in busy], timeout_s=patience if wait else 0.0) if busy else []
        if nobody_works and not ended:
            self.pool.say_that_it_waits()
        now = time.monotonic()
        for place in busy:
            if place.call in ended:
                self._ended(place, self.pool.seam.get(place.call))
            elif place.deadline is not None and now >= place.deadline:
                self._overdue(place)

    def _ended(self, place: Place, value: Any) -> None:
        if isinstance(value, Born):
            where = f"@gpu{value.gpu}" if value.gpu else ""
            place.worker = f"{self.pool.name}:{place.number}{where} {self.pool.machine(value.host)}:{value.pid}"
            place.call, place.deadline, place.failed_starts = None, None, 0
        elif place.starting:
            self._not_started(place, value.reason)
        elif isinstance(value, list):
            redo = []
            for position, answer in zip(place.positions, value, strict=True):
                job = self.again(self.jobs[position], answer) if isinstance(answer, Reply) else None
                if job is None:
                    self.answers[position] = replace(answer, worker=place.worker)
                else:
                    self.jobs[position] = job
                    redo.append(position)
            self.todo.extendleft([tuple(redo)] if redo else [])
            place.call, place.positions, place.deadline = None, (), None
            if any(isinstance(answer, Failure) and answer.kind == "memory" for answer in value):
                self.pool.drop(place)  # what was refused may have left the process half done
        else:
            self._fail(place, value.kind, value.reason)

    def _overdue(self, place: Place) -> None:
        if place.starting:
            # It has had its time, and the next would wait for the same.
            place.failed_starts = STARTS
            late = f"it took more than {self.pool.limits.start_s:g} s"
            self._not_started(place, "; ".join(filter(None, [late, self.pool.room()])))
        else:
            self._fail(place, "hung", f"no answer within job_timeout_s = {self.pool.limits.job_s:g} s")

    def _not_started(self, place: Place, reason: str) -> None:
        self.pool.trouble = reason
        self.pool.drop(place)

    def _fail(self, place: Place, kind: str, reason: str) -> None:
        self.losses.update(place.positions)
        tries = max(self.losses[position] for position in place.positions)
        if kind in MACHINES and tries < TRIES:
            # Whole, since a cohort's size decides the last bits of its result.
            self.todo.appendleft(place.positions)
            clients = ", ".join(str(self.jobs[position].client) for position in place.positions)
            log.info(f"note: {place.worker} was lost ({kind}: {reason}); done again: client {clients}")
        elif len(place.positions) > 1:
            # One of them did it, nobody can say which: each goes again alone, so that it costs only itself.
            self.todo.extendleft((position,) for position in reversed(place.positions))
        else:
            (position,) = place.positions
            job = self.jobs[position]
            reason = reason if tries == 1 else f"{reason} ({tries} tries)"
            self.answers[position] = Failure(
                round=job.round, client=job.client, kind=kind, reason=reason, worker=place.worker
            )
        self.pool.drop(place)
