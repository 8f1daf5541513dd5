"""Hostile clients, late joiners, newcomers, clients without a server: what of them a study may not ask for."""

from __future__ import annotations

from fedlth.data.split import num_sampled
from fedlth.errors import StudyError, wrong
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


def check_quorum(experiment: Experiment) -> None:
    """Refuse more usable replies or votes than a round has clients, and a quorum with which no round could count."""
    federate, count = experiment.study.federate, experiment.study.clients.count
    rounds = [phase for phase in experiment.phases if phase.join is not None]
    for phase in rounds:  # of late joiners the first round has the fewest
        if (there := len(experiment.clients(phase, 1))) < federate.min_clients:
            raise wrong("federate.min_clients", f"at most the {there} clients of {phase.name} 1", federate.min_clients)
        if (votes := getattr(phase.join, "min_votes", 0)) and votes >= there:
            raise wrong("method.min_votes", f"below the {there} clients of {phase.name} 1", votes)
    if federate.quorum is None:
        return
    quorum = num_sampled(federate.quorum, count)
    if quorum > count:
        raise wrong("federate.quorum", f"at most clients.count = {count}", federate.quorum)
    if rounds and quorum < federate.min_clients:
        raise wrong("federate.quorum", f"at least federate.min_clients = {federate.min_clients}", federate.quorum)


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
