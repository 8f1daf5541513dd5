"""Simulated time: what a client's round takes on the study's fleet, from counted FLOPs and measured bytes alone.

A client's seconds are latency + bytes down / rate + FLOPs / (speed x flops_s) + latency + bytes up / rate, times a
log-normal factor. No wall clock enters, so every engine and every resume gets the same seconds, and the same clients
are late or drop out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlth import rng
from fedlth.experiment.experiment import Experiment
from fedlth.federation.jobs import Job, Message, Reply
from fedlth.methods.client_update import passes_of
from fedlth.methods.method import Phase
from fedlth.storage.records import LedgerRow, party
from fedlth.study.sections import Fleet
from fedlth.training.local_client import LocalClient
from fedlth.training.study_recipe import budget_of


@dataclass(frozen=True)
class Clock:
    """The clock of one round; without a fleet there is no time, and nobody is late or drops out.

    Evaluations between the rounds serve the curve alone: as no total of bytes holds them, they take no time.
    """

    experiment: Experiment
    phase: Phase
    round: int

    @property
    def fleet(self) -> Fleet | None:
        return None if self.phase.evaluates else self.experiment.study.fleet

    def _draw(self, what: str, client: int) -> np.random.Generator:
        # Of step 2 the streams carry no round: which wave a client is in must not matter.
        number = 0 if self.phase.in_waves else self.round
        return rng.stream(self.experiment.study.seed, f"{what} {self.phase.name}", number, client)

    def drops(self, client: int) -> bool:
        """Say whether a client drops out of a federated round, after its download."""
        if self.fleet is None or self.phase.join is None:
            return False
        return bool(self._draw("drop", client).random() < self.fleet.drop)

    @property
    def deadline_s(self) -> float | None:
        """Until when a federated round waits; None: for all, as the waves of step 2 do."""
        return self.fleet.deadline_s if self.fleet is not None and self.phase.join is not None else None

    def late(self, seconds: float | None) -> str:
        """Say why a reply comes too late to be joined, "" where it does not."""
        if seconds is None or self.deadline_s is None or seconds <= self.deadline_s:
            return ""
        return f"after {seconds:.3g} simulated s, fleet.deadline_s is {self.deadline_s:g}"

    def seconds(
        self, client: int, *, down_bytes: float, up_bytes: float, flops: float, tries: int = 1
    ) -> float | None:  # fmt: skip
        """Return what a client's visit takes, None without a fleet; each try is a message each way."""
        if self.fleet is None:
            return None
        fleet, tier = self.fleet, self.experiment.task.capacity(client)
        down_s = down_bytes / _own(tier.down_bytes_s, fleet.down_bytes_s)
        up_s = up_bytes / _own(tier.up_bytes_s, fleet.up_bytes_s)
        latency_s = 2 * tries * _own(tier.latency_s, fleet.latency_s)
        whole = latency_s + down_s + up_s + flops / (tier.speed * fleet.flops_s)
        if not fleet.straggle:
            return whole
        return whole * math.exp(fleet.straggle * float(self._draw("straggle", client).standard_normal()))

    def of_reply(
        self, job: Job, reply: Reply, tried: Sequence[LedgerRow] = (), *, sent_bytes: int | None = None
    ) -> float | None:  # fmt: skip
        """Return what a visit took by its reply; `tried` are the rows of a try before it.

        `sent_bytes`: what it sends to other clients in this round, in place of its reply, where there is no server.
        """
        if self.fleet is None:
            return None
        flops = reply.flops if self.fleet.flops == "dense" else reply.alive_flops
        server, paid = party(None), [row for row in tried if row.kind not in self._apart]
        more = [sum(row.payload_bytes for row in paid if (row.receiver == server) is up) for up in (False, True)]
        down, up = self.moved(job.inbox) + more[0], self.moved(reply.outbox) + more[1]
        if sent_bytes is not None:
            up = sent_bytes + more[1]
        return self.seconds(job.client, down_bytes=down, up_bytes=up, flops=flops, tries=1 + bool(tried))

    def of_dropped(self, job: Job, mask: np.ndarray | None) -> float | None:
        """Return what the visit of a client that dropped out would have taken.

        It never happened, so it is the study's usual training of what was sent, and an upload as long as the download.
        """
        if self.fleet is None:
            return None
        moved = self.moved(job.inbox)
        return self.seconds(job.client, down_bytes=moved, up_bytes=moved, flops=self.usual_flops(job.client, mask))

    def usual_flops(self, client: int, mask: np.ndarray | None = None) -> float:
        """Return the FLOPs of a client's usual visit in step 1, as the fleet counts them; `mask` is of what is shared.

        A method that trains more than once an epoch does so here as at a client's first visit.
        """
        task = self.experiment.task_of(client)
        local, train = LocalClient(task, client, self.round, self.phase.name), task.study.train
        alive = local.full if mask is None else task.whole_mask(mask, local.full)
        dense, sparse = local.flops(alive, budget_of(train).examples(local.num_train, train.batch_size))
        passes = passes_of(self.phase.update, task, 0, flops=True)
        return passes * (dense if self.fleet is None or self.fleet.flops == "dense" else sparse)

    def moved(self, messages: Iterable[Message]) -> int:
        """Return the bytes that a device would move: without what only controls and tables of step 2 need."""
        return sum(len(m.payload) for m in messages if m.kind not in self._apart)

    @property
    def _apart(self) -> tuple[str, ...]:
        return ("evaluation", "metrics") if self.phase.in_waves else ()

    def whole(self, came: Sequence[float], gone: Sequence[float]) -> float | None:
        """Return what the round takes: as long as its slowest client, or the deadline where somebody did not meet it.

        `came` are the seconds of replies, `gone` what clients that dropped out would have taken.
        """
        if self.fleet is None:
            return None
        longest = max((*came, *gone), default=0.0)
        if self.deadline_s is not None and (gone or longest > self.deadline_s):
            return self.deadline_s
        return longest


def _own(tiers: float | None, fleets: float) -> float:
    """Return what the tier says, where it says anything."""
    return fleets if tiers is None else tiers
