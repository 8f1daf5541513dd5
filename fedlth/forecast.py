"""What a study will cost, before anything trains: clients, bytes, FLOPs, memory and time."""

from __future__ import annotations

import time

import numpy as np

from fedlth import train
from fedlth.client import initial, space
from fedlth.config import Study
from fedlth.engines.choose import check_engine
from fedlth.methods.local import Local
from fedlth.methods.recipe import Recipe
from fedlth.methods.resolve import arms_of, finder_of, recipe_of, resolve
from fedlth.rounds import CONTROLS, steps_of
from fedlth.server import broadcast
from fedlth.session import backend, together
from fedlth.world import World, open_world

TIMED_STEPS = 5


def trainings(arm: str, study: Study) -> int:
    """Return how many fine-tunings an arm needs beyond those that arms listed before it share with it."""
    finder, targets = finder_of(study), study.finder.densities
    longest, every = finder.trainings(targets)
    once = len(targets)
    return {
        "local": longest, "dense": 1, "dense_total": longest, "ticket": every, "ticket_0": every - finder.dense_first,
        "one_shot": once, "global_mask": once, "random": 3 * once, "own_tuned": 1, "own_random": 1,
    }.get(arm, 0)  # fmt: skip


def forecast(study: Study) -> str:
    """Validate a study wholly and return the forecast as text. Trains nothing but a few timed synthetic steps.

    Bytes are exact for methods that send dense models; for methods with masks they are upper bounds.
    """
    study, notes = resolve(study)
    study, why = backend(study)
    notes += why
    world = open_world(study.science())
    world.probe()
    check_engine(study)
    study, why = together(study, study.engine)
    notes += why
    recipe = recipe_of(study)
    step_s = _step_seconds(world)
    sizes = [len(c.train) for c in world.splits.clients]
    per_epoch = float(np.mean([-(-n // study.train.batch_size) for n in sizes]))
    participations = study.federate.rounds * study.federate.clients_per_round if recipe.federated else 0
    tuning = sum(trainings(a, study) for a in arms_of(study)) * study.personalise.epochs
    if study.refine.rounds:
        tuning += study.personalise.epochs
    visits = participations + study.refine.rounds * study.refine.clients_per_round
    steps = per_epoch * (visits * study.train.epochs + study.clients.count * tuning)
    down, up = _bytes(world, recipe, participations)
    per_step = 3 * world.flops[""] * study.train.batch_size
    lines = [
        f"study {study.study}: method {recipe.name}, {len(steps_of(world, recipe))} commits",
        *(f"note: {n}" for n in notes),
        f"clients: {study.clients.count} ({len(world.splits.unseen)} unseen), "
        f"train examples {min(sizes)}-{max(sizes)}, partition {world.splits.digest[:16]}",
        f"model: {study.model.name}, {world.layout.num_params:,} parameters, {world.layout.num_prunable:,} prunable",
        *(_tensor_line(world, e.name) for e in world.layout.floats if e.role == "param"),
        *_compute_lines(world),
        f"cohort: {study.cohort} clients train as one" if study.cohort != 1 else "cohort: 1, clients train one by one",
        f"bytes: down {down / 1e6:,.2f} MB, up {up / 1e6:,.2f} MB"
        + ("" if recipe.down == "broadcast" and recipe.space == "weights" else " (upper bound: masks only save)"),
        f"training: {steps:,.0f} steps, {steps * per_step / 1e12:,.2f} TFLOP (dense), at {1e3 * step_s:.2f} ms a step "
        f"about {steps * step_s / 60:,.1f} min on one core",
        f"memory: about {_memory_mb(world):,.0f} MB a worker; disk about {_disk_mb(world, recipe):,.0f} MB",
    ]
    return "\n".join(lines)


def _step_seconds(world: World) -> float:
    """Time a few steps on the largest client, shortened to a few batches."""
    client = int(np.argmax([len(c.train) for c in world.splits.clients]))
    local = Local(world, client, 0, "forecast")
    x, y = local.train_part
    size = min(len(y), world.study.train.batch_size * TIMED_STEPS)
    count = max(1, -(-size // world.study.train.batch_size))
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        train.train(
            world.bound, world.theta_0, data=(x[:size], y[:size]), plan=local.plan.__class__(
                epochs=1, batch_size=world.study.train.batch_size, lr=1e-6
            ), order=local.rng("order"), torch_seed=0,
        )  # fmt: skip
        best = min(best, (time.perf_counter() - began) / count)
    return best


def _bytes(world: World, recipe: Recipe, participations: int) -> tuple[int, int]:
    study = world.study
    if not recipe.federated:
        return 0, 0
    kind = "values" if recipe.space == "weights" else "scores"
    dense = len(broadcast(kind, "", initial(world, recipe), space(world, recipe)).payload)
    bits = (world.layout.num_prunable + 7) // 8
    up = dense if recipe.visit.sends == "values" else bits
    twice = 1 + (recipe.down == "slice" and bool(CONTROLS & set(arms_of(study))))
    anchor = finder_of(study).rewind.anchor
    anchors = 1 if anchor and "@" in anchor and "ticket" in arms_of(study) else 0
    refined = study.refine.rounds * study.refine.clients_per_round
    down_bytes = dense * (participations + study.clients.count * (twice + anchors))
    up_bytes = up * participations
    if study.refine.rounds:
        down_bytes += dense * (refined + study.clients.count)
        up_bytes += dense * refined + bits * study.clients.count
    return down_bytes, up_bytes


def _memory_mb(world: World) -> float:
    data = sum(a.nbytes for a in (world.dataset.x_train, world.dataset.x_test))
    largest = max(len(c.train) + len(c.val) for c in world.splits.clients)
    example = 4 * int(np.prod(world.dataset.x_train.shape[1:]))
    return 350 + (data + largest * example + 12 * 4 * world.layout.num_floats) / 1e6


def _disk_mb(world: World, recipe: Recipe) -> float:
    count, whole = world.study.clients.count, 4 * world.layout.num_floats
    tickets = count * (whole + world.layout.num_prunable / 8) if arms_of(world.study) != ("global",) else 0
    return float(2 * tickets + 3 * whole + (count * whole if recipe.name == "fedselect" else 0)) / 1e6


def _compute_lines(world: World) -> list[str]:
    """Say what computes this study, and which layers the kernel runs or why it cannot."""
    lines = [f"compute: {world.study.compute}"]
    if world.study.compute == "tuned":
        lines.append(f"  torch, {world.bound.forward.note}")
    if isinstance(world.table, str):
        return [*lines, f"  the kernel cannot run this study: {world.table}"]
    runs = "runs" if world.study.compute == "sparse" else "could run (compute: sparse)"
    return [*lines, f"  the kernel {runs} every layer:", *(f"    {line}" for line in world.table.describe())]


def _tensor_line(world: World, name: str) -> str:
    entry = next(e for e in world.layout.floats if e.name == name)
    what = "prunable" if entry.prunable else ("dense" if entry.trainable else "frozen")
    shape = "x".join(map(str, entry.shape)) or "scalar"
    return f"  {name:32} {shape:>16} {what}"
