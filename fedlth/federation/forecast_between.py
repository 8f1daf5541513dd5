"""What will cross where clients send to one another: who hears whom is known before a run, lengths nearly so."""

from __future__ import annotations

import numpy as np

from fedlth.experiment.experiment import Experiment
from fedlth.federation.message_lengths import Lengths
from fedlth.methods.client_update import Keep
from fedlth.wire import payload
from fedlth.wire.payload import Content

ENCODED = 4  # of how many clients a publication is encoded to see how long it is


def between(wire: Lengths, *, evaluations: bool = False) -> float:
    """Return the bytes on all edges: of the rounds and step 2, or of the evaluations between the rounds.

    Each client that has taken part has published; failures are not foreseen.
    """
    experiment, edges = wire.experiment, 0
    published: set[int] = set()
    for phase, round in experiment.steps:
        clients = experiment.clients(phase, round)
        if phase.topology is not None and phase.evaluates == evaluations:
            edges += sum(len(published.intersection(experiment.senders(phase, round, c))) for c in clients)
        if phase in experiment.federated_phases:
            published.update(clients)
    return edges * published_bytes(wire)


def published_bytes(wire: Lengths) -> float:
    """Return how long a publication is under a client's first mask, its own mask beside it: a mean of a few."""
    experiment, layout, sizes = wire.experiment, wire.layout, []
    seen = [c for c in range(experiment.study.clients.count) if c not in experiment.task.splits.unseen]
    for client in seen[:ENCODED]:
        first = experiment.first_mask(client)
        mask = np.ones(layout.num_prunable, bool) if first is None else first
        content = Content(mask, wire.theta.masked(mask).floats, wire.theta.ints)
        sizes.append(len(payload.encode("values", layout, content, codec=wire.codec)))
    return float(np.mean(sizes))


def bounds(experiment: Experiment) -> tuple[str, ...]:
    """Say why publications may be shorter: masks that may lose density, zeros that a coder spares."""
    event = getattr(experiment.method.own, "after", None)
    if event == Keep():
        return ()
    if not getattr(event, "keeps_density", False):
        return ("masks as dense as the first",)
    return ("no weight that has just come back, at zero",) if experiment.codec.refers else ()
