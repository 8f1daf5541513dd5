"""What a study will take on its fleet: every round's draws are known, and its visits are counted as dense models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlth.data.capacity import named
from fedlth.experiment.experiment import Experiment
from fedlth.federation.fleet import Clock
from fedlth.methods.method import Phase
from fedlth.study.sections import Tier
from fedlth.training.local_client import LocalClient
from fedlth.training.study_recipe import budget_of, personal


@dataclass(frozen=True)
class Visit:
    """A client's visit of one dense model: bytes each way, and the epochs of step 2 that a tier's kept model takes.

    `later_bytes` are those down in step 2, where nothing goes beside the model.
    """

    down_bytes: float
    up_bytes: float
    later_bytes: float
    epochs: Callable[[Tier], float]


def forecast_time(experiment: Experiment, visit: Visit) -> list[str]:
    """Return lines on simulated time by step and on a visit by tier; none without a fleet."""
    fleet = experiment.study.fleet
    if fleet is None:
        return []
    step1, step2, visits, dropped, late = 0.0, 0.0, 0, 0, 0
    longest: dict[str, float] = {}
    published: set[int] = set()
    for phase, round in experiment.steps:
        if phase.evaluates:
            continue
        clock, clients = Clock(experiment, phase, round), experiment.clients(phase, round)
        there = [c for c in clients if not clock.drops(c)]
        messages = _messages(experiment, phase, round, there, published)
        seconds = {c: _seconds(clock, phase, c, visit, messages(c)) for c in clients}
        # Without a server nobody sends to who is not there, and it takes no time.
        gone = [seconds[c] for c in clients if c not in there and phase.topology is None]
        came = [seconds[c] for c in there]
        whole = clock.whole(came, gone) or 0.0
        if phase.join is None:  # waves are commits: all clients work at once
            longest[phase.name] = max(whole, longest.get(phase.name, 0.0))
            continue
        visits, dropped = visits + len(clients), dropped + len(clients) - len(there)
        late += sum(bool(clock.late(s)) for s in came)
        if phase in experiment.federated_phases:
            step1 += whole
            published.update(there)
        else:
            step2 += whole
    step2 += math.fsum(longest.values())
    of = f" ({visits:,} visits: {dropped} dropped, {late} late)" if visits else ""
    lines = [
        f"fleet: about {_told(step1)} of simulated time in the rounds of step 1 and {_told(step2)} in step 2{of}, if "
        f"all models were dense"
    ]
    return [*lines, *_tiers(experiment, visit)]


def _messages(
    experiment: Experiment, phase: Phase, round: int, there: Sequence[int], published: set[int]
) -> Callable[[int], tuple[int, int]]:  # fmt: skip
    """Return what says how many models a client is sent in a round, and how many it sends: one up where it joins.

    Without a server a client is sent what each neighbour has published, and sends what it has to each receiver.
    """
    if phase.topology is None:
        return lambda client: (1, int(phase.join is not None))
    receivers = range(experiment.study.clients.count) if phase.in_waves else there
    heard = {c: published.intersection(experiment.senders(phase, round, c)) for c in receivers}
    sent = Counter(sender for senders in heard.values() for sender in senders)
    return lambda client: (len(heard.get(client, ())), sent[client])


def _seconds(clock: Clock, phase: Phase, client: int, visit: Visit, messages: tuple[int, int]) -> float:
    flops, down_bytes = clock.usual_flops(client), visit.down_bytes
    if phase.join is None:
        down_bytes = visit.later_bytes
        local = LocalClient(clock.experiment.task_of(client), client, 0, phase.name)
        train = personal(local.task.study)
        once = budget_of(train).examples(local.num_train, train.batch_size)
        searched = visit.epochs(clock.experiment.task.capacity(client))
        examples = round(searched * local.num_train) if phase.name == "personalise" else once
        flops = local.flops(local.full, examples)[0]
    down, up = down_bytes * messages[0], visit.up_bytes * messages[1]
    return clock.seconds(client, down_bytes=down, up_bytes=up, flops=flops) or 0.0


def _tiers(experiment: Experiment, visit: Visit) -> list[str]:
    """Say what a visit takes in each tier: link and training of its median client, straggling aside."""
    phase = next((p for p in experiment.phases if p.join is not None), None)
    fleet, task = experiment.study.fleet, experiment.task
    if phase is None or fleet is None:
        return []
    calm = experiment.study.model_copy(update={"fleet": fleet.model_copy(update={"straggle": 0.0})})
    clock = Clock(Experiment.of(calm), phase, 1)
    lines = []
    for name, tier in named(experiment.study.clients.capacity):
        held = [c for c in range(experiment.study.clients.count) if task.capacity(c) == tier]
        if held:
            parts: Mapping[str, tuple[float, float, float]] = {
                "download": (visit.down_bytes, 0.0, 0.0), "upload": (0.0, visit.up_bytes, 0.0),
                "training": (0.0, 0.0, float(np.median([clock.usual_flops(c) for c in held]))),
            }  # fmt: skip
            still = clock.seconds(held[0], down_bytes=0, up_bytes=0, flops=0) or 0.0
            spent = {
                what: (clock.seconds(held[0], down_bytes=down, up_bytes=up, flops=flops) or 0.0) - still
                for what, (down, up, flops) in parts.items()
            }
            told = ", ".join(f"{what} {_told(seconds)}" for what, seconds in spent.items())
            many = f"{len(held)} client{'' if len(held) == 1 else 's'}"
            lines.append(f"  {name}, {many}: a dense visit takes {told}, latency {_told(still)}")
    return lines


def _told(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds:.3g} s"
