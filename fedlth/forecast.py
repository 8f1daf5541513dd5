"""What a study will cost, before anything trains: clients, bytes, FLOPs, memory and time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedlth.data.ragged import named
from fedlth.engines.choose import answers_at_once, check_engine, without_effect
from fedlth.experiment.chaos import foreseen_faults
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.federation.answer_bytes import said_at_start
from fedlth.federation.forecast_bytes import EVALUATION, forecast_bytes, trying
from fedlth.federation.forecast_time import Visit, forecast_time
from fedlth.methods.client_update import passes_of
from fedlth.methods.fedselect import SelectUpdate
from fedlth.methods.robust import holds_round
from fedlth.personalization.arms import OF_TICKETS, at_init
from fedlth.study.schema import Study
from fedlth.study.sections import Tier
from fedlth.tickets.finder import Finder
from fedlth.tickets.rewind import ToInit
from fedlth.tickets.schedule import OneShot
from fedlth.training import batch_requests, kernel_backend
from fedlth.training.batches import steps_an_epoch
from fedlth.training.budget import Budget
from fedlth.training.dp_accountant import epsilon
from fedlth.training.evaluation import evaluate
from fedlth.training.kept_layers import said
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, drawn_request
from fedlth.training.study_recipe import budget_of, personal, recipes
from fedlth.training.task import Task
from fedlth.training.train import train

TIMED_STEPS = 5
SEARCHES: Mapping[str, Callable[[Finder], Finder]] = {
    "ticket": lambda finder: finder,
    "ticket_0": lambda finder: replace(finder, rewind=ToInit()),
    "one_shot": lambda finder: replace(finder, schedule=OneShot()),
    "init_mask": at_init,
}


def trainings(arm: str, experiment: Experiment) -> int:
    """Return how many trainings an arm takes, the dense one that a search begins with included.

    Each is as long as `personalise` says. A control's of the ticket's masks are those beside the search, which it
    shares with `ticket`.
    """
    finder, targets = experiment.finder, experiment.study.finder.densities
    if arm in SEARCHES:
        return SEARCHES[arm](finder).trainings(targets)[1]
    once, longest = len(targets), finder.trainings(targets)[0] or int(not finder.learned(targets)[0])
    return {
        "local": longest, "dense": 1, "dense_total": longest, "global_mask": once,
        "random": len(experiment.random_starts) * once, "shuffled_values": once, "reinit": once,
        "own_random": 1, "own_global_mask": 1,
    }.get(arm, 0)  # fmt: skip


def step2_epochs(experiment: Experiment) -> float:
    """Return the epochs of a client's step 2, the method's own training aside; what arms share counts once."""
    arms, finder, targets = set(experiment.arms), experiment.finder, experiment.study.finder.densities
    if arms & OF_TICKETS:
        arms.add("ticket")  # a control walks the search for the masks where the arm does not
    searches = [SEARCHES[arm](finder) for arm in sorted(arms & SEARCHES.keys())]
    shared = max(0, ("dense" in arms) + sum(f.dense_first for f in searches) - 1)
    learned = finder.learned(targets)[0] * len({"local", "dense_total"} & arms) + sum(
        f.learned(targets)[1] for f in searches
    )
    train = personal(experiment.study)
    epochs = budget_of(train).in_epochs(_mean_steps(experiment.task, train.batch_size))
    return (sum(trainings(arm, experiment) for arm in arms) - shared) * epochs + learned


def own_epochs(experiment: Experiment, *, flops: bool = False) -> tuple[float, float]:
    """Return the epochs of the method's own trainings of all clients: in the rounds of step 1, and in step 2.

    A client's visits are those that the server will sample: a method may train more than once an epoch after some.
    `flops`: as many epochs of the whole network as cost as much.
    """
    first, second = (
        budget_of(train).in_epochs(_mean_steps(experiment.task, train.batch_size))
        for train in (experiment.study.train, personal(experiment.study))
    )
    trained, tuned = map(sum, zip(*_own_trainings(experiment, flops=flops).values(), strict=True))
    return float(trained * first), float(tuned * second)


def _own_trainings(experiment: Experiment, *, flops: bool = False) -> dict[int, tuple[float, float]]:
    """Return each client's trainings of the method's own: in rounds, those inside tickets included, and in step 2.

    `flops`: as many of the whole network as cost as much.
    """
    study, task = experiment.study, experiment.task
    visits, trained = dict.fromkeys(range(study.clients.count), 0), dict.fromkeys(range(study.clients.count), 0.0)
    for phase, round in experiment.steps:
        if phase.name == "refine":
            for client in experiment.clients(phase, round):
                trained[client] += 1
        elif phase in experiment.federated_phases:
            for client in experiment.clients(phase, round):
                trained[client] += passes_of(phase.update, task.of(client), visits[client], flops=flops)
                visits[client] += 1
    own, tunes, refined = experiment.method.own, "own_tuned" in experiment.arms, study.refine.rounds > 0
    tuned = {c: passes_of(own, task.of(c), n, tunes=True, flops=flops) if tunes else 0 for c, n in visits.items()}
    return {client: (trained[client], tuned[client] + refined) for client in visits}


def _epsilon_lines(experiment: Experiment) -> list[str]:
    """Say what privacy.dp comes to for the client that it protects least, where every search goes to its end."""
    task, (first, second) = experiment.task, recipes(experiment.study)
    if first.dp is None:
        return []
    worst, step_2 = 0.0, step2_epochs(experiment)
    for client, (rounds, tuned) in _own_trainings(experiment).items():
        size, steps = len(task.splits.clients[client].train), Counter[int]()
        steps[first.batch_size] += round(rounds * first.steps(size))
        steps[second.batch_size] += round(tuned * second.steps(size) + step_2 * steps_an_epoch(size, second.batch_size))
        worst = max(worst, epsilon(first.dp, size, steps))
    return [f"privacy.dp: epsilon about {worst:.1f} at most, at delta {first.dp.delta:g}, over all of a client's steps"]


def _mean_steps(task: Task, batch_size: int) -> float:
    """Return the mean over clients of the steps of an epoch."""
    return float(np.mean([steps_an_epoch(len(c.train), batch_size) for c in task.splits.clients]))


def _kept_epochs(experiment: Experiment, tier: Tier) -> float:
    """Return the epochs of step 2 that lead to the model which a client of this tier keeps; it trains no controls."""
    arm, train = experiment.kept_arm, personal(experiment.study)
    if arm is None:
        return 0.0
    many, learned = float(trainings(arm, experiment)), 0
    if arm in SEARCHES:
        finder, targets = SEARCHES[arm](experiment.finder), experiment.study.finder.densities
        kept = experiment.keep.allowed(tier)
        many, learned = finder.trainings(targets, kept)[1], finder.learned(targets, kept)[1]
    elif arm == "own_tuned":
        many = passes_of(experiment.method.own, experiment.task, 0, tunes=True, flops=True)
    return many * budget_of(train).in_epochs(_mean_steps(experiment.task, train.batch_size)) + learned


@dataclass(frozen=True)
class Foreseen:
    """A forecast as text, and its sums: payload bytes, dense training FLOPs, minutes on one core, megabytes."""

    text: str
    down_bytes: float
    up_bytes: float
    flops: float
    minutes: float
    memory_mb: float
    disk_mb: float


def forecast(study: Study) -> str:
    """Validate a study wholly and return the forecast as text; see `foreseen`."""
    return foreseen(study).text


def foreseen(study: Study) -> Foreseen:
    """Validate a study wholly and return its forecast; a few steps and visits are tried, nothing is kept.

    Bytes are estimates, or upper bounds that say so and why (forecast_bytes).
    """
    check_engine(study)
    experiment, notes = resolve(study)
    study, task = experiment.study, experiment.task
    notes += without_effect(study)
    sizes = [len(c.train) for c in task.splits.clients]
    largest = int(np.argmax(sizes))
    local = LocalClient(task.of(largest), largest, 0, "forecast")
    step_s = []
    for place, recipe in (("train", local.recipe), ("personalise", local.personal_recipe)):
        with trying(f"{place}: training fails", local):
            step_s.append(_step_seconds(local, recipe))
    per_epoch = [_mean_steps(task, recipe.batch_size) for recipe in (local.recipe, local.personal_recipe)]
    rest = study.clients.count * step2_epochs(experiment)
    taken, paid = (own_epochs(experiment, flops=flops) for flops in (False, True))
    steps = [one * many for one, many in zip(per_epoch, (taken[0], taken[1] + rest), strict=True)]
    whole = [one * many for one, many in zip(per_epoch, (paid[0], paid[1] + rest), strict=True)]
    flops = float(np.mean([task.of(client).model.training_flops[""] for client in range(study.clients.count)]))
    sizes_of_batches = local.recipe.batch_size, local.personal_recipe.batch_size
    flop = sum(flops * size * many for size, many in zip(sizes_of_batches, whole, strict=True))
    minutes = sum(one * many for one, many in zip(step_s, steps, strict=True)) / 60
    moved = forecast_bytes(experiment, step_s[0] * budget_of(study.train).in_epochs(per_epoch[0]) * per_epoch[0])
    lines = [
        f"study {study.study}: method {experiment.method.name}, {len(experiment.steps)} commits",
        *(f"note: {n}" for n in notes),
        *([f"seeds: {len(study.seeds)}, a run each; the figures below are those of one run"] if study.seeds else []),
        f"clients: {study.clients.count} ({len(task.splits.unseen)} unseen), "
        f"train examples {min(sizes)}-{max(sizes)}, {_tests(task)}partition {task.splits.digest[:16]}",
        *_guess_lines(task),
        *(line for one in (task, *(one for one in task.each if one is not task)) for line in _model_lines(one)),
        *_compute_lines(next((t for t in task.each if isinstance(t.table, str)), task.each[0])),
        *_recipe_lines(experiment, local),
        *_epsilon_lines(experiment),
        f"cohort: {study.cohort} clients train as one" if study.cohort != 1 else "cohort: 1, clients train one by one",
        str(moved),
        *forecast_time(experiment, Visit(*moved.visit, epochs=partial(_kept_epochs, experiment))),
        f"training: {sum(steps):,.0f} steps, {flop / 1e12:,.2f} TFLOP (dense), at {1e3 * step_s[0]:.2f} ms a step of "
        f"step 1 and {1e3 * step_s[1]:.2f} of step 2 about {minutes:,.1f} min on one core",
        *_evaluation_lines(experiment),
        f"server: {said_at_start(experiment, answers_at_once(study))}",
        *_server_lines(experiment),
        *foreseen_faults(experiment),
        f"memory: about {_memory_mb(experiment):,.0f} MB a worker; disk about {_disk_mb(experiment):,.0f} MB",
    ]
    memory, disk = _memory_mb(experiment), _disk_mb(experiment)
    return Foreseen("\n".join(lines), moved.down.size, moved.up.size, flop, minutes, memory, disk)


def _server_lines(experiment: Experiment) -> list[str]:
    """Say what the server holds at once where its rule looks at all updates of a round together."""
    lines, needs = list[str](), list[tuple[float, int, float, Any]]()
    for phase in experiment.phases:
        if holds_round(phase.join):
            # The consensus of clients without a server is of all that have published.
            taking_part = len(experiment.clients(phase, phase.rounds))
            count = taking_part if phase.topology is None else experiment.taking_part
            layouts = [experiment.message_layout(phase, name, kind) for name, kind in phase.update.sends]
            each = sum(4 * one.num_floats + 8 * one.num_ints + one.num_prunable for one in layouts) / 1e6
            needs.append((count * each, count, each, phase.join))
    if needs:
        most, count, each, rule = max(needs, key=lambda one: one[0])
        name, fewest = type(rule).__name__, min(one[1] for one in needs)
        lines.append(f"server: {name} holds a round's updates at once: {count} x {each:,.2f} = {most:,.1f} MB")
        for one in (rule, getattr(rule, "mean", None)):
            doubt = getattr(one, "doubt", None)
            if doubt is not None and (why := doubt(fewest)):
                lines.append(f"federate.join: {why}")
    if experiment.population.hostile:
        lines.append(f"hostile clients: {', '.join(map(str, sorted(experiment.population.hostile)))}")
    if experiment.population.arrivals:
        told = ", ".join(f"{c} from round {r}" for c, r in sorted(experiment.population.arrivals.items()))
        lines.append(f"late joiners: clients {told}")
    return lines


def _tests(task: Task) -> str:
    if not task.splits.own_test:
        return ""
    sizes = [len(c.test) for c in task.splits.clients]
    return f"own test examples {min(sizes)}-{max(sizes)}, "


def _guess_lines(task: Task) -> list[str]:
    """Say what needs no model: a client's most frequent training class, told of every test example."""
    if task.dataset.targets != "classes" or np.ptp(task.dataset.y_train) == 0:
        return []
    y_train, hits = task.dataset.y_train, []
    y_test = y_train if task.splits.own_test else task.dataset.y_test
    for split in task.splits.clients:
        hits.append(float((y_test[split.test] == np.bincount(y_train[split.train]).argmax()).mean()))
    low, mean, high = (f"{100 * value:.1f}" for value in (min(hits), float(np.mean(hits)), max(hits)))
    return [f"guessing each client's most frequent training class: {mean} % of its test examples ({low} to {high})"]


