"""The loop: the only place where time passes. Each step is a batch of jobs, then one commit."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlth.errors import NothingUsable
from fedlth.experiment.resolve import arms_of, finder_of, main_density, recipe_of
from fedlth.federation import server
from fedlth.federation.client_step import initial, space
from fedlth.federation.downlink import Downlink
from fedlth.federation.jobs import MACHINES, Engine
from fedlth.federation.progress import line, summary_of
from fedlth.federation.update_norms import UpdateNorms
from fedlth.federation.visits import Stage, Visits
from fedlth.methods.method import Recipe, in_phase
from fedlth.models.layout import Params
from fedlth.storage.run_folder import Progress, RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.study.schema import Study
from fedlth.training.task import World, open_world
from fedlth.wire.codec import CODECS

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


def anchors_of(study: Study) -> list[str]:
    """Name the earlier global models that step 2 rewinds to; they are kept and shipped once each."""
    anchor = finder_of(study).rewind.anchor
    searched = {"ticket", "one_shot", "random"} & set(arms_of(study))
    # theta_g@0 is theta_0, which every client draws from the seed.
    return [anchor] if anchor and "@" in anchor and anchor != "theta_g@0" and searched else []


class Loop:
    """A run in progress. Everything that outlives a step is in the folder; this object may die at any moment."""

    def __init__(self, folder: RunFolder, world: World, engine: Engine, tell: Tell) -> None:
        self.folder, self.world, self.engine, self.tell = folder, world, engine, tell
        self.science = world.study.science()
        self.recipe = recipe_of(world.study)
        self.codec = CODECS[world.study.wire]
        self.layout = space(world, self.recipe)
        self.progress = folder.progress()
        self.state = self._loaded(self.progress.theta)
        self.anchors = anchors_of(world.study)

    @property
    def theta(self) -> Params:
        return self.state.theta

    def _loaded(self, name: str) -> ServerState:
        return self.folder.load_state(name) if name else ServerState(initial(self.world, self.recipe))

    def run(self, stop_after: int | None = None) -> None:
        """Run what is left of the study, committing after every step."""
        steps = steps_of(self.world, self.recipe)
        for i in range(self.progress.step, len(steps) if stop_after is None else min(stop_after, len(steps))):
            began = time.perf_counter()
            self._step(steps[i], i, len(steps), began)

    def revisit(self) -> None:
        """Visit `missing` clients again, in waves of their own after the last step; all steps must be done.

        Step 2 does not depend on the wave, and the global model, anchors and masks are still those of the last phase:
        parameters, tickets and metrics are those of a client that was never lost. What had crossed stays in the ledger.
        """
        lost, size = missing(self.folder), self.world.study.personalise.clients_per_wave
        phase, done = _last_phase(self.world.study), max((row["round"] for row in _last_waves(self.folder)), default=0)
        waves = [tuple(lost[i : i + size]) for i in range(0, len(lost), size)]
        first = self.progress.step
        for i, wave in enumerate(waves):
            step = Step(phase, done + 1 + i, wave)
            self._step(step, first + i, first + len(waves), time.perf_counter())

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
        norms = UpdateNorms(self.theta, self.layout, dict(self.progress.norms.get(step.phase, {})))
        visits = Visits(stage, self.folder, self.engine, self.progress, down, clients, self._asked(step), norms)
        progress, sent = self.progress, self.state
        if joins:
            accumulator, count = recipe.aggregate.init(self.state, self.layout), 0
            for contribution in visits.contributions():
                recipe.aggregate.add(accumulator, contribution)
                count += 1
            if count:  # without a reply the old state stays
                self.state = recipe.aggregate.result(accumulator)
            progress = replace(progress, empty_rounds=0 if count else progress.empty_rounds + 1)
            if norms.accepted:
                progress = replace(progress, norms={**progress.norms, step.phase: norms.accepted})
        else:
            deque(visits.contributions(), maxlen=0)  # a ticket's mask is mirrored, not joined
        if visits.resyncs:
            self.tell(f"note: {visits.resyncs} clients had lost what they held; their download was sent again, whole")
        summary = summary_of(visits)
        if visits.versions:
            progress = replace(progress, good=self.progress.theta)
        elif self._broken(visits):
            summary["rolled_back_to"] = self._roll_back()
            progress = replace(progress, good=f"theta-{index}")
        self._commit(step, index, progress, sent, visits, summary, began)
        self.tell(line(summary, index + 1, total, time.perf_counter() - began))
        if "rolled_back_to" in summary:
            self.tell(f"note: no client could use this global model; it is rolled back to {summary['rolled_back_to']}")
        if joins and self.progress.empty_rounds >= EMPTY_ROUNDS_ALLOWED:
            refused = f"every reply was refused, the first with: {visits.failed[0]['reason']}"
            died = next((f["reason"] for f in visits.failed if f["kind"] != "refused"), refused)
            raise NothingUsable(
                f"{self.folder.root}: {EMPTY_ROUNDS_ALLOWED} rounds without one usable reply; last: {died}"
            )

    def _broken(self, visits: Visits) -> bool:
        """Say whether the global model is why nobody's work can be used, and there is one that somebody could use.

        All must have answered, so that no lost machine counts, and be two at least, so that no single client can undo
        the work of others: the only client of a round counts from the second empty round on.
        """
        answered = all(f["kind"] in ("raised", "refused") for f in visits.failed)
        several = len(visits.failed) > 1 or self.progress.empty_rounds > 0
        return self.recipe.federated and answered and several and self.progress.good not in (None, self.progress.theta)

    def _roll_back(self) -> str:
        """Return to the last state that a client could work with, anchors too; say which one it is."""
        good, broken = self.progress.good or "", self.theta.digest()
        self.state = self._loaded(good)
        for name in self.anchors:
            if self.folder.has_params(name) and self.folder.load_params(name).digest() == broken:
                self.folder.save_params(name, self.theta)
        if not good:
            return "the initial one"
        made = steps_of(self.world, self.recipe)[int(good.removeprefix("theta-"))]
        return f"that of {made.phase} {made.round}"

    def _asked(self, step: Step) -> Callable[[int], server.Asked]:
        """Return what the server knows of a client's answer before it comes."""
        study, splits = self.world.study, self.world.splits
        arms: frozenset[str] = frozenset()
        if step.phase in ("personalise", "refined"):
            arms = frozenset(arms_of(study) if step.phase == "personalise" else ("refined",))
        targets = frozenset((1.0, *study.finder.densities, main_density(study)))
        return lambda c: server.Asked(splits.clients[c], c in splits.unseen, arms, targets)

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
        self, step: Step, index: int, progress: Progress, sent: ServerState, visits: Visits, summary: dict[str, Any],
        began: float,
    ) -> None:  # fmt: skip
        versions, mirrors = {**progress.versions, **visits.versions}, dict(progress.mirrors)
        for client, version in visits.mirrors.items():
            mirrors.pop(client, None)
            if version is not None:
                mirrors[client] = version
        whole = {"round": step.round, "phase": step.phase, "client": None, "seconds": time.perf_counter() - began}
        if self.state is not sent:
            progress = replace(progress, theta=f"theta-{index}")
            self.folder.save_state(progress.theta, self.state)
        if step.phase == "federate" and f"theta_g@{step.round}" in self.anchors:
            self.folder.save_params(f"theta_g@{step.round}", self.theta)
        lengths = {
            "ledger": self.folder.append("ledger", visits.rows),
            "rounds": self.folder.append("rounds", [summary]),
            "metrics": self.folder.append("metrics", visits.metrics),
            "times": self.folder.append("times", [*visits.times, whole]),
        }
        self.progress = replace(progress, step=index + 1, lengths=lengths, versions=versions, mirrors=mirrors)
        self.folder.commit(self.progress)
        self.folder.drop_params([self.progress.theta, self.progress.good or "", *self.anchors])
        self.folder.clients.tidy(_owners(versions))
        self.folder.mirrors.tidy(_owners(mirrors))


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
        kinds = {f["client"]: f["kind"] for f in row["failed"]}
        lost |= {client: kinds.get(client) in MACHINES for client in row["clients"]}
    return sorted(client for client, is_lost in lost.items() if is_lost)


def _last_waves(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the committed waves of the run's last phase."""
    file, phase = folder.log("rounds"), _last_phase(folder.study())
    rows = [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
    return [row for row in rows if row["phase"] == phase]


def _last_phase(study: Study) -> str:
    return "refined" if study.refine.rounds else "personalise"


def check_rule(world: World) -> None:
    """Raise StudyError, before anything is written, where the method's aggregation rule cannot be believed."""
    recipe = recipe_of(world.study)
    if recipe.federated:
        count = world.study.federate.clients_per_round
        server.check_rule(recipe, ServerState(initial(world, recipe)), space(world, recipe), count)


def open_loop(folder: RunFolder, engine: Engine, tell: Tell) -> Loop:
    """Open a run folder where its last commit left it."""
    return Loop(folder, open_world(folder.study().science()), engine, tell)
