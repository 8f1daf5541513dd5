"""The most bytes that the answers of a round can bring at once: what a server must have memory for."""

from __future__ import annotations

from fedlth.experiment.experiment import Experiment
from fedlth.methods.client_update import sends_in
from fedlth.methods.method import Phase
from fedlth.wire import metrics, payload


def most_of_one(experiment: Experiment, phase: Phase) -> int:
    """Return the most bytes of one client's answer that the door reads: its metrics, and all that its update sends."""
    sent = {sends_in(phase.update, round) for round in range(1, phase.rounds + 1)}
    sizes = [
        sum(payload.longest(experiment.message_layout(phase, name, kind), experiment.codec) for name, kind in sends)
        for sends in sent
    ]
    return metrics.LONGEST + max(sizes, default=0)


def most_at_once(experiment: Experiment, at_once: int) -> tuple[int, int]:
    """Return the most that the answers to `at_once` jobs take, of any phase, and how many answers these are."""
    found = [(0, 0)]
    for phase in experiment.phases:
        count = min(at_once, len(experiment.clients(phase, phase.rounds)))
        found.append((count * most_of_one(experiment, phase), count))
    return max(found)


def said_at_start(experiment: Experiment, at_once: int) -> str:
    """Say how much memory the answers can take that an engine reads at once; a run says it before it begins."""
    size, count = most_at_once(experiment, at_once)
    return f"the answers of {count} clients are read at once, {1e-6 * size:.1f} MB at most"
