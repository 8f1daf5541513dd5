"""client_step: one client's pure step, the same on every engine and on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedlth.experiment.resolve import arms_of, finder_of, kept_arm, main_density, recipe_of
from fedlth.federation.jobs import RESYNC, Job, Message, Reply
from fedlth.federation.uplink import Uplink
from fedlth.methods.client_update import private, received_params
from fedlth.methods.fedpm import first_scores
from fedlth.methods.method import Recipe, in_phase
from fedlth.models.layout import Layout, Params
from fedlth.personalization.arms import ARMS, tuned
from fedlth.personalization.step2 import Result, Step2
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import MetricRow
from fedlth.training.local_client import Local
from fedlth.training.task import World, open_world
from fedlth.wire import mask as bitmap
from fedlth.wire import metrics, payload
from fedlth.wire.codec import CODECS
from fedlth.wire.errors import ReferenceLost
from fedlth.wire.payload import Content


def space(world: World, recipe: Recipe) -> Layout:
    """Return the layout of the method's global state: the exchanged model, or its prunable tensors as scores."""
    return world.exchange if recipe.space == "weights" else world.layout.select(lambda e: e.prunable)


def initial(world: World, recipe: Recipe) -> Params:
    """Return round 0's global state, which both ends draw from the study's seed."""
    return world.shared_part(world.theta_0) if recipe.space == "weights" else first_scores(world)


def client_step(job: Job) -> Reply:
    """Decode, restore, train, encode. Pure but for its caches: equal jobs give equal replies on every engine."""
    began = time.perf_counter()
    world = open_world(job.study)
    recipe = in_phase(_recipe(job.study), job.phase)
    state = ClientState.from_bytes(job.state)
    if job.version and job.state is None:
        return _resync(job, began, bytes(8))
    try:
        received = _received(job, world, recipe, state)
    except ReferenceLost:
        known = state.masks.get("active")
        return _resync(job, began, bytes.fromhex(bitmap.digest(known)) if known is not None else b"\1" * 8)
    if not received["theta_g"].mask.all():
        # A slice is of the client's own mask; one that was sent again brings it back to a client that has lost it.
        state = state.with_(masks={"active": received["theta_g"].mask})
    if job.phase in ("federate", "refine"):
        local = Local(world, job.client, job.round, job.phase)
        state, outbox = _visit(local, job, recipe, received["theta_g"], state)
    else:
        # Streams of step 2 are the client's alone: which wave it is in must not matter.
        local = Local(world, job.client, 0, job.phase)
        state, outbox = _personalise(local, job, recipe, received, state)
    return Reply(
        round=job.round,
        client=job.client,
        outbox=outbox,
        state=state.to_bytes(),
        seconds=time.perf_counter() - began,
        device=world.device,
        work=tuple(local.work),
    )


@lru_cache(maxsize=2)
def _recipe(science: str) -> Recipe:
    return recipe_of(open_world(science).study)


def _resync(job: Job, began: float, held: bytes) -> Reply:
    """Ask for the same download without references; nothing has changed here."""
    asked = Message("control", RESYNC, held)
    return Reply(round=job.round, client=job.client, outbox=(asked,), seconds=time.perf_counter() - began)


@lru_cache(maxsize=4)
def _decoded(data: bytes, kind: str, science: str) -> Content:
    """Decode a broadcast once a worker. Callers treat the content as immutable."""
    world = open_world(science)
    return payload.decode(data, kind, space(world, recipe_of(world.study)), codec=CODECS[world.study.wire])


def _received(job: Job, world: World, recipe: Recipe, state: ClientState) -> dict[str, Content]:
    """Return what came, by name; training uses these decoded objects, never the sender's."""
    layout = space(world, recipe)
    known, codec = state.masks.get("active"), CODECS[world.study.wire]
    got: dict[str, Content] = {}
    for message in job.inbox:
        kind = "values" if message.kind == "evaluation" else message.kind
        if message.broadcast:
            content = _decoded(message.payload, kind, job.study)
        else:
            content = payload.decode(message.payload, kind, layout, codec=codec, known_mask=known)
        got["evaluation" if message.kind == "evaluation" else message.name] = content
    if "theta_g" not in got:
        start = initial(world, recipe)
        got["theta_g"] = Content(np.ones(layout.num_prunable, bool), start.floats, start.ints)
    return got


def _uplink(job: Job, world: World, received: Content) -> Uplink:
    """Return what this visit's answer may refer to: the download that the server knows it has sent."""
    codec = CODECS[world.study.wire]
    return Uplink(codec, received.mask, received.reference if job.inbox and codec.refers else None)


def _visit(
    local: Local, job: Job, recipe: Recipe, received: Content, state: ClientState
) -> tuple[ClientState, tuple[Message, ...]]:
    world = local.world
    done = recipe.visit(local, received, state)
    sent, kept = _uplink(job, world, received).update(done.kind, space(world, recipe), done.content, done.state)
    record: dict[str, Any] = {"num_examples": local.num_train, **done.metrics}
    return kept, (Message(done.kind, "update", sent), Message("metrics", "visit", metrics.encode(record)))