def _step_seconds(local: LocalClient, recipe: TrainingRecipe) -> float:
    """Time a few steps of a recipe on the largest client, shortened to a few batches."""
    request = _tried(local, recipe)
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        train(local.task.flat_model, request)
        best = min(best, (time.perf_counter() - began) / len(request.rates))
    return best


def _evaluation_lines(experiment: Experiment) -> list[str]:
    """Say how long the evaluations between the rounds take, if there are any."""
    phase, task = next((p for p in experiment.phases if p.evaluates), None), experiment.task
    if phase is None:
        return []
    parts = [len(split.val) + len(split.test) for split in task.splits.clients]
    client = int(np.argmax(parts))
    task = task.of(client)
    data = task.part(client, "train")
    with trying(EVALUATION, LocalClient(task, client, 0, "forecast")):
        evaluate(task.flat_model, task.theta_0, data, task.judged.all)  # once: nothing is compiled while it is timed
    began = time.perf_counter()
    evaluate(task.flat_model, task.theta_0, data, task.judged.all)
    example_s = (time.perf_counter() - began) / len(data)
    examples = phase.rounds * len(experiment.curve_arms) * sum(parts)
    minutes = examples * example_s / 60
    return [f"evaluation between rounds: {examples:,} examples, about {minutes:,.1f} min on one core"]


