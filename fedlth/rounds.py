"""The loop: the only place where time passes. Each step is a batch of jobs, then one commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth import entries, server
from fedlth.client import initial, space
from fedlth.downlink import Downlink
from fedlth.errors import StudyError
from fedlth.jobs import RESYNC, Engine, Failure, Job, Message, Reply
from fedlth.ledger import Row
from fedlth.methods.recipe import Recipe, in_phase
from fedlth.methods.resolve import arms_of, finder_of, recipe_of
from fedlth.runfolder import Progress, RunFolder
from fedlth.wire.codec import CODECS
from fedlth.wire.errors import PayloadError
from fedlth.world import World, open_world

EMPTY_ROUNDS_ALLOWED = 3
CONTROLS = {"global", "dense", "dense_total", "own_random", "global_mask", "random", "ticket", "ticket_0", "one_shot"}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One commit's worth of work: a federated round, or a wave of clients in step 2."""

    phase: str
    round: int
    clients: tuple[int, ...] = ()


def steps_of(world: World, recipe: Recipe) -> list[Step]:
    """List a study's steps in order; the list depends on the study alone."""
    study = world.study
    everyone = range(study.clients.count)
    size = study.personalise.clients_per_wave
    waves = [tuple(everyone[i : i + size]) for i in range(0, len(everyone), size)]
    steps = [Step("federate", r) for r in range(1, study.federate.rounds + 1) if recipe.federated]
    steps += [Step("personalise", i, w) for i, w in enumerate(waves, 1)]
    if study.refine.rounds:
        steps += [Step("refine", r) for r in range(1, study.refine.rounds + 1)]
        steps += [Step("refined", i, w) for i, w in enumerate(waves, 1)]
    return steps


