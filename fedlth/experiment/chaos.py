"""Injected faults (`chaos` of a study): which visit meets which one is a pure function of the seed given there."""

from __future__ import annotations

from collections import Counter

from fedlth import rng
from fedlth.errors import StudyError, wrong
from fedlth.experiment.experiment import Experiment
from fedlth.storage.transfer_cells import TRANSFER
from fedlth.study.schema import Study

KILL = "kill"


def fault_of(study: Study, phase: str, round: int, client: int) -> str:
    """Return the fault that a visit meets, "" for none: the same on every engine, and after every resume."""
    chaos = study.chaos
    if chaos is None or phase == TRANSFER:  # a matrix of a finished run is no part of what was put to the test
        return ""
    for only, one in ((chaos.rounds, round), (chaos.clients, client), (chaos.phases, phase)):
        if only is not None and one not in only:
            return ""
    draw = float(rng.stream(chaos.seed, f"chaos {phase}", round, client).random())
    for fault, rate in chaos.faults:
        if draw < rate:
            return fault
        draw -= rate
    return ""


def check_chaos(experiment: Experiment) -> list[str]:
    """Return a note that says what is injected; raise StudyError where the study's `chaos` cannot be."""
    study, chaos = experiment.study, experiment.study.chaos
    if chaos is None:
        return []
    rates = {fault: rate for fault, rate in chaos.faults if rate}
    if not rates:
        raise StudyError("chaos.faults: must give at least one fault a rate above 0")
    if beyond := [c for c in chaos.clients or () if c >= study.clients.count]:
        raise wrong("chaos.clients", f"below clients.count = {study.clients.count}", beyond)
    names = [phase.name for phase in experiment.phases]
    if unknown := [name for name in chaos.phases or () if name not in names]:
        raise wrong("chaos.phases", f"among {', '.join(names)}", unknown)
    if KILL in rates and study.cohort != 1:
        raise StudyError(
            f"chaos.faults.kill: needs cohort: 1, got {study.cohort}: who trains together decides last bits, and a "
            "killed process takes its whole cohort with it"
        )
    told = ", ".join(f"{fault} {rate:g}" for fault, rate in rates.items())
    where = [
        f"{key} {', '.join(map(str, only))}"
        for key in ("rounds", "clients", "phases")
        if (only := getattr(chaos, key)) is not None
    ]
    return ["; ".join([f"chaos: faults are injected by seed {chaos.seed}, at rates {told}", *where])]


def foreseen_faults(experiment: Experiment) -> list[str]:
    """Return a line that counts the faults which the visits of a run will meet; none where the study has no chaos."""
    if experiment.study.chaos is None:
        return []
    visits = [(phase.name, round, c) for phase, round in experiment.steps for c in experiment.clients(phase, round)]
    met = Counter(fault_of(experiment.study, *visit) for visit in visits)
    del met[""]
    told = ", ".join(f"{fault} {count}" for fault, count in sorted(met.items()))
    return [f"injected faults: {sum(met.values())} of {len(visits)} visits{': ' * bool(told)}{told}"]
