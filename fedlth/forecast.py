"""What a study will cost, before anything trains: clients, bytes, FLOPs, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fedlth.data.ragged import named
from fedlth.engines.choose import check_engine, without_effect
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.methods.fedselect import SelectUpdate
from fedlth.study.schema import Study
from fedlth.tickets.finder import Finder
from fedlth.tickets.rewind import ToInit
from fedlth.tickets.schedule import OneShot
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import Epochs, TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.task import Task
from fedlth.training.train import train

TIMED_STEPS = 5
SEARCHES: Mapping[str, Callable[[Finder], Finder]] = {
    "ticket": lambda finder: finder,
    "ticket_0": lambda finder: replace(finder, rewind=ToInit()),
    "one_shot": lambda finder: replace(finder, schedule=OneShot()),
}


def trainings(arm: str, experiment: Experiment) -> int:
    """Return how many trainings an arm takes, the dense one that a search begins with included.

    Each is of `personalise.epochs`. The random control's are those beside the search, which it shares with `ticket`.
    """
    finder, targets = experiment.finder, experiment.study.finder.densities
    if arm in SEARCHES:
        return SEARCHES[arm](finder).trainings(targets)[1]
    once, longest = len(targets), finder.trainings(targets)[0] or int(not finder.learned(targets)[0])
    return {
        "local": longest, "dense": 1, "dense_total": longest, "global_mask": once, "random": 3 * once, "own_random": 1,
    }.get(arm, 0)  # fmt: skip


def step2_epochs(experiment: Experiment) -> int:
    """Return the epochs of a client's step 2, the method's own training aside; what arms share counts once."""
    arms, finder, targets = set(experiment.arms), experiment.finder, experiment.study.finder.densities
    if "random" in arms:
        arms.add("ticket")  # the control walks the search for the masks where the arm does not
    searches = [SEARCHES[arm](finder) for arm in sorted(arms & SEARCHES.keys())]
    shared = max(0, ("dense" in arms) + sum(f.dense_first for f in searches) - 1)
    learned = finder.learned(targets)[0] * len({"local", "dense_total"} & arms) + sum(
        f.learned(targets)[1] for f in searches
    )
    epochs = experiment.study.personalise.epochs
    return (sum(trainings(arm, experiment) for arm in arms) - shared) * epochs + learned


def own_epochs(experiment: Experiment) -> tuple[float, float]:
    """Return the epochs of the method's own trainings of all clients: in the rounds of step 1, and in step 2.

    A client's visits are those that the server will sample: a method may train more than once an epoch after some.
    """
    study, task, trained = experiment.study, experiment.task, 0
    visits = dict.fromkeys(range(study.clients.count), 0)
    refined = study.refine.rounds * study.refine.clients_per_round
    for phase, round in experiment.steps:
        if phase in experiment.federated_phases:
            passes = getattr(phase.update, "passes", _once)
            for client in experiment.clients(phase, round):
                trained += passes(task, visits[client])
                visits[client] += 1
    passes = getattr(experiment.method.own, "passes", _once)
    tuned = sum(passes(task, count) for count in visits.values()) if "own_tuned" in experiment.arms else 0
    if study.refine.rounds:
        tuned += len(visits)
    return float((trained + refined) * study.train.epochs), float(tuned * study.personalise.epochs)


def _once(task: Task, visits: int) -> int:
    return 1


def forecast(study: Study) -> str:
    """Validate a study wholly and return the forecast as text; a few steps and visits are tried, nothing is kept.

    Bytes are estimates, or upper bounds that say so and why (forecast_bytes).
    """
    check_engine(study)
    experiment, notes = resolve(study)
    study, task = experiment.study, experiment.task
    notes += without_effect(study)
    step_s = _step_seconds(task)
    sizes = [len(c.train) for c in task.splits.clients]
    per_epoch = float(np.mean([-(-n // study.train.batch_size) for n in sizes]))
    steps = per_epoch * (sum(own_epochs(experiment)) + study.clients.count * step2_epochs(experiment))
    moved = forecast_bytes(experiment, step_s * per_epoch * study.train.epochs)
    per_step = 3 * task.model.flops[""] * study.train.batch_size
    lines = [
        f"study {study.study}: method {experiment.method.name}, {len(experiment.steps)} commits",
        *(f"note: {n}" for n in notes),
        f"clients: {study.clients.count} ({len(task.splits.unseen)} unseen), "
        f"train examples {min(sizes)}-{max(sizes)}, partition {task.splits.digest[:16]}",
        f"model: {study.model.name}, {task.layout.num_params:,} parameters, {task.layout.num_prunable:,} prunable",
        *(_tensor_line(task, e.name) for e in task.layout.floats if e.role == "param"),
        *_compute_lines(task),
        f"cohort: {study.cohort} clients train as one" if study.cohort != 1 else "cohort: 1, clients train one by one",
        str(moved),
        f"training: {steps:,.0f} steps, {steps * per_step / 1e12:,.2f} TFLOP (dense), at {1e3 * step_s:.2f} ms a step "
        f"about {steps * step_s / 60:,.1f} min on one core",
        f"memory: about {_memory_mb(experiment):,.0f} MB a worker; disk about {_disk_mb(experiment):,.0f} MB",
    ]
    return "\n".join(lines)


def _step_seconds(task: Task) -> float:
    """Time a few steps on the largest client, shortened to a few batches."""
    client = int(np.argmax([len(c.train) for c in task.splits.clients]))
    local = LocalClient(task, client, 0, "forecast")
    data = local.train_part
    size = min(len(data), task.study.train.batch_size * TIMED_STEPS)
    count = max(1, -(-size // task.study.train.batch_size))
    recipe = TrainingRecipe(budget=Epochs(1), batch_size=task.study.train.batch_size, lr=1e-6, loss=task.loss)
    request = drawn_request(task.theta_0, data.batch(slice(size)), recipe, order=local.rng("order"), torch_seed=0)
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        train(task.flat_model, request)
        best = min(best, (time.perf_counter() - began) / count)
    return best


def _memory_mb(experiment: Experiment) -> float:
    task = experiment.task
    data = sum(a.nbytes for x in (task.dataset.x_train, task.dataset.x_test) for a in named(x).values())
    largest = max(len(c.train) + len(c.val) for c in task.splits.clients)
    example = sum(4 * int(np.prod(a.shape[1:])) for a in named(task.dataset.x_train).values())
    models = 12 + _step2_models(experiment)
    masks = len(task.study.finder.densities) if "random" in experiment.arms else 0
    return (
        350 + (data + largest * example + models * 4 * task.layout.num_floats + masks * task.layout.num_prunable) / 1e6
    )


def _step2_models(experiment: Experiment) -> int:
    """Return how many models step 2 holds beside those of any training: no more with more arms or densities.

    The dense twin, with the epochs that a score looks back to; the kept result; of a search its start, its end, the
    ticket before and the scores; an earlier global model to rewind to.
    """
    arms, finder = set(experiment.arms), experiment.finder
    searching = bool(arms & {*SEARCHES, "random"})
    anchor = finder.rewind.anchor
    return 2 + searching * (4 + 2 * finder.window + bool(anchor and "@" in anchor))


def _disk_mb(experiment: Experiment) -> float:
    task, count = experiment.task, experiment.study.clients.count
    whole = 4 * task.layout.num_floats
    tickets = count * (whole + task.layout.num_prunable / 8) if experiment.arms != ("global",) else 0
    private = isinstance(experiment.method.own, SelectUpdate) or task.exchange is not task.layout.moving
    return float(2 * tickets + 3 * whole + (count * whole if private else 0)) / 1e6


def _compute_lines(task: Task) -> list[str]:
    """Say what computes this study, and which layers the kernel runs or why it cannot."""
    lines = [f"compute: {task.study.compute}"]
    if task.study.compute == "tuned":
        lines.append(f"  torch, {task.flat_model.forward.note}")
    if isinstance(task.table, str):
        return [*lines, f"  the kernel cannot run this study: {task.table}"]
    runs = "runs" if task.study.compute == "sparse" else "could run (compute: sparse)"
    return [*lines, f"  the kernel {runs} every layer:", *(f"    {line}" for line in task.table.describe())]


def _tensor_line(task: Task, name: str) -> str:
    entry = next(e for e in task.layout.floats if e.name == name)
    what = "prunable" if entry.prunable else ("dense" if entry.trainable else "frozen")
    shape = "x".join(map(str, entry.shape)) or "scalar"
    return f"  {name:32} {shape:>16} {what}"