def _personalise(
    local: Local, job: Job, recipe: Recipe, received: dict[str, Content], state: ClientState
) -> tuple[ClientState, tuple[Message, ...]]:
    world = local.world
    rows: list[dict[str, Any]] = []
    kept: Result | None = None
    for result in _results(local, job, recipe, received, state):  # each is let go, for it holds a whole model
        rows.append(_row(local, result).record())
        if result.cpu_s[0]:
            cost = {"cpu_s": result.cpu_s[0], "last_cpu_s": result.cpu_s[1]}
            local.work.append({"arm": result.arm, "target_density": result.target, **cost})
        kept = _kept(world, kept, replace(result, diverged=rows[-1].get("diverged", False)))
    outbox = [Message("metrics", "arms", metrics.encode({"rows": rows}))]
    if kept is not None and kept.diverged:
        state = state.without("ticket").without("ticket_ints").without("ticket_dead")
    elif kept is not None:
        rest, moving = world.layout.num_prunable, world.moving_part(kept.params)
        values = np.concatenate((moving.floats[np.flatnonzero(kept.mask)], moving.floats[rest:]))
        state = state.with_(masks={"ticket": kept.mask}, vectors={"ticket": values, "ticket_ints": moving.ints})
        if kept.held:
            state = state.with_(vectors={"ticket_dead": kept.params.floats[:rest][~kept.mask]})
    if kept is not None and world.study.refine.rounds and job.phase == "personalise":
        # Of a ticket that diverged too: refinement needs the mask alone, and trains the server's weights in it.
        state = state.without("owed").with_(masks={"active": kept.mask})
        up = replace(_uplink(job, world, received["theta_g"]), known_mask=None)
        bare = up.encode("mask", world.exchange, Content(kept.mask, None, None))
        outbox.append(Message("mask", "ticket", bare))
    return state, tuple(outbox)


def _results(
    local: Local, job: Job, recipe: Recipe, received: dict[str, Content], state: ClientState
) -> Iterator[Result]:
    """Yield the models of a client's step 2, one at a time."""
    study = local.world.study
    if job.phase == "refined":
        yield tuned("refined", local, recipe.visit, received["theta_g"], state, main_density(study))
        return
    step = _step2(local, recipe, received, state)
    for name in sorted(arms_of(study), key="random".__eq__):  # last: it shuffles the masks that the ticket has found
        yield from ARMS[name](step)


def _step2(local: Local, recipe: Recipe, received: dict[str, Content], state: ClientState) -> Step2:
    world, main = local.world, received["theta_g"]
    if recipe.space == "scores":
        held = recipe.visit.own(local, main, state)
        theta_g, alive = held.params, held.mask
    else:
        whole = received.get("evaluation", main)
        theta_g, alive = world.merge(received_params(whole), private(local, state)), local.full
    anchors = {"theta_0": world.theta_0, "theta_g@0": world.theta_0, "theta_g": theta_g}
    for name, content in received.items():
        if name.startswith("theta_g@"):
            anchors[name] = world.merge(received_params(content), private(local, state))
    study = world.study
    return Step2(local, recipe.visit, main, state, theta_g, alive, anchors, finder_of(study), study.finder.densities)


def _kept(world: World, kept: Result | None, result: Result) -> Result | None:
    """Return which of two is this client's product: the kept arm's at the main density, else its first."""
    if result.arm not in ("refined", kept_arm(world.study)):
        return kept
    return result if kept is None or result.target == main_density(world.study) != kept.target else kept


def _row(local: Local, result: Result) -> MetricRow:
    """Evaluate one finished model. Test data is read here alone; no training and no choice sees it.

    A model that diverged, or whose loss is not finite, counts as a uniform guess among the classes. Its row says so for
    what training and validation show; of a test loss no ticket file and no choice may depend.
    """
    world, size = local.world, local.full.size
    if not (result.held or result.diverged) and ((result.params.floats[:size] != 0) & ~result.mask).any():
        raise AssertionError(f"arm {result.arm}: a dead weight is not zero")
    guess = 1 / world.dataset.num_classes, math.log(world.dataset.num_classes)
    val, test, diverged = guess, guess, result.diverged
    if not diverged:
        val = local.evaluate(result.params, local.val_part)
        test = local.evaluate(result.params, world.part(local.client, "test"))
        if not math.isfinite(val[1]):
            val, test, diverged = guess, guess, True
        elif not math.isfinite(test[1]):
            test = guess
    split = world.splits.clients[local.client]
    return MetricRow(
        client=local.client,
        unseen=local.client in world.splits.unseen,
        arm=result.arm,
        density=_share(result.mask),
        target_density=result.target,
        start=result.start,
        epochs=result.epochs,
        search_epochs=result.search_epochs,
        train_flops=result.flops[0],
        train_flops_effective=result.flops[1],
        val_accuracy=val[0],
        val_loss=val[1],
        test_accuracy=test[0],
        test_loss=test[1],
        num_train=len(split.train),
        num_val=len(split.val),
        num_test=len(split.test),
        ticket="" if result.mask.all() else bitmap.digest(result.mask),
        layer_density={e.name: _share(result.mask[e.slice]) for e in world.layout.prunable},
        diverged=diverged,
    )


def _share(mask: np.ndarray) -> float:
    return int(np.count_nonzero(mask)) / mask.size
