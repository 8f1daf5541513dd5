"""The in-process engine on several cores: forked workers that share data, model and kernel with this process."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from fedlth.engines.cohort import peeked, size_of
from fedlth.engines.inprocess import one_line
from fedlth.engines.pool import Limits, Lost, Pool
from fedlth.engines.worker import Worker
from fedlth.federation.jobs import Again, Answers, Enough, Job, never
from fedlth.training.task import open_task

START_S = 300.0


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Forked:
    """Workers forked at the first map, when the study's task is built: one copy of it serves all of them.

    Which worker does a job changes nothing but times. The work of one that dies is done again (see `Pool`); one that
    takes longer than `job_timeout_s` costs the job in hand. A fresh one takes its place.
    """

    name = "inprocess"
    holds_state = False
    processes = True  # jobs run in processes of their own, which may end

    def __init__(self, workers: int, *, job_timeout_s: float | None = None) -> None:
        self.workers, self.limits = workers, Limits(START_S, job_timeout_s)
        self._pool: Pool | None = None

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        first, jobs = peeked(jobs)
        if first is None:
            return
        if self._pool is None:
            open_task(first.study).warm()
            forks = Forks()
            given = {"path": (), "folder": os.getcwd(), "memory_mb": None}
            self._pool = Pool(forks, self.workers, name="fork", spawn=forks.spawn, given=given, limits=self.limits)
        yield from self._pool.map(jobs, cohort=size_of(first), again=again)

    def present(self, *, until: Enough | None = None) -> None:
        return None  # all are: a client is where its job is done

    def late(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


@dataclass(frozen=True)
class Stored:
    """A value that crosses to each worker once a map."""

    key: int
    value: object = field(repr=False)


@dataclass(eq=False)
class Child:
    """A forked worker, this end of its pipe, and the stored values that it has."""

    pid: int
    pipe: Connection
    has: set[int] = field(default_factory=set)
    ended: bool = False


class Forks:
    """The seam of `Pool` over forks and pipes. A child does one call at a time, so the child stands for its call."""

    def __init__(self) -> None:
        self._keys = count()

    def put(self, value: object) -> Stored:
        return Stored(next(self._keys), value)

    def spawn(self) -> Child:
        here, there = Pipe()
        gc.freeze()  # a collection in the child would touch, and so copy, every page that holds an object
        try:
            pid = os.fork()
        except OSError:  # no memory or no room for a process
            gc.unfreeze()
            here.close()
            there.close()
            raise
        if not pid:
            _live(there)
        gc.unfreeze()
        there.close()
        return Child(pid, here)

    def call(self, actor: Child, method: str, *args: object, **kwargs: object) -> Child | None:
        stored = {a.key for a in args if isinstance(a, Stored)}
        sent = [Stored(a.key, None) if isinstance(a, Stored) and a.key in actor.has else a for a in args]
        actor.has = stored
        try:
            actor.pipe.send((method, sent, kwargs))
        except OSError:  # it died while it was idle
            return None
        return actor

    def wait(self, calls: Sequence[Child], *, timeout_s: float | None) -> list[Child]:
        ready = wait([c.pipe for c in calls], timeout_s)
        return [c for c in calls if c.pipe in ready]

    def get(self, call: Child) -> Any:
        try:
            return call.pipe.recv()
        except (EOFError, OSError):
            return Lost("died", _ending(call))
        except Exception as error:  # whatever unpickling raises
            return Lost("raised", f"unreadable answer: {one_line(error)}")

    def kill(self, actor: Child) -> None:
        if not actor.ended:  # or its number may be another process's by now
            with suppress(ProcessLookupError):
                os.kill(actor.pid, signal.SIGKILL)
            _ending(actor)
        actor.pipe.close()


def _ending(child: Child) -> str:
    """Wait for a child's end; say how it ended."""
    child.ended = True
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    except ChildProcessError:
        return "its process is gone"
    return f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"


def _live(pipe: Connection) -> NoReturn:
    """Serve until the other end is gone. Nothing of the parent's is cleaned up here: it is the parent's."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _close_all_but(pipe.fileno())
        worker, held = Worker(), dict[int, object]()
        while True:
            method, args, kwargs = pipe.recv()
            held = {a.key: held[a.key] if a.value is None else a.value for a in args if isinstance(a, Stored)}
            values = [held[a.key] if isinstance(a, Stored) else a for a in args]
            pipe.send(getattr(worker, method)(*values, **kwargs))
    except BaseException as error:  # whatever it is, the parent's frames below this one must not see it
        with suppress(BaseException):  # the parent may be what has gone
            pipe.send(Lost("memory" if isinstance(error, MemoryError) else "raised", one_line(error)))
        os._exit(1)


def _close_all_but(kept: int) -> None:
    """Close inherited files: the run folder's lock and the other workers' pipes must end with the parent alone."""
    listing = "/proc/self/fd"
    for name in os.listdir(listing):
        if int(name) > 2 and int(name) != kept:
            with suppress(OSError):
                os.close(int(name))
