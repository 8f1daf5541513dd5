"""Who must be there for a round to begin, and who was not, where an engine knows."""

from __future__ import annotations

from fedlth.experiment.experiment import Experiment
from fedlth.federation.jobs import Enough
from fedlth.methods.method import Phase


def enough(experiment: Experiment, phase: Phase, round: int) -> Enough:
    """Return what says that a round can begin: as many clients are there as it needs to count, or anybody.

    Nobody else is waited for: who is away costs the round a client, not time.
    """
    if phase.join is None:
        return bool
    seen, wanted = (
        experiment.population.there(experiment.of_step_1(phase, round)),
        experiment.study.federate.min_clients,
    )
    return lambda there: len(there & set(seen)) >= wanted


def drawn(experiment: Experiment, phase: Phase, round: int, present: frozenset[int] | None) -> list[int]:
    """Return who takes part in a round: of a federated one, where federate.quorum is given, among who is present.

    With everybody there it is the same draw. Step 2 asks for all: who is away in it is remembered as lost.
    """
    if present is None or phase.join is None or experiment.study.federate.quorum is None:
        return experiment.clients(phase, round)
    seen = experiment.population.there(experiment.of_step_1(phase, round))
    return experiment.clients(phase, round, present) if present.intersection(seen) else []


def absent(experiment: Experiment, present: frozenset[int] | None) -> list[int]:
    """Return the clients that are not present, sorted; nobody, where all always are."""
    if present is None:
        return []
    return [client for client in range(experiment.study.clients.count) if client not in present]
