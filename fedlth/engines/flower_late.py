"""Jobs whose round was closed before they were answered: their devices are busy, and what comes is counted once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedlth.federation.jobs import Job


@dataclass(frozen=True)
class Unanswered:
    """A job that a node may still be at work on, without what it was sent.

    It is left in peace until `busy_until`; until `until`, when it must have given up, what comes is counted.
    """

    job: Job
    node: int
    busy_until: float
    until: float


@dataclass
class Late:
    """The jobs that are out by their messages' ids. A node bounds its own step, so that none is kept for ever.

    A node that misses a round's limit is left in peace for as long again, and for twice that with each further one: a
    slow device must not gather a queue of rounds that are closed, and one that has lost its job must get another.
    """

    keep_s: float
    _out: dict[str, Unanswered] = field(default_factory=dict)

    def add(self, id: str, job: Job, node: int) -> None:
        bare, now = replace(job, study="", inbox=()), time.monotonic()
        missed = sum(one.node == node for one in self._out.values())
        peace_s = self.keep_s if job.limit_s is None else min(self.keep_s, job.limit_s * 2.0**missed)
        self._out[id] = Unanswered(bare, node, now + peace_s, now + self.keep_s)

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
        now = time.monotonic()
        at_work = (one for one in self._out.values() if now < one.busy_until)
        return {one.job.client: one.job for one in at_work if nodes.get(one.job.client) == one.node}
