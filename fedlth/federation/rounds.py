"""The rounds: the only place where time passes. Each is a batch of jobs, then one commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.errors import NothingUsable
from fedlth.experiment.experiment import Experiment
from fedlth.federation.answered import Answered
from fedlth.federation.downloads import Downloads
from fedlth.federation.jobs import MACHINES, Engine
from fedlth.federation.progress import line, summary_of
from fedlth.federation.published import Published
from fedlth.federation.replies import Replies
from fedlth.federation.update_norms import UpdateNorms
from fedlth.methods.aggregate import Aggregate
from fedlth.methods.method import Phase
from fedlth.models.layout import Params
from fedlth.storage.records import DROPPED, LATE, CurveRow, Failed, RoundRow, TimeRow
from fedlth.storage.run_folder import Best, Progress, RunFolder
from fedlth.storage.server_state import ServerState

log = logging.getLogger(__name__)

EMPTY_ROUNDS_ALLOWED = 3
Committed = Callable[[int, RoundRow, Sequence[CurveRow]], None]  # who is told of each commit, counted from 1


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

    def __init__(
        self, experiment: Experiment, folder: RunFolder, engine: Engine, committed: Committed | None = None
    ) -> None:  # fmt: skip
        self.experiment, self.folder, self.engine, self.committed = experiment, folder, engine, committed
        self.progress = folder.progress()
        self.state = self._loaded(self.progress.theta)

    @property
    def theta(self) -> Params:
        return self.state.theta

    def _loaded(self, name: str) -> ServerState:
        return self.folder.load_state(name) if name else self.experiment.start()

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
        phase, done = (
            self.experiment.phase(_last(self.folder)),
            max((row.round for row in _last_waves(self.folder)), default=0),
        )
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
        rule = self.experiment.rule(phase)
        accumulator = rule.init(sent, layout) if rule else None
        publishes = phase.topology is not None and rule is not None
        with (
            self.folder.clients.writing(replies.version) as states,
            self.folder.mirrors.writing(replies.version) as masks,
            self.folder.published.writing(replies.version) if publishes else nullcontext() as publishing,
            closing(self.engine.map(replies.jobs(), again=replies.again)) as answers,
        ):
            replies.publishing = publishing
            for job, answer in replies.all_of(answers):
                for contribution in replies.judged(job, answer, states, masks):
                    joined += _add(rule, accumulator, contribution)
            for contribution in replies.rest(states, masks):
                joined += _add(rule, accumulator, contribution)
        published = {**self.progress.published, **replies.published}
        progress = self.progress
        if rule:
            if joined:  # without a reply the old state stays
                new = rule.result(accumulator)
                if publishes:  # of all that is published, by whoever was not here too
                    new = Published(self.experiment, self.folder, published).consensus(phase, sent)
                self.state = new if new.mask is not None else replace(new, mask=sent.mask)
            progress = replace(progress, empty_rounds=0 if joined else progress.empty_rounds + self._at_fault(replies))
            if norms.accepted:
                progress = replace(progress, norms={**progress.norms, phase.name: norms.accepted})
        if replies.resyncs:
            told = f"note: {replies.resyncs} clients had lost what they held; their download was sent again in full"
            log.info(told)
        summary = summary_of(replies)
        if phase.evaluates:
            progress, summary = self._judged(step, progress, replies, summary)
        elif replies.versions:
            progress = replace(progress, good=self.progress.theta)
        elif phase.changes_state and not publishes and self._broken(replies):
            summary = replace(summary, rolled_back_to=self._roll_back())
            progress = replace(progress, good=f"theta-{step.place}")
        self._commit(step, progress, sent, replies, summary, began)
        told = line(summary, step.place + 1, step.total, time.perf_counter() - began, self.experiment.judged.main)
        log.info(told)
        if summary.kept_best:
            log.info(f"note: step 2 begins with the global model of {summary.kept_best}, the best on validation data")
        if summary.rolled_back_to:
            log.info(f"note: no client could use this global model; it is rolled back to {summary.rolled_back_to}")
        if phase.join and self.progress.empty_rounds >= EMPTY_ROUNDS_ALLOWED:
            why = _why_nothing(replies.failed)
            raise NothingUsable(
                f"{self.folder.root}: {EMPTY_ROUNDS_ALLOWED} rounds without one usable reply; last: {why}"
            )

    def _trained(self, step: Step) -> tuple[Phase, int]:
        """Return the phase and the round whose model an evaluation looks at."""
        return self.experiment.steps[step.place - 1]

    def _curve(self, step: Step, replies: Replies) -> list[CurveRow]:
        """Return the rows of an evaluation with what the server knows of them; no other step has any."""
        if not step.phase.evaluates:
            return []
        phase, round = self._trained(step)
        return [replace(row, phase=phase.name, round=round) for row in replies.curve]

    def _judged(
        self, step: Step, progress: Progress, replies: Replies, summary: RoundRow
    ) -> tuple[Progress, RoundRow]:  # fmt: skip
        """Remember the best model so far where the study keeps it; after the last evaluation it is the current one.

        Validation data alone decide; of equals the earlier one stays.
        """
        if self.experiment.study.evaluate.keep != "best":
            return progress, summary
        best = progress.best
        judged = self.experiment.judged
        seen = summary.val_accuracy if judged.main.name == "accuracy" else summary.val_metric
        if seen is not None:
            rank = (max(len(replies.seen), len(replies.seen_metric)), judged.score(seen))
            if best is None or rank > best.rank:
                phase, round = self._trained(step)
                best = Best(progress.theta, phase.name, round, rank)
        progress = replace(progress, best=best)
        if best is None or any(phase.evaluates for phase, _ in self.experiment.steps[step.place + 1 :]):
            return progress, summary
        if best.theta != progress.theta:
            self.state = self._loaded(best.theta)
        summary = replace(summary, kept_best=f"{best.phase} {best.round}")
        return replace(progress, theta=best.theta, good=best.theta), summary

    def _downloads(self, step: Step) -> Downloads:
        masks: dict[int, np.ndarray] = {}
        hand = step.phase.hand
        if hand is not None:
            others = (c for c in range(self.experiment.study.clients.count) if c not in step.clients)
            known = {c: mask for c in others if (mask := self._mirror(c)) is not None}
            masks = hand(step.clients, known, self.state.memory)
        for client in step.clients if step.phase.down == "slice" and hand is None else ():
            if step.phase.cut is not None:
                cut = step.phase.cut(self.experiment.task_of(client), self.state, client)
                if not cut.all():
                    masks[client] = cut
                continue
            mask = self._mirror(client)
            mask = self.experiment.first_mask(client) if mask is None else mask
            if mask is not None:
                masks[client] = mask
        names = self.experiment.rewind_targets if step.phase.name == "personalise" else ()
        targets = {name: self.folder.load_params(name) for name in names}
        holds = {int(client): name for client, name in self.progress.holds.items()}
        published = Published(self.experiment, self.folder, self.progress.published)
        return Downloads(self.experiment, step.phase, step.round, self.state, masks, targets, published, holds)

    def _mirror(self, client: int) -> np.ndarray | None:
        """Return the mask of what a client shares, as it last said; None where it has not, or shares all."""
        version = self.progress.mirrors.get(str(client), "")
        return self.folder.mirror(client, version, self.experiment.layout.num_prunable)

    def _broken(self, replies: Replies) -> bool:
        """Say whether the global model is why nobody's work can be used, and there is one that somebody could use.

        All must have answered, so that no lost machine counts, and be two at least, so that no single client can undo
        the work of others: the only client of a round counts from the second empty round on.
        """
        failed = [f for f in replies.failed if f.kind != DROPPED]
        answered = all(f.kind in ("raised", "refused") for f in failed)
        several = len(failed) > 1 or self.progress.empty_rounds > 0
        better = self.progress.good not in (None, self.progress.theta)
        return self.experiment.federated and bool(failed) and answered and several and better

    def _at_fault(self, replies: Replies) -> bool:
        """Say whether a round without an update counts against the run, as a fleet's bad luck does not.

        Clients that dropped out never count. Where all others were late, the deadline is met in other rounds, or else
        in none: only if nobody has ever met it.
        """
        kinds = {f.kind for f in replies.failed}
        lucky = kinds == {DROPPED} or (bool(kinds) and kinds <= {DROPPED, LATE} and self.progress.good is not None)
        if lucky:
            log.info(
                f"note: nothing was joined in {replies.phase.name} {replies.round}: {_why_nothing(replies.failed)}"
            )
        return not lucky

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
        held = {**self.progress.holds, **replies.holds}
        # Before there is a mask nobody holds one: where there never is, nothing is written.
        holds = held if any(held.values()) or self.experiment.start_mask is not None else {}
        whole = TimeRow(round=step.round, phase=step.phase.name, seconds=time.perf_counter() - began)
        targets, target = self.experiment.rewind_targets, f"theta_g@{step.round}"
        if self.state is not sent and not step.phase.evaluates:  # what an evaluation chose has its file
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
        curve = self._curve(step, replies)
        if any(phase.evaluates for phase in self.experiment.phases):
            lengths["curve"] = self.folder.append("curve", curve)
        published = {**progress.published, **replies.published}
        self.progress = replace(
            progress,
            step=step.place + 1,
            lengths=lengths,
            versions=versions,
            mirrors=mirrors,
            holds=holds,
            published=published,
        )
        self.folder.commit(self.progress)
        Answered(self.folder.root / "answered").clear()
        best = self.progress.best.theta if self.progress.best else ""
        self.folder.drop_params([self.progress.theta, self.progress.good or "", best, *targets])
        self.folder.clients.tidy(_owners(versions))
        self.folder.mirrors.tidy(_owners(mirrors))
        self.folder.published.tidy(_owners(published))
        if self.committed:
            self.committed(self.progress.step, summary, curve)


def _add(rule: Aggregate | None, accumulator: Any, contribution: Any) -> int:
    """Join one contribution; a ticket's mask is mirrored, not joined."""
    if rule is None:
        return 0
    rule.add(accumulator, contribution)
    return 1


