"""The loop: the only place where time passes. Each step is a batch of jobs, then one commit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth import server
from fedlth.client import initial, space
from fedlth.downlink import Downlink
from fedlth.errors import StudyError
from fedlth.jobs import Engine
from fedlth.methods.recipe import Recipe, in_phase
from fedlth.methods.resolve import arms_of, finder_of, recipe_of
from fedlth.runfolder import Progress, RunFolder
from fedlth.visits import Stage, Visits
from fedlth.wire.codec import CODECS
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
        joins = step.phase in ("federate", "refine")
        stage = Stage(
            phase=step.phase, round=step.round, science=self.science, recipe=recipe, layout=self.layout,
            codec=self.codec, sends=recipe.visit.sends if joins else self._sends_mask(step),
            mirrors=self.recipe.down == "slice" or self.world.study.refine.rounds > 0,
        )  # fmt: skip
        down = self._downlink(step, clients, recipe)
        visits = Visits(stage, self.folder, self.engine, self.progress, down, clients)
        came = visits.contributions()
        if joins:
            self.theta, empty = server.aggregate(recipe.aggregate, self.theta, came, self.layout)
            progress = replace(self.progress, empty_rounds=self.progress.empty_rounds + 1 if empty else 0)
        else:
            deque(came, maxlen=0)  # a ticket's mask is mirrored, not joined
            progress = self.progress
        if visits.resyncs:
            self.tell(f"note: {visits.resyncs} clients had lost what they held; their download was sent again, whole")
        summary = _summary(visits)
        self._commit(step, index, progress, visits, summary, began)
        self.tell(_line(summary, index + 1, total, time.perf_counter() - began))
        if joins and self.progress.empty_rounds >= EMPTY_ROUNDS_ALLOWED:
            died = next((f["reason"] for f in visits.failed if f["kind"] != "refused"), "every reply was refused")
            raise StudyError(
                f"{self.folder.root}: {EMPTY_ROUNDS_ALLOWED} rounds without one usable reply; last: {died}"
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

    def _needs_whole(self, step: Step) -> bool:
        """Say whether controls need the whole global model beside a client's slice; it is counted as evaluation."""
        return step.phase == "personalise" and bool(CONTROLS & set(arms_of(self.world.study)))

    def _sends_mask(self, step: Step) -> str:
        return "mask" if step.phase == "personalise" and self.world.study.refine.rounds else ""

    def _commit(
        self, step: Step, index: int, progress: Progress, visits: Visits, summary: dict[str, Any], began: float
    ) -> None:
        versions, mirrors = {**progress.versions, **visits.versions}, dict(progress.mirrors)
        for client, version in visits.mirrors.items():
            mirrors.pop(client, None)
            if version is not None:
                mirrors[client] = version
        whole = {"round": step.round, "phase": step.phase, "client": None, "seconds": time.perf_counter() - began}
        self.folder.save_params(f"theta-{index}", self.theta)
        if step.phase == "federate" and f"theta_g@{step.round}" in self.anchors:
            self.folder.save_params(f"theta_g@{step.round}", self.theta)
        lengths = {
            "ledger": self.folder.append("ledger", visits.rows),
            "rounds": self.folder.append("rounds", [summary]),
            "metrics": self.folder.append("metrics", visits.metrics),
            "times": self.folder.append("times", [*visits.times, whole]),
        }
        self.progress = replace(
            progress, step=index + 1, theta=f"theta-{index}", lengths=lengths, versions=versions, mirrors=mirrors
        )
        self.folder.commit(self.progress)
        self.folder.drop_params([self.progress.theta, *self.anchors])
        self.folder.clients.tidy(_owners(versions))
        self.folder.mirrors.tidy(_owners(mirrors))


def _owners(versions: Mapping[str, str]) -> dict[str, set[int]]:
    """Return the clients whose current version each version is."""
    found: dict[str, set[int]] = {}
    for client, version in versions.items():
        found.setdefault(version, set()).add(int(client))
    return found


def _summary(visits: Visits) -> dict[str, Any]:
    return {
        "round": visits.stage.round,
        "phase": visits.stage.phase,
        "clients": list(visits.clients),
        "val_accuracy": float(np.mean(visits.seen)) if visits.seen else None,
        "up_bytes": sum(r.payload_bytes for r in visits.rows if r.receiver == "server"),
        "down_bytes": sum(r.payload_bytes for r in visits.rows if r.sender == "server"),
        "failed": visits.failed,
        "diverged": [
            {key: row[key] for key in ("client", "arm", "target_density")}
            for row in visits.metrics
            if row.get("diverged")
        ],
    }


def _line(summary: dict[str, Any], done: int, total: int, seconds: float) -> str:
    """Return one line of live progress."""
    accuracy = summary["val_accuracy"]
    said = f"val {100 * accuracy:5.1f} %" if accuracy is not None else f"{len(summary['clients'])} clients"
    failed = f"  {len(summary['failed'])} failed" if summary["failed"] else ""
    for arm in dict.fromkeys(one["arm"] for one in summary["diverged"]):
        failed += f"  {arm} diverged for {len({d['client'] for d in summary['diverged'] if d['arm'] == arm})}"
    mb = 1e-6
    return (
        f"[{done}/{total}] {summary['phase']} {summary['round']}: {said}  up {summary['up_bytes'] * mb:.2f} MB  "
        f"down {summary['down_bytes'] * mb:.2f} MB  {seconds:.1f} s{failed}"
    )


def open_loop(folder: RunFolder, engine: Engine, tell: Tell) -> Loop:
    """Open a run folder where its last commit left it."""
    return Loop(folder, open_world(folder.study().science()), engine, tell)