def _tried(local: LocalClient, recipe: TrainingRecipe) -> TrainingRequest:
    """Return a training by a recipe, of a few batches and next to no rate."""
    few = local.task.part(local.client, "train").batch(slice(recipe.batch_size * TIMED_STEPS))
    short = replace(recipe, budget=Budget(epochs=1), lr=1e-6)
    return drawn_request(local.task.theta_0, few, short, order=local.rng("order"), torch_seed=0)


def _recipe_lines(experiment: Experiment, local: LocalClient) -> list[str]:
    """Say which backend trains by the recipe of each step, and why no faster one; what decides is what trains."""
    study, lines, own = experiment.study, list[str](), experiment.method.own
    tried = {"step 1": local.recipe, "step 2": local.personal_recipe}
    objective = own.recipe(local, local.recipe) if hasattr(own, "recipe") else local.recipe
    if objective != local.recipe:
        tried[f"{experiment.method.name}'s own"] = objective
    for name, recipe in tried.items():
        request, why, where = _tried(local, recipe), list[str](), ""
        if study.compute == "sparse":
            why.append(kernel_backend.obstacle(local.task.flat_model, request))
            where = "" if why[0] else "dense trainings run in the kernel"
        if not where and study.cohort != 1:
            why.append(batch_requests.lacks(request))
            where = "" if why[-1] else "trainings run in cohorts"
        told = f", because {'; '.join(why)}" if why else ""
        lines.append(f"  {name}: {where or f'dense trainings run in torch, client by client{told}'}")
    return lines


