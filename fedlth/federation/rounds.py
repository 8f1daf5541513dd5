"""The rounds: the only place where time passes. Each is a batch of jobs, then one commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.errors import NothingUsable
from fedlth.experiment.experiment import Experiment
from fedlth.federation.downloads import Downloads
from fedlth.federation.jobs import MACHINES, Engine
from fedlth.federation.progress import line, summary_of
from fedlth.federation.replies import Replies
from fedlth.federation.update_norms import UpdateNorms
from fedlth.methods.method import Phase
from fedlth.models.layout import Params
from fedlth.storage.records import RoundRow, TimeRow
from fedlth.storage.run_folder import Progress, RunFolder
from fedlth.storage.server_state import ServerState

log = logging.getLogger(__name__)

EMPTY_ROUNDS_ALLOWED = 3


@dataclass(frozen=True)
class Step:
    """One commit's worth of work. `place` counts commits from 0."""

    phase: Phase
    round: int
    clients: Sequence[int]
    place: int
    total: int


class Federation:
    """A run in progress. Everything that outlives a round is in the folder; this object may die at any moment."""

    def __init__(self, experiment: Experiment, folder: RunFolder, engine: Engine) -> None:
        self.experiment, self.folder, self.engine = experiment, folder, engine
        self.progress = folder.progress()
        self.state = self._loaded(self.progress.theta)

    @property
    def theta(self) -> Params:
        return self.state.theta

    def _loaded(self, name: str) -> ServerState:
        return self.folder.load_state(name) if name else ServerState(self.experiment.initial())

    def run(self, stop_after: int | None = None) -> None:
        """Run what is left of the study, committing after every round."""
        steps = self.experiment.steps
        last = len(steps) if stop_after is None else min(stop_after, len(steps))
        for place in range(self.progress.step, last):
            phase, round = steps[place]
            self._step(Step(phase, round, self.experiment.clients(phase, round), place, len(steps)))

    def revisit(self) -> None:
        """Visit `missing` clients again, in waves of their own after the last step; all steps must be done.

        Step 2 does not depend on the wave, and the global model, rewind targets and masks are still those of the last
        phase: parameters, tickets and metrics are those of a client that was never lost. What had crossed stays in the
        ledger.
        """
        lost, size = missing(self.folder), self.experiment.study.personalise.clients_per_wave
        phase, done = self.experiment.phases[-1], max((row.round for row in _last_waves(self.folder)), default=0)
        waves = [lost[i : i + size] for i in range(0, len(lost), size)]
        first = self.progress.step
        for i, wave in enumerate(waves):
            self._step(Step(phase, done + 1 + i, wave, first + i, first + len(waves)))

    def _step(self, step: Step) -> None:
        """Do one round: send, draw replies as they come, judge each, join what is accepted, commit."""
        began, phase, layout = time.perf_counter(), step.phase, self.experiment.layout
        norms = UpdateNorms(self.theta, layout, dict(self.progress.norms.get(phase.name, {})))
        replies = Replies(
            self.experiment, phase, step.round, self.folder, self.progress, self._downloads(step), step.clients, norms,
            self.engine.holds_state,
        )  # fmt: skip
        sent, joined = self.state, 0
        accumulator = phase.join.init(sent, layout) if phase.join else None
        with (
            self.folder.clients.writing(replies.version) as states,
            self.folder.mirrors.writing(replies.version) as masks,
            closing(self.engine.map(replies.jobs(), again=replies.again)) as answers,
        ):
            for job, answer in answers:
                for contribution in replies.judged(job, answer, states, masks):
                    joined += _add(phase, accumulator, contribution)
            for contribution in replies.rest(states, masks):
                joined += _add(phase, accumulator, contribution)
        progress = self.progress
        if phase.join:
            if joined:  # without a reply the old state stays
                new = phase.join.result(accumulator)
                self.state = new if new.mask is not None else replace(new, mask=sent.mask)
            progress = replace(progress, empty_rounds=0 if joined else progress.empty_rounds + 1)
            if norms.accepted:
                progress = replace(progress, norms={**progress.norms, phase.name: norms.accepted})
        if replies.resyncs:
            told = f"note: {replies.resyncs} clients had lost what they held; their download was sent again in full"
            log.info(told)
        summary = summary_of(replies)
        if replies.versions:
            progress = replace(progress, good=self.progress.theta)
        elif self._broken(replies):
            summary = replace(summary, rolled_back_to=self._roll_back())
            progress = replace(progress, good=f"theta-{step.place}")
        self._commit(step, progress, sent, replies, summary, began)
        log.info(
            line(summary, step.place + 1, step.total, time.perf_counter() - began, self.experiment.task.judged.main)
        )
        if summary.rolled_back_to:
            log.info(f"note: no client could use this global model; it is rolled back to {summary.rolled_back_to}")
        if phase.join and self.progress.empty_rounds >= EMPTY_ROUNDS_ALLOWED:
            refused = [f"every reply was refused, the first with: {f.reason}" for f in replies.failed[:1]]
            died = [f.reason for f in replies.failed if f.kind != "refused"]
            raise NothingUsable(
                f"{self.folder.root}: {EMPTY_ROUNDS_ALLOWED} rounds without one usable reply; last: "
                + (*died, *refused, "nobody took part")[0]
            )

    def _downloads(self, step: Step) -> Downloads:
        masks: dict[int, np.ndarray] = {}
        for client in step.clients if step.phase.down == "slice" else ():
            version = self.progress.mirrors.get(str(client), "")
            mask = self.folder.mirror(client, version, self.experiment.layout.num_prunable)
            mask = self.experiment.first_mask(client) if mask is None else mask
            if mask is not None:
                masks[client] = mask
        names = self.experiment.rewind_targets if step.phase.name == "personalise" else ()
        targets = {name: self.folder.load_params(name) for name in names}
        return Downloads(self.experiment, step.phase, self.state, masks, targets)

    def _broken(self, replies: Replies) -> bool:
        """Say whether the global model is why nobody's work can be used, and there is one that somebody could use.

        All must have answered, so that no lost machine counts, and be two at least, so that no single client can undo
        the work of others: the only client of a round counts from the second empty round on.
        """
        answered = all(f.kind in ("raised", "refused") for f in replies.failed)
        several = len(replies.failed) > 1 or self.progress.empty_rounds > 0
        better = self.progress.good not in (None, self.progress.theta)
        return self.experiment.federated and bool(replies.failed) and answered and several and better

    def _roll_back(self) -> str:
        """Return to the last state that a client could work with, rewind targets too; say which one it is."""
        good, broken = self.progress.good or "", self.theta.digest()
        self.state = self._loaded(good)
        for name in self.experiment.rewind_targets:
            if self.folder.has_params(name) and self.folder.load_params(name).digest() == broken:
                self.folder.save_params(name, self.theta)
        if not good:
            return "the initial one"
        phase, round = self.experiment.steps[int(good.removeprefix("theta-"))]
        return f"that of {phase.name} {round}"

    def _commit(
        self, step: Step, progress: Progress, sent: ServerState, replies: Replies, summary: RoundRow, began: float
    ) -> None:
        versions, mirrors = {**progress.versions, **replies.versions}, dict(progress.mirrors)
        for client, version in replies.mirrors.items():
            mirrors.pop(client, None)
            if version is not None:
                mirrors[client] = version
        whole = TimeRow(round=step.round, phase=step.phase.name, seconds=time.perf_counter() - began)
        targets, target = self.experiment.rewind_targets, f"theta_g@{step.round}"
        if self.state is not sent:
            progress = replace(progress, theta=f"theta-{step.place}")
            self.folder.save_state(progress.theta, self.state)
        if target in targets and step.phase.name == self.experiment.method.phases[-1].name:
            self.folder.save_params(target, self.theta)
        lengths = {
            "ledger": self.folder.append("ledger", replies.rows),
            "rounds": self.folder.append("rounds", [summary]),
            "metrics": self.folder.append("metrics", replies.metrics),
            "times": self.folder.append("times", [*replies.times, whole]),
        }
        self.progress = replace(progress, step=step.place + 1, lengths=lengths, versions=versions, mirrors=mirrors)
        self.folder.commit(self.progress)
        self.folder.drop_params([self.progress.theta, self.progress.good or "", *targets])
        self.folder.clients.tidy(_owners(versions))
        self.folder.mirrors.tidy(_owners(mirrors))


def _add(phase: Phase, accumulator: Any, contribution: Any) -> int:
    """Join one contribution; a ticket's mask is mirrored, not joined."""
    if phase.join is None:
        return 0
    phase.join.add(accumulator, contribution)
    return 1


def _owners(versions: Mapping[str, str]) -> dict[str, set[int]]:
    """Return the clients whose current version each version is."""
    found: dict[str, set[int]] = {}
    for client, version in versions.items():
        found.setdefault(version, set()).add(int(client))
    return found


def missing(folder: RunFolder) -> list[int]:
    """Return the clients whose visit in the run's last phase was lost with their machine, and not made up for since.

    One that was lost in an earlier phase is not among them: the others have gone on from there without it.
    """
    lost: dict[int, bool] = {}
    for row in _last_waves(folder):
        kinds = {f.client: f.kind for f in row.failed}
        lost |= {client: kinds.get(client) in MACHINES for client in row.clients}
    return sorted(client for client, is_lost in lost.items() if is_lost)


def _last_waves(folder: RunFolder) -> list[RoundRow]:
    """Return the committed waves of the run's last phase."""
    phase = "refined" if folder.study().refine.rounds else "personalise"
    return [row for row in folder.rows(RoundRow) if row.phase == phase]