def _why_nothing(failed: Sequence[Failed]) -> str:
    """Say why a round had no update to join."""
    kinds = {f.kind for f in failed}
    if not failed:
        return "nobody took part"
    if kinds <= {DROPPED, LATE}:
        late = sum(f.kind == LATE for f in failed)
        first = next((f": the first {f.reason}" for f in failed if f.kind == LATE), "")
        return f"of {len(failed)} clients {late} were late and {len(failed) - late} dropped out{first}"
    died = [f.reason for f in failed if f.kind not in ("refused", DROPPED, LATE)]
    refused = [f"every reply was refused, the first with: {f.reason}" for f in failed if f.kind == "refused"]
    return (*died, *refused)[0]


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
        injected = {i.client for i in row.injected}  # on purpose, so that a resume ends as a run without a stop
        kinds = {f.client: f.kind for f in row.failed if f.client not in injected}
        lost |= {client: kinds.get(client) in MACHINES for client in row.clients}
    return sorted(client for client, is_lost in lost.items() if is_lost)


def _last_waves(folder: RunFolder) -> list[RoundRow]:
    """Return the committed waves of the run's last phase."""
    last = _last(folder)
    return [row for row in folder.rows(RoundRow) if row.phase == last]


def _last(folder: RunFolder) -> str:
    """Name the last phase that gives clients another state; newcomers may be handed a ticket after it."""
    return "refined" if folder.study().refine.rounds else "personalise"