def _memory_mb(experiment: Experiment) -> float:
    task = experiment.task
    data = sum(a.nbytes for x in (task.dataset.x_train, task.dataset.x_test) for a in named(x).values())
    largest = max(len(c.train) + len(c.val) for c in task.splits.clients)
    example = sum(4 * int(np.prod(a.shape[1:])) for a in named(task.dataset.x_train).values())
    models = 12 + _step2_models(experiment)
    masks = len(task.study.finder.densities) if OF_TICKETS & set(experiment.arms) else 0
    # What an optimizer remembers, and as much again while it makes a step; of what is trained alone.
    optimizers = (recipe.optimizer for recipe in recipes(task.study, task.dataset.num_classes, task.dataset.targets))
    moments = 2 * max(len(one.memory(torch.zeros(1))) for one in optimizers)
    trained = len(range(task.layout.num_params)[task.layout.trained])
    numbers = models * task.layout.num_floats + moments * trained
    return 350 + (data + largest * example + 4 * numbers + masks * task.layout.num_prunable) / 1e6


def _step2_models(experiment: Experiment) -> int:
    """Return how many models step 2 holds beside those of any training: no more with more arms or densities.

    The dense twin, with the epochs that a score looks back to; the kept result; of a search its start, its end, the
    ticket before and the scores; an earlier global model to rewind to.
    """
    arms, finder = set(experiment.arms), experiment.finder
    searching = bool(arms & (SEARCHES.keys() | OF_TICKETS))
    anchor = finder.rewind.anchor
    return 2 + searching * (4 + 2 * finder.window + bool(anchor and "@" in anchor))


