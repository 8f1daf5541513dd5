"""From a study as it was written to its experiment: defaults, what this machine decides, and all that can be refused.

Asks what was given and what is a default, so it is for a study as the user wrote it, never for a resolved one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlth.data.capacity import named
from fedlth.data.partition_file import sha256_of
from fedlth.errors import StudyError, wrong
from fedlth.experiment import client_memory, effects, feasible, recipe_checks
from fedlth.experiment.backend import with_backend
from fedlth.experiment.chaos import check_chaos
from fedlth.experiment.dp_checks import check_dp
from fedlth.experiment.experiment import KEPT_FIRST, Experiment, open_experiment
from fedlth.experiment.mask_defence import check_defence
from fedlth.experiment.well_formed import method_of
from fedlth.experiment.who_takes_part import check_newcomers, check_no_server, check_population, check_quorum
from fedlth.methods.client_update import sends_in
from fedlth.methods.rules import check_rule
from fedlth.models.initial import refuse
from fedlth.personalization import kept
from fedlth.personalization.arms import REWOUND, arm_of
from fedlth.storage.trackers import trackers_of
from fedlth.study.schema import Study
from fedlth.tickets.gate import Adaptive, ValAccuracy, ValDrop
from fedlth.tickets.rewind import ToInit
from fedlth.training import cohort_size, statistics
from fedlth.training.local_client import LocalClient
from fedlth.training.study_recipe import recipes
from fedlth.training.task import Task, forget_tasks, open_task


def resolve(study: Study) -> tuple[Experiment, list[str]]:
    """Return the experiment, everything decided, and notes on what was decided or has no effect; write nothing.

    Raises StudyError where the study cannot be run.
    """
    experiment, notes = read(study)
    for tracker in trackers_of(study).values():
        tracker.require()
    resolved, why = with_backend(experiment)
    resolved = _named(resolved, experiment.task)
    if resolved.science() != experiment.text:
        forget_tasks()  # what has been built is of another text, and three models large
    experiment = open_experiment(resolved.science())
    if study.tune.lr and not experiment.one_metric:
        raise StudyError("tune.lr: must not be given where tasks have different metrics: no mean of them decides")
    if study.tune.lr and study.privacy.dp is not None:
        raise StudyError("tune.lr: must be left out with privacy.dp: trainings at rates that are tried are not counted")
    notes += why + _checked(experiment) + feasible.check(study, experiment) + client_memory.notes(experiment)
    _check_rules(experiment)
    if resolved.device == "auto" and resolved.engine == "inprocess":  # elsewhere each worker's machine decides
        resolved = resolved.model_copy(update={"device": experiment.task.device})
    size, why = cohort_size.decided(resolved, open_task(resolved.science()))
    if size > 1 and not experiment.method.space.trains_weights:
        name = experiment.method.name
        why.append(f"cohort: method {name} trains scores one client at a time; other trainings go together")
    # Of the whole study: what decides no number (engine, folders, names) is not in the text of a worker's.
    return Experiment.of(resolved.model_copy(update={"cohort": size})), notes + why


def read(study: Study) -> tuple[Experiment, list[str]]:
    """Return the study with the method's defaults, and notes on options without effect; builds neither data nor model.

    Raises StudyError naming the place.
    """
    method = method_of(study)
    update: dict[str, Any] = {}
    if method.rewind and "rewind" not in study.finder.model_fields_set:
        update["finder"] = study.finder.model_copy(update={"rewind": {"name": method.rewind}})
    written = study.model.model_fields_set
    wanted = {"personal": method.personal or None, "prunable": method.prunable, "buffers": method.buffers}
    asked = {key: value for key, value in wanted.items() if value is not None and key not in written}
    if asked:
        update["model"] = study.model.model_copy(update=asked)
    if method.prunable is not None and "prunable" in written and study.model.prunable != method.prunable:
        raise wrong(
            "model.prunable",
            f"{list(method.prunable)} or left out for method {method.name}, whose masks are over these tensors",
            study.model.prunable,
        )
    if study.partition["name"] == "file" and isinstance(study.partition.get("path"), str):
        sha256 = study.partition.get("sha256") or sha256_of(study.partition["path"])
        update["partition"] = {**study.partition, "sha256": sha256}
    if not method.phases:
        update["federate"] = study.federate.model_copy(update={"rounds": 0})
    experiment = Experiment.of(study.model_copy(update=update))
    first, _ = recipes(study)  # says what is wrong with a part of the training
    for phase in method.phases:
        if study.train.pull is not None and getattr(phase.update, "own_pull", False):
            raise StudyError(f"train.pull: must be left out, method {method.name} has its own, got {study.train.pull}")
        if hasattr(phase.update, "obstacle") and (why := phase.update.obstacle(first)):
            raise StudyError(f"method: {method.name} {why}")
    arms, finder = experiment.arms, experiment.finder
    for arm in arms:
        arm_of(arm)
    effects.check_arms(study, method, arms)
    notes = effects.notes(study, experiment)
    refines = study.refine.rounds > 0
    if refines and ("ticket" not in arms or not experiment.shares_weights):
        raise StudyError(
            "refine.rounds: must be 0 for a method without the arm `ticket` and federated rounds of weights"
        )
    sends_values = any(kind == "values" for phase in method.phases for _, kind in phase.update.sends)
    if experiment.codec.feedback and not sends_values:
        raise StudyError(f"wire: must not be {study.wire} for a method that sends no values up, as {method.name}")
    if refines and (finder.dead.holds or not getattr(finder.rewind, "trains", True)):
        raise StudyError(
            "refine.rounds: must be 0 where dead weights are not zero or tickets are frozen: refinement trains "
            f"survivors among zeros, got {finder.dead} and {finder.rewind}"
        )
    if method.topology is not None:
        check_no_server(experiment)
    if study.evaluate.keep == "best" and study.evaluate.every and method.own_masks:
        raise StudyError(
            f"evaluate.keep: must be last for a method whose clients have masks, as {method.name}: theirs are of later "
            "rounds than the best one, got best"
        )
    if study.tickets == "compact" and finder.dead.holds:
        raise StudyError(f"tickets: must be dense where dead weights are not zero, as with {finder.dead}")
    if "ticket_0" in arms:
        replace(finder, rewind=ToInit())  # says so where the finder's other parts forbid it
    kept.check(experiment.keep, study.finder, named(study.clients.capacity))
    _check_counts(experiment)
    check_newcomers(experiment)
    notes += check_defence(experiment)
    _check_validation(experiment)
    _check_anchor(experiment)
    p = study.personalise
    given = p.lr is not None or p.schedule != {"name": "constant"}
    if not method.space.trains_weights and "own_tuned" in arms and given:
        notes.append(
            f"personalise.lr and .schedule: have no effect on own_tuned, whose scores have {method.name}'s own rate"
        )
    return experiment, notes


def _named(study: Study, task: Task) -> Study:
    """Return the study with the name of what both ends must have before anything crosses, where there is any."""
    return study.model_copy(update={"model": study.model.model_copy(update={"theta_0": task.model.fixed})})


def _checked(experiment: Experiment) -> list[str]:
    """Return notes on what only the built data and model can say; raise StudyError where the study cannot be run.

    Another initialisation of a model that brings its weights would be those weights again: a rewind to it is
    refused, and the arm `random` does without.
    """
    check_population(experiment)
    check_quorum(experiment)
    arms = set(experiment.arms)
    experiment.task.capacity(0)  # says what is wrong with clients.capacity
    for phase in (phase for phase in experiment.phases if phase.topology is not None):
        for client in experiment.clients(phase, 1):
            experiment.senders(phase, 1, client)  # says what is wrong with a topology of the user's
    faults = check_chaos(experiment)
    _check_first_masks(experiment)
    recipe_checks.check_rounds(experiment)
    notes = [*faults, *check_dp(experiment), *_own_recipes(experiment)]
    for task in experiment.task.each:
        try:
            found = _checked_task(experiment, task, arms)
        except StudyError as error:
            if not task.name:
                raise
            raise StudyError(f"tasks.{task.name}: {error}") from error
        notes += [f"tasks.{task.name}: {note}" if task.name else note for note in found]
    return notes


def _check_first_masks(experiment: Experiment) -> None:
    """Ask for the first mask of a client of each tier: a model or a tier that has none is refused before the run."""
    met = set()
    for client in range(experiment.study.clients.count):
        of = experiment.task_of(client).name, experiment.task.capacity(client)
        if of not in met:
            met.add(of)
            experiment.first_mask(client)


def _own_recipes(experiment: Experiment) -> list[str]:
    """Return a note for each view of a method's own recipes, which go to torch where the study's would not.

    A recipe may depend on what a client carries, so one client of each tier is asked.
    """
    study, task = experiment.study, experiment.task
    if study.compute != "sparse" and study.cohort == 1:
        return []
    one_of = {task.capacity(client): client for client in task.clients}
    views: dict[str, None] = {}
    for update in (phase.update for phase in experiment.federated_phases if hasattr(phase.update, "recipe")):
        for client in one_of.values():
            local = LocalClient(experiment.task_of(client), client, 1, "check", rounds=1)
            recipe = update.recipe(local, local.recipe)
            if recipe.views:
                views[type(recipe.view).__name__] = None
    who = "the kernel has" if study.compute == "sparse" else "cohorts have"
    said = f"method {experiment.method.name}: trains in torch, client by client, since {who} no view"
    return [f"{said} {name} of weights" for name in views]


def _probed(task: Task) -> list[str]:
    try:
        return task.probe()
    except StudyError as error:  # which a field that is too short in one example may be behind
        raise StudyError("; ".join([str(error), *feasible.uneven(task.dataset.lengths_train)])) from error


def _checked_task(experiment: Experiment, task: Task, arms: set[str]) -> list[str]:
    recipe_checks.check(task)
    method, notes = experiment.method, _probed(task)
    recipe_checks.try_own(task)
    if experiment.finder.rewind.anchor == "reinit" and arms & REWOUND:
        refuse(task.model.brought, "finder.rewind")
    if "random" in arms and task.model.brought:
        notes.append(f"arm random: starts from {' and '.join(experiment.random_starts)} alone; {task.model.brought}")
    evaluate = experiment.study.evaluate
    if evaluate.keep == "best" and evaluate.every and task.exchange is not task.layout.moving and method.phases:
        raise StudyError(
            "evaluate.keep: must be last where tensors stay with the clients (model.personal, model.buffers): theirs "
            "are of later rounds than the best one, got best"
        )
    _check_gates(experiment, task)
    for update in (phase.update for phase in method.phases):
        if hasattr(update, "unfit") and (why := update.unfit(task)):
            raise StudyError(f"method: {method.name} {why}")
        if hasattr(update, "remark") and (said := update.remark(task)):
            notes.append(f"method: {method.name} {said}")
    untrained = f"method {method.name}" if not method.space.trains_weights else ""
    if not getattr(experiment.finder.rewind, "trains", True) and arms & REWOUND:
        untrained = untrained or "finder.rewind"
    if untrained and (layer := statistics.unknown(task.model.module())):
        raise StudyError(statistics.REFUSED.format(layer=layer, what=f"what {untrained} never trains"))
    if method.needs_norms and not any(e.norm for e in task.layout.entries):
        raise StudyError(f"method: {method.name} needs a model with norms, {task.study.model.name} has none")
    if method.space.kind != "values" and task.exchange.num_prunable != task.layout.num_prunable:
        raise StudyError(
            f"model.personal: must leave all that is prunable shared, method {method.name} learns {method.space.name} "
            f"over all of it, got {list(task.study.model.personal or ())} and buffers {task.study.model.buffers}"
        )
    return notes


def _check_gates(experiment: Experiment, task: Task) -> None:
    """Refuse a threshold on a metric of which less is better: all thresholds say what must be reached or exceeded."""
    metric, finder, own = task.judged.main, experiment.finder, experiment.method.own
    if metric.higher_is_better:
        return
    for event in (own, getattr(own, "before", None), getattr(own, "after", None)):
        gate = getattr(event, "val_accuracy", -1)
        if gate >= 0:
            got = f"got {gate}" if "val_accuracy" in experiment.study.method else f"left at its default {gate}"
            raise StudyError(
                f"method.val_accuracy: must be below 0 (always open) where less of the metric is better, as of "
                f"{metric.name}, {got}"
            )
    if set(experiment.arms) & effects.SEARCH and hasattr(finder.gate, "at_least"):
        raise StudyError(
            f"finder.gate: must not be {type(finder.gate).__name__} where less of the metric is better, as of "
            f"{metric.name}"
        )


def _check_rules(experiment: Experiment) -> None:
    """Raise StudyError where a rule of the method cannot be believed."""
    for phase in experiment.phases:
        rule = experiment.rule(phase)
        if rule is not None:
            rule.init(experiment.start(), experiment.layout)  # a rule may refuse a layout
            place = f"method: {experiment.method.name}'s aggregation rule {type(phase.join).__name__}"
            count = len(experiment.clients(phase, 1))
            for sends in sorted({sends_in(phase.update, round) for round in range(1, phase.rounds + 1)}):
                layouts = {name: (kind, experiment.message_layout(phase, name, kind)) for name, kind in sends}
                check_rule(rule, experiment.start(), experiment.layout, layouts, count, place)


def _check_anchor(experiment: Experiment) -> None:
    """Refuse weights to go back to that no client could have."""
    study, finder, method = experiment.study, experiment.finder, experiment.method
    anchor = finder.rewind.anchor
    if anchor is None or (isinstance(anchor, str) and anchor in ("theta_0", "theta_g", "reinit")):
        return
    name, at, number = anchor.partition("@") if isinstance(anchor, str) else ("", "", "")
    if name != "theta_g" or not at or not number.isdecimal():
        raise StudyError(
            f"finder.rewind: there are no weights called {anchor!r} for {type(finder.rewind).__name__} to go back to; "
            "known: theta_0, theta_g, theta_g@ROUND, reinit"
        )
    rounds, place = study.federate.rounds, "federate.rounds"
    own = method.phases[-1].rounds if method.phases else 0
    if own:
        rounds, place = own, f"the rounds of phase {method.phases[-1].name}"
    elif study.tune.lr and study.tune.rounds < rounds:
        rounds, place = study.tune.rounds, "tune.rounds"
    if int(number) > rounds:
        raise StudyError(f"finder.rewind.round: must be at most {place} = {rounds}, got {anchor}")
    if method.space.kind != "values":
        raise StudyError(f"finder.rewind.round: must be -1, method {method.name} shares no weights, got {anchor}")


def _check_validation(experiment: Experiment) -> None:
    """Refuse decisions on validation data that no client has. What a user's part decides shows only in the run."""
    study, method, arms = experiment.study, experiment.method, set(experiment.arms)
    if study.clients.validation:
        return
    searches, finder = bool(arms & effects.SEARCH), experiment.finder
    own = method.own
    events = [own, *(getattr(own, event, None) for event in ("before", "after"))]
    deciding = {
        "tune.lr": bool(study.tune.lr),
        "the arm random": "random" in arms,
        "finder.main: auto": isinstance(experiment.keep, kept.Best),
        "evaluate.keep: best": study.evaluate.every > 0 and study.evaluate.keep == "best",
        "finder.gate": searches and isinstance(finder.gate, (ValAccuracy, Adaptive)),
        "finder.stop": searches and isinstance(finder.stop, ValDrop),
        f"method {method.name}": any(hasattr(event, "val_accuracy") for event in events),
    }
    for place, decides in deciding.items():
        if decides:
            raise StudyError(f"clients.validation: must be above 0, {place} decides on validation data, got 0")


def _check_counts(experiment: Experiment) -> None:
    """Refuse rounds that ask for more clients than take part (the split's own count), and a rate to try twice."""
    study = experiment.study
    if len(set(study.tune.lr)) < len(study.tune.lr):
        raise StudyError(f"tune.lr: each must be given once, got {list(study.tune.lr)}")
    if study.tune.lr and experiment.product_arm is None and "global" not in experiment.arms:
        raise StudyError(f"personalise.arms: must hold global or one of {', '.join(KEPT_FIRST)}, which tune.lr scores")
    most = experiment.taking_part
    fixed = {phase.name for phase in experiment.method.phases if getattr(phase.who, "count", 0)}
    for phase in experiment.phases:
        wanted = getattr(phase.who, "count", 0)
        if wanted > most:
            place = f"{phase.name if phase.name == 'refine' else 'federate'}.clients_per_round"
            place = f"method: {experiment.method.name}: its {phase.name}.who" if phase.name in fixed else place
            raise StudyError(f"{place}: must be at most the {most} clients that take part, got {wanted}")
