"""The rounds: the only place where time passes. Each is a batch of jobs, then one commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.experiment.experiment import Experiment
from fedlth.federation.answered import Answered
from fedlth.federation.collapse import collapsed, followed, health_of
from fedlth.federation.downloads import Downloads
from fedlth.federation.jobs import Engine
from fedlth.federation.missing import last_phase, last_waves, missing, unfinished
from fedlth.federation.presence import absent, drawn, enough
from fedlth.federation.progress import line, summary_of
from fedlth.federation.published import Published
from fedlth.federation.replies import Replies
from fedlth.federation.update_norms import UpdateNorms, without_last
from fedlth.federation.void import VOID_ROUNDS_ALLOWED, at_fault, none_counted, too_many
from fedlth.methods.aggregate import Aggregate
from fedlth.methods.method import Phase
from fedlth.models.layout import Params
from fedlth.storage.checkpoint import Best, Health, Progress
from fedlth.storage.records import DROPPED, CurveRow, RoundRow, TimeRow
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState

log = logging.getLogger(__name__)

STEP_2 = "step-2"  # the checkpoint of the model that tickets grew from, kept where rounds inside them move it on
Committed = Callable[[int, RoundRow, Sequence[CurveRow]], None]  # who is told of each commit, counted from 1


@dataclass(frozen=True)
class Step:
    """One commit's worth of work. `place` counts commits from 0; `absent` could not be reached when it began."""

    phase: Phase
    round: int
    clients: Sequence[int]
    place: int
    total: int
    absent: Sequence[int] = ()


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
            present = self.engine.present(until=enough(self.experiment, phase, round))
            clients = drawn(self.experiment, phase, round, present)
            self._step(Step(phase, round, clients, place, len(steps), absent(self.experiment, present)))

    def revisit(self, *, resumed: bool) -> None:
        """Visit `missing` clients again, in waves of their own after the last step; all steps must be done.

        Where a run is `resumed` that has no result of anybody, all whose visits failed (`unfinished`).

        Devices that are away are waited for, once and for a bounded time, and only those that are there are visited.

        Step 2 does not depend on the wave, and the global model, rewind targets and masks are still those of the last
        phase: parameters, tickets and metrics are those of a client that was never lost. What had crossed stays in the
        ledger.
        """
        lost = (unfinished(self.folder) if resumed else []) or missing(self.folder)
        size = self.experiment.study.personalise.clients_per_wave
        if not lost:
            return
        if self.engine.holds_state:
            log.info(
                f"note: {len(lost)} clients have no result of step 2; those that are there in time are visited now"
            )
        away = absent(self.experiment, self.engine.present(until=frozenset(lost).issubset))
        lost = [client for client in lost if client not in away]
        phase, done = (
            self.experiment.phase(last_phase(self.folder)),
            max((row.round for row in last_waves(self.folder)), default=0),
        )
        waves = [lost[i : i + size] for i in range(0, len(lost), size)]
        first = self.progress.step
        for i, wave in enumerate(waves):
            self._step(Step(phase, done + 1 + i, wave, first + i, first + len(waves), away))

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
        void, worked = rule is not None and joined < self.experiment.study.federate.min_clients, bool(replies.versions)
        if void and self._none_counted(step):  # nothing is committed: a resume asks for this round again
            raise none_counted(replies, joined, self.engine.present())
        health = health_of(self.experiment, phase, replies.visits, self.progress.versions.keys())
        undone = "" if void or rule is None or publishes else self._collapsed(health)
        if void or undone:  # the old state stays, or an older one: so must everything that goes with a newer one
            replies.forget()
        published = {**self.progress.published, **replies.published}
        progress = self.progress
        if rule and not undone:
            if not void:
                new = rule.result(accumulator)
                if publishes:  # of all that is published, by whoever was not here too
                    new = Published(self.experiment, self.folder, published).consensus(phase, sent)
                self.state = new if new.mask is not None else replace(new, mask=sent.mask)
            against = void and at_fault(replies, ever=self.progress.good is not None)
            progress = replace(progress, empty_rounds=progress.empty_rounds + against if void else 0)
            if norms.accepted and not void:
                known = {**progress.norms, phase.name: norms.accepted}
                progress = replace(progress, norms=known, fresh=norms.fresh)
        if replies.resyncs:
            told = f"note: {replies.resyncs} clients had lost what they held; their download was sent again in full"
            log.info(told)
        summary = replace(summary_of(replies), void=void, absent=list(step.absent))
        if phase.evaluates:
            progress, summary = self._judged(step, progress, replies, summary)
        elif worked and not undone:
            # What nothing that follows can be without is no model to go back behind.
            good = f"theta-{step.place}" if phase.must_count and not void else self.progress.theta
            progress = replace(progress, good=good, health=followed(progress.health, health))
        elif undone or (phase.changes_state and not publishes and self._broken(replies)):
            summary = replace(summary, rolled_back_to=self._roll_back(), undone=undone)
            progress = replace(progress, good=f"theta-{step.place}", norms=self._norms_of_good(), fresh={})
        self._commit(step, progress, sent, replies, summary, began)
        told = line(summary, step.place + 1, step.total, time.perf_counter() - began, self.experiment.judged.main)
        log.info(told)
        if summary.kept_best:
            log.info(f"note: step 2 begins with the global model of {summary.kept_best}, the best on validation data")
        if summary.rolled_back_to:
            why = f"undone: {undone}" if undone else "no client could use this global model"
            log.info(f"note: {why}; it is rolled back to {summary.rolled_back_to}")
        if phase.join and self.progress.empty_rounds >= VOID_ROUNDS_ALLOWED:
            raise too_many(replies, joined, self.engine.present())

    def _none_counted(self, step: Step) -> bool:
        """Say whether a void round is the last of a phase that must count, after none that did."""
        last = step.phase.must_count and step.round == step.phase.rounds
        return last and all(row.void for row in self.folder.rows(RoundRow) if row.phase == step.phase.name)

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

    def _collapsed(self, health: Health | None) -> str:
        """Say which round's model has collapsed and why, "" for none, or where there is no better one."""
        if self.progress.good in (None, self.progress.theta):
            return ""
        why = collapsed(self.experiment, self.progress.health, health)
        phase, round = self._made()
        return why and f"{phase.name} {round}: {why}"

    def _made(self) -> tuple[Phase, int]:
        """Return the phase and round that made the current state, which some round has made."""
        return self.experiment.steps[int(self.progress.theta.removeprefix("theta-"))]

    def _norms_of_good(self) -> dict[str, dict[str, list[float]]]:
        """Return what is known of updates without those of the round that is undone: they are no measure of others."""
        name = self._made()[0].name
        known = self.progress.norms
        return {**known, name: without_last(known.get(name, {}), self.progress.fresh)}

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
        kept = [STEP_2] if self.experiment.study.refine.rounds else []
        if kept and step.phase.name == "personalise" and not self.folder.has_params(STEP_2):
            self.folder.save_state(STEP_2, self.state)
        logs: dict[str, Sequence[Any]] = {
            "ledger": [*replies.rows, *replies.rows_of_late(self.engine.late())], "rounds": [summary],
            "metrics": replies.metrics, "times": [*replies.times, whole],
        }  # fmt: skip
        curve = self._curve(step, replies)
        if any(phase.evaluates for phase in self.experiment.phases):
            logs["curve"] = curve
        lengths, checks = dict[str, int](), dict[str, int]()
        for name, rows in logs.items():
            check = progress.checks.get(name, None if progress.lengths.get(name) else 0)  # an earlier version has none
            lengths[name], now = self.folder.append(name, rows, check)
            checks |= {} if now is None else {name: now}
        published = {**progress.published, **replies.published}
        before = self.progress  # stays whole on disk, to fall back on
        self.progress = replace(
            progress,
            step=step.place + 1,
            lengths=lengths,
            checks=checks,
            versions=versions,
            mirrors=mirrors,
            holds=holds,
            published=published,
        )
        self.folder.commit(self.progress)
        Answered(self.folder.root / "answered").clear()
        self.folder.drop_params([*self.progress.states, *before.states, *targets, *kept])
        self.folder.clients.tidy(_owners(versions, before.versions))
        self.folder.mirrors.tidy(_owners(mirrors, before.mirrors))
        self.folder.published.tidy(_owners(published, before.published))
        if self.committed:
            self.committed(self.progress.step, summary, curve)


def _add(rule: Aggregate | None, accumulator: Any, contribution: Any) -> int:
    """Join one contribution; a ticket's mask is mirrored, not joined."""
    if rule is None:
        return 0
    rule.add(accumulator, contribution)
    return 1


def _owners(*commits: Mapping[str, str]) -> dict[str, set[int]]:
    """Return the clients whose version each version is in any of the commits."""
    found: dict[str, set[int]] = {}
    for client, version in (pair for versions in commits for pair in versions.items()):
        found.setdefault(version, set()).add(int(client))
    return found