def _disk_mb(experiment: Experiment) -> float:
    task, study, own = experiment.task, experiment.study, experiment.method.own
    moving, bits = task.layout.moving, task.layout.num_prunable / 8
    whole, frozen = 4 * moving.num_floats, 4 * (task.layout.num_prunable - moving.num_prunable)
    kept = experiment.kept_arm is not None and experiment.arms != ("global",)
    pruned = experiment.kept_arm == "ticket" and study.finder.stop == {"name": "target"}
    density = experiment.keep.allowed(Tier())[0] if pruned else 1.0
    # What nothing trains is in no state; of what is pruned there is nothing to keep.
    ticket = whole - 4 * (1 - density) * moving.num_prunable + bits
    compact = ticket + density * frozen
    file = {"none": 0.0, "compact": compact, "dense": 4 * task.layout.num_floats + bits}[study.tickets]
    home = 4 * (moving if isinstance(own, SelectUpdate) else task.home).num_floats
    # What a lossy codec owes the server lies with each client, too.
    owed = experiment.codec.feedback and experiment.shares_weights and experiment.method.topology is None
    first = experiment.first_mask(0)
    published = 0.0 if experiment.method.topology is None else 1.0 if first is None else float(first.mean())
    each = kept * (ticket + file) + home + whole * (getattr(own, "keeps", 0) + owed + published)
    return float(3 * whole + study.clients.count * each) / 1e6


def _compute_lines(task: Task) -> list[str]:
    """Say what computes this study, and which layers the kernel runs or why it cannot."""
    lines = [f"compute: {task.study.compute}"]
    if task.study.compute == "tuned":
        lines.append(f"  torch, {task.flat_model.forward.note}")
    if isinstance(task.table, str):
        return [*lines, f"  the kernel cannot run this study: {task.table}", *said(task.flat_model.kept)]
    runs = "runs" if task.study.compute == "sparse" else "could run (compute: sparse)"
    return [*lines, f"  the kernel {runs} every layer:", *(f"    {line}" for line in task.table.describe())]


def _model_lines(task: Task) -> list[str]:
    """Say what a task's network is; of a task with a name, only what the clients do not share."""
    shared = {e.name for e in task.exchange.entries} if task.name else set()
    params = [e.name for e in task.layout.floats if e.role == "param" and e.name not in shared]
    outputs = "1 output" if task.dataset.num_classes == 1 else f"{task.dataset.num_classes} outputs"
    what = f"task {task.name}, {outputs}" if task.name else f"model: {task.study.model.name}"
    of = f", {len(task.clients)} clients" if task.name else ""
    head = f"{what}{of}, {task.layout.num_params:,} parameters, {task.layout.num_prunable:,} prunable"
    return [head, *(_tensor_line(task, name) for name in params)]


def _tensor_line(task: Task, name: str) -> str:
    entry = next(e for e in task.layout.floats if e.name == name)
    what = ("prunable" if entry.prunable else "dense") if entry.trainable else "frozen" + ", prunable" * entry.prunable
    shape = "x".join(map(str, entry.shape)) or "scalar"
    return f"  {name:32} {shape:>16} {what}"
