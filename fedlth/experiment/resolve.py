"""From a study as it was written to its experiment: defaults, what this machine decides, and all that can be refused.

Asks what was given and what is a default, so it is for a study as the user wrote it, never for a resolved one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlth.data.split import num_unseen
from fedlth.errors import StudyError
from fedlth.experiment import effects, feasible
from fedlth.experiment.experiment import KEPT_FIRST, Experiment, method_of, open_experiment
from fedlth.kernel import kernel
from fedlth.methods.rules import check_rule
from fedlth.models.initial import refuse
from fedlth.personalization.arms import arm_of
from fedlth.storage import tensorboard
from fedlth.storage.server_state import ServerState
from fedlth.study.schema import Study
from fedlth.tickets.rewind import ToInit
from fedlth.training import cohort_size
from fedlth.training.task import open_task


def resolve(study: Study) -> tuple[Experiment, list[str]]:
    """Return the experiment, everything decided, and notes on what was decided or has no effect; write nothing.

    Raises StudyError where the study cannot be run.
    """
    experiment, notes = read(study)
    if study.tensorboard:
        tensorboard.require()
    resolved, why = _backend(experiment)
    experiment = open_experiment(resolved.science())
    notes += why + _checked(experiment) + feasible.check(study, experiment)
    _check_rules(experiment)
    if resolved.device == "auto" and resolved.engine == "inprocess":  # elsewhere each worker's machine decides
        resolved = resolved.model_copy(update={"device": experiment.task.device})
    size, why = cohort_size.decided(resolved, open_task(resolved.science()))
    if size > 1 and experiment.method.space == "scores":
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
    if method.personal and "personal" not in study.model.model_fields_set:
        update["model"] = study.model.model_copy(update={"personal": method.personal})
    if not method.phases:
        update["federate"] = study.federate.model_copy(update={"rounds": 0})
    experiment = Experiment.of(study.model_copy(update=update))
    arms, finder = experiment.arms, experiment.finder
    for arm in arms:
        arm_of(arm)
    effects.check_arms(study, method, arms)
    notes = effects.notes(study, experiment)
    refines = study.refine.rounds > 0
    if refines and ("ticket" not in arms or not experiment.trains_weights):
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
    if study.tickets == "compact" and finder.dead.holds:
        raise StudyError(f"tickets: must be dense where dead weights are not zero, as with {finder.dead}")
    if "ticket_0" in arms:
        replace(finder, rewind=ToInit())  # says so where the finder's other parts forbid it
    _check_counts(experiment)
    _check_anchor(experiment)
    p = study.personalise
    if method.space == "scores" and "own_tuned" in arms and (p.lr is not None or p.schedule != "constant"):
        notes.append(
            f"personalise.lr and .schedule: have no effect on own_tuned, whose scores have {method.name}'s own rate"
        )
    if method.name == "sub_fedavg" and study.train.epochs < 2:
        notes.append("train.epochs: with 1, sub_fedavg's two masks are the same epoch's, and nothing is pruned")
    return experiment, notes


def _backend(experiment: Experiment) -> tuple[Study, list[str]]:
    """Return the study with `compute: auto` decided, and a note that says what was decided and why."""
    study = experiment.study
    if study.compute != "auto":
        return study, []
    table = experiment.task.table
    if isinstance(table, str):
        return study.model_copy(update={"compute": "tuned"}), [
            f"compute: tuned, because the kernel cannot run: {table}"
        ]
    note = "compute: sparse, all layers run in the kernel"
    if kernel.large(table):
        note += "; what is dense is trained in torch, which is faster for maps of this size"
    return study.model_copy(update={"compute": "sparse"}), [note]


def _checked(experiment: Experiment) -> list[str]:
    """Return notes on what only the built data and model can say; raise StudyError where the study cannot be run.

    Another initialisation of a model that brings its weights would be those weights again: a rewind to it is
    refused, and the arm `random` does without.
    """
    task, arms = experiment.task, set(experiment.arms)
    notes = task.probe()
    if experiment.finder.rewind.anchor == "reinit" and arms & {"ticket", "one_shot", "random"}:
        refuse(task.model.brought, "finder.rewind")
    if "random" in arms and task.model.brought:
        notes.append(f"arm random: starts from {' and '.join(experiment.random_starts)} alone; {task.model.brought}")
    _check_gates(experiment)
    task.capacity(0)  # says what is wrong with clients.capacity
    method = experiment.method
    if method.space == "scores" and task.exchange.num_prunable != task.layout.num_prunable:
        raise StudyError(
            f"model.personal: must leave all that is prunable shared, method {method.name} learns one mask of it, got "
            f"{list(task.study.model.personal or ())} and buffers {task.study.model.buffers}"
        )
    return notes


def _check_gates(experiment: Experiment) -> None:
    """Refuse a threshold on a metric of which less is better: all thresholds say what must be reached or exceeded."""
    metric, finder, own = experiment.task.judged.main, experiment.finder, experiment.method.own
    if metric.higher_is_better:
        return
    for event in (getattr(own, "before", None), getattr(own, "after", None)):
        if event is not None and getattr(event, "val_accuracy", -1) >= 0:
            raise StudyError(
                f"method.val_accuracy: must be below 0 (always open) where less of the metric is better, as of "
                f"{metric.name}, got {event.val_accuracy}"
            )
    if set(experiment.arms) & effects.SEARCH and hasattr(finder.gate, "at_least"):
        raise StudyError(
            f"finder.gate: must not be {type(finder.gate).__name__} where less of the metric is better, as of "
            f"{metric.name}"
        )


def _check_rules(experiment: Experiment) -> None:
    """Raise StudyError where a rule of the method cannot be believed."""
    for phase in experiment.phases:
        if phase.join is not None:
            place = f"method: {experiment.method.name}'s aggregation rule {type(phase.join).__name__}"
            count = len(experiment.clients(phase, 1))
            layouts = {name: (kind, experiment.layout_of(kind)) for name, kind in phase.update.sends}
            check_rule(phase.join, ServerState(experiment.initial()), experiment.layout, layouts, count, place)


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
    if method.space != "weights":
        raise StudyError(f"finder.rewind.round: must be -1, method {method.name} shares no weights, got {anchor}")


def _check_counts(experiment: Experiment) -> None:
    """Refuse rounds that ask for more clients than take part (the split's own count), and a rate to try twice."""
    study = experiment.study
    if len(set(study.tune.lr)) < len(study.tune.lr):
        raise StudyError(f"tune.lr: each must be given once, got {list(study.tune.lr)}")
    if study.tune.lr and experiment.product_arm is None and "global" not in experiment.arms:
        raise StudyError(f"personalise.arms: must hold global or one of {', '.join(KEPT_FIRST)}, which tune.lr scores")
    most = study.clients.count - num_unseen(study.clients.count, study.clients.unseen)
    fixed = {phase.name for phase in experiment.method.phases if getattr(phase.who, "count", 0)}
    for phase in experiment.phases:
        wanted = getattr(phase.who, "count", 0)
        if wanted > most:
            place = f"{phase.name if phase.name == 'refine' else 'federate'}.clients_per_round"
            place = f"method: {experiment.method.name}: its {phase.name}.who" if phase.name in fixed else place
            raise StudyError(f"{place}: must be at most the {most} clients that take part, got {wanted}")
