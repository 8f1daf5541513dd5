"""Jobs whose round was closed before they were answered: their devices are busy, and what comes is counted once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedlth.federation.jobs import Job


@dataclass(frozen=True)
class Unanswered:
    """A job that a node may still be at work on, without what it was sent, until it must have given up."""

    job: Job
    node: int
    until: float


@dataclass
class Late:
    """The jobs that are out by their messages' ids. A node bounds its own step, so that none is kept for ever."""

    keep_s: float
    _out: dict[str, Unanswered] = field(default_factory=dict)

    def add(self, id: str, job: Job, node: int) -> None:
        bare = replace(job, study="", inbox=())
        self._out[id] = Unanswered(bare, node, time.monotonic() + self.keep_s)

    def ids(self) -> list[str]:
        """Return what may still come."""
        now = time.monotonic()
        self._out = {id: one for id, one in self._out.items() if now < one.until}
        return sorted(self._out)

    def came(self, id: str) -> Job | None:
        """Return the job whose answer has come; None where it is none of these, or has come before."""
        one = self._out.pop(id, None)
        return None if one is None else one.job

    def busy(self, nodes: Mapping[int, int]) -> dict[int, Job]:
        """Return the jobs that clients are still at work on; a node under a new id has begun anew."""
        return {one.job.client: one.job for one in self._out.values() if nodes.get(one.job.client) == one.node}
