"""A worker's inside, on Ray or forked: one process, one torch thread, one memory limit, one cohort at a time."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedlth.federation.jobs import Failure, Job, Message, Reply

MIB = 2**20


@dataclass(frozen=True)
class Parcel:
    """A job without what the object store holds: the study's text and the broadcast payloads.

    `shared` says which message's payload is which of those that are stored.
    """

    job: Job
    shared: tuple[tuple[int, int], ...]

    def whole(self, study: str, payloads: Sequence[bytes]) -> Job:
        """Return the job again."""
        inbox: list[Message] = list(self.job.inbox)
        for at, number in self.shared:
            inbox[at] = replace(inbox[at], payload=payloads[number])
        return replace(self.job, study=study, inbox=tuple(inbox))


@dataclass(frozen=True)
class Born:
    """What a started worker says of itself: its process, its machine, its GPU ("" for none)."""

    pid: int
    host: str
    gpu: str


class Worker:
    """The actor. Its life starts with `start`; what kills it costs the job in hand and nothing else."""

    def __init__(self) -> None:
        self._last: dict[int, bytes] = {}

    def start(self, study: str, *, path: Sequence[str], folder: str, memory_mb: int | None) -> Born:
        """Import, limit memory, and build the study's task, so that a job's time limit covers the job alone.

        `path` and `folder` are the driver's, so that the user's own modules and relative paths are found here.
        """
        sys.path += [p for p in path if p not in sys.path]
        if Path(folder).is_dir():  # on another machine it may not be there, and then no path can be relative to it
            os.chdir(folder)
        importlib.import_module("fedlth.federation.client_step")
        from fedlth.training.task import open_task

        if memory_mb is not None:
            limit_memory(memory_mb)
        # What is wrong with the task is told by the job that needs it, as the in-process engine would.
        with contextlib.suppress(Exception):
            open_task(study)
        return Born(os.getpid(), platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def step(self, parcels: Sequence[Parcel], study: str, *payloads: bytes) -> list[Reply | Failure]:
        """Do one cohort's jobs."""
        from fedlth.engines.cohort import side_by_side
        from fedlth.engines.inprocess import attempt
        from fedlth.federation.chaotic import die_if_killed
        from fedlth.federation.client_step import client_step

        def one(job: Job) -> Reply:
            die_if_killed(job)
            return client_step(job)

        same = [self._same(i, p) for i, p in enumerate(payloads)]
        return side_by_side([partial(attempt, one, parcel.whole(study, same)) for parcel in parcels])

    def _same(self, at: int, payload: bytes) -> bytes:
        """Return the object that came last time where it is equal: its hash is known, so its decoding is found."""
        if self._last.get(at) != payload:
            self._last[at] = payload
        return self._last[at]


def limit_memory(megabytes: int) -> None:
    """Let this process hold `megabytes` more private memory than it does now; the kernel refuses what is beyond."""
    import resource

    status = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    limit = held + megabytes * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
