"""Hostile clients, late joiners, newcomers, clients without a server: what of them a study may not ask for."""

from __future__ import annotations

from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment


def check_population(experiment: Experiment) -> None:
    """Refuse hostile clients and late joiners that the data or the rounds do not allow."""
    study, people = experiment.study, experiment.population
    if experiment.method.topology is not None:
        for place, given in (("attack", study.attack), ("clients.newcomer", study.clients.newcomer)):
            if given is not None:
                raise StudyError(
                    f"{place}: must be left out for method {experiment.method.name}, whose clients send to one another"
                )
    attack, _ = people.attack
    if hasattr(attack, "poison") and any(task.dataset.targets != "classes" for task in experiment.task.each):
        raise StudyError(f"attack: {study.attack and study.attack['name']} needs targets that are classes")
    total = sum(phase.rounds for phase in experiment.federated_phases)
    late = max(people.arrivals.values(), default=0)
    if late > total and total:
        raise StudyError(f"clients.joiners: round must be at most the {total} rounds of step 1, got {late}")
    first, wanted = len(people.there(1)), study.federate.clients_per_round
    if isinstance(wanted, int) and total and wanted > first:
        raise StudyError(
            f"federate.clients_per_round: must be at most the {first} clients that are there from the first round on "
            f"(clients.joiners), got {wanted}"
        )


def check_newcomers(experiment: Experiment) -> None:
    """Refuse a first ticket for newcomers where clients have none at one density, of weights that all share."""
    study, method = experiment.study, experiment.method
    if experiment.newcomer is None:
        return
    place = f"clients.newcomer: must be left out for method {method.name}"
    if not experiment.shares_weights:
        raise StudyError(f"{place}, which shares no weights")
    if "ticket" not in experiment.arms:
        raise StudyError("clients.newcomer: needs the arm ticket (personalise.arms), whose masks are handed over")
    if experiment.keep.chooses:
        raise StudyError(f"clients.newcomer: needs tickets of one density, got finder.main: {study.finder.main}")


def check_no_server(experiment: Experiment) -> None:
    """Refuse what needs a global model that clients go on from: where they send to one another, there is none."""
    study, anchor, name = experiment.study, experiment.finder.rewind.anchor, experiment.method.name
    why = f"for method {name}, whose clients send to one another and hold no global model"
    if study.refine.rounds:
        raise StudyError(f"refine.rounds: must be 0 {why}, got {study.refine.rounds}")
    if study.evaluate.keep == "best" and study.evaluate.every:
        raise StudyError(f"evaluate.keep: must be last {why}, got best")
    if experiment.rewind_targets:
        raise StudyError(f"finder.rewind.round: must be -1 {why}, got {anchor}")