class Loop:
    """A run in progress. Everything that outlives a step is in the folder; this object may die at any moment."""

    def __init__(self, folder: RunFolder, world: World, engine: Engine, tell: Tell) -> None:
        self.folder, self.world, self.engine, self.tell = folder, world, engine, tell
        self.science = world.study.science()
        self.recipe = recipe_of(world.study)
        self.codec = CODECS[world.study.wire]
        self.layout = space(world, self.recipe)
        self.progress = folder.progress()
        self.theta = folder.load_params(self.progress.theta) if self.progress.theta else initial(world, self.recipe)
        self.anchors = self._anchor_names()

    def run(self, stop_after: int | None = None) -> None:
        """Run what is left of the study, committing after every step."""
        steps = steps_of(self.world, self.recipe)
        for i in range(self.progress.step, len(steps) if stop_after is None else min(stop_after, len(steps))):
            began = time.perf_counter()
            self._step(steps[i], i, len(steps), began)

    def _anchor_names(self) -> list[str]:
        """Name the earlier global models that step 2 rewinds to; they are kept and shipped once each."""
        anchor = finder_of(self.world.study).rewind.anchor
        searched = {"ticket", "one_shot", "random"} & set(arms_of(self.world.study))
        # theta_g@0 is theta_0, which every client draws from the seed.
        return [anchor] if anchor and "@" in anchor and anchor != "theta_g@0" and searched else []

    def _step(self, step: Step, index: int, total: int, began: float) -> None:
        recipe = in_phase(self.recipe, step.phase)
        clients = list(step.clients) or self._sampled(step)
        down = self._downlink(step, clients, recipe)
        jobs = [self._job(step, c, down.inbox(c)) for c in clients]
        answers = self.engine.map(jobs)
        jobs, answers, asked, again = self._again(step, down, jobs, answers)
        sends = recipe.visit.sends if step.phase in ("federate", "refine") else self._sends_mask(step)
        accepted, rows, failed = self._judge(step, jobs, answers, recipe, sends, down, again)
        rows = asked + rows
        version = f"{step.phase}-{step.round}"
        progress = self._keep(accepted, version)
        if step.phase in ("federate", "refine"):
            contributions = [a.contribution for _, a in accepted if a.contribution]
            self.theta = server.aggregate(recipe, recipe.aggregate, self.theta, contributions, self.layout)
            empty = 0 if contributions else progress.empty_rounds + 1
            progress = replace(progress, empty_rounds=empty)
        summary = self._summary(step, clients, accepted, rows, failed)
        self._commit(step, index, progress, rows, accepted, summary, answers, began)
        self.tell(_line(summary, index + 1, total, time.perf_counter() - began))
        if step.phase in ("federate", "refine") and self.progress.empty_rounds >= EMPTY_ROUNDS_ALLOWED:
            reason = next((a.reason for a in answers if isinstance(a, Failure)), "every reply was refused")
            raise StudyError(
                f"{self.folder.root}: {EMPTY_ROUNDS_ALLOWED} rounds without one usable reply; last: {reason}"
            )

    def _sampled(self, step: Step) -> list[int]:
        study = self.world.study
        section = study.federate if step.phase == "federate" else study.refine
        seen = [c for c in range(study.clients.count) if c not in self.world.splits.unseen]
        return server.sample(study.seed, step.phase, step.round, clients=seen, count=section.clients_per_round)

    def _downlink(self, step: Step, clients: Sequence[int], recipe: Recipe) -> Downlink:
        masks = {}
        for client in clients if recipe.down == "slice" else ():
            mask = self.folder.mirror(client, self.progress.mirrors.get(str(client), ""), self.layout.num_prunable)
            if mask is not None:
                masks[client] = mask
        anchors = {n: self.folder.load_params(n) for n in self.anchors} if step.phase == "personalise" else {}
        return Downlink(recipe, self.layout, self.codec, self.theta, masks, anchors, self._needs_whole(step))

    def _job(self, step: Step, client: int, inbox: tuple[Message, ...], *, forget: bool = False) -> Job:
        version = "" if forget else self.progress.versions.get(str(client), "")
        state = None if self.engine.holds_state else self.folder.clients.get(client, version)
        return Job(
            study=self.science, phase=step.phase, round=step.round, client=client, inbox=inbox, version=version,
            state=state,
        )  # fmt: skip

    def _again(
        self, step: Step, down: Downlink, jobs: Sequence[Job], answers: Sequence[Reply | Failure]
    ) -> tuple[list[Job], list[Reply | Failure], list[Row], set[int]]:
        """Send once more, leaning on nothing, to the clients that have lost what their download referred to.

        Returns the jobs and answers that count, the rows of the first try (those bytes were sent too), and whom.
        """
        out_jobs, out = list(jobs), list(answers)
        rows: list[Row] = []
        lost: list[int] = []
        for i, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
            if not isinstance(answer, Reply) or not _asks(answer):
                continue
            rows += self._rows_down(step, job, down, answer)
            rows += self._rows_up(step, answer, None, "ok", "")
            forget = not any(answer.outbox[0].payload)
            out_jobs[i] = self._job(step, job.client, down.inbox(job.client, alone=True), forget=forget)
            lost.append(i)
        if lost:
            self.tell(f"note: {len(lost)} clients have lost what they held; their download is sent again, whole")
            for i, answer in zip(lost, self.engine.map([out_jobs[i] for i in lost]), strict=True):
                out[i] = answer
        return out_jobs, out, rows, {jobs[i].client for i in lost}

    def _rows_up(self, step: Step, answer: Reply, mask: np.ndarray | None, status: str, sends: str) -> list[Row]:
        return entries.up(step.round, step.phase, answer, mask, status, sends, layout=self.layout)

    def _rows_down(self, step: Step, job: Job, down: Downlink, answer: Reply | Failure, kind: str = "") -> list[Row]:
        first = "install" if str(job.client) not in self.progress.versions else ""
        return entries.down(
            step.round, step.phase, job.client, job.inbox, down.masks.get(job.client), answer.framed_down_bytes,
            layout=self.layout, kind=kind or first,
        )  # fmt: skip

    def _needs_whole(self, step: Step) -> bool:
        """Say whether controls need the whole global model beside a client's slice; it is counted as evaluation."""
        return step.phase == "personalise" and bool(CONTROLS & set(arms_of(self.world.study)))

    def _sends_mask(self, step: Step) -> str:
        return "mask" if step.phase == "personalise" and self.world.study.refine.rounds else ""

    def _judge(
        self, step: Step, jobs: Sequence[Job], answers: Sequence[Reply | Failure], recipe: Recipe, sends: str,
        down: Downlink, again: Collection[int],
    ) -> tuple[list[tuple[Reply, server.Accepted]], list[Row], list[dict[str, Any]]]:  # fmt: skip
        """Turn answers into accepted replies, ledger rows and failures; each answer stands alone."""
        accepted, rows, failed = [], [], []
        for job, answer in zip(jobs, answers, strict=True):
            rows += self._rows_down(step, job, down, answer, "resync" if job.client in again else "")
            if isinstance(answer, Failure):
                failed.append({"client": job.client, "kind": answer.kind, "reason": answer.reason})
                rows.append(entries.failed(step.round, step.phase, answer))
                continue
            try:
                if (answer.client, answer.round) != (job.client, job.round):
                    raise PayloadError(f"client {answer.client} answered for client {job.client}")
                held = down.held(job.client, job.inbox if sends else (), mask=step.phase != "personalise")
                got = server.accept(answer, recipe=recipe, layout=self.layout, sends=sends, codec=self.codec, held=held)
            except PayloadError as error:
                failed.append({"client": job.client, "kind": "refused", "reason": str(error)})
                rows += self._rows_up(step, answer, None, f"refused: {error}", sends)
                continue
            rows += self._rows_up(step, answer, got.mask, "ok", sends)
            accepted.append((answer, got))
        return accepted, rows, failed

    def _keep(self, accepted: Sequence[tuple[Reply, server.Accepted]], version: str) -> Progress:
        """Write the new versions of client states and mask mirrors; they are current only after the commit."""
        versions, mirrors = dict(self.progress.versions), dict(self.progress.mirrors)
        for reply, got in accepted:
            versions[str(reply.client)] = version
            if not self.engine.holds_state and reply.state is not None:
                self.folder.clients.put(reply.client, version, reply.state)
            if got.mask is not None and self._mirrors(got):
                self.folder.put_mirror(reply.client, version, got.mask)
                mirrors[str(reply.client)] = version
            elif got.mask is not None and got.mask.all():
                mirrors.pop(str(reply.client), None)
        return replace(self.progress, versions=versions, mirrors=mirrors)

    def _mirrors(self, got: server.Accepted) -> bool:
        """Say whether the server needs this mask again: for slices and for refinement, not for FedPM's samples."""
        return (self.recipe.down == "slice" or self.world.study.refine.rounds > 0) and not (
            got.mask is None or got.mask.all()
        )

    def _summary(
        self, step: Step, clients: Sequence[int], accepted: Sequence[tuple[Reply, server.Accepted]],
        rows: Sequence[Row], failed: list[dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        seen = [a.record["val_accuracy"] for _, a in accepted if "val_accuracy" in a.record]
        return {
            "round": step.round,
            "phase": step.phase,
            "clients": list(clients),
            "val_accuracy": float(np.mean(seen)) if seen else None,
            "up_bytes": sum(r.payload_bytes for r in rows if r.receiver == "server"),
            "down_bytes": sum(r.payload_bytes for r in rows if r.sender == "server"),
            "failed": failed,
        }

    def _commit(
        self, step: Step, index: int, progress: Progress, rows: Sequence[Row],
        accepted: Sequence[tuple[Reply, server.Accepted]], summary: dict[str, Any],
        answers: Sequence[Reply | Failure], began: float,
    ) -> None:  # fmt: skip
        metrics = [row for _, a in accepted for row in a.record.get("rows", [])]
        times = [_time_row(step, a) for a in answers]
        times.append({"round": step.round, "phase": step.phase, "client": None, "seconds": time.perf_counter() - began})
        self.folder.save_params(f"theta-{index}", self.theta)
        if step.phase == "federate" and f"theta_g@{step.round}" in self.anchors:
            self.folder.save_params(f"theta_g@{step.round}", self.theta)
        lengths = {
            "ledger": self.folder.append("ledger", rows),
            "rounds": self.folder.append("rounds", [summary]),
            "metrics": self.folder.append("metrics", metrics),
            "times": self.folder.append("times", times),
        }
        self.progress = replace(progress, step=index + 1, theta=f"theta-{index}", lengths=lengths)
        self.folder.commit(self.progress)
        self.folder.drop_params([self.progress.theta, *self.anchors])
        for reply, _ in accepted:
            self.folder.clients.drop_others(reply.client, self.progress.versions[str(reply.client)])
            self.folder.mirrors.drop_others(reply.client, self.progress.mirrors.get(str(reply.client), ""))


def _asks(answer: Reply) -> bool:
    """Say whether an answer is nothing but the request to send the download again."""
    return [(m.kind, m.name, len(m.payload)) for m in answer.outbox] == [("control", RESYNC, 8)]


def _time_row(step: Step, answer: Reply | Failure) -> dict[str, Any]:
    row: dict[str, Any] = {"round": step.round, "phase": step.phase, "client": answer.client, "worker": answer.worker}
    if isinstance(answer, Reply):
        row |= {"seconds": answer.seconds, "device": answer.device}
    return row


def _line(summary: dict[str, Any], done: int, total: int, seconds: float) -> str:
    """Return one line of live progress."""
    accuracy = summary["val_accuracy"]
    said = f"val {100 * accuracy:5.1f} %" if accuracy is not None else f"{len(summary['clients'])} clients"
    failed = f"  {len(summary['failed'])} failed" if summary["failed"] else ""
    mb = 1e-6
    return (
        f"[{done}/{total}] {summary['phase']} {summary['round']}: {said}  up {summary['up_bytes'] * mb:.2f} MB  "
        f"down {summary['down_bytes'] * mb:.2f} MB  {seconds:.1f} s{failed}"
    )


def open_loop(folder: RunFolder, engine: Engine, tell: Tell) -> Loop:
    """Open a run folder where its last commit left it."""
    return Loop(folder, open_world(folder.study().science()), engine, tell)
